"""OpenAI's TL;DR comparisons: workers choosing the better of two summaries of a Reddit post.

Upstream: ``openai/summarize_from_feedback``, config ``comparisons`` (Stiennon et al. 2020); which
rows, users and synthetic preferences are used follows P-RLHF (arXiv 2402.05133).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeGuard

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.data.reading import read_rows
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.rows import content_hash
from plrhf.data.sources.base import Source, refuse_shared_prompts
from plrhf.data.sources.files import HubFiles, data_files, read_files
from plrhf.data.sources.formats import Record
from plrhf.data.splits import uniform_hash

# The repository itself holds a loading script, which `datasets` no longer runs; the hub's own
# conversion to parquet lies in this revision.
HUB = HubFiles("openai/summarize_from_feedback", ("comparisons/*",), "refs/convert/parquet")
SPLIT_OF = {"train": "train", "valid1": "test", "valid2": "test"}

LENGTH_SEED = 3456
"""The authors': with it the published share of train rows of each taste comes out."""

LIKES_LONG = 0.7


@dataclass(frozen=True)
class _Comparison:
    """One record, its structure checked; texts and worker are checked with the row."""

    worker: str | None
    split: str
    prompt: str
    prompt_id: str
    texts: tuple[Any, Any]
    choice: Any


class TldrSource(Source):
    """Comparisons between two supervised policies, from the hub or from a copy in upstream's format.

    Of every record both policies must contain "sup" and neither "ppo" nor "cnn". Upstream's train
    rows train and, by prompt, select (`val_fraction`); its valid1 and valid2 rows are the test.
    Seen users are the `n_seen` workers with most train rows, ties by id; the others have test rows
    only. Rows of one post share a ``prompt_id``.

    Args:
        path: the hub's name, or a directory, file or list of files (.json, .jsonl, .parquet).
        choices: ``real``, or ``length``: each worker is drawn to like the longer (p = 0.7) or the
            shorter text by characters, and decides every pair by it; equal lengths are ties.
        protocol: ``paper``, or ``disjoint``: rows whose post is in a later split too are left out.
        n_seen: 10 and 40 in the paper.
        val_fraction: of the posts in upstream's train rows.
        seed: of the val draw; the synthetic tastes have the authors' own.

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
        """Yield refusals of what is not selected, then a row for every comparison that is."""
        seen = set(self._workers[: self.n_seen])
        rows = ((where, self._row(one, seen)) for where, one in self._comparisons)
        yield from refuse_shared_prompts(rows) if self.protocol == "disjoint" else rows

    def oracle_margins(self) -> dict[str, float] | None:
        """Return how many characters each choice is on its user's side of, for synthetic tastes."""
        if self.choices == "real":
            return None
        rows, _ = read_rows(self.records())
        return {
            row.pair_id: float(self._taste[row.user_id] * (len(row.chosen) - len(row.rejected)))
            for row in rows
        }

    def true_score(self, user_id: str, text: str) -> float | None:
        """Return the text's characters, negative for who likes short ones; None for real choices."""
        if self.choices == "real" or user_id not in self._taste:
            return None
        return float(self._taste[user_id] * len(text))

    def profile(self, user_id: str) -> str | None:
        """Say which length the worker likes; None for real choices."""
        if self.choices == "real" or user_id not in self._taste:
            return None
        return f"Prefers the {'longer' if self._taste[user_id] > 0 else 'shorter'} summary."

    @cached_property
    def _comparisons(self) -> list[tuple[str, _Comparison | Refusal]]:
        files = data_files(self.path, hub=HUB, within="comparisons")
        return [
            (where, record if isinstance(record, Refusal) else _comparison(record))
            for where, record in read_files(files)
        ]

    @cached_property
    def _workers(self) -> list[str]:
        """Workers by number of train rows, most first, then by id."""
        train: Counter[str] = Counter()
        for _, one in self._comparisons:
            if isinstance(one, _Comparison) and one.worker is not None:
                train[one.worker] += one.split == "train"
        return sorted(train, key=lambda worker: (-train[worker], worker))

    @cached_property
    def _taste(self) -> dict[str, int]:
        """Worker -> 1 for who likes long texts, -1 for who likes short ones."""
        # RandomState and the order of workers are the authors', and numpy keeps its stream fixed.
        draws = np.random.RandomState(LENGTH_SEED).choice(
            [1, -1], size=len(self._workers), p=[LIKES_LONG, 1 - LIKES_LONG]
        )
        return dict(zip(self._workers, draws.tolist(), strict=True))

    def _row(self, one: _Comparison | Refusal, seen: set[str]) -> Record:
        if isinstance(one, Refusal):
            return one
        split = one.split
        if split == "train":
            if one.worker in self._taste and one.worker not in seen:
                allowed = f"one of the {self.n_seen} workers with most train rows"
                cure = "Raise data.n_seen to train on more"
                return refusal(Reason.UNSEEN_OUTSIDE_TEST, "worker", one.worker, allowed, cure)
            if uniform_hash(one.prompt_id, salt="val prompt", seed=self.seed) < self.val_fraction:
                split = "val"
        chosen = self._chosen(one)
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

    def _chosen(self, one: _Comparison) -> int | Refusal:
        """Return the place of the preferred summary."""
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
            cure = "Leave the row out: who goes by length has no preference here"
            return refusal(Reason.TIE, "summaries", len(first), "two lengths", cure)
        return int((len(second) - len(first)) * self._taste[one.worker] > 0)


def _comparison(record: Mapping[str, Any]) -> _Comparison | Refusal:
    """Return the record's parts, or why it is not among the paper's comparisons."""
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
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(one, Mapping) and isinstance(one.get("policy"), str) for one in value)
    )
