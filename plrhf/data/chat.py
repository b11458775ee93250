"""Chat prompts and responses, written by the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from plrhf.core.errors import bad_value
from plrhf.data.messages import ASSISTANT_ROLES
from plrhf.data.rows import Message
from plrhf.data.text_encoder import TextEncoder, Tokenizer, special_tokens, text_encoder

SYSTEM_ROLES = ("system", "developer")
PROBE, SECOND_PROBE = "plrhfprobeone", "plrhfprobetwo"
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError),
    *(AttributeError, ArithmeticError, RecursionError),
)


class TemplateRefusal(Exception):
    """A chat template cannot write a conversation; the message says why on one line."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt written by the chat template.

    Attributes:
        text: the text; spellings of control tokens in it are hidden, see `TextEncoder.hide`.
        continues: whether it ends inside an assistant's turn, which the response continues.
        trimmed: white space at the end of that turn which the template drops. The response starts with
            it, so that prompt and response together are complete.
    """

    text: str
    continues: bool = False
    trimmed: str = ""


class ChatTemplate:
    """A tokenizer's chat template, whose properties are found by rendering short test conversations.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._as_parts = False
        if PROBE not in (self._probe(_turns(PROBE)) or ""):
            self._as_parts = True
            self._as_parts = PROBE in (self._probe(_turns(PROBE)) or "")
        written = self._probe(_turns(PROBE, SECOND_PROBE, PROBE)) or ""
        added = (str(one) for one in tokenizer.added_tokens_decoder.values())
        control = special_tokens(tokenizer) | {
            one for one in added if one.strip() and one in written
        }
        self.encoder: TextEncoder = text_encoder(tokenizer, control)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes system turns (it may refuse them or leave them out)."""
        system = {"role": "system", "content": SECOND_PROBE}
        return SECOND_PROBE in (self._probe([system, *_turns(PROBE)]) or "")

    @cached_property
    def trims(self) -> bool:
        """Whether the template strips white space around a response."""
        trimmed, whole = (
            self._probe(_turns(PROBE, one)) for one in (SECOND_PROBE, f" {SECOND_PROBE} ")
        )
        return trimmed is not None and trimmed == whole

    @cached_property
    def response_edges(self) -> tuple[str, str]:
        """The texts that the template puts before and after a response within its turn.

        Before: white space behind the generation prompt, if any. After: all up to the control token
        that ends the turn, or the tokenizer's end token if there is no such token.
        """
        asked = self._probe(_turns(PROBE), add_generation_prompt=True) or ""
        turns_alone = self._probe(_turns(PROBE)) or ""
        answered = self._probe(_turns(PROBE, SECOND_PROBE)) or ""
        head, found, tail = answered.rpartition(SECOND_PROBE)
        eos = self.tokenizer.eos_token or ""
        if not found:
            return "", eos
        lead = head[len(asked) :] if head.startswith(asked) else ""
        opening = asked[len(turns_alone) :] if asked.startswith(turns_alone) else ""
        openers = self.encoder.control.findall(opening)
        if opening == "":  # the template opens a turn at every end, or never
            openers = self.encoder.control.findall(head.partition(PROBE)[2])[-1:]
        end = self.encoder.control.search(tail)
        if end is None:
            after = f"{tail.rstrip()}{eos}"
        elif end[0] in openers:  # the next turn begins, so this one has no end of its own
            after = f"{tail[: end.start()].rstrip()}{eos}"
        else:
            after = tail[: end.end()]
        return ("" if lead.strip() else lead), after

    def response(self, text: str, prompt: RenderedPrompt) -> str:
        """Return a response with the texts around it in its turn, see `response_edges`."""
        before, after = self.response_edges
        text = self.encoder.hide(text)
        if self.trims:
            text = text.rstrip() if prompt.continues else text.strip()
        return f"{prompt.trimmed if prompt.continues else before}{text}{after}"

    def prompt(
        self, messages: Sequence[Message], *, user_text: str | None = None, separator: str = "\n"
    ) -> RenderedPrompt:
        """Render a prompt up to the beginning of the response.

        The user text goes into the system turn or, if the template takes none, in front of the first
        user turn. If the last turn is the assistant's, it is left open.

        Raises:
            TemplateRefusal: the template refuses the conversation, or would leave out a part of it.
        """
        messages = [dict(message) for message in messages]
        if user_text is not None:
            messages = self._with_user_text(messages, user_text, separator or "\n")
        last = messages[-1]
        continues = last["role"] in ASSISTANT_ROLES
        if continues and last.get("tool_calls"):
            raise TemplateRefusal("the last turn calls a tool and has no result")
        if continues and not (last["content"] or "").strip():
            messages, continues = messages[:-1], False
        if len(messages) == 0:
            raise TemplateRefusal("no turn says anything")
        hidden = self.encoder.hide(messages)
        text = self._render(hidden, continues=continues)
        if not self.takes_system and any(one["role"] in SYSTEM_ROLES for one in messages):
            raise TemplateRefusal("the template has no system turn")
        for message in hidden:
            _check_written(message, text)
        said = hidden[-1]["content"] or ""
        trimmed = said[len(said.rstrip()) :] if continues and not text.endswith(said) else ""
        return RenderedPrompt(text, continues, trimmed)

    def _with_user_text(
        self, messages: list[Message], user_text: str, separator: str
    ) -> list[Message]:
        """Add the user text to the system turn, or else to the first user turn."""
        if self.takes_system and messages[0]["role"] not in SYSTEM_ROLES:
            return [{"role": "system", "content": user_text}, *messages]
        into = SYSTEM_ROLES if self.takes_system else ("user",)
        for place, message in enumerate(messages):
            if message["role"] in into:
                content = f"{user_text}{separator}{message['content'] or ''}"
                return [*messages[:place], {**message, "content": content}, *messages[place + 1 :]]
        raise TemplateRefusal("no turn has room for user_text")

    def _render(self, messages: list[Message], *, continues: bool) -> str:
        """Render messages. Null content is made empty if the template would print it as a word."""
        how = {"continue_final_message": continues, "add_generation_prompt": not continues}
        if all(one["content"] is not None for one in messages):
            return self._apply(messages, **how)
        blank = [{**one, "content": one["content"] or ""} for one in messages]
        try:
            with_null = self._apply(messages, **how)
        except TemplateRefusal:
            return self._apply(blank, **how)
        without = self._apply(blank, **how)
        return without if with_null.count("None") > without.count("None") else with_null

    def _apply(self, messages: Sequence[Message], **how: Any) -> str:
        """Call the template; raise a `TemplateRefusal` if it fails."""
        if self._as_parts:
            messages = [
                {**one, "content": [{"type": "text", "text": one["content"] or ""}]}
                for one in messages
            ]
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **how)
        except TEMPLATE_ERRORS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise TemplateRefusal(f"the chat template says: {said}") from error
        return text

    def _probe(self, messages: Sequence[Message], **how: Any) -> str | None:
        """Render a test conversation; None if the template refuses it."""
        try:
            return self._apply(messages, **how)
        except TemplateRefusal:
            return None


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the tokenizer's chat template.

    Raises:
        ValueError: it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise bad_value(
            "prompt",
            "messages",
            "text, as this tokenizer has no chat template",
            "Set backbone.chat_template=plain, or take a backbone whose tokenizer has one",
        )
    return ChatTemplate(tokenizer)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a response in a chat; None if the tokenizer has no template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    template = ChatTemplate(tokenizer)
    ids = template.encoder.encode_rendered(template.response_edges[1])
    return ids[-1] if len(ids) > 0 else None


def exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Divide a conversation into system turns and exchanges. An exchange begins with a user turn."""
    opening = 0
    while opening < len(messages) and messages[opening]["role"] in SYSTEM_ROLES:
        opening += 1
    groups: list[list[Message]] = []
    before = None
    for message in messages[opening:]:
        if len(groups) == 0 or (message["role"] == "user" and before != "user"):
            groups.append([])
        groups[-1].append(message)
        before = message["role"]
    return list(messages[:opening]), groups


