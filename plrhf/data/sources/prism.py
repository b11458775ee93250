"""PRISM: people of 75 countries choosing among the replies of language models, and who they are.

Upstream: ``HannahRoseKirk/prism-alignment`` (Kirk et al. 2024), ``survey`` and ``conversations``;
which users, dialogues and pairs are used follows P-RLHF (arXiv 2402.05133).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from plrhf.core.errors import bad_value
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.rows import Features, content_hash
from plrhf.data.sources.base import Source, refuse_shared_prompts
from plrhf.data.sources.files import HubFiles, data_files, files_by_stem, read_files
from plrhf.data.sources.formats import Record
from plrhf.data.splits import is_unseen_user, uniform_hash

HUB = HubFiles("HannahRoseKirk/prism-alignment", ("survey.jsonl", "conversations.jsonl"))
BLANK = "EMPTY STRING"
"""What upstream writes where a text was missing."""

VALUES = (
    *("values", "creativity", "fluency", "factuality"),
    *("diversity", "safety", "personalisation", "helpfulness"),
)
"""What people rated the importance of, 0 to 100, in ``stated_prefs``."""

CATEGORIES = (
    *("age", "gender", "education", "employment_status", "marital_status"),
    *("english_proficiency", "lm_familiarity", "lm_frequency_use"),
    *("religion.categorised", "ethnicity.categorised", "location.special_region"),
)
"""Columns of the survey that become categories; a dotted one is nested."""


@dataclass(frozen=True)
class _Person:
    text: str | None
    features: Features


@dataclass(frozen=True)
class _Dialogue:
    dialogue_id: str
    user_id: str
    history: list[Mapping[str, Any]]


@dataclass(frozen=True)
class _Turn:
    """What a user wrote, which reply was chosen first, and the others with their places."""

    asked: Any
    chosen: list[Any]
    rejected: list[tuple[int, Any]]


class PrismSource(Source):
    """One pair for each rejected reply of a turn; the prompt is the dialogue with chosen replies.

    Survey columns (`CATEGORIES`, and the ratings of `VALUES` as numbers) are the user features,
    stated preferences and self-description the user text. Users with no finished conversation are
    left out. `unseen_fraction` of the users are unseen, all of their dialogues test; of n dialogues
    of any other, ``int(n * (1 - test_fraction))`` train and the rest test, so that who has one only
    is unseen. Dialogues never go over two splits.

    Args:
        path: the hub's name, or a directory with survey and conversations (.jsonl, .json, .parquet).
        protocol: ``paper``, or ``disjoint``: pairs whose prompt (an opening like "Hello" is many
            people's) is in a later split too are left out.
        unseen_fraction: of users. test_fraction: of a seen user's dialogues.
        val_fraction: of the dialogues left to train on; each user's first one trains.
        seed: of the draws.
    """

    def __init__(
        self,
        *,
        path: str,
        protocol: Literal["paper", "disjoint"] = "paper",
        unseen_fraction: float = 0.1,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.path, self.protocol, self.seed = path, protocol, seed
        self.unseen_fraction = unseen_fraction
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._people: dict[str, _Person] = {}

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield refusals of survey lines and dialogues, and the pairs dialogue by dialogue."""
        rows = self._rows()
        yield from refuse_shared_prompts(rows) if self.protocol == "disjoint" else rows

    def profile(self, user_id: str) -> str | None:
        """Return the user text."""
        person = self._people.get(user_id)
        return None if person is None else person.text

    def _rows(self) -> Iterator[tuple[str, Record]]:
        wanted = ("survey", "conversations")
        files = files_by_stem(data_files(self.path, hub=HUB), wanted)
        for name in wanted:
            if name not in files:
                cure = "Give the directory that holds both"
                allowed = f"a directory with survey and conversations, and {name} is not there"
                raise bad_value("data.path", self.path, allowed, cure)
        self._people = {}
        for where, record in read_files([files["survey"]]):
            refused = self._add_person(record)
            if refused is not None:
                yield where, refused
        dialogues: list[tuple[str, _Dialogue]] = []
        for where, record in read_files([files["conversations"]]):
            found = self._dialogue(record)
            if isinstance(found, Refusal):
                yield where, found
            else:
                dialogues.append((where, found))
        splits = self._splits([one for _, one in dialogues])
        for where, one in dialogues:
            for turn, row in _pairs(one, self._people[one.user_id], splits[one.dialogue_id]):
                yield f"{where} turn {turn}", row

    def _add_person(self, record: Record) -> Refusal | None:
        """Keep what the survey says of a person, or return why they are left out."""
        if isinstance(record, Refusal):
            return record
        user = record.get("user_id")
        if not isinstance(user, str) or user in self._people:
            cure = "Mend or remove the line"
            return refusal(Reason.BAD_SHAPE, "user_id", user, "text used once", cure)
        if record.get("num_completed_conversations") == 0:
            allowed, cure = "a user who finished one", "Leave the user out"
            return refusal(Reason.NO_CONVERSATION, "num_completed_conversations", 0, allowed, cure)
        self._people[user] = _person(record)
        return None

    def _dialogue(self, record: Record) -> _Dialogue | Refusal:
        if isinstance(record, Refusal):
            return record
        dialogue, user = record.get("conversation_id"), record.get("user_id")
        cure = "Mend or remove the line"
        if user is None:
            return refusal(Reason.MISSING_FIELD, "user_id", user, "a user of the survey", cure)
        if not isinstance(user, str) or user not in self._people:
            cure = "Give survey and conversations of one release"
            allowed = "a user of the survey with a finished conversation"
            return refusal(Reason.NO_CONVERSATION, "user_id", user, allowed, cure)
        history = record.get("conversation_history")
        if not isinstance(dialogue, str) or not _is_history(history):
            allowed = "text in conversation_id, and entries with turn and role in the history"
            return refusal(Reason.BAD_SHAPE, "conversation", dict(record), allowed, cure)
        return _Dialogue(dialogue, user, history)

    def _splits(self, dialogues: list[_Dialogue]) -> dict[str, str]:
        """Return dialogue id -> split."""
        of_user: dict[str, list[str]] = {}
        for one in dialogues:
            of_user.setdefault(one.user_id, []).append(one.dialogue_id)
        splits: dict[str, str] = {}
        for user, ids in of_user.items():
            unseen = is_unseen_user(user, seed=self.seed, unseen_fraction=self.unseen_fraction)
            n_train = 0 if unseen else int(len(ids) * (1 - self.test_fraction))
            # A hash rather than a generator: a dialogue more leaves the others where they are.
            ids.sort(key=lambda dialogue: uniform_hash(dialogue, salt="dialogue", seed=self.seed))
            for place, dialogue in enumerate(ids):
                draw = uniform_hash(dialogue, salt="val dialogue", seed=self.seed)
                is_val = place > 0 and draw < self.val_fraction
                splits[dialogue] = "test" if place >= n_train else "val" if is_val else "train"
        return splits


def _person(record: Mapping[str, Any]) -> _Person:
    """Return the user text and features of a line of the survey."""
    stated = record.get("stated_prefs")
    ratings = {
        name: float(stated[name])
        for name in VALUES
        if isinstance(stated, Mapping) and isinstance(stated.get(name), (int, float))
    }
    ratings = {name: rating for name, rating in ratings.items() if not math.isnan(rating)}
    features: dict[str, Any] = {f"stated_prefs.{name}": one for name, one in ratings.items()}
    for column in CATEGORIES:
        outer, _, inner = column.partition(".")
        value = record.get(outer)
        if inner != "":
            value = value.get(inner) if isinstance(value, Mapping) else None
        if value is not None:
            features[column] = value
    parts = []
    described = record.get("self_description")
    if isinstance(described, str) and described.strip() not in ("", BLANK):
        parts.append(f"About the user: {described.strip()}")
    if len(ratings) > 0:
        ordered = sorted(ratings, key=lambda name: (-ratings[name], name))
        listed = ", ".join(f"{name} {ratings[name]:g}" for name in ordered)
        parts.append(f"What the user finds important in an answer, of 100: {listed}.")
    return _Person("\n".join(parts) if len(parts) > 0 else None, features)


def _is_history(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(
        isinstance(one, Mapping)
        and isinstance(one.get("turn"), int)
        and one.get("role") in ("user", "model")
        for one in value
    )


def _turns(history: list[Mapping[str, Any]]) -> dict[int, _Turn]:
    """Return the turns by number; of several user messages or chosen replies the first counts."""
    turns: dict[int, _Turn] = {}
    for number in sorted({one["turn"] for one in history}):
        said = [one for one in history if one["turn"] == number]
        replies = [one for one in said if one["role"] == "model"]
        asked = [_content(one) for one in said if one["role"] == "user"]
        turns[number] = _Turn(
            asked=asked[0] if len(asked) > 0 else None,
            chosen=[_content(one) for one in replies if one.get("if_chosen") is True],
            rejected=[
                (place, _content(one))
                for place, one in enumerate(replies)
                if one.get("if_chosen") is not True
            ],
        )
    return turns


def _content(entry: Mapping[str, Any]) -> Any:
    content = entry.get("content")
    return "" if isinstance(content, str) and content.strip() == BLANK else content


def _pairs(dialogue: _Dialogue, person: _Person, split: str) -> Iterator[tuple[int, Record]]:
    """Yield each turn's number with its pairs, or with why it has none."""
    prompt: list[dict[str, Any]] = []
    for number, turn in _turns(dialogue.history).items():
        prompt = [*prompt, {"role": "user", "content": turn.asked}]
        if turn.asked is None or turn.asked == "":
            cure = "Leave the turn out"
            yield number, refusal(Reason.EMPTY_PROMPT, "content", turn.asked, "text", cure)
        elif len(turn.chosen) == 0 or len(turn.rejected) == 0:
            shown = f"{len(turn.chosen)} chosen, {len(turn.rejected)} rejected"
            allowed, cure = "a chosen and a rejected reply", "Leave the turn out"
            yield number, refusal(Reason.NO_PAIR, "if_chosen", shown, allowed, cure)
        else:
            for place, rejected in turn.rejected:
                yield (
                    number,
                    {
                        "prompt": prompt,
                        "chosen": turn.chosen[0],
                        "rejected": rejected,
                        "user_id": dialogue.user_id,
                        "user_text": person.text,
                        "user_features": person.features,
                        "prompt_id": content_hash(prompt),
                        "pair_id": f"{dialogue.dialogue_id} {number} {place}",
                        "split": split,
                    },
                )
        for _ in turn.chosen[1:]:
            cure = "Leave the reply out"
            yield number, refusal(Reason.TIE, "if_chosen", True, "one chosen reply a turn", cure)
        if len(turn.chosen) > 0:
            prompt = [*prompt, {"role": "assistant", "content": turn.chosen[0]}]
