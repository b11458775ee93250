"""Tokenises the texts of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from plrhf.core.errors import bad_value
from plrhf.data.chat import (
    ChatTemplate,
    RenderedPrompt,
    TemplateRefusal,
    chat_template,
    exchanges,
    last_turns,
)
from plrhf.data.digests import content_hash
from plrhf.data.packing import TokenPair
from plrhf.data.reasons import Reason, RefusedRow
from plrhf.data.rows import Message, Row
from plrhf.data.store import in_blocks
from plrhf.data.text_encoder import (
    Ids,
    Tokenizer,
    special_tokens,
    text_encoder,
    tokenizer_state,
)

__all__ = ["RowTokenizer", "TokenizedRow", "Tokenizer"]

ON_LONG_PROMPT = ("truncate", "error")
ON_LONG_RESPONSE = ("drop", "truncate")
MOST_TEXTS = 30_000  # whose tokens are kept at hand, as texts come again

TOKENISATION = 4
"""Version of the tokenisation. Increase it when a code change gives other tokens; old files are then
ignored."""


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """The tokens of a row, and whether they were truncated or refused.

    Attributes:
        history_cut: whether earlier turns than `history_turns` allows were left out.
        refused: why the chat template refuses the prompt, or None; if refused, there are no tokens.
    """

    pair: TokenPair
    prompt_cut: bool = False
    response_cut: bool = False
    history_cut: bool = False
    refused: str | None = None


EMPTY_PAIR = TokenPair((), (), ())


class RowTokenizer:
    """Turns rows into token pairs, and counts what is truncated or too long.

    A plain prompt that is too long keeps its end, and the user text in front. A chat that is too long
    loses its oldest exchanges; system turn and user text stay. The prompt of a chat is what the
    template writes, without a further start token, and a response ends as the template ends an
    assistant's turn. Texts never become control tokens, see `TextEncoder`.

    Args:
        tokenizer: with an end or separator token.
        max_prompt_tokens: longest prompt, start token included; at least 1, or 0 for tokenizers with a
            start token.
        max_tokens: longest prompt and response together.
        on_long_prompt: ``truncate`` (and count) or ``error``.
        on_long_response: what happens to rows longer than `max_tokens`: ``drop``, or ``truncate`` the
            responses. A truncated response keeps its end token, because reward models read there; a
            policy then learns to stop too early.
        separator: text between prompt and response if there is no chat template.
        use_user_text: put the row's `user_text` in front of the prompt.
        use_user_features: put the row's `user_features` there, too, as text, a line each.
        history_turns: how many of the last turns of a chat are kept, each beginning with the user's; None:
            all. System turns stay.

    Raises:
        ValueError: a setting out of range.

    Attributes:
        counts: number of rows by what was done: "prompt truncated", "response truncated", "response too
            long".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int,
        max_tokens: int,
        on_long_prompt: str = "truncate",
        on_long_response: str = "drop",
        separator: str = "\n",
        use_user_text: bool = False,
        use_user_features: bool = False,
        history_turns: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_tokens
        self.on_long_prompt, self.on_long_response = on_long_prompt, on_long_response
        self.separator = separator
        self.use_user_text, self.use_user_features = use_user_text, use_user_features
        self.history_turns = history_turns
        self.counts: Counter[str] = Counter(
            {"prompt truncated": 0, "response truncated": 0, "response too long": 0}
        )
        causal_end = tokenizer.eos_token_id
        self.end: int = tokenizer.sep_token_id if causal_end is None else causal_end
        self.encoder_only = causal_end is None
        first = tokenizer.cls_token_id if self.encoder_only else tokenizer.bos_token_id
        self.start: Ids = () if first is None else (first,)
        self._check_settings()
        self.encoder = text_encoder(tokenizer, special_tokens(tokenizer))
        self._ids: dict[tuple[str, str], Ids] = {}

    def _check_settings(self) -> None:
        """Raise a ValueError if a setting is out of range."""
        least = 1 - len(self.start)  # something must stand before a response's first token
        if self.max_prompt_tokens < least:
            raise bad_value(
                "data.max_prompt_tokens",
                self.max_prompt_tokens,
                f"a whole number from {least}",
                "Set data.max_prompt_tokens=512",
            )
        for name, value, allowed in (
            ("on_long_prompt", self.on_long_prompt, ON_LONG_PROMPT),
            ("on_long_response", self.on_long_response, ON_LONG_RESPONSE),
        ):
            if value not in allowed:
                cure = f"Set data.{name}={allowed[0]}"
                raise bad_value(f"data.{name}", value, " or ".join(allowed), cure)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return chat_template(self.tokenizer)

    def __call__(self, rows: Iterable[Row]) -> tuple[list[Row], list[TokenPair]]:
        """Tokenise rows; return the rows that fit and their tokens, in the same order.

        Raises:
            RefusedRow: the chat template refuses a row.
        """
        kept, pairs = [], []
        for block in in_blocks(rows):
            for row, found in zip(block, self.tokens(block), strict=True):
                if found.refused is not None:
                    raise RefusedRow(Reason.CHAT_TEMPLATE, found.refused)
                fits = found.pair.longest <= self.max_tokens
                self.counts["response too long"] += not fits
                if fits:
                    self.counts["prompt truncated"] += found.prompt_cut
                    self.counts["response truncated"] += found.response_cut
                    kept.append(row)
                    pairs.append(found.pair)
        return kept, pairs

    def tokens(self, rows: Sequence[Row]) -> list[TokenizedRow]:
        """Return the tokens of each row. All new texts are tokenised in one call."""
        if len(self._ids) > MOST_TEXTS:
            self._ids.clear()
        plain = [row for row in rows if isinstance(row.prompt, str)]
        self._tokenise_new("", [self._prompt_text(row) for row in plain])
        after = self._after_plain
        self._tokenise_new(after, [text for row in plain for text in (row.chosen, row.rejected)])
        return [self._tokenized(row) for row in rows]

    def _tokenized(self, row: Row) -> TokenizedRow:
        """Tokenise one row, and truncate it if the settings say so."""
        try:
            found = self._fitted(*self._pair(row))
            cut = self._history(row) is not row.prompt
            return replace(found, history_cut=True) if cut else found
        except TemplateRefusal as refusal:
            allowed = (
                f"a conversation that the chat template writes (pair {row.pair_id}: {refusal})"
            )
            cure = "Leave the row out, or take a tokenizer whose template takes it"
            return TokenizedRow(
                EMPTY_PAIR, refused=str(bad_value("prompt", row.prompt, allowed, cure))
            )

    def pair(self, row: Row) -> TokenPair:
        """Return the tokens of one row; long responses are not truncated.

        Raises:
            RefusedRow: the chat template refuses the row.
        """
        pair, cut = self._pair_or_refusal(row, responses=True)
        self.counts["prompt truncated"] += cut
        return pair

    def prompt(self, row: Row) -> Ids:
        """Return the prompt's tokens, special ones included, at most `max_prompt_tokens`.

        Raises:
            RefusedRow: the chat template refuses the row.
        """
        pair, cut = self._pair_or_refusal(row, responses=False)
        self.counts["prompt truncated"] += cut
        return pair.prompt

    def _pair_or_refusal(self, row: Row, *, responses: bool) -> tuple[TokenPair, bool]:
        """Do as `_pair`, with a `RefusedRow` if the chat template refuses the row."""
        try:
            return self._pair(row, responses=responses)
        except TemplateRefusal as refusal:
            allowed = f"a conversation that the chat template writes ({refusal})"
            cure = "Give other messages, or a tokenizer whose template takes them"
            message = str(bad_value("prompt", row.prompt, allowed, cure))
            raise RefusedRow(Reason.CHAT_TEMPLATE, message) from refusal

    def digest(self) -> str | None:
        """Hash everything that decides the tokens of a text; None if that is not possible.

        This is the tokenizer's class and state, the settings, the versions of the libraries, and
        `TOKENISATION`. A slow tokenizer cannot be hashed.
        """
        state = tokenizer_state(self.tokenizer)
        if state is None:
            return None
        settings = [self.max_prompt_tokens, self.on_long_prompt, self.separator, self.use_user_text]
        if self.on_long_response == "truncate":  # else it decides what fits, and no text's tokens
            settings += [self.max_tokens]
        settings += [self.use_user_features, self.history_turns]
        own = [TOKENISATION, self.start, self.end, self.encoder_only]
        return content_hash(own, state, settings)

    def _pair(self, row: Row, *, responses: bool = True) -> tuple[TokenPair, bool]:
        """Return the row's tokens, and whether the prompt was cut."""
        texts = (row.chosen, row.rejected) if responses else ()
        if isinstance(row.prompt, str):
            prompt, cut = self._plain_prompt(row)
            found = [(*self._encode(text, self._after_plain), self.end) for text in texts]
        else:
            prompt, cut, rendered = self._chat_prompt(row)
            found = [self._chat_response(text, rendered) for text in texts]
        return TokenPair(prompt, *(found or ((), ()))), cut

    def _fitted(self, pair: TokenPair, prompt_cut: bool) -> TokenizedRow:
        """Truncate responses to what fits into `max_tokens`, if the settings ask for it.

        Responses that would become equal are not truncated, so the row stays too long.
        """
        room = self.max_tokens - len(pair.prompt)
        if (
            pair.longest <= self.max_tokens
            or self.on_long_response == "drop"
            or room < 2  # a token and the end token
        ):
            return TokenizedRow(pair, prompt_cut)
        chosen, rejected = (
            one if len(one) <= room else (*one[: room - 1], one[-1])
            for one in (pair.chosen, pair.rejected)
        )
        cut = TokenPair(pair.prompt, chosen, rejected)
        if chosen == rejected:
            return TokenizedRow(pair, prompt_cut)
        return TokenizedRow(cut, prompt_cut, response_cut=True)

    # Prompts in text

    def _prompt_text(self, row: Row) -> str:
        """Return a plain prompt with user text and separator."""
        text, own = f"{row.prompt}{self.separator}", self.user_text(row)
        return text if own is None else f"{own}{self.separator}{text}"

    @property
    def reads_people(self) -> bool:
        """Whether tokens depend on what a row says of its user."""
        return self.use_user_text or self.use_user_features

    def user_text(self, row: Row) -> str | None:
        """Return what is said of the user in front of the row's prompt; None if nothing is."""
        parts = [row.user_text] if self.use_user_text and row.user_text is not None else []
        if self.use_user_features and row.user_features:
            shown = sorted(row.user_features.items())
            parts += [
                f"{name}: {one if isinstance(one, str) else f'{one:g}'}" for name, one in shown
            ]
        return "\n".join(parts) if len(parts) > 0 else None

    def _plain_prompt(self, row: Row) -> tuple[Ids, bool]:
        """Return the tokens of a plain prompt, and whether it was truncated."""
        end = (self.end,) if self.encoder_only else ()
        room = max(0, self.max_prompt_tokens - len(self.start) - len(end))
        ids = self._encode(self._prompt_text(row))
        cut = len(ids) > room
        if cut:
            self._check_may_cut(row, len(self.start) + len(ids) + len(end))
            user: Ids = ()
            own = self.user_text(row)
            if own is not None:  # at most half of the room is the user's
                user = self._encode(f"{own}{self.separator}")[: room // 2]
                ids = self._encode(f"{row.prompt}{self.separator}")
            left = room - len(user)
            ids = user + ids[max(0, len(ids) - left) :] if left > 0 else user
        return self.start + ids + (end if len(ids) > 0 else ()), cut

    def _check_may_cut(self, row: Row, n_tokens: int) -> None:
        """Raise a ValueError if long prompts are an error."""
        if self.on_long_prompt == "error":
            raise bad_value(
                "prompt",
                f"{n_tokens} tokens (pair {row.pair_id})",
                f"at most data.max_prompt_tokens={self.max_prompt_tokens}",
                "Raise data.max_prompt_tokens, or set data.on_long_prompt=truncate",
            )

    @cached_property
    def _after_plain(self) -> str:
        """The last character before a response, or an empty text if the tokenizer needs no context.

        Some tokenizers put a space in front of a text that is encoded alone.
        """
        return self._context(self.separator[-1:] or ":")

    def _context(self, before: str) -> str:
        """Return `before` if it affects how the tokenizer encodes the text after it, else an empty text."""
        (alone,) = self.encoder.encode(["a"])
        head, whole = self.encoder.encode([before, f"{before}a"])
        return before if whole[: len(head)] == head and whole[len(head) :] != alone else ""

    def _tokenise_new(self, before: str, texts: Iterable[str]) -> None:
        """Encode the texts that are not in the cache yet, each as it is encoded after `before`."""
        new = [text for text in dict.fromkeys(texts) if (before, text) not in self._ids]
        if len(new) == 0:
            return
        found = self.encoder.encode([before + text for text in new])
        if before != "":
            (head,) = self.encoder.encode([before])
            found = [
                whole[len(head) :] if whole[: len(head)] == head else self.encoder.encode([text])[0]
                for text, whole in zip(new, found, strict=True)
            ]
        self._ids.update(zip(((before, text) for text in new), found, strict=True))

    def _encode(self, text: str, before: str = "") -> Ids:
        """Return the tokens of a text after `before`, from the cache if possible."""
        if (before, text) not in self._ids:
            self._tokenise_new(before, [text])
        return self._ids[before, text]

    # Chats

    def _chat_prompt(self, row: Row) -> tuple[Ids, bool, RenderedPrompt]:
        """Return the tokens of a chat prompt, whether it was truncated, and the whole rendered prompt."""
        messages = self._history(row)
        assert not isinstance(messages, str)
        ids, rendered = self._rendered(row, messages)
        cut = len(ids) > self.max_prompt_tokens
        if cut:
            self._check_may_cut(row, len(ids))
            ids = self._shortened(row, messages)
        return ids, cut, rendered

    def _history(self, row: Row) -> str | Sequence[Message]:
        """Return the prompt; of a chat, its last `history_turns` turns."""
        if isinstance(row.prompt, str):
            return row.prompt
        return last_turns(row.prompt, self.history_turns)

    def _rendered(self, row: Row, messages: Sequence[Message]) -> tuple[Ids, RenderedPrompt]:
        """Render messages by the chat template and encode them."""
        found = self.chat.prompt(
            messages,
            user_text=self.user_text(row),
            separator=self.separator,
        )
        ids = self.chat.encoder.encode_rendered(found.text)
        if self.encoder_only:
            start = () if ids[: len(self.start)] == self.start else self.start
            ids = (*start, *ids, *((self.end,) if ids[-1:] != (self.end,) else ()))
        return ids, found

    def _shortened(self, row: Row, messages: Sequence[Message]) -> Ids:
        """Shorten a chat to `max_prompt_tokens`.

        It removes the oldest exchanges first, then the beginning of the last exchange's user turn. If
        system turn and user text alone are too long, it removes tokens from the front.
        """
        system, groups = exchanges(messages)
        for first in range(1, len(groups)):
            ids, _ = self._rendered(row, [*system, *(one for g in groups[first:] for one in g)])
            if len(ids) <= self.max_prompt_tokens:
                return ids
        last = groups[-1] if len(groups) > 0 else []
        content = (last[0]["content"] or "") if len(last) > 0 else ""
        whole, _ = self._rendered(row, [*system, *last])
        best: Ids | None = None
        low, high = 0, len(content)
        while low < high:  # the longest end of the turn that fits
            middle = (low + high) // 2
            opening = {**last[0], "content": content[middle:]}
            ids, _ = self._rendered(row, [*system, opening, *last[1:]])
            if len(ids) <= self.max_prompt_tokens:
                best, high = ids, middle
            else:
                low = middle + 1
        return best if best is not None else whole[-self.max_prompt_tokens :]

    def _chat_response(self, text: str, prompt: RenderedPrompt) -> Ids:
        """Return the tokens of a response in a chat, after its rendered prompt."""
        written = self.chat.response(text, prompt)
        encoder = self.chat.encoder
        before = self._chat_context(prompt.text)
        if before != "":
            head, whole = (encoder.encode_rendered(one) for one in (before, before + written))
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return encoder.encode_rendered(written)

    def _chat_context(self, prompt: str) -> str:
        """Return the end of a prompt that affects the first tokens of a response, see `_after_plain`."""
        tokens = list(self.chat.encoder.control.finditer(prompt))
        if len(tokens) > 0 and tokens[-1].end() == len(prompt):
            return tokens[-1][0]
        return self._context(self.chat.encoder.show(prompt)[-1:])
