"""Which of two texts a user likes better: by true preferences, a reward model, or a chat endpoint."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from rich.progress import track

from plrhf.backbone.loading import load_tokenizer
from plrhf.core.errors import bad_value
from plrhf.core.stats import Array, Outcomes, correctness, summarise_outcomes
from plrhf.data.dataset import PairDataset
from plrhf.data.packing import TokenPair, packed, two_rows
from plrhf.data.rows import Row, content_hash
from plrhf.data.tokenizer import RowTokenizer
from plrhf.evaluation.chat_endpoint import ChatEndpoint, Reply, ReplyStore
from plrhf.evaluation.predictions import Written
from plrhf.models.reward import PersonalRewardModel

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


@dataclass(frozen=True)
class Contest:
    """Two texts for the same user on the same prompt."""

    ours: Written
    theirs: Written


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a judge said of N contests.

    Attributes:
        wins: how much of each contest our text won: 1, 0, or 0.5 for a tie; NaN where the judge did
            not say. [N, 2] from a judge who reads one text after the other: asked with ours first,
            and with ours second; else [N, 1].
        answers: number of questions put, and of answers that were none, by reason; None from a
            judge that always answers.
        cost: of the distinct questions: how many, how many of them answered before, tokens, price.
    """

    wins: Array
    answers: dict[str, int] | None = None
    cost: dict[str, Any] | None = None


class Judge(ABC):
    """Says which text each user likes better."""

    @abstractmethod
    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """Verdicts on N contests, in their order."""


def win_rates(contests: Sequence[Contest], verdicts: Verdicts) -> dict[str, Any]:
    """The figures of winrate.json, from contests answered in full.

    Who wins in one order and loses in the other has tied, so that a judge who always prefers the
    first text says nothing. Intervals are from a bootstrap over users; one user's rate has none.

    Raises:
        ValueError: no contest was answered in full.
    """
    share = verdicts.wins.mean(axis=1)  # [N], NaN where any answer is missing
    judged = np.isfinite(share)
    if not judged.any():
        raise bad_value(
            "eval.judge",
            f"{len(share)} contests, none answered",
            "a judge that answers",
            f"Look at what it said ({verdicts.answers})",
        )
    user = np.array([contest.ours.user_id for contest in contests])[judged]
    prompt = np.array([contest.ours.prompt_id for contest in contests])[judged]
    share, wins = share[judged], verdicts.wins[judged]
    pair = np.array([f"{one} {other}" for one, other in zip(user, prompt, strict=True)])
    outcomes = Outcomes(pair_id=pair, user_id=user, margin=share - 0.5, correct=share)
    found = summarise_outcomes(outcomes, names=("accuracy_micro", "accuracy_macro"))
    first = None
    if wins.shape[1] == 2:
        first = float(np.mean([wins[:, 0], 1 - wins[:, 1]]))
    return {
        "win_rate": found["accuracy_micro"],
        "win_rate_macro": found["accuracy_macro"],
        "ties": float((share == 0.5).mean()),
        "n_texts": len(share),
        "n_users": found["n_users"],
        "n_unanswered": int((~judged).sum()),
        "per_user": {
            str(one): {
                "win_rate": float(share[user == one].mean()),
                "n_texts": int((user == one).sum()),
            }
            for one in np.unique(user)
        },
        "first_position_wins": first,
        "answers": verdicts.answers,
        "cost": verdicts.cost,
    }


