"""PRISM: people from 75 countries choose among replies of language models, and describe themselves.

The data are the files ``survey`` and ``conversations`` of ``HannahRoseKirk/prism-alignment`` (Kirk
et al. 2024). Users, dialogues and pairs are selected as in P-RLHF (arXiv 2402.05133).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.rows import Features
from plrhf.data.sources.base import Source, refuse_shared_prompts
from plrhf.data.sources.files import HubFiles, data_files, files_by_stem, read_files
from plrhf.data.sources.formats import Record
from plrhf.data.split_by import uniform_hash
from plrhf.data.splits import is_unseen_user

HUB = HubFiles("HannahRoseKirk/prism-alignment", ("survey.jsonl", "conversations.jsonl"))
BLANK = "EMPTY STRING"
"""Upstream's placeholder for a missing text."""

VALUES = (
    *("values", "creativity", "fluency", "factuality"),
    *("diversity", "safety", "personalisation", "helpfulness"),
)
"""Qualities of an answer whose importance people rated from 0 to 100 in ``stated_prefs``."""

CATEGORIES = (
    *("age", "gender", "education", "employment_status", "marital_status"),
    *("english_proficiency", "lm_familiarity", "lm_frequency_use"),
    *("religion.categorised", "ethnicity.categorised", "location.special_region"),
)
"""Survey columns that become category features. A dot separates the names of a nested column."""


@dataclass(frozen=True)
class _Person:
    """The user text and the user features of a participant of the survey."""

    text: str | None
    features: Features


@dataclass(frozen=True)
class _Dialogue:
    """A conversation: its id, its user, and all messages in upstream's format."""

    dialogue_id: str
    user_id: str
    history: list[Mapping[str, Any]]


@dataclass(frozen=True)
class _Turn:
    """One turn of a dialogue: a message of the user and the replies to it."""

    message: Any
    chosen: list[Any]  # the replies marked as chosen; one, unless upstream is inconsistent
    rejected: list[tuple[int, Any]]  # all other replies, with their index among the turn's replies


class PrismSource(Source):
    """Makes a pair of every rejected reply and the chosen reply of the same turn.

    The prompt is the dialogue so far, with the chosen replies. The survey columns in `CATEGORIES` and
    the ratings of `VALUES` are the user features. Self-description and ratings in words are the user
    text. Users without a finished conversation are left out.

    Every dialogue belongs to one split. All dialogues of an unseen user are test. Of the n dialogues
    of another user ``int(n * (1 - test_fraction))`` are train or val and the rest test. A user with a
    single dialogue is therefore unseen as well.

    Args:
        path: the dataset's name on the hub, or a directory with survey and conversations (.jsonl,
            .json, .parquet).
        protocol: ``paper``, or ``disjoint``, which leaves out pairs whose prompt is in a later split
            too, e.g. an opening such as "Hello".
        unseen_fraction: fraction of the users drawn to be unseen.
        test_fraction: fraction of a seen user's dialogues that become test.
        val_fraction: fraction of the other dialogues that become val; a user's first one is train.
        seed: seed of all draws.
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
        """Yield the pairs of all dialogues, and the refusals of survey lines, dialogues and turns."""
        rows = self._rows()
        yield from refuse_shared_prompts(rows) if self.protocol == "disjoint" else rows

    def profile(self, user_id: str) -> str | None:
        """Return the user's self-description and stated preferences."""
        person = self._people.get(user_id)
        return None if person is None else person.text

    def _rows(self) -> Iterator[tuple[str, Record]]:
        """Read both files, and yield what `records` does before shared prompts are refused."""
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
            found = self._parse_dialogue(record)
            if isinstance(found, Refusal):
                yield where, found
            else:
                dialogues.append((where, found))
        splits = self._assign_splits([one for _, one in dialogues])
        for where, one in dialogues:
            person, split = self._people[one.user_id], splits[one.dialogue_id]
            for turn, row in _rows_of_dialogue(one, person, split):
                yield f"{where} turn {turn}", row

    def _add_person(self, record: Record) -> Refusal | None:
        """Parse a line of the survey and keep its person, or return why it is refused."""
        if isinstance(record, Refusal):
            return record
        user = record.get("user_id")
        if not isinstance(user, str) or user in self._people:
            cure = "Mend or remove the line"
            return refusal(Reason.BAD_SHAPE, "user_id", user, "text used once", cure)
        if record.get("num_completed_conversations") == 0:
            allowed, cure = "a user who finished one", "Leave the user out"
            return refusal(Reason.NO_CONVERSATION, "num_completed_conversations", 0, allowed, cure)
        self._people[user] = _parse_person(record)
        return None

    def _parse_dialogue(self, record: Record) -> _Dialogue | Refusal:
        """Parse a conversation, or return why it is refused."""
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

    def _assign_splits(self, dialogues: list[_Dialogue]) -> dict[str, str]:
        """Draw the split of every dialogue, and return it by dialogue id."""
        of_user: dict[str, list[str]] = {}
        for one in dialogues:
            of_user.setdefault(one.user_id, []).append(one.dialogue_id)
        splits: dict[str, str] = {}
        for user, ids in of_user.items():
            unseen = is_unseen_user(user, seed=self.seed, unseen_fraction=self.unseen_fraction)
            n_train = 0 if unseen else int(len(ids) * (1 - self.test_fraction))
            # By hash, so that one more dialogue does not change the split of the others.
            ids.sort(key=lambda dialogue: uniform_hash(dialogue, salt="dialogue", seed=self.seed))
            for place, dialogue in enumerate(ids):
                draw = uniform_hash(dialogue, salt="val dialogue", seed=self.seed)
                is_val = place > 0 and draw < self.val_fraction
                splits[dialogue] = "test" if place >= n_train else "val" if is_val else "train"
        return splits