def last_turns(messages: Sequence[Message], n_turns: int | None) -> Sequence[Message]:
    """Return the system turns and the last exchanges of a conversation; None: all of it."""
    system, groups = exchanges(messages)
    if n_turns is None or len(groups) <= n_turns:
        return messages
    return [*system, *(one for group in groups[-n_turns:] for one in group)]


def _turns(*contents: str) -> list[Message]:
    """Return a conversation with these contents, in which user and assistant alternate."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]


def _check_written(message: Message, text: str) -> None:
    """Raise a `TemplateRefusal` if a rendered text lacks the content or a tool call of a message."""
    for call in message.get("tool_calls") or ():
        called = call.get("function", call) if isinstance(call, dict) else {}
        name = called.get("name") if isinstance(called, dict) else None
        if isinstance(name, str) and name not in text:
            raise TemplateRefusal(f"the template leaves out the call of {name}")
    content = (message["content"] or "").strip()
    if message["role"] in ASSISTANT_ROLES:  # whose reasoning templates leave out by design
        return
    escaped = json.dumps(content, ensure_ascii=False)[1:-1]
    first_line = content.partition("\n")[0].strip()
    if not any(one in text for one in (content, escaped, first_line)):
        raise TemplateRefusal(f"the template leaves out the {message['role']} turn")