class PreferenceJudge(Judge):
    """Goes by the users' true preferences, as only a synthetic world knows them."""

    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: texts without true scores.
        """
        scores = [(contest.ours.score, contest.theirs.score) for contest in contests]
        if any(one is None for both in scores for one in both):
            raise bad_value(
                "eval/judge",
                "preferences",
                "a judge for texts without true scores, which only data=personas knows",
                "Set eval/judge=reward or eval/judge=chat",
            )
        ours, theirs = np.array(scores, dtype=np.float64).T
        return Verdicts(wins=correctness(ours - theirs)[:, None])


class RewardJudge(Judge):
    """Goes by a trained reward model.

    It should have been trained on other pairs than the policies it judges: what both learned from
    the same noise it takes for preference.

    Args:
        export: directory that `export.save_export` wrote.
        users: `own`: each user by the vector the model learned for them; `held_out`: all as users
            it never saw, by the generic user's vector and, where its encoder reads them, features.
        batch_size: contests at once, from 1.
        trust_remote_code: let the backbone's repository bring its own code.

    Raises:
        ValueError: no reward model there, or one that reads texts about users.
    """

    def __init__(
        self,
        *,
        export: Path,
        users: Literal["own", "held_out"] = "own",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise bad_value(
                "eval.judge.batch_size",
                batch_size,
                "a whole number from 1",
                "Set eval.judge.batch_size=32",
            )
        self.users, self.batch_size = users, batch_size
        self.model = PersonalRewardModel.from_pretrained(
            export, trust_remote_code=trust_remote_code
        )
        text = self.model.card.text
        if text["use_user_text"]:
            raise bad_value(
                "eval.judge.export",
                str(export),
                "a reward model trained with data.use_user_text=false",
                "Train one, as generated texts come without their users' own",
            )
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.row_tokenizer = RowTokenizer(load_tokenizer(str(export)), **text)

    @torch.no_grad()
    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: a user the model was not trained on, though `users` is `own`; a text longer
                than its backbone allows; or a reward that is not finite.
        """
        pairs = self._pairs(contests)
        length = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs.pairs]
        order = sorted(range(len(pairs)), key=length.__getitem__)
        margin = np.zeros(len(pairs))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = move_data_to_device(pairs.batch(places), self.model.device)
            found, _ = self.model.margins(self.model.hidden(batch, ("user",)), batch)
            margin[places] = found[0].double().cpu().numpy()
        if not np.isfinite(margin).all():
            worst = float(margin[~np.isfinite(margin)][0])
            raise bad_value(
                "reward", worst, "finite numbers", "Judge by a model whose training went well"
            )
        same = [contest.ours.response == contest.theirs.response for contest in contests]
        margin[same] = 0.0  # computed side by side they differ by rounding
        return Verdicts(wins=correctness(margin)[:, None])

    def _pairs(self, contests: Sequence[Contest]) -> PairDataset:
        """Each contest as a pair, ours in the place of the chosen response."""
        card = self.model.card
        index = {user: place + 1 for place, user in enumerate(card.users)}
        rows, tokens = [], []
        for contest in contests:
            ours = contest.ours
            row = Row(
                prompt=ours.prompt,
                chosen=ours.response,
                rejected=contest.theirs.response,
                user_id=ours.user_id,
                user_features=ours.user_features,
                prompt_id=ours.prompt_id,
                pair_id=f"{ours.user_id} {ours.prompt_id}",
            )
            if self.users == "own" and row.user_id not in index:
                raise bad_value(
                    "eval.judge.users",
                    "own",
                    f"users the reward model was trained on (it does not know {row.user_id})",
                    "Set eval.judge.users=held_out, or judge by a model of these users",
                )
            rows.append(row)
            tokens.append(self._tokens(row))
        return PairDataset(
            rows,
            tokens,
            layout=packed if self.model.backbone.causal else two_rows,
            user_index=index if self.users == "own" else {},
            schema=card.feature_schema(),
        )

    def _tokens(self, row: Row) -> TokenPair:
        prompt = self.row_tokenizer.prompt(row)
        chosen, rejected = (
            self.row_tokenizer.response(text) for text in (row.chosen, row.rejected)
        )
        room, needed = self.model.max_positions, len(prompt) + max(len(chosen), len(rejected))
        if room is not None and needed > room:
            raise bad_value(
                "eval.judge.export",
                f"{needed} tokens (user {row.user_id}, prompt {row.prompt_id})",
                f"at most the reward model's {room} positions",
                "Write shorter texts with eval=generate eval.max_new_tokens",
            )
        return TokenPair(prompt, chosen, rejected)


class ChatJudge(Judge):
    """Asks a language model behind an OpenAI-compatible endpoint, about both orders of two texts.

    Every reply is kept by the content of its request, so an evaluation that was cut short, or is
    made again, asks and costs only what is new.

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

    def _body(self, contest: Contest, first: Written, second: Written) -> dict[str, Any]:
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
        """Put the questions that have no reply yet; how many these were."""
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
        """What all these replies cost, those from the cache when they were first asked for."""
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
    """Their sum; None where one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def read_answer(reply: Reply) -> float | None:
    """How much the text shown first won: 1 for A, 0 for B, 0.5 for TIE; None for anything else.

    The answer is the last line, or else the first: some models think aloud, others explain.
    """
    lines = reply.text.strip().splitlines()
    if reply.refused or len(lines) == 0:
        return None
    for line in (lines[-1], lines[0]):
        found = ANSWER.fullmatch(line)
        if found is not None:
            return SHARE_OF_FIRST[found[1].upper()]
    return None
