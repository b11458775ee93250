"""Descriptions of people that a language model writes from their choices, and keeps if they predict others.

The idea is that of SynthesizeMe (Ryan et al. 2025, arXiv 2506.05598): hypotheses about a person are made
from some of the person's choices and tested on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from plrhf.data.in_context import show_pairs
from plrhf.data.rows import Row
from plrhf.data.split_by import uniform_hash
from plrhf.evaluation.chat_client import ChatClient, Messages
from plrhf.evaluation.chat_judge import question, read_answer

DESCRIBE = (
    "You describe readers by the choices they made between two answers to a request. Say in at most "
    "five sentences what this reader likes and dislikes in an answer, in style and in content, such that "
    "somebody else could tell which of two other answers the reader would prefer. Write nothing else."
)
NOBODY = "Nothing is known of this reader."


@dataclass(frozen=True)
class Persona:
    """What was found of a person.

    Attributes:
        text: the description; None if none predicted the person's held-out choices better than `NOBODY`.
        accuracy, baseline: share of held-out choices that the best description and `NOBODY` predict; a tie
            or an answer that cannot be read counts as one half.
    """

    user_id: str
    text: str | None
    accuracy: float
    baseline: float
    n_held_out: int


class PersonaWriter(ChatClient):
    """Writes and tests descriptions of people with a language model.

    Its settings are those of `ChatClient`. `request` is that of the questions; descriptions have
    `max_tokens` of their own.
    """

    def write(
        self,
        choices: Mapping[str, Sequence[Row]],
        *,
        n_hypotheses: int,
        shown: int,
        held_out: int,
        max_tokens: int,
        seed: int,
    ) -> list[Persona]:
        """Return the best description of each person with two choices or more.

        Args:
            choices: of each person, drawn from for everything.
            n_hypotheses: descriptions a person, each from another draw of `shown` choices.
            held_out: choices a description is tested on, at most half of the person's.
            max_tokens: of a description.

        Raises:
            ValueError: the endpoint fails for good.
        """
        parts = {
            user: divided(user, own, held_out=held_out, seed=seed)
            for user, own in choices.items()
            if len(own) >= 2
        }
        asked = [
            (user, _drawn(user, rest, shown, f"{seed} {number}"))
            for user, (rest, _) in parts.items()
            for number in range(n_hypotheses)
        ]
        replies = self.ask(
            [_describe(own) for _, own in asked], [user for user, _ in asked], max_tokens=max_tokens
        )
        found: dict[str, list[str]] = {user: [NOBODY] for user in parts}
        for (user, _), reply in zip(asked, replies, strict=True):
            if reply.text.strip() and not reply.refused and reply.text.strip() not in found[user]:
                found[user].append(reply.text.strip())
        tests = [(user, text) for user, texts in found.items() for text in texts]
        accuracies = self._predict([(user, text, parts[user][1]) for user, text in tests])
        of_user: dict[str, dict[str, float]] = {user: {} for user in parts}
        for (user, text), accuracy in zip(tests, accuracies, strict=True):
            of_user[user][text] = accuracy
        return [best_of(user, of_user[user], len(parts[user][1])) for user in parts]

    def _predict(self, tests: Sequence[tuple[str, str, Sequence[Row]]]) -> list[float]:
        """Return the share of a user's choices that each description predicts."""
        questions = [_question(text, row) for _, text, rows in tests for row in rows]
        replies = iter(self.ask(questions, [user for user, _, rows in tests for _ in rows]))
        found = []
        for _, _, rows in tests:
            right = []
            for row in rows:
                share = read_answer(next(replies))
                first = 0.5 if share is None else share
                right.append(first if _chosen_is_first(row) else 1 - first)
            found.append(fmean(right))
        return found


def best_of(user: str, accuracy: Mapping[str, float], n_held_out: int) -> Persona:
    """Return the description that predicts best, or none if `NOBODY` predicts as well."""
    text, best = max(accuracy.items(), key=lambda one: one[1])  # the first of equal ones: nobody
    return Persona(user, None if text == NOBODY else text, best, accuracy[NOBODY], n_held_out)


def divided(
    user: str, rows: Sequence[Row], *, held_out: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Divide a person's choices into those to describe and those to predict, at most half of all.

    Choices on one prompt stay together, so that no description has read about what it predicts, unless
    there is a single prompt.
    """
    ordered = _drawn(user, rows, len(rows), f"{seed} held out")
    tested = min(held_out, len(rows) // 2)
    prompts = {row.prompt_id for row in ordered[:tested]}
    rest = [row for row in ordered[tested:] if row.prompt_id not in prompts]
    return rest or ordered[tested:], ordered[:tested]


def _drawn(user: str, rows: Iterable[Row], n: int, salt: str) -> list[Row]:
    """Draw so many rows by a hash."""

    def place(row: Row) -> float:
        return uniform_hash(f"{user} {row.pair_id}", salt=f"persona {salt}", seed=0)

    return sorted(rows, key=place)[:n]


def _describe(rows: Sequence[Row]) -> Messages:
    """Return the messages that ask for a description."""
    shown = f"{show_pairs(rows)}\nDescribe the reader who preferred these answers."
    return [{"role": "system", "content": DESCRIBE}, {"role": "user", "content": shown}]


def _question(text: str, row: Row) -> Messages:
    """Return the messages that ask which response somebody prefers, in an order drawn by a hash."""
    answers = (row.chosen, row.rejected)
    return question(text, row.prompt, *(answers if _chosen_is_first(row) else answers[::-1]))


def _chosen_is_first(row: Row) -> bool:
    """Whether the chosen response is shown first: by the two texts alone, whichever was chosen."""
    first, second = sorted((row.chosen, row.rejected))
    key = f"{row.prompt_id} {first} {second}"
    shown = first if uniform_hash(key, salt="persona order", seed=0) < 0.5 else second
    return row.chosen == shown
