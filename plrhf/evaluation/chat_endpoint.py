"""A client for OpenAI-compatible chat endpoints, with retries and a file of replies."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.data.digests import content_hash

TRY_AGAIN = (408, 409, 429, *range(500, 600))
FILTERED = ("content_filter", "content_policy_violation")


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

    The file has one JSON object on each line, which also says of whom it is, by a hash of their ids. Any
    other line, such as one cut short by a kill, is ignored.
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
                key = record.pop("key")
                record.pop(PEOPLE, None)
                self._replies[key] = Reply(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
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
        line = json.dumps({"key": key, PEOPLE: of, **asdict(reply)}).encode() + b"\n"
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
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
    2, 4, 8, ... times `backoff` seconds, or after the time that the server asks for.

    Args:
        url: as `openai.OpenAI(base_url=...)` takes it.
        key_variable: name of the environment variable that holds the key; None for no key. The
            key itself is in no setting and in nothing that is written.
        timeout: seconds, of connecting and of each wait for an answer.
        retries: how often a request is sent again, from 0. backoff: seconds, from 0.
        parallel: connections kept. field: dotted name of these settings, for messages.

    Raises:
        ValueError: a setting out of range, no key, or urllib3 is not installed.
    """

    def __init__(
        self,
        *,
        url: str,
        key_variable: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        parallel: int,
        field: str,
    ) -> None:
        _check_url(url, f"{field}.url")
        for name, value, good, allowed in (
            ("timeout", timeout, timeout > 0, "a number of seconds above 0"),
            ("retries", retries, retries >= 0, "a whole number from 0"),
            ("backoff", backoff, backoff >= 0, "a number of seconds from 0"),
            ("parallel", parallel, parallel >= 1, "a whole number from 1"),
        ):
            if not good:
                raise bad_value(f"{field}.{name}", value, allowed, f"Set {field}.{name}=1")
        if find_spec("urllib3") is None:
            allowed = "no address, as urllib3 is not installed"
            raise bad_value(f"{field}.url", url, allowed, "Install plrhf[judge]")
        import urllib3

        self.url = f"{url.rstrip('/')}/chat/completions"
        self._retries = retries
        self._field = field
        self._key = _key(key_variable, f"{field}.key_variable")
        self._pool = urllib3.PoolManager(
            maxsize=parallel,
            timeout=urllib3.Timeout(timeout),
            retries=urllib3.Retry(
                total=retries,
                status_forcelist=TRY_AGAIN,
                allowed_methods=None,  # asking twice does no harm
                backoff_factor=backoff,
            ),
        )

    def post(self, body: dict[str, Any]) -> Reply:
        """Send a request, and return the reply.

        Raises:
            ValueError: the endpoint cannot be reached, does not know the request or the key, or
                answers with something else than a chat completion.
        """
        import urllib3

        authorization = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            # Not redirected, as the key is for this address alone.
            response = self._pool.request(
                "POST", self.url, json=body, headers=authorization, redirect=False
            )
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", error)
            raise self._not_a_reply(f"{reason} after {self._retries} retries") from error
        text = response.data.decode(errors="replace")
        try:
            content = json.loads(text)
            text = json.dumps(content, ensure_ascii=False)  # in which a key is spelled out
            if response.status == 400 and content["error"]["code"] in FILTERED:
                return Reply(text="", refused=True, input_tokens=0, output_tokens=0)
            if response.status == 200:
                reply = _reply(content)
                return replace(reply, text=self._without_key(reply.text))
        except (ValueError, TypeError, LookupError, AttributeError):
            pass
        shown = "".join(one if one.isprintable() else " " for one in self._without_key(text))
        raise self._not_a_reply(f"HTTP {response.status}, {' '.join(shown.split())[:200]}")

    def _without_key(self, text: str) -> str:
        """Remove the API key from a text, since some servers repeat it.

        This happens after a reply is parsed, because a key may look like a part of the JSON.
        """
        return text if self._key is None else text.replace(self._key, "***")

    def _not_a_reply(self, found: str) -> ValueError:
        """Return the error for an answer that is not a chat completion."""
        return bad_value(
            f"{self._field}.url",
            self.url,
            f"a chat completion (got {found})",
            f"Check {self._field}.url, model, request and key_variable, and run it again: "
            "what was answered is kept",
        )


def _check_url(url: str, field: str) -> None:
    """Raise a ValueError unless the URL is a valid http or https address."""
    parts = urlsplit(url)
    # A password or a key in it would be written with the settings, and is not shown here either.
    open_part = url.partition("?")[0].replace(parts.netloc, parts.netloc.rpartition("@")[2])
    plain = "@" not in parts.netloc and parts.query == parts.fragment == ""
    if parts.scheme not in ("http", "https") or parts.hostname is None or not plain:
        raise bad_value(
            field,
            open_part,
            "an http or https address without user, password and query",
            f"Set {field}=http://localhost:8000/v1",
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
