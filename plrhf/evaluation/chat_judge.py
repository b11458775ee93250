"""A judge that asks a chat endpoint which of two texts a reader would like better."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.data.rows import Message
from plrhf.evaluation.chat_client import ChatClient, Messages
from plrhf.evaluation.chat_endpoint import Reply
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


class ChatJudge(ChatClient, Judge):
    """Asks a language model at an OpenAI-compatible endpoint, once for each order of the two texts.

    Its settings are those of `ChatClient`.
    """

    field = "eval.judge"

    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: nothing is known of a user, or the endpoint fails for good.
        """
        replies = self.ask(
            [
                _question_of(contest, first, second)
                for contest in contests
                for first, second in (
                    (contest.ours, contest.theirs),
                    (contest.theirs, contest.ours),
                )
            ],
            [contest.ours.user_id for contest in contests for _ in range(2)],
        )
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
        return Verdicts(wins=by_order, answers=answers, cost=self.cost())


def _question_of(contest: Contest, first: GeneratedText, second: GeneratedText) -> Messages:
    """Return the messages that ask about one order of a contest's two texts."""
    profile = contest.ours.profile
    if profile is None:
        raise bad_value(
            "profile",
            None,
            f"something to read about user {first.user_id}, as a chat judge knows nobody",
            "Give rows a user_text, or set eval/judge=reward",
        )
    return question(profile, first.prompt, first.response, second.response)


def question(profile: str, prompt: str | Sequence[Message], first: str, second: str) -> Messages:
    """Return the messages that ask which of two answers a reader would like better."""
    if not isinstance(prompt, str):
        prompt = shown_chat(prompt)
    asked = QUESTION.format(profile=profile, prompt=prompt, first=first, second=second)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": asked}]


def shown_chat(messages: Sequence[Message]) -> str:
    """Write a chat as lines with the role in front."""
    return "\n".join(f"{one['role']}: {one['content']}" for one in messages)


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
