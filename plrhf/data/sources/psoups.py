"""Personalized Soups: pairs of answers that GPT-4 judged by six opposing preferences.

The data archive of ``joeljang/RLPHF`` (Jang et al. 2023) holds one file for each preference,
``rm_training/P1A.json`` and so on. As in P-RLHF (arXiv 2402.05133), each preference is a user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import Source
from plrhf.data.sources.files import data_files, files_by_stem, read_files
from plrhf.data.sources.formats import Record
from plrhf.data.split_by import uniform_hash

PREFERENCES = {
    "P1A": "Generate a response that can be easily understood by an elementary school student.",
    "P1B": "Generate a response that only a PhD Student in that specific field could understand.",
    "P2A": "Generate a response that is concise and to the point without being verbose.",
    "P2B": "Generate a response that is very informative without missing any background information.",
    "P3A": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    "P3B": "Generate a response in an unfriendly manner.",
}
"""The sentence that upstream puts into the prompts of each user, by user id."""

PLACE = "{prompt}"


class PsoupsSource(Source):
    """Reads the pairs of six users, one file each. Upstream repeats most pairs; repeats are refused.

    The preference sentence would reveal the user, so it is removed from the prompt and becomes the
    row's ``user_text``.

    Args:
        path: the unpacked archive, or its folder ``rm_training``, with all six files.
        protocol: ``paper`` divides pairs at random, so a prompt may be in both train and test, even
            with the same answers. ``disjoint`` gives rows no split, so they are divided by prompt.
        template: text around the prompt, which stands at ``{prompt}``; None: a chat message.
        val_fraction, test_fraction: fractions of the pairs, for ``paper`` only.
        seed: seed of the division.

    Raises:
        ValueError: a template without ``{prompt}``.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        protocol: Literal["paper", "disjoint"] = "paper",
        template: str | None = "<|user|>\n{prompt}\n<|assistant|>",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        if template is not None and PLACE not in template:
            cure = "Set data.template=null for a chat message"
            raise bad_value("data.template", template, f"text with {PLACE}, or null", cure)
        self.path, self.protocol, self.template = path, protocol, template
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield the pairs user by user.

        Raises:
            ValueError: a user's file is missing or is there twice.
        """
        files = files_by_stem(self._files(), PREFERENCES)
        missing = [user for user in PREFERENCES if user not in files]
        if len(missing) > 0:
            allowed = f"the files {', '.join(PREFERENCES)}, and {', '.join(missing)} is not there"
            raise bad_value("data.path", self.path, allowed, "Unpack upstream's archive again")
        for user in PREFERENCES:
            seen: set[str] = set()
            for where, record in read_files([files[user]]):
                if isinstance(record, Refusal):
                    yield where, record
                else:
                    yield where, self._row(record, user, seen)

    def profile(self, user_id: str) -> str | None:
        """Return the user's preference in upstream's words."""
        return PREFERENCES.get(user_id)

    def _files(self) -> list[Path]:
        return data_files(self.path, within="rm_training")

    def _row(self, record: Mapping[str, Any], user: str, seen: set[str]) -> Record:
        """Turn an upstream record into a row, or into the reason why it is refused.

        Args:
            seen: hashes of the user's pairs so far; this pair's is added.
        """
        asked, chosen, rejected = (
            record.get(name) for name in ("user_input", "completion_a", "completion_b")
        )
        pair = content_hash(asked, chosen, rejected)
        if pair in seen:
            allowed = "a pair this user has not judged yet"
            return refusal(Reason.REPEATED, "user_input", asked, allowed, "Leave the row out")
        seen.add(pair)
        question = asked
        if isinstance(asked, str):
            question = asked.replace(PREFERENCES[user], "").strip()
            if question == "":
                allowed = "more than the preference"
                cure = "Leave the row out"
                return refusal(Reason.EMPTY_PROMPT, "user_input", asked, allowed, cure)
        row = {
            "prompt": self._prompt(question),
            "chosen": chosen,
            "rejected": rejected,
            "user_id": user,
            "user_text": PREFERENCES[user],
            "prompt_id": content_hash(question),
        }
        return row if self.protocol == "disjoint" else {**row, "split": self._split(user, pair)}

    def _prompt(self, question: object) -> object:
        """Put the question into the template."""
        if not isinstance(question, str):
            return question  # for `parse_row` to refuse
        if self.template is None:
            return [{"role": "user", "content": question}]
        return self.template.replace(PLACE, question)

    def _split(self, user: str, pair: str) -> str:
        """Draw the split of a user's pair by a hash."""
        place = uniform_hash(f"{user} {pair}", salt="pair", seed=self.seed)
        if place < self.test_fraction:
            return "test"
        return "val" if place < self.test_fraction + self.val_fraction else "train"