def _parse_person(record: Mapping[str, Any]) -> _Person:
    """Make the user text and the user features from a line of the survey."""
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
    """Whether a value is a list of messages with a turn number and a known role."""
    return isinstance(value, list) and all(
        isinstance(one, Mapping)
        and isinstance(one.get("turn"), int)
        and one.get("role") in ("user", "model")
        for one in value
    )


def _group_by_turn(history: list[Mapping[str, Any]]) -> dict[int, _Turn]:
    """Group the messages of a dialogue by turn number. A turn keeps its first user message only."""
    turns: dict[int, _Turn] = {}
    for number in sorted({one["turn"] for one in history}):
        messages = [one for one in history if one["turn"] == number]
        replies = [one for one in messages if one["role"] == "model"]
        from_user = [_text_of(one) for one in messages if one["role"] == "user"]
        turns[number] = _Turn(
            message=from_user[0] if len(from_user) > 0 else None,
            chosen=[_text_of(one) for one in replies if one.get("if_chosen") is True],
            rejected=[
                (index, _text_of(one))
                for index, one in enumerate(replies)
                if one.get("if_chosen") is not True
            ],
        )
    return turns


def _text_of(message: Mapping[str, Any]) -> Any:
    """Return a message's content, with upstream's placeholder for a missing text made empty."""
    content = message.get("content")
    return "" if isinstance(content, str) and content.strip() == BLANK else content


def _rows_of_dialogue(
    dialogue: _Dialogue, person: _Person, split: str
) -> Iterator[tuple[int, Record]]:
    """Yield the rows and refusals of a dialogue, each with the number of its turn.

    Only the first reply marked as chosen is used; the others are refused as ties.
    """
    prompt: list[dict[str, Any]] = []
    for number, turn in _group_by_turn(dialogue.history).items():
        prompt = [*prompt, {"role": "user", "content": turn.message}]
        if turn.message is None or turn.message == "":
            cure = "Leave the turn out"
            yield number, refusal(Reason.EMPTY_PROMPT, "content", turn.message, "text", cure)
        elif len(turn.chosen) == 0 or len(turn.rejected) == 0:
            shown = f"{len(turn.chosen)} chosen, {len(turn.rejected)} rejected"
            allowed, cure = "a chosen and a rejected reply", "Leave the turn out"
            yield number, refusal(Reason.NO_PAIR, "if_chosen", shown, allowed, cure)
        else:
            for index, rejected in turn.rejected:
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
                        "pair_id": f"{dialogue.dialogue_id} {number} {index}",
                        "conversation_id": dialogue.dialogue_id,
                        "split": split,
                    },
                )
        for _ in turn.chosen[1:]:
            cure = "Leave the reply out"
            yield number, refusal(Reason.TIE, "if_chosen", True, "one chosen reply a turn", cure)
        if len(turn.chosen) > 0:
            prompt = [*prompt, {"role": "assistant", "content": turn.chosen[0]}]
