"""The bodies of requests. Unknown fields are refused, so that none is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from plrhf.serving.store import MOST_ID

MOST_CHOICES, MOST_STOPS, MOST_PAIRS, MOST_TEXTS = 16, 4, 100, 100
MOST_SEED = 2**63 - 1


def _storable(text: str) -> str:
    """Refuse text that no database and no tokenizer takes."""
    if "\x00" in text:
        raise ValueError("must not contain the character NUL")
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError("must not contain halves of a character (lone surrogates)")
    return text


def _addressable(text: str) -> str:
    """Refuse ids that no URL can hold, as clients resolve "." and ".." in a path."""
    if not text.isprintable() or "/" in text or not text.strip() or text in (".", ".."):
        raise ValueError("must be printable, without a slash, not blank and not a dot or two")
    return text


Text = Annotated[str, AfterValidator(_storable)]
Name = Annotated[
    str, StringConstraints(min_length=1, max_length=MOST_ID), AfterValidator(_addressable)
]
"""A person's id."""


class Body(BaseModel):
    """A body whose numbers are numbers, and in which nothing unknown stands."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message as rows of preference data have it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": self.role, "content": content}


Prompt = Text | list[ChatMessage]


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False


Number = Annotated[float, Field(allow_inf_nan=False)]


class ChatRequest(Body):
    """The body of POST /v1/chat/completions, OpenAI's schema and `best_of`."""

    model: Text
    messages: list[ChatMessage] = Field(min_length=1)
    user: Name | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: Text | list[Text] | None = None
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """Return the stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ScoreInput(Body):
    """A response to score, for a person or for nobody in particular."""

    prompt: Prompt
    response: Text
    user: Name | None = None


class ScoreRequest(Body):
    """The body of POST /v1/score."""

    inputs: list[ScoreInput] = Field(min_length=1, max_length=MOST_TEXTS)


class PersonRequest(Body):
    """The body of PUT /v1/users/{id}."""

    consent: bool


class PairInput(Body):
    """A judgment, a row of preference data without its user."""

    prompt: Prompt
    chosen: Text
    rejected: Text
    verdict: Literal["prefer", "tie", "skip"] = "prefer"


class PairsRequest(Body):
    """The body of POST /v1/users/{id}/pairs."""

    pairs: list[PairInput] = Field(min_length=1, max_length=MOST_PAIRS)


def plain_prompt(prompt: Any) -> Any:
    """Return a prompt of a request as rows of preference data have it."""
    return prompt if isinstance(prompt, str) else [message.plain() for message in prompt]
