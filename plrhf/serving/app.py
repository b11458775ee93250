"""The HTTP application: routes of the API, and errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from plrhf.core.errors import BadValue
from plrhf.serving.chat import add_chat
from plrhf.serving.engine import Busy
from plrhf.serving.errors import ApiError, error_response, failed, log_without_values
from plrhf.serving.guard import Guard
from plrhf.serving.schemas import (
    MOST_SEED,
    Name,
    PairsRequest,
    PersonRequest,
    ScoreRequest,
    plain_prompt,
)
from plrhf.serving.service import Service
from plrhf.serving.store import Judgment, Known

PAGE = Path(__file__).parent / "page"
RETRY = {"Retry-After": "1"}
MEDIA = {".css": "text/css", ".js": "text/javascript"}

UserId = Annotated[Name, PathParameter()]
JudgmentId = Annotated[int, PathParameter(ge=0, le=MOST_SEED)]


def build_app(
    service: Service,
    *,
    keys: Sequence[str],
    rate_limit: int | None,
    max_body: int,
    local: bool,
) -> ASGIApp:
    """Build the application of a service, behind its guard.

    Args:
        keys, rate_limit, max_body, local: see `Guard`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # No pages of FastAPI's own: they load scripts from another host.
    app = FastAPI(
        title="plrhf",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    add_errors(app)
    add_page(app)
    add_status(app, service)
    add_people(app, service)
    add_chat(app, service)
    return Guard(
        app,
        keys=frozenset(keys),
        rate_limit=rate_limit,
        max_body=max_body,
        local=local,
        metrics=service.metrics,
    )


def add_errors(app: FastAPI) -> None:
    """Give all errors of an application OpenAI's form."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(BadValue)
    async def bad_value(request: Request, error: BadValue) -> Response:
        return error_response(ApiError(400, str(error)))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return error_response(ApiError(503, "Too many answers wait. Try again.", headers=RETRY))

    @app.exception_handler(DBAPIError)
    async def no_database(request: Request, error: DBAPIError) -> Response:
        log_without_values(error)
        message = "The database of people cannot be read or written now. Try again later."
        return error_response(ApiError(503, message, code="database_unavailable", headers=RETRY))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(one) for one in first["loc"][1:])
        message = f"{place or 'body'}: {first['msg']}."
        return error_response(ApiError(400, _encodable(message), param=_encodable(place) or None))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return error_response(failed())  # the guard logs it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status = 400 if error.status_code == 422 else error.status_code
        return error_response(ApiError(status, f"{error.detail}.", headers=error.headers))


def add_status(app: FastAPI, service: Service) -> None:
    """Add the routes that tell about the server."""

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(service.metrics.text())

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        found = [
            {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": "plrhf",
                "writes": model is service.policy,
            }
            for model in service.models
        ]
        return {"object": "list", "data": found}

    @app.get("/v1/map")
    def people_map() -> dict[str, Any]:
        return service.map()

    @app.post("/v1/score")
    def score(body: ScoreRequest) -> dict[str, Any]:
        inputs = [
            {"prompt": plain_prompt(one.prompt), "response": one.response, "user": one.user}
            for one in body.inputs
        ]
        found = service.score(inputs)
        data = [
            {"object": "score", "index": n, "user": one["user"], "score": value}
            for n, (one, value) in enumerate(zip(inputs, found, strict=True))
        ]
        return {"object": "list", "model": service.models[-1].name, "data": data}


def add_page(app: FastAPI) -> None:
    """Add the web page."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in MEDIA}

    @app.get("/")
    def index() -> Response:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}")
    def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "The page has no such part.")
        return FileResponse(files[name], media_type=MEDIA[files[name].suffix])


def add_people(app: FastAPI, service: Service) -> None:
    """Add the routes of people and their judgments."""

    @app.get("/v1/users/{user_id}")
    def get_person(user_id: UserId) -> dict[str, Any]:
        return _shown(user_id, service.person(user_id))

    @app.put("/v1/users/{user_id}")
    def put_person(user_id: UserId, body: PersonRequest) -> dict[str, Any]:
        return _shown(user_id, service.put(user_id, consent=body.consent))

    @app.delete("/v1/users/{user_id}")
    def delete_person(user_id: UserId) -> dict[str, Any]:
        return {"id": user_id, "deleted": True, **service.delete(user_id)}

    @app.post("/v1/users/{user_id}/pairs")
    def add_pairs(user_id: UserId, body: PairsRequest) -> dict[str, Any]:
        judgments = [
            Judgment(
                prompt=plain_prompt(one.prompt),
                chosen=one.chosen,
                rejected=one.rejected,
                verdict=one.verdict,
            )
            for one in body.pairs
        ]
        return service.add_judgments(user_id, judgments)

    @app.delete("/v1/users/{user_id}/pairs/{pair_id}")
    def remove_pair(user_id: UserId, pair_id: JudgmentId) -> dict[str, Any]:
        return service.remove_judgment(user_id, pair_id)

    @app.get("/v1/users/{user_id}/next-pair")
    def next_pair(user_id: UserId) -> dict[str, Any]:
        return service.next_pair(user_id)

    @app.get("/v1/users/{user_id}/certainty")
    def certainty(user_id: UserId) -> dict[str, Any]:
        return service.certainty(user_id)


def _shown(user_id: str, known: Known) -> dict[str, Any]:
    """Return all that is stored about a person, as they may export it."""
    pairs = [{"id": one.id, **one.pair(), "verdict": one.verdict} for one in known.judgments]
    return {"id": user_id, "object": "user", "consent": known.consent, "pairs": pairs}


def _encodable(text: str) -> str:
    """Return text without lone surrogates, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
