"""A client for OpenAI-compatible chat endpoints, with retries and a file of replies."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx2

from plrhf.core.errors import bad_value
from plrhf.core.files import open_to_append, whole_file
from plrhf.data.digests import DIGEST, check_digest, content_hash, json_text

TRY_AGAIN = (408, 409, 429, *range(500, 600))
FILTERED = ("content_filter", "content_policy_violation")

LARGEST_REPLY = 2**20
"""Bytes of an answer that are read; a long one takes a few hundred thousand."""

LONGEST_PAUSE = 120.0
"""Seconds between two requests where the server asks for no other time."""

ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
"""A character as JSON may write it."""


@dataclass(frozen=True)
class Answer:
    """What a server answered: its status, the body, and how many seconds it asks to wait, if any."""

    status: int
    content: bytes
    retry_after: float | None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply of a chat endpoint.

    Attributes:
        text: the answer; empty if there is none.
        refused: whether the model, or a filter in front of it, refused to answer.
        input_tokens, output_tokens: as the endpoint counts them; None if it does not.
    """

    text: str
    refused: bool
    input_tokens: int | None
    output_tokens: int | None


PEOPLE = "of"
"""Key of the hashes of the people whom a stored reply is about."""


class ReplyStore:
    """Stores replies by key in a file, to which each is appended at once.

    The file has one JSON object on each line, with its digest, which also says of whom it is, by a hash of
    their ids. Any other line, such as one that is damaged or was cut short by a kill, is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        content = path.read_bytes() if path.is_file() else b""
        self._end_torn_line = b"" if content[-1:] in (b"", b"\n") else b"\n"
        for line in content.splitlines():
            try:
                record = json.loads(line)
                check_digest(str(path), record, "Ask again")
                key = record.pop("key")
                for name in (PEOPLE, DIGEST):
                    record.pop(name, None)
                self._replies[key] = Reply(**record)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def add(self, key: str, reply: Reply, people: Iterable[str]) -> None:
        """Store a reply to a question about people. Several threads may call this.

        Args:
            people: their ids.
        """
        of = sorted(content_hash(one) for one in people)
        line = json_text({"key": key, PEOPLE: of, **asdict(reply)}).encode(errors="surrogatepass")
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self._path, mode="ab", buffering=0) as file:
                file.write(self._end_torn_line + line)
            self._end_torn_line = b""
            self._replies[key] = reply


def remove_replies(path: Path, user: str) -> tuple[int, int]:
    """Remove the replies about a person, and lines that are no replies, from a file of replies.

    Returns:
        How many replies were removed, and how many do not say of whom they are, and stay.
    """
    lines, hashed = path.read_bytes().splitlines(keepends=True), content_hash(user)
    kept, n_removed, n_unnamed = [], 0, 0
    for line in lines:
        try:
            of = json.loads(line).get(PEOPLE)
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(of, list) and hashed in of:
            n_removed += 1
            continue
        n_unnamed += not isinstance(of, list)
        kept.append(line)
    if len(kept) < len(lines):
        with whole_file(path) as part:
            part.write_bytes(b"".join(kept))
    return n_removed, n_unnamed


class ChatEndpoint:
    """Sends requests to ``url/chat/completions``. Several threads may use it at once.

    A request that meets a busy or failing server, or a timeout, is repeated at once, and then after
    2, 4, 8, ... times `backoff` seconds, at most 120. If the server asks for another time, it is that, but
    at most `timeout`. An answer of more than `LARGEST_REPLY` bytes is refused.

    Args:
        url: as `openai.OpenAI(base_url=...)` takes it.
        key_variable: name of the environment variable that holds the key; None for no key. The
            key itself is in no setting and in nothing that is written.
        timeout: seconds, from connecting to the last byte of an answer.
        retries: how often a request is sent again, from 0. backoff: seconds, from 0.
        field: dotted name of these settings, for messages.

    Raises:
        ValueError: a setting out of range, or no key.
    """

    def __init__(
        self,
        *,
        url: str,
        key_variable: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        field: str,
    ) -> None:
        _check_url(url, f"{field}.url")
        for name, value, good, allowed in (
            ("timeout", timeout, timeout > 0, "a number of seconds above 0"),
            ("retries", retries, retries >= 0, "a whole number from 0"),
            ("backoff", backoff, backoff >= 0, "a number of seconds from 0"),
        ):
            if not good:
                raise bad_value(f"{field}.{name}", value, allowed, f"Set {field}.{name}=1")
        self.url = f"{url.rstrip('/')}/chat/completions"
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._field = field
        self._key = _key(key_variable, f"{field}.key_variable")
        self._tls = ssl.create_default_context()

    def post(self, body: dict[str, Any]) -> Reply:
        """Send a request, and return the reply.

        Raises:
            ValueError: the endpoint cannot be reached, does not know the request or the key, or
                answers with something else than a chat completion.
        """
        for n_before in range(self._retries + 1):
            is_last = n_before == self._retries
            pause = min(LONGEST_PAUSE, self._backoff * 2**n_before * (n_before > 0))
            try:
                answer = asyncio.run(asyncio.wait_for(self._answer(body), self._timeout))
            except (TimeoutError, httpx2.HTTPError) as error:
                if is_last:
                    late = f"no whole answer in {self._timeout:g} seconds"
                    said = f"{type(error).__name__} {self._shown(str(error))}".strip()
                    found = late if isinstance(error, TimeoutError) else said
                    raise self._not_a_reply(found, n_before) from error
            else:
                if is_last or answer.status not in TRY_AGAIN:
                    return self._read(answer, n_before)
                if answer.retry_after is not None:
                    pause = min(self._timeout, answer.retry_after)
            time.sleep(pause)
        raise AssertionError("the last request returns or raises")

    async def _answer(self, body: dict[str, Any]) -> Answer:
        """Send a request once. What is longer than `LARGEST_REPLY` is not read to its end."""
        headers = {"Content-Type": "application/json"}
        headers["Accept-Encoding"] = "identity"  # a packed answer could be of any size
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # Not redirected, as the key is for this address alone; the deadline is the caller's.
        async with (
            httpx2.AsyncClient(verify=self._tls, timeout=None, trust_env=False) as client,
            client.stream("POST", self.url, content=json.dumps(body), headers=headers) as response,
        ):
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > LARGEST_REPLY:
                    break
            return Answer(
                response.status_code,
                bytes(content),
                seconds_until(response.headers.get("Retry-After", "")),
            )

    def _read(self, answer: Answer, n_retries: int) -> Reply:
        """Return the reply that an answer holds, which came after so many retries.

        Raises:
            ValueError: it holds none.
        """
        text = answer.content.decode(errors="replace")
        if len(answer.content) > LARGEST_REPLY:
            raise self._not_a_reply(f"more than {LARGEST_REPLY:,} bytes", n_retries)
        try:
            content = json.loads(text)
            if answer.status == 400 and content["error"]["code"] in FILTERED:
                return Reply(text="", refused=True, input_tokens=0, output_tokens=0)
            if answer.status == 200:
                reply = _reply(content)
                return replace(reply, text=self._without_key(reply.text))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass
        raise self._not_a_reply(f"HTTP {answer.status}, {self._shown(text)}", n_retries)

    def _shown(self, text: str) -> str:
        """Return the beginning of what a server said, in one line without the key."""
        plain = "".join(one if one.isprintable() else " " for one in self._without_key(text))
        return " ".join(plain.split())[:200]

    def _without_key(self, text: str) -> str:
        """Remove the API key from a text, since some servers repeat it, also escaped.

        This happens after a reply is parsed, because a key may look like a part of the JSON.
        """
        if self._key is None:
            return text
        spelled_out = unquote(html.unescape(ESCAPED.sub(lambda one: chr(int(one[1], 16)), text)))
        found = spelled_out if self._key in spelled_out else text
        return found.replace(self._key, "***")

    def _not_a_reply(self, found: str, n_retries: int) -> ValueError:
        """Return the error for an answer that is not a chat completion."""
        tries = f" after {n_retries} retries" if n_retries > 0 else ""
        return bad_value(
            f"{self._field}.url",
            self.url,
            f"a chat completion (got {found}{tries})",
            f"Check {self._field}.url, model, request and key_variable, and run it again: "
            "what was answered is kept",
        )


def seconds_until(retry_after: str) -> float | None:
    """Return how many seconds a ``Retry-After`` header asks to wait; None if it does not."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, moment.timestamp() - time.time())


