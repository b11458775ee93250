"""POST /v1/chat/completions: OpenAI's chat completions, each written for its user."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from plrhf.backbone.row_options import Sampling
from plrhf.serving.engine import Answer, Busy
from plrhf.serving.errors import ApiError, error_body, failed, log_without_values
from plrhf.serving.schemas import MOST_SEED, MOST_STOPS, ChatRequest
from plrhf.serving.served import ServedModel
from plrhf.serving.service import Service


def add_chat(app: FastAPI, service: Service) -> None:
    """Add the route of chat completions."""

    @app.post("/v1/chat/completions")
    async def completions(body: ChatRequest, request: Request) -> Any:
        policy = _policy(service, body)
        answers = await run_in_threadpool(_answers, service, policy, body)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
        }
        if body.stream:
            written = _stream(service, policy, body, answers, head)
            # The first event waits until the answers are taken, so that an error still has a status.
            first = await anext(written)
            return StreamingResponse(_with_first(first, written), media_type="text/event-stream")
        policy.engine.write(answers)
        await _until_done(answers, request)
        service.metrics.tokens.inc(sum(one.n_tokens for one in answers))
        chosen = answers
        if body.best_of is not None:
            chosen = await run_in_threadpool(_best, service, body, answers)
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.done.result(),
                "logprobs": None,
            }
            for n, answer in enumerate(chosen)
        ]
        usage = _usage(answers)
        # As a response, FastAPI has nothing to convert.
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": choices, "usage": usage}
        )


def _policy(service: Service, body: ChatRequest) -> ServedModel:
    """Return the model that is asked; raise an `ApiError` if the request cannot be answered."""
    policy = service.policy
    if policy is None or body.model != policy.name:
        names = "none that writes" if policy is None else policy.name
        message = f"The model {body.model!r} is not served here, but {names}."
        raise ApiError(404, message, param="model", code="model_not_found")
    if body.best_of is not None:
        if service.reward is None:
            message = "best_of needs a reward model. Start the server with reward=DIR."
            raise ApiError(400, message, param="best_of")
        if body.stream or body.best_of < body.n:
            message = "best_of must be at least n, and cannot be streamed."
            raise ApiError(400, message, param="best_of")
    stops = body.stops()
    if len(stops) > MOST_STOPS or "" in stops:
        message = f"stop must be at most {MOST_STOPS} sequences, none of them empty."
        raise ApiError(400, message, param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
    return policy


def _answers(service: Service, policy: ServedModel, body: ChatRequest) -> list[Answer]:
    """Return the answers to be written."""
    prompt = policy.users.prompt([message.plain() for message in body.messages])
    most = service.options.max_tokens
    asked = body.max_completion_tokens or body.max_tokens
    room = policy.users.model.max_positions
    left = most if room is None else min(most, room - len(prompt))
    if left < 1 or (asked or 1) > left:
        raise ApiError(
            400,
            f"The prompt has {len(prompt)} tokens, so at most {max(0, left)} can be written.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    vector = policy.vector(body.user)
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return [
        Answer(
            prompt=prompt,
            vector=vector,
            sampling=Sampling(
                temperature=temperature, top_p=top_p, seed=(seed + n) % (MOST_SEED + 1)
            ),
            max_tokens=asked or left,
            stop=body.stops(),
        )
        for n in range(body.best_of or body.n)
    ]


async def _until_done(answers: list[Answer], request: Request) -> None:
    """Wait for all answers; cancel them if the client leaves.

    Raises:
        Exception: what went wrong while they were written.
    """
    done = asyncio.gather(*(asyncio.wrap_future(one.done) for one in answers))
    left = asyncio.ensure_future(_left(request))
    either: list[asyncio.Future[Any]] = [done, left]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        for answer in answers:
            answer.cancelled = True
    if not done.done():
        raise ApiError(499, "The client left.")
    done.result()


async def _left(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _best(service: Service, body: ChatRequest, answers: list[Answer]) -> list[Answer]:
    """Return the n answers that the reward model scores highest for the person, the best one first."""
    prompt: Any = [message.plain() for message in body.messages]
    if service.policy is not None and not service.policy.users.has_template:
        prompt = prompt[0]["content"]
    written = [answer for answer in answers if answer.text.strip()]
    inputs = [{"prompt": prompt, "response": one.text, "user": body.user} for one in written]
    scores = service.score(inputs) if len(inputs) > 0 else []
    order = sorted(range(len(written)), key=lambda n: -scores[n])
    blank = [answer for answer in answers if not answer.text.strip()]
    return [*(written[n] for n in order), *blank][: body.n]


def _usage(answers: list[Answer]) -> dict[str, int]:
    """Count the tokens read and written, those of all candidates included."""
    read, written = len(answers[0].prompt), sum(one.n_tokens for one in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


async def _stream(
    service: Service,
    policy: ServedModel,
    body: ChatRequest,
    answers: list[Answer],
    head: dict[str, Any],
) -> AsyncGenerator[str]:
    """Yield server-sent events: first that the answers are taken, then their pieces, then the end."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        return _event(chunk | ({"usage": usage} if with_usage else {}))

    def choice(n: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {"index": n, "delta": delta, "finish_reason": reason, "logprobs": None}

    pieces = _pieces(answers)
    try:
        policy.engine.write(answers)
        yield event([choice(n, {"role": "assistant", "content": ""}) for n in range(len(answers))])
        left = len(answers)
        while left > 0:
            n, piece = await pieces.get()
            if piece is None:
                left -= 1
                yield event([choice(n, {}, answers[n].done.result())])
            else:
                yield event([choice(n, {"content": piece})])
        if with_usage:
            yield event([], _usage(answers))
        yield "data: [DONE]\n\n"
    except Busy:
        raise  # nothing was sent yet
    except Exception as error:
        log_without_values(error)
        yield _event(error_body(failed()))
    finally:  # also if the client leaves
        for answer in answers:
            answer.cancelled = True
        service.metrics.tokens.inc(sum(one.n_tokens for one in answers))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _pieces(answers: list[Answer]) -> asyncio.Queue[tuple[int, str | None]]:
    """Return a queue that gets the number of an answer with each piece of it, and None at its end."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str | None]]()

    def tell(n: int, piece: str | None) -> None:
        # After the server's end there is nobody to tell.
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, (n, piece))

    for n, answer in enumerate(answers):
        answer.tell = lambda piece, n=n: tell(n, piece)  # type: ignore[misc]
        answer.done.add_done_callback(lambda _, n=n: tell(n, None))  # type: ignore[misc]
    return pieces


async def _with_first(first: str, rest: AsyncGenerator[str]) -> AsyncIterator[str]:
    """Yield an event that was taken already, and then the others; end them when this ends."""
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one
