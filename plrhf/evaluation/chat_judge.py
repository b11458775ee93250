"""A judge that asks a chat endpoint which of two texts a reader would like better."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.evaluation.chat_endpoint import ChatEndpoint, Reply, ReplyStore
from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.judges import Contest, Judge, Verdicts

INSTRUCTION = (
    "You compare two answers to one request for one reader. Go by what is said of the reader, not "
    "by your own taste or by the order of the answers."
)
QUESTION = """The reader: {profile}

The request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer would this reader like better? Reply with A, B or TIE and nothing else."""
SHARE_OF_FIRST = {"A": 1.0, "B": 0.0, "TIE": 0.5}
ANSWER = re.compile(r"\W*(?:answer\W+)?(A|B|TIE)\W*", re.IGNORECASE)


class ChatJudge(Judge):
    """Asks a language model at an OpenAI-compatible endpoint, once for each order of the two texts.

    Every reply is kept under a hash of its request. An evaluation that was interrupted, or is
    repeated, sends and pays only new requests.

    Args:
        url, key_variable, timeout, retries, backoff: see `ChatEndpoint`.
        model: its name at the endpoint.
        request: other fields of each request, such as temperature.
        parallel: requests at once, from 1.
        cache: file of replies.
        input_price, output_price: of a million tokens, in any currency; None: not known.

    Raises:
        ValueError: a setting out of range, no key, or urllib3 is not installed.
    """

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
                field = f"eval.judge.{name}"
                raise bad_value(field, price, "a number from 0, or null", f"Set {field}=null")
        for name in ("model", "messages", "stream", "n"):
            if name in request:
                field = f"eval.judge.request.{name}"
                raise bad_value(
                    field, request[name], "no such field, as the judge sets it", f"Remove {field}"
                )
        self.endpoint = ChatEndpoint(
            url=url,
            key_variable=key_variable,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            parallel=parallel,
        )
        self.model, self.request, self.parallel = model, request, parallel
        self.replies = ReplyStore(cache)
        self.prices = (input_price, output_price)

    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: nothing is known of a user, or the endpoint fails for good.
        """
        bodies = [
            self._body(contest, first, second)
            for contest in contests
            for first, second in (
                (contest.ours, contest.theirs),
                (contest.theirs, contest.ours),
            )
        ]
        keys = [content_hash(self.endpoint.url, body) for body in bodies]
        new = self._ask(dict(zip(keys, bodies, strict=True)))
        replies = [self.replies[key] for key in keys]
        shares = [read_answer(reply) for reply in replies]
        by_order = np.array(shares, dtype=np.float64).reshape(len(contests), 2)
        by_order[:, 1] = 1 - by_order[:, 1]  # what the first text did not win, ours did
        unread = [reply for reply, one in zip(replies, shares, strict=True) if one is None]
        refused = sum(reply.refused for reply in unread)
        answers = {
            "questions": len(replies),
            "refused": refused,
            "unparseable": len(unread) - refused,
        }
        distinct = [self.replies[key] for key in dict.fromkeys(keys)]
        return Verdicts(wins=by_order, answers=answers, cost=self._cost(distinct, new))

    def _body(
        self, contest: Contest, first: GeneratedText, second: GeneratedText
    ) -> dict[str, Any]:
        """Return the request that asks about one order of a contest's two texts."""
        profile = contest.ours.profile
        if profile is None:
            raise bad_value(
                "profile",
                None,
                f"something to read about user {first.user_id}, as a chat judge knows nobody",
                "Give rows a user_text, or set eval/judge=reward",
            )
        prompt = first.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{one['role']}: {one['content']}" for one in prompt)
        question = QUESTION.format(
            profile=profile, prompt=prompt, first=first.response, second=second.response
        )
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": question},
        ]
        return {"model": self.model, "messages": messages, **self.request}

    def _ask(self, bodies: dict[str, dict[str, Any]]) -> int:
        """Send the requests that have no reply yet, and return their number."""
        missing = [key for key in bodies if key not in self.replies]

        def ask(key: str) -> None:
            self.replies.add(key, self.endpoint.post(bodies[key]))

        with ThreadPoolExecutor(self.parallel) as pool:
            for _ in track(
                pool.map(ask, missing),  # on an error it drops those not yet begun
                total=len(missing),
                description="asking the judge",
                transient=True,
                disable=not sys.stdout.isatty(),
            ):
                pass
        return len(missing)

    def _cost(self, replies: Sequence[Reply], new: int) -> dict[str, Any]:
        """Return what all replies cost, including those that an earlier run paid for."""
        tokens_in = _total([reply.input_tokens for reply in replies])
        tokens_out = _total([reply.output_tokens for reply in replies])
        price_in, price_out = self.prices
        price = None
        if None not in (tokens_in, tokens_out, price_in, price_out):
            price = (tokens_in * price_in + tokens_out * price_out) / 1e6  # type: ignore[operator]
        return {
            "questions": len(replies),
            "from_cache": len(replies) - new,
            "input_tokens": tokens_in,
            "output_tokens": tokens_out,
            "price": price,
        }


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum of the counts; None if one of them is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def read_answer(reply: Reply) -> float | None:
    """Read from a reply how much the first text won: 1 for A, 0 for B, 0.5 for TIE, else None.

    The answer is the last line, since some models reason first, or else the first line, since others
    explain afterwards.
    """
    lines = reply.text.strip().splitlines()
    if reply.refused or len(lines) == 0:
        return None
    for line in (lines[-1], lines[0]):
        found = ANSWER.fullmatch(line)
        if found is not None:
            return SHARE_OF_FIRST[found[1].upper()]
    return None