EXAMPLE = "http://localhost:8000/v1"


def _check_url(url: str, field: str) -> None:
    """Raise a ValueError unless the URL is a valid http or https address."""
    try:
        parts = urlsplit(url)
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise bad_value(
            field, url.partition("?")[0], f"an address ({error})", f"Set {field}={EXAMPLE}"
        ) from error
    # A password or a key in it would be written with the settings, and is not shown here either.
    open_part = url.partition("?")[0].replace(parts.netloc, parts.netloc.rpartition("@")[2])
    plain = "@" not in parts.netloc and parts.query == parts.fragment == ""
    if parts.scheme not in ("http", "https") or parts.hostname is None or not plain:
        raise bad_value(
            field,
            open_part,
            "an http or https address without user, password and query",
            f"Set {field}={EXAMPLE}",
        )


def _key(variable: str | None, field: str) -> str | None:
    """Return the API key in an environment variable; None without a variable."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if key == "":
        raise bad_value(
            field,
            variable,
            "the name of an environment variable that holds a key",
            f"Write export {variable}=KEY, or set {field}=null",
        )
    if not re.fullmatch(r"[!-~]+", key):  # a library would show it in its error
        allowed = "the name of an environment variable that holds a key of ASCII letters and signs"
        raise bad_value(field, variable, allowed, f"Write export {variable}=KEY")
    return key


def _reply(content: dict[str, Any]) -> Reply:
    """Read the reply from the body of a chat completion."""
    choice, usage = content["choices"][0], content.get("usage")
    message, usage = choice["message"], usage if isinstance(usage, dict) else {}
    text = message.get("content")
    filtered = choice.get("finish_reason") == "content_filter"
    return Reply(
        text=text if isinstance(text, str) else "",
        refused=filtered or message.get("refusal") is not None,
        input_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    """Return a number of tokens; None for anything that is not one."""
    return value if type(value) is int and value >= 0 else None
