"""Asks a language model at a chat endpoint many things at once, and counts what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from plrhf.core.errors import bad_value
from plrhf.core.progress import with_progress
from plrhf.data.digests import content_hash
from plrhf.evaluation.chat_endpoint import ChatEndpoint, Reply, ReplyStore

Messages = Sequence[Mapping[str, str]]


class ChatClient:
    """Asks a language model at an OpenAI-compatible endpoint.

    Every reply is kept under a hash of its request. What was interrupted, or is repeated, sends and pays
    only new requests.

    Args:
        url, key_variable, timeout, retries, backoff: see `ChatEndpoint`.
        model: its name at the endpoint.
        request: other fields of each request, such as temperature.
        parallel: requests at once, from 1.
        cache: file of replies.
        input_price, output_price: of a million tokens, in any currency; None: not known.

    Raises:
        ValueError: a setting out of range, or no key.

    Attributes:
        field: dotted name of these settings, for messages.
    """

    field: ClassVar[str] = "endpoint"

    def __init__(
        self,
        *,
        url: str,
        model: str,
        cache: Path,
        request: dict[str, Any],
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        parallel: int = 4,
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        for name, price in (("input_price", input_price), ("output_price", output_price)):
            if price is not None and price < 0:
                field = f"{self.field}.{name}"
                raise bad_value(field, price, "a number from 0, or null", f"Set {field}=null")
        if parallel < 1:
            field = f"{self.field}.parallel"
            raise bad_value(field, parallel, "a whole number from 1", f"Set {field}=1")
        for name in ("model", "messages", "stream", "n"):
            if name in request:
                field = f"{self.field}.request.{name}"
                allowed = "no such field, as it is set by other means"
                raise bad_value(field, request[name], allowed, f"Remove {field}")
        self.endpoint = ChatEndpoint(
            url=url,
            key_variable=key_variable,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            field=self.field,
        )
        self.model, self.request, self.parallel = model, request, parallel
        self.replies = ReplyStore(cache)
        self.prices = (input_price, output_price)
        self._asked: dict[str, bool] = {}  # key of each request -> whether it was sent now

    def ask(
        self, conversations: Sequence[Messages], people: Sequence[str], **request: Any
    ) -> list[Reply]:
        """Return the reply to each conversation; equal ones are asked once.

        Args:
            people: id of the person whom each conversation is about.
            request: fields of these requests, in the place of `request`'s.

        Raises:
            ValueError: the endpoint fails for good.
        """
        bodies = [
            {"model": self.model, "messages": list(one), **self.request, **request}
            for one in conversations
        ]
        keys = [content_hash(self.endpoint.url, body) for body in bodies]
        body_of = dict(zip(keys, bodies, strict=True))
        missing = [key for key in body_of if key not in self.replies]
        people_of = defaultdict[str, set[str]](set)
        for key, person in zip(keys, people, strict=True):
            people_of[key].add(person)

        def send(key: str) -> None:
            self.replies.add(key, self.endpoint.post(body_of[key]), people_of[key])

        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(send, missing)  # on an error it drops those not yet begun
            for _ in with_progress(answers, f"asking {self.model}", total=len(missing)):
                pass
        self._asked = {**dict.fromkeys(keys, False), **dict.fromkeys(missing, True), **self._asked}
        return [self.replies[key] for key in keys]

    def cost(self) -> dict[str, Any]:
        """Return what all replies so far cost, including those that an earlier run paid for."""
        replies = [self.replies[key] for key in self._asked]
        tokens_in = _total([reply.input_tokens for reply in replies])
        tokens_out = _total([reply.output_tokens for reply in replies])
        price_in, price_out = self.prices
        price = None
        if None not in (tokens_in, tokens_out, price_in, price_out):
            price = (tokens_in * price_in + tokens_out * price_out) / 1e6  # type: ignore[operator]
        return {
            "questions": len(replies),
            "from_cache": len(replies) - sum(self._asked.values()),
            "input_tokens": tokens_in,
            "output_tokens": tokens_out,
            "price": price,
        }


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum of the counts; None if one of them is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
