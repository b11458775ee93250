"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    499: "client_closed_request",
    500: "internal_error",
    503: "overloaded",
}
log = logging.getLogger("plrhf.serving")


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP. message: one sentence on what is wrong, and how to mend it.
        param: the field of the request that is wrong. code: None: that of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = CODES.get(status, "invalid_value") if code is None else code
        self.headers = headers


def failed() -> ApiError:
    """Return what a client is told where the server itself is at fault."""
    return ApiError(500, "The server failed. Its log says where.")


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error as OpenAI's API writes it."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    content = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    return {"error": content}


def error_response(error: ApiError) -> JSONResponse:
    """Return the response that tells a client of an error."""
    return JSONResponse(error_body(error), error.status, headers=error.headers)


def log_without_values(error: BaseException) -> None:
    """Log where an error arose, but not its message, which may quote a prompt."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s\n%s", type(error).__name__, places)
