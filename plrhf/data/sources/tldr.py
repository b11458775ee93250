"""OpenAI's TL;DR comparisons: workers choose the better of two summaries of a Reddit post.

The data are ``openai/summarize_from_feedback``, config ``comparisons`` (Stiennon et al. 2020). Rows,
users and synthetic preferences are selected as in P-RLHF (arXiv 2402.05133).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeGuard

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.data.reading import read_rows
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import Source, refuse_shared_prompts
from plrhf.data.sources.files import HubFiles, data_files, read_files
from plrhf.data.sources.formats import Record
from plrhf.data.split_by import uniform_hash

# The main branch holds a loading script, which `datasets` no longer runs. This revision holds the
# hub's own conversion to parquet.
HUB = HubFiles("openai/summarize_from_feedback", ("comparisons/*",), "refs/convert/parquet")
SPLIT_OF = {"train": "train", "valid1": "test", "valid2": "test"}

LENGTH_SEED = 3456
"""The authors' seed. It reproduces the published shares of train rows by preference."""

LIKES_LONG = 0.7
"""Probability that a worker of ``choices=length`` prefers the longer summary."""


@dataclass(frozen=True)
class _Comparison:
    """A record of the expected structure. `parse_row` checks its texts and its worker later."""

    worker: str | None
    split: str  # train or test
    prompt: str
    prompt_id: str
    texts: tuple[Any, Any]  # the two summaries
    choice: Any  # index of the summary that the worker preferred


class TldrSource(Source):
    """Reads comparisons of two supervised policies from the hub, or from files in the hub's format.

    A record is used if the names of both policies contain "sup" and neither "ppo" nor "cnn". The
    rows of upstream's train split become train and val, divided by post. Those of its valid1 and
    valid2 splits become test. The `n_seen` workers with the most train rows (ties broken by id) are
    the seen users. All other workers have test rows only. Rows of the same post share a
    ``prompt_id``.

    Args:
        path: the dataset's name on the hub, or a directory, file or list of files (.json, .jsonl,
            .parquet).
        choices: ``real`` for the workers' own choices. ``length`` replaces them: each worker is
            drawn to prefer longer texts (with probability 0.7) or shorter ones, in characters, and
            every choice follows that preference. Two texts of equal length are a tie.
        protocol: ``paper``, or ``disjoint``, which leaves out rows whose post is in a later split too.
        n_seen: number of seen users; 10 or 40 in the paper.
        val_fraction: fraction of the posts in upstream's train split that become val.
        seed: draws the val posts. The preferences of ``choices=length`` use the authors' own seed.

    Raises:
        ValueError: `n_seen` below 1.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        choices: Literal["real", "length"] = "real",
        protocol: Literal["paper", "disjoint"] = "paper",
        n_seen: int = 10,
        val_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        if n_seen < 1:
            raise bad_value("data.n_seen", n_seen, "a whole number from 1", "Set data.n_seen=10")
        self.path, self.choices, self.protocol = path, choices, protocol
        self.n_seen, self.val_fraction, self.seed = n_seen, val_fraction, seed

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield each record with its place, as a row or as the reason why it is not used."""
        seen = set(self._workers_by_rows[: self.n_seen])
        rows = ((where, self._row(one, seen)) for where, one in self._comparisons)
        yield from refuse_shared_prompts(rows) if self.protocol == "disjoint" else rows

    def oracle_margins(self) -> dict[str, float] | None:
        """Return the difference in length of each pair, signed by its user's preference.

        None for real choices.
        """
        if self.choices == "real":
            return None
        rows, _ = read_rows(self.records())
        return {
            row.pair_id: float(
                self._length_sign[row.user_id] * (len(row.chosen) - len(row.rejected))
            )
            for row in rows
        }

    def true_score(self, user_id: str, text: str) -> float | None:
        """Return the length of the text, negative for a user who prefers short texts.

        None for real choices.
        """
        if self.choices == "real" or user_id not in self._length_sign:
            return None
        return float(self._length_sign[user_id] * len(text))

    def profile(self, user_id: str) -> str | None:
        """Describe which length the worker prefers; None for real choices."""
        if self.choices == "real" or user_id not in self._length_sign:
            return None
        return f"Prefers the {'longer' if self._length_sign[user_id] > 0 else 'shorter'} summary."

    @cached_property
    def _comparisons(self) -> list[tuple[str, _Comparison | Refusal]]:
        """All records with their places, parsed or refused."""
        files = data_files(self.path, hub=HUB, within="comparisons")
        return [
            (where, record if isinstance(record, Refusal) else _parse_record(record))
            for where, record in read_files(files)
        ]

    @cached_property
    def _workers_by_rows(self) -> list[str]:
        """All workers, sorted by their number of train rows (most first) and then by id."""
        train: Counter[str] = Counter()
        for _, one in self._comparisons:
            if isinstance(one, _Comparison) and one.worker is not None:
                train[one.worker] += one.split == "train"
        return sorted(train, key=lambda worker: (-train[worker], worker))

    @cached_property
    def _length_sign(self) -> dict[str, int]:
        """For each worker, 1 if they prefer long texts and -1 if they prefer short ones."""
        # The authors use RandomState on workers in this order. NumPy never changes its numbers.
        draws = np.random.RandomState(LENGTH_SEED).choice(
            [1, -1], size=len(self._workers_by_rows), p=[LIKES_LONG, 1 - LIKES_LONG]
        )
        return dict(zip(self._workers_by_rows, draws.tolist(), strict=True))

    def _row(self, one: _Comparison | Refusal, seen: set[str]) -> Record:
        """Turn a comparison into a row with its split, or into the reason why it is not used."""
        if isinstance(one, Refusal):
            return one
        split = one.split
        if split == "train":
            if one.worker in self._length_sign and one.worker not in seen:
                allowed = f"one of the {self.n_seen} workers with most train rows"
                cure = "Raise data.n_seen to train on more"
                return refusal(Reason.UNSEEN_OUTSIDE_TEST, "worker", one.worker, allowed, cure)
            if uniform_hash(one.prompt_id, salt="val prompt", seed=self.seed) < self.val_fraction:
                split = "val"
        chosen = self._preferred_index(one)
        if isinstance(chosen, Refusal):
            return chosen
        return {
            "prompt": one.prompt,
            "chosen": one.texts[chosen],
            "rejected": one.texts[1 - chosen],
            "user_id": one.worker,
            "prompt_id": one.prompt_id,
            "split": split,
        }

    def _preferred_index(self, one: _Comparison) -> int | Refusal:
        """Return the index (0 or 1) of the summary that the worker prefers."""
        if self.choices == "real":
            if one.choice in (0, 1) and not isinstance(one.choice, bool):
                return int(one.choice)
            cure = "Leave the row out"
            return refusal(Reason.BAD_SHAPE, "choice", one.choice, "0 or 1", cure)
        first, second = one.texts
        are_texts = isinstance(first, str) and isinstance(second, str)
        if one.worker is None or not are_texts or first == second:
            return 0  # for `parse_row` to refuse
        if len(first) == len(second):
            cure = "Leave the row out: a user who goes by length has no preference here"
            return refusal(Reason.TIE, "summaries", len(first), "two lengths", cure)
        return int((len(second) - len(first)) * self._length_sign[one.worker] > 0)


