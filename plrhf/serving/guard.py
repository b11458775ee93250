"""What every request passes before the application: key, rate, size, and a last resort for errors."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plrhf.serving.errors import ApiError, error_response, failed, log_without_values
from plrhf.serving.metrics import Metrics

OPEN = ("/", "/healthz")
LOCAL = ("127.0.0.1", "localhost", "::1")
OPEN_FOLDER = "/page/"
BODY_SECONDS = 30.0  # that a client may take to send a body
MOST_CLIENTS = 10_000  # whose rates are remembered
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def key_hash(key: str) -> str:
    """Return the SHA-256 of an API key, as the setting ``keys`` has it."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class RateLimit:
    """Allows each client `per_minute` requests a minute, as many at once (a token bucket).

    Args:
        per_minute: None: no limit.
    """

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        self.clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def wait(self, client: str, now: float) -> float:
        """Count a request at a time in seconds; return how long the client must wait, 0 if allowed."""
        if self.per_minute is None:
            return 0.0
        tokens, before = self.clients.pop(client, (float(self.per_minute), now))
        tokens = min(self.per_minute, tokens + (now - before) * self.per_minute / 60)
        allowed = tokens >= 1
        self.clients[client] = (tokens - 1 if allowed else tokens, now)
        if len(self.clients) > MOST_CLIENTS:
            self.clients.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) * 60 / self.per_minute


class Guard:
    """ASGI middleware around the whole application.

    Args:
        keys: SHA-256 of the API keys; none: everybody may use the server. rate_limit: requests a minute
            for each key, or each address without keys. max_body: bytes of a request.
        local: answer only requests to a name of this machine. Otherwise a web page could give its own name
            this machine's address, and so read what the server answers (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: frozenset[str],
        rate_limit: int | None,
        max_body: int,
        local: bool,
        metrics: Metrics,
    ) -> None:
        self.app, self.keys, self.max_body, self.metrics = app, keys, max_body, metrics
        self.local = local
        self.rate = RateLimit(rate_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                added = [(name, value) for name, value in HEADERS.items() if name not in own]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            try:
                body = await self._admitted(scope, receive)
                await self.app(scope, _replayed(body, receive), noting)
            except ApiError as error:
                await error_response(error)(scope, receive, noting)
            except Exception as error:
                log_without_values(error)
                if status == 0:
                    await error_response(failed())(scope, receive, noting)
        finally:
            self.metrics.count(scope, status, time.monotonic() - start)

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body of a request that may pass, or raise an `ApiError`."""
        headers, path = Headers(scope=scope), scope["path"]
        if self.local and not _is_local(headers.get("host", "")):
            raise ApiError(
                403, "This server answers only this machine. Start it with host=0.0.0.0."
            )
        if path not in OPEN and not path.startswith(OPEN_FOLDER):
            client = self._client(scope, headers)
            wait = self.rate.wait(client, time.monotonic())
            if wait > 0:
                retry = {"Retry-After": str(int(wait) + 1)}
                raise ApiError(429, "Too many requests. Wait and try again.", headers=retry)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive, self.max_body, headers)
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time. Send it again.") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if len(body) > 0 and kind != "application/json":
            raise ApiError(415, "The body must be JSON. Send Content-Type: application/json.")
        return body

    def _client(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Return who asks: the hash of the key, or the address if the server has no keys."""
        if len(self.keys) == 0:
            return str((scope.get("client") or ("unknown",))[0])
        scheme, _, key = headers.get("authorization", "").partition(" ")
        hashed = key_hash(key.strip())
        if scheme.lower() != "bearer" or hashed not in self.keys:
            message = "No such API key. Send Authorization: Bearer KEY."
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return hashed


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        return urlsplit(f"//{host}").hostname in LOCAL
    except ValueError:
        return False


async def _read(receive: Receive, most: int, headers: Mapping[str, str]) -> bytes:
    """Read a body of at most `most` bytes."""
    too_large = ApiError(413, f"The body is too large. Send at most {most} bytes.")
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":  # what has come may be half of what was meant
            raise ApiError(499, "The client left before the body had ended.")
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives a body that was read already, and then what the client sends."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if len(pending) > 0 else await receive()

    return again
