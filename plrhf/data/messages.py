"""Checks chat messages, and converts TRL's forms of preference data to prompt and responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from plrhf.data.reasons import Reason, refuse, refuse_surrogates
from plrhf.data.rows import Message

MESSAGE_FIELDS = (
    *("role", "content", "name", "tool_calls", "tool_call_id"),
    *("reasoning_content", "thinking"),
)
"""Fields of a message that the chat template gets; others are left out."""

TEXT_PARTS = ("text", "input_text", "output_text")
ASSISTANT_ROLES = ("assistant", "model")


def is_message_list(value: object) -> bool:
    """Whether a value is a list of objects, as no field but messages is."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(one, Mapping) for one in value)
    )


def parse_messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Check a list of chat messages and return it with the fields that chat templates read.

    Fields that are null are left out, except the content of a message with tool calls. Content in
    text parts is joined by line breaks.

    Raises:
        RefusedRow: a message without role or content, or content that is not text.
    """
    return tuple(_message(entry, f"{field}[{n}]", where) for n, entry in enumerate(value))


def _message(entry: object, field: str, where: str) -> Message:
    """Check one message, and return it with the fields that chat templates read."""
    if not isinstance(entry, Mapping):
        cure = 'Write the prompt as text or as [{"role": "user", "content": "..."}]'
        refuse(Reason.NOT_TEXT, where, field, entry, "an object with role and content", cure)
    message = {key: entry[key] for key in MESSAGE_FIELDS if entry.get(key) is not None}
    if "content" in message and not isinstance(message["content"], str):
        message["content"] = _joined_parts(message["content"], f"{field}.content", where)
    if len(message.get("tool_calls", ())) > 0:
        message.setdefault("content", None)
    for key in ("role", "content"):
        if key not in message:
            cure = "Give every message a role and a content"
            allowed = "a value in every message"
            refuse(Reason.MISSING_FIELD, where, f"{field}.{key}", None, allowed, cure)
    if not isinstance(message["role"], str):
        cure = "Write e.g. user or assistant"
        refuse(Reason.NOT_TEXT, where, f"{field}.role", message["role"], "text", cure)
    try:
        texts = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in message.values()
        ]
    except (TypeError, ValueError, RecursionError):
        cure = "Write dates and numbers of tool calls as JSON has them"
        refuse(Reason.BAD_MESSAGES, where, field, entry, "JSON values", cure)
    for text in texts:
        refuse_surrogates(text, where, field, entry)
    return message


def _joined_parts(parts: object, field: str, where: str) -> str:
    """Join the text parts of a message's content by line breaks; other kinds of parts are refused."""
    texts = []
    for n, part in enumerate(parts if isinstance(parts, (list, tuple)) else [parts]):
        text = part
        if isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS:
            text = part.get("text")
        if not isinstance(text, str) or not isinstance(part, Mapping):
            cure = "Leave out images, audio and other parts that are not text"
            name = f"{field}[{n}]" if isinstance(parts, (list, tuple)) else field
            refuse(Reason.NOT_TEXT, where, name, part, "text or text parts", cure)
        texts.append(text)
    return "\n".join(texts)


def has_content(messages: tuple[Message, ...]) -> bool:
    """Whether any message has text or a tool call."""
    return any((one["content"] or "").strip() or one.get("tool_calls") for one in messages)


def split_conversations(
    prompt: Any, chosen: Any, rejected: Any, where: str
) -> tuple[Any, str, str]:
    """Split two conversations (TRL's conversational forms) into a prompt and two responses.

    The messages that both begin with are the prompt, behind those of an explicit prompt. What is
    left of each conversation must be one message of the assistant.

    Args:
        prompt: None (implicit), text or messages.
        chosen, rejected: lists of messages.

    Returns:
        The prompt (as messages) and the texts of the two responses.

    Raises:
        RefusedRow: a message that cannot be read, or more than one message behind the shared ones.
    """
    ours = parse_messages(chosen, "chosen", where)
    theirs = parse_messages(rejected, "rejected", where)
    n_shared = 0
    while n_shared < min(len(ours), len(theirs)) - 1 and ours[n_shared] == theirs[n_shared]:
        n_shared += 1
    before, shared = _prompt_messages(prompt, where), ours[:n_shared]
    if shared[: len(before)] != before and not _ends_with(shared, before):
        shared = before + shared
    texts = []
    for name, conversation in (("chosen", ours), ("rejected", theirs)):
        rest = conversation[n_shared:]
        if (
            len(rest) != 1
            or rest[0]["role"] not in ASSISTANT_ROLES
            or rest[0].get("tool_calls")
            or not isinstance(rest[0]["content"], str)
        ):
            allowed = (
                "one assistant's text message behind the messages that chosen and rejected share"
            )
            cure = "Leave the row out, or compare single replies"
            refuse(Reason.BAD_MESSAGES, where, name, list(rest), allowed, cure)
        texts.append(rest[0]["content"])
    return (list(shared) if len(shared) > 0 else None), texts[0], texts[1]


def _prompt_messages(prompt: Any, where: str) -> tuple[Message, ...]:
    """Return a prompt (None, text or messages) as messages; text is a user turn."""
    if prompt is None:
        return ()
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if not is_message_list(prompt):
        cure = 'Write the prompt as text or as [{"role": "user", "content": "..."}]'
        refuse(Reason.NOT_TEXT, where, "prompt", prompt, "text or messages", cure)
    return parse_messages(prompt, "prompt", where)


def _ends_with(messages: tuple[Message, ...], tail: tuple[Message, ...]) -> bool:
    return len(tail) > 0 and messages[-len(tail) :] == tail


def shared_beginning(chosen: str, rejected: str) -> str:
    """Return the text that both responses begin with, TRL's implicit prompt.

    As in TRL, a space at its end belongs to the responses.
    """
    n_shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        n_shared += 1
    if n_shared > 0 and chosen[n_shared - 1] == " ":
        n_shared -= 1
    return chosen[:n_shared]
