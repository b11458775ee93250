"""From the texts of rows to token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.packing import TokenPair
from plrhf.data.rows import Row, content_hash
from plrhf.data.store import in_blocks

Tokenizer = Any
"""A transformers tokenizer; typed loosely so that this file does not import transformers."""

ON_LONG_PROMPT = ("truncate", "error")
MOST_TEXTS = 30_000  # whose tokens are kept at hand, as texts come again

TOKENISATION = 2
"""Raise it whenever the code makes other tokens of the same text: old files are then not read."""

LIBRARIES = ("tokenizers", "transformers", "jinja2")
"""Libraries whose version may change the tokens; the last applies chat templates."""

NOT_OF_THE_TOKENS = {
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
    *("cache_dir", "token", "local_files_only", "_commit_hash"),
}
"""What a tokenizer was made with that says where it lies, and nothing of its tokens."""


class RowTokenizer:
    """Rows -> token pairs, counting what is cut and what does not fit.

    A too-long prompt keeps its end, which holds the instruction or the last turn; a response is
    never cut: its row is dropped and counted.

    Args:
        tokenizer: with an end or separator token.
        max_prompt_tokens: longest prompt, start token included, from 1 (from 0 where there is a
            start token: a bidirectional encoder may do without the text).
        max_tokens: longest prompt and response together.
        on_long_prompt: ``truncate`` (count it) or ``error``.
        separator: text between prompt and response, where no chat template says.
        use_user_text: put the row's `user_text` in front of the prompt.

    Raises:
        ValueError: `max_prompt_tokens` or `on_long_prompt` out of range.

    Attributes:
        counts: rows by what was done to them: "prompt truncated", "response too long".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int,
        max_tokens: int,
        on_long_prompt: str = "truncate",
        separator: str = "\n",
        use_user_text: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_tokens
        self.on_long_prompt = on_long_prompt
        self.separator = separator
        self.use_user_text = use_user_text
        self.counts: Counter[str] = Counter({"prompt truncated": 0, "response too long": 0})
        causal_end = tokenizer.eos_token_id
        self.end: int = tokenizer.sep_token_id if causal_end is None else causal_end
        self.encoder_only = causal_end is None
        first = tokenizer.cls_token_id if self.encoder_only else tokenizer.bos_token_id
        self.start: tuple[int, ...] = () if first is None else (first,)
        least = 1 - len(self.start)  # something must stand before a response's first token
        if max_prompt_tokens < least:
            raise bad_value(
                "data.max_prompt_tokens",
                max_prompt_tokens,
                f"a whole number from {least}",
                "Set data.max_prompt_tokens=512",
            )
        if on_long_prompt not in ON_LONG_PROMPT:
            raise bad_value(
                "data.on_long_prompt",
                on_long_prompt,
                " or ".join(ON_LONG_PROMPT),
                "Set data.on_long_prompt=truncate",
            )
        self._ids: dict[str, tuple[int, ...]] = {}

    def __call__(self, rows: Iterable[Row]) -> tuple[list[Row], list[TokenPair]]:
        """Rows that fit, and their tokens, in the order given."""
        kept, pairs = [], []
        for block in in_blocks(rows):
            for row, (pair, cut) in zip(block, self.tokens(block), strict=True):
                fits = pair.longest <= self.max_tokens
                self.counts["prompt truncated"] += cut
                self.counts["response too long"] += not fits
                if fits:
                    kept.append(row)
                    pairs.append(pair)
        return kept, pairs

    def tokens(self, rows: Sequence[Row]) -> list[tuple[TokenPair, bool]]:
        """Each row's tokens, and whether its prompt was cut; new texts are tokenised at one go."""
        if len(self._ids) > MOST_TEXTS:
            self._ids.clear()
        prompts = [self._prompt_text(row) for row in rows]
        self._learn(prompts)
        self._learn([text for row in rows for text in (row.chosen, row.rejected)])
        found = []
        for row, text in zip(rows, prompts, strict=True):
            prompt, cut = self._fitted(row, self._ids[text])
            pair = TokenPair(prompt, self.response(row.chosen), self.response(row.rejected))
            found.append((pair, cut))
        return found

    def prompt(self, row: Row) -> tuple[int, ...]:
        """Prompt tokens, special ones included, cut from the front to `max_prompt_tokens`."""
        prompt, cut = self._fitted(row, self._encode(self._prompt_text(row)))
        self.counts["prompt truncated"] += cut
        return prompt

    def response(self, text: str) -> tuple[int, ...]:
        """Response tokens with the end token, which is learned and scored like any other."""
        return (*self._encode(text), self.end)

    def digest(self) -> str | None:
        """Hash all that decides the tokens of a text; None if the tokenizer cannot be serialised.

        This is the tokenizer's class and whole state, the settings, the versions of the libraries that
        apply them, and `TOKENISATION`.
        """
        pieces = getattr(self.tokenizer, "backend_tokenizer", None)
        if pieces is None:
            return None
        kind = type(self.tokenizer)
        state = {
            name: value
            for name, value in self.tokenizer.init_kwargs.items()
            if name not in NOT_OF_THE_TOKENS
        }
        return content_hash(
            TOKENISATION,
            [f"{name} {version(name)}" for name in LIBRARIES],
            f"{kind.__module__}.{kind.__qualname__}",
            pieces.to_str(),
            json.dumps(state, sort_keys=True, default=str),
            self.tokenizer.chat_template,
            [self.start, self.end, self.encoder_only],
            [self.max_prompt_tokens, self.on_long_prompt, self.separator, self.use_user_text],
        )

    def _fitted(self, row: Row, ids: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """The prompt of these tokens, and whether it was cut."""
        end = (self.end,) if self.encoder_only else ()
        special = len(self.start) + len(end)
        room = max(0, self.max_prompt_tokens - special)
        cut = len(ids) > room
        if cut and self.on_long_prompt == "error":
            raise bad_value(
                "prompt",
                f"{special + len(ids)} tokens (pair {row.pair_id})",
                f"at most data.max_prompt_tokens={self.max_prompt_tokens}",
                "Raise data.max_prompt_tokens, or set data.on_long_prompt=truncate",
            )
        ids = ids[len(ids) - room :] if cut else ids
        return self.start + ids + (end if len(ids) > 0 else ()), cut

    def _learn(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if len(new) > 0:
            tokens = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            self._ids.update(zip(new, map(tuple, tokens), strict=True))

    def _encode(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            self._learn([text])
        return self._ids[text]

    def _prompt_text(self, row: Row) -> str:
        if isinstance(row.prompt, str):
            text = row.prompt + self.separator
            if self.use_user_text and row.user_text is not None:
                text = row.user_text + self.separator + text
            return text
        if self.tokenizer.chat_template is None:
            raise bad_value(
                "prompt",
                row.prompt,
                "text, as this tokenizer has no chat template",
                "Give prompts as text, or a backbone whose tokenizer has a chat template",
            )
        messages = [dict(message) for message in row.prompt if isinstance(message, dict)]
        if self.use_user_text and row.user_text is not None:
            messages.insert(0, {"role": "system", "content": row.user_text})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        start_text = self.tokenizer.bos_token
        if self.start and start_text is not None and text.startswith(start_text):
            text = text[len(start_text) :]  # the start token is put there once, by `_fitted`
        return text
