"""Servers that answer a judge as no server should: none hangs it, fills its memory or shows the key.

FAULTS=full python -m pytest tests/faults/test_chat_answers.py -s
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from chat_server import completion
from fuzz_rows import VALUES, places_in
from sizes import size

from plrhf.core.errors import BadValue
from plrhf.evaluation.chat_endpoint import LARGEST_REPLY, ChatEndpoint, Reply

KEY = "sk-a+secret/key=1"
TIMEOUT = 0.4
GOOD = json.dumps(completion("A")[2])
BOMB = gzip.compress(b"0" * 10**8, compresslevel=1)
Parts = Callable[[], Iterable[bytes]]


def head(status: int = 200, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode("latin-1", "replace")


def whole(body: str | bytes, status: int = 200, *lines: str) -> bytes:
    body = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    return head(status, f"Content-Length: {len(body)}", *lines) + body


def slowly(content: bytes) -> Iterator[bytes]:
    for one in content:
        yield bytes([one])
        time.sleep(TIMEOUT / 4)


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(one):04x}" for one in text)


@contextmanager
def answering(parts: Parts) -> Iterator[str]:
    """A server that sends these parts to whoever connects; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # who asked has gone, or the test has ended
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(2**16)
                    for part in parts():
                        connection.sendall(part)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(2**16) != b"":  # else closing would reset the connection
                        pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def asked(url: str, **settings: Any) -> Reply | str:
    """The reply, or the error, which is one line without the key, whatever its escapes."""
    endpoint = ChatEndpoint(url=url, key_variable="SOME_KEY", field="f", **{**QUICK, **settings})
    try:
        return endpoint.post({"model": "m", "messages": []})
    except BadValue as error:
        assert str(error).isprintable()
        return str(error)


QUICK = {"timeout": TIMEOUT, "retries": 0, "backoff": 0.01}
ENDLESS: dict[str, tuple[Parts, str]] = {
    "a body byte by byte": (lambda: slowly(whole(GOOD)), "no whole answer in 0.4 seconds"),
    "a head line byte by byte": (lambda: slowly(b"HTTP/1.1 " + b"2" * 999), "no whole answer"),
    "heads that say to go on": (
        lambda: (time.sleep(0.01) or head(100) for _ in itertools.count()),
        "no whole answer",
    ),
    "no answer": (lambda: (time.sleep(2 * TIMEOUT) or b"" for _ in "x"), "no whole answer"),
    "a head without end": (lambda: itertools.repeat(b"X: " + b"x" * 9_000 + b"\r\n"), "got "),
    "a body without end": (
        lambda: itertools.chain([head()], itertools.repeat(b"x" * 2**16)),
        f"more than {LARGEST_REPLY:,} bytes",
    ),
    "a body in pieces without end": (
        lambda: itertools.chain(
            [head(200, "Transfer-Encoding: chunked")], itertools.repeat(b"5\r\nabcde\r\n")
        ),
        "got ",
    ),
    "a packed body": (
        lambda: [whole(BOMB, 200, "Content-Encoding: gzip")],
        "got HTTP 200",
    ),
    "a deep body": (lambda: [whole("[" * 10**6)], "got HTTP 200"),
    "as long as it says": (lambda: [head(200, "Content-Length: 99999999999")], "got "),
    "another place": (
        lambda: [whole("", 302, "Location: http://127.0.0.1:1/"), b""],
        "got HTTP 302",
    ),
}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)


@pytest.mark.parametrize("case", ENDLESS)
def test_no_answer_hangs_or_grows(case: str) -> None:
    parts, said = ENDLESS[case]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with answering(parts) as url:
        found = asked(url)
        seconds = time.monotonic() - began
    assert isinstance(found, str) and said in found, found
    assert seconds < 5 * TIMEOUT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("asks", ["3600", "9" * 5_000, "Fri, 31 Dec 2100 23:59:59 GMT", "nan", "x"])
def test_a_server_does_not_say_how_long_is_waited(asks: str) -> None:
    began = time.monotonic()
    with answering(lambda: [whole("busy", 429, f"Retry-After: {asks}")]) as url:
        found = asked(url, retries=1)
    assert "got HTTP 429, busy after 1 retries" in str(found)
    assert time.monotonic() - began < 4 * TIMEOUT


@pytest.mark.parametrize(
    "said",
    [
        *(KEY, escaped(KEY), escaped(KEY).upper().replace("\\U", "\\u")),
        *(KEY.replace("+", "%2B").replace("/", "%2F"), KEY.replace("/", "&#x2F;")),
    ],
)
def test_a_key_that_comes_back_is_not_shown(said: str) -> None:
    with answering(lambda: [whole(f"<p>{said}", 401)]) as url:
        assert "got HTTP 401, <p>***" in str(asked(url))
    body = json.dumps(completion(f"A {said}")[2])
    for sent in (body, body.replace("\\\\", "\\")):  # as text, and as JSON's own escapes
        with answering(lambda sent=sent: [whole(sent)]) as url:
            found = asked(url)
            assert isinstance(found, Reply) and found.text == "A ***"


@pytest.mark.parametrize("wrong", ["two words", "a\nb", "a\x00b", "clé"])
def test_a_key_that_no_header_may_hold_is_not_shown(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {"SOME_KEY": wrong})
    with pytest.raises(BadValue, match="f.key_variable='SOME_KEY' is not allowed") as error:
        asked("http://127.0.0.1:1/v1")
    assert wrong not in str(error.value)


def damaged_answer(draw: random.Random) -> bytes:
    """A completion in which a value is another, that is cut, or whose head is wrong."""
    way, content = draw.randrange(5), json.loads(GOOD)
    if way < 2:
        *outer, last = draw.choice(places_in(content))
        within: Any = content
        for one in outer:
            within = within[one]
        within[last] = draw.choice(VALUES)
    body = json.dumps(content).replace("Infinity", "1e999")
    if way == 2:
        body = body[: draw.randrange(len(body))]
    status = draw.choice([200, 200, 204, 301, 304, 400, 401, 600, 999])
    lines = ["", "X", "X: \x1b[2J", "Content-Length: -1", "Content-Length: x", "Retry-After: x"]
    sent = whole(body, status, *[draw.choice(lines)] * (way == 3))
    if way == 4:
        place = draw.randrange(len(sent))
        sent = sent[:place] + draw.randbytes(draw.randint(1, 9)) + sent[place + 1 :]
    return sent


@pytest.mark.slow
def test_damaged_answers_are_replies_or_one_line(tmp_path: Path) -> None:
    draw, sent, found = random.Random(4), [b""], []
    with answering(lambda: sent) as url:
        for _ in range(size(40, 2_000)):
            sent[0] = damaged_answer(draw)
            found.append(asked(url))
    replies = [one for one in found if isinstance(one, Reply)]
    assert all(isinstance(one.text, str) for one in replies)
    assert 0 < len(replies) < len(found)
    print(f"\n{len(found):,} answers: {len(replies):,} replies, the others refused in one line")
