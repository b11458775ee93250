"""Text to token ids, with control tokens only where the caller puts them and never from the text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

Tokenizer = Any
"""A transformers tokenizer; typed loosely so that this file does not import transformers."""

Ids = tuple[int, ...]


LIBRARIES = ("tokenizers", "transformers", "jinja2")
"""Libraries whose version may change the tokens; the last applies chat templates."""

NOT_OF_THE_TOKENS = {
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
    *("cache_dir", "token", "local_files_only", "_commit_hash"),
}
"""Arguments of a tokenizer that say where it is stored and do not affect tokens."""

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""Tokens with which SentencePiece writes single bytes. They are text, although some files mark them as
special."""


def tokenizer_state(tokenizer: Tokenizer) -> list[Any] | None:
    """Return a fast tokenizer's whole state as JSON-able values; None for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    kind = type(tokenizer)
    made_with = {k: v for k, v in tokenizer.init_kwargs.items() if k not in NOT_OF_THE_TOKENS}
    return [
        [f"{name} {version(name)}" for name in LIBRARIES],
        f"{kind.__module__}.{kind.__qualname__}",
        backend.to_str(),
        json.dumps(made_with, sort_keys=True, default=str),
        tokenizer.chat_template,
    ]


def special_tokens(tokenizer: Tokenizer) -> set[str]:
    """Return the spellings of the tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(str(one) for one in added if one.special)}
    return {one for one in special if one != "" and not BYTE_TOKEN.fullmatch(one)}


class TextEncoder:
    """Encodes texts so that the spelling of a control token in a text is never the control token.

    It uses a copy of a fast tokenizer in which control tokens have names that no text contains. The
    option `split_special_tokens` is not enough, because Unigram, WordLevel and some BPE models have
    the spelling of a control token in their vocabulary. For all other texts the ids are those of the
    tokenizer itself.

    Args:
        tokenizer: fast or slow.
        control: spellings of its control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, control: Collection[str]) -> None:
        self.tokenizer = tokenizer
        secret = secrets.token_hex(12)
        self._name = {one: f"<{secret}-{n}>" for n, one in enumerate(sorted(control))}
        self._hidden = {one: f"w{secret}x{n}x" for n, one in enumerate(sorted(control))}
        longest_first = sorted(control, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._shown = {hidden: one for one, hidden in self._hidden.items()}
        self._hidden_word = re.compile(f"w{secret}x[0-9]+x")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = None if backend is None else _renamed(backend, self._name)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts, without special tokens."""
        if self._backend is None:
            return [self._slowly(text) for text in texts]
        # The fast one leaves out where each token stands in its text.
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [tuple(one.ids) for one in found]

    def hide(self, value: Any) -> Any:
        """Replace the spellings of control tokens in messages by placeholders.

        In the rendered chat, the control tokens of the template can then be told from them.
        """
        if isinstance(value, str):
            return self.control.sub(lambda found: self._hidden[found[0]], value)
        if isinstance(value, dict):
            return {key: self.hide(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(one) for one in value]
        return value

    def show(self, text: str) -> str:
        """Put back what `hide` replaced."""
        return self._hidden_word.sub(lambda found: self._shown.get(found[0], found[0]), text)

    def encode_rendered(self, text: str) -> Ids:
        """Encode a rendered chat: the template's control tokens, and hidden spellings as plain text."""
        if self._backend is not None:
            named = self.control.sub(lambda found: self._name[found[0]], text)
            return self.encode([self.show(named)])[0]
        ids: list[int] = []
        start = 0
        for found in self.control.finditer(text):
            ids += self._slowly(self.show(text[start : found.start()]))
            ids.append(self.tokenizer.convert_tokens_to_ids(found[0]))
            start = found.end()
        return (*ids, *self._slowly(self.show(text[start:])))

    def _slowly(self, text: str) -> Ids:
        """Encode a text with a slow tokenizer."""
        if text == "":
            return ()
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(found["input_ids"])


def _renamed(backend: Any, name: dict[str, str]) -> Any:
    """Return a copy of a fast tokenizer's backend with renamed tokens.

    Args:
        name: new names by old name.
    """
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    for token in state["added_tokens"]:
        token["content"] = name.get(token["content"], token["content"])
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {name.get(piece, piece): number for piece, number in vocab.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[name.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = name.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [one for one in model["merges"] if not _touches(one, name)]
    return Backend.from_str(json.dumps(state, ensure_ascii=False))


def _touches(merge: Any, name: dict[str, str]) -> bool:
    """Return whether a BPE merge involves one of the names."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first in name or second in name or first + second in name


_encoders: WeakKeyDictionary[Any, tuple[tuple[Any, ...], TextEncoder]] = WeakKeyDictionary()


def text_encoder(tokenizer: Tokenizer, control: Collection[str]) -> TextEncoder:
    """Return the `TextEncoder` of a tokenizer. It is cached, as making one takes up to a second."""
    key = (len(tokenizer), frozenset(control))
    found = _encoders.get(tokenizer)
    if found is None or found[0] != key:
        found = _encoders[tokenizer] = (key, TextEncoder(tokenizer, control))
    return found[1]
