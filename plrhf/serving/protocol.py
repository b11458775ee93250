"""The HTTP server: uvicorn, with errors in OpenAI's form and a limit on how long a request's head takes."""

from __future__ import annotations

import asyncio

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from plrhf.serving.errors import ApiError, error_response

HEAD_SECONDS = 30.0
"""That a client may take to send the request line and the headers."""
GRACE_SECONDS = 60
"""That running answers have to end when the server is stopped."""


def build_server(app: ASGIApp, *, host: str, port: int) -> uvicorn.Server:
    """Build a server of an application, without a log of requests, which would name people."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


class Protocol(H11Protocol):
    """One connection. What is no HTTP at all never reaches the application, so it is refused here."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch_head(self) -> None:
        """Let the time run while the head of a request is incomplete, however slowly it comes."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self._end_slow_head)

    def _stop_watching(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _end_slow_head(self) -> None:
        """Close the connection, unless an earlier request of it is still answered."""
        self.head_timer = None
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, unless an answer has begun, which can only be broken off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            told = error_response(ApiError(400, "This is no valid HTTP/1.1 request. Send one."))
            headers = [*told.raw_headers, (b"connection", b"close")]
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (answer, h11.Data(data=bytes(told.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
