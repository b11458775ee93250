"""Requests on a raw socket: what is no HTTP, comes slowly, or ends before it is complete."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from urllib.parse import urlsplit

import httpx2
import pytest
from served import Running

from plrhf.serving import protocol

HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"


def opened(server: Running) -> closing[socket.socket]:
    address = urlsplit(server.url)
    assert address.port is not None
    return closing(socket.create_connection(("127.0.0.1", address.port), timeout=10))


def received(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + HEAD + b"X: " + b"a" * 70_000,
        b"GET /v1/models HTTP/1.1\r\n" + HEAD + b"Na me: a\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + HEAD + HEAD + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/\xc3\xa4 HTTP/1.1\r\n" + HEAD + b"\r\n",
        b"PUT /v1/users/raw HTTP/1.1\r\n"
        + HEAD
        + b"Content-Length: 1\r\nContent-Length: 9\r\n\r\n{}",
        b"PUT /v1/users/raw HTTP/1.1\r\n"
        + HEAD
        + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_same_form(server: Running, request_: bytes) -> None:
    with opened(server) as connection:
        connection.sendall(request_)
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "HTTP" in error["message"]


def test_half_a_body_is_not_taken_for_the_whole(server: Running, http: httpx2.Client) -> None:
    """A chunked body that breaks off is not acted on, though what came of it is complete JSON."""
    body = json.dumps({"consent": True}).encode()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n"
    begun = (
        b"PUT /v1/users/half HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk
    )
    with opened(server) as connection:
        connection.sendall(begun)
    with opened(server) as connection:  # it is handled after the one that left
        connection.sendall(begun.replace(b"half", b"whole") + b"0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert http.get("/v1/users/half").status_code == 404
    assert http.get("/v1/users/whole").status_code == 200


def test_a_head_that_does_not_end_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly it drips, and also after another request on the connection."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    for before in (b"", b"GET /healthz HTTP/1.1\r\n" + HEAD + b"\r\n"):
        with opened(server) as connection:
            connection.sendall(before)
            if before:
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError):  # the server has closed
                for _ in range(100):
                    connection.sendall(b"G")
                    time.sleep(0.02)
