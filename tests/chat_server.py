"""A chat endpoint on this machine that answers as it is told and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, body: JSON-able, or text as it is."""


def completion(
    text: str | None = None, *, tokens: tuple[int, int] | None = (100, 2), **choice: Any
) -> Answer:
    """A chat completion that says `text`."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    body: dict[str, Any] = {"choices": [{"index": 0, "message": message, **choice}]}
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return 200, {}, body


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two texts of a question, in the order shown."""
    question = body["messages"][-1]["content"]
    first, second = question.split("\n\nAnswer A:\n")[1].split("\n\nAnswer B:\n")
    return first, second.split("\n\nWhich answer would")[0]


@dataclass
class ChatServer:
    """What was asked of a running server: paths, headers, bodies."""

    url: str
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[ChatServer]:
    """A server for the time of a ``with``.

    Args:
        answer: (body of a request, how many came before it) -> what to answer.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = len(asked.bodies)
                asked.paths.append(self.path)
                asked.headers.append(dict(self.headers))
                asked.bodies.append(body)
            status, headers, content = answer(body, before)
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # who asked has gone, as after a timeout
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked = ChatServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