def _parse_record(record: Mapping[str, Any]) -> _Comparison | Refusal:
    """Parse an upstream record, or return why it is not one of the paper's comparisons."""
    info, summaries = record.get("info"), record.get("summaries")
    if not isinstance(info, Mapping) or not _are_summaries(summaries):
        allowed = "an object info and two summaries, each with a policy and a text"
        cure = "Give files of upstream's config comparisons"
        return refusal(Reason.BAD_SHAPE, "record", dict(record), allowed, cure)
    policies = [one["policy"] for one in summaries]
    if any("sup" not in one or "ppo" in one or "cnn" in one for one in policies):
        allowed = 'two policies with "sup" in their names and neither "ppo" nor "cnn"'
        return refusal(Reason.OTHER_POLICY, "policy", policies, allowed, "Leave the row out")
    split = record.get("split")
    if not isinstance(split, str) or split not in SPLIT_OF:
        cure = "Give files of upstream's config comparisons"
        return refusal(Reason.UNKNOWN_SPLIT, "split", split, "train, valid1 or valid2", cure)
    post = info.get("post")
    if not isinstance(post, str) or not post.strip():
        reason = Reason.EMPTY_PROMPT if post is None or isinstance(post, str) else Reason.NOT_TEXT
        allowed = "text that is not blank"
        return refusal(reason, "info.post", post, allowed, "Leave the row out")
    worker = record.get("worker")
    if worker is not None and not isinstance(worker, str):
        return refusal(Reason.NOT_TEXT, "worker", worker, "text", "Write the worker's id as text")
    return _Comparison(
        worker=worker,
        split=SPLIT_OF[split],
        prompt=f"SUBREDDIT: r/{info.get('subreddit')}\nTITLE: {info.get('title')}\n"
        f"POST: {post}\nTL;DR:",
        prompt_id=content_hash(post.strip()),
        texts=(summaries[0].get("text"), summaries[1].get("text")),
        choice=record.get("choice"),
    )


def _are_summaries(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of two summaries, each with the name of its policy."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(one, Mapping) and isinstance(one.get("policy"), str) for one in value)
    )
