"""Puts pairs of the user's own, as text, in front of prompts: few-shot prompting with preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from plrhf.core.errors import BadValue
from plrhf.data.chat import TemplateRefusal
from plrhf.data.dataset import PairDataset
from plrhf.data.own_pairs import TrainPairs
from plrhf.data.packing import TokenPair
from plrhf.data.rows import Row, Rows
from plrhf.data.text_encoder import Ids, Tokenizer
from plrhf.data.tokenizer import RowTokenizer, TokenizedRow
from plrhf.data.tokens import load_or_tokenize

OwnPairs = Mapping[str, Sequence[Row]]
"""Pairs of users by user id."""

EXAMPLE = (
    "# Example {number}\n## Question\n{prompt}\n## Preferred\n{chosen}\n## Dispreferred\n{rejected}"
)
TASK = "# Task"


class InContextTokenizer(RowTokenizer):
    """Tokenises rows with pairs of the user's own in front of the prompt.

    The pairs are written as in FSPO (Singh et al. 2025, arXiv 2502.19312), and stand where a user text
    stands (behind it, if there is one): in front of a plain prompt, else in the chat's system turn or first
    user turn.

    Args:
        own_pairs: pairs of the users that are known; other users' prompts stay as they are.
        use_user_text, use_user_features, options: see `RowTokenizer`.

    Attributes:
        whole: the tokenizer of rows that `with_pairs` has made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        own_pairs: OwnPairs | None = None,
        use_user_text: bool = False,
        use_user_features: bool = False,
        **options: Any,
    ) -> None:
        own = {"use_user_text": use_user_text, "use_user_features": use_user_features}
        super().__init__(tokenizer, **{**options, **own})
        self.own_pairs: OwnPairs = {} if own_pairs is None else own_pairs
        self.whole = RowTokenizer(tokenizer, use_user_text=True, **options)

    def with_pairs(self, row: Row, pairs: Sequence[Row]) -> Row:
        """Return the row with these pairs in its user text, as many of the first ones as there is room for.

        A pair with the prompt of the row and one of its responses would reveal the answer and is left out.
        """
        own = self.user_text(row)
        pairs = [pair for pair in pairs if not shares_text(pair, row)]
        for number in range(len(pairs), 0, -1):
            parts = [*([] if own is None else [own]), show_pairs(pairs[:number])]
            found = replace(row, user_text="\n".join(parts))
            if self._has_room(found):
                return found
        return replace(row, user_text=own)

    def tokens(self, rows: Sequence[Row]) -> list[TokenizedRow]:
        return self.whole.tokens([self._with_own(row) for row in rows])

    def pair(self, row: Row) -> TokenPair:
        return self.whole.pair(self._with_own(row))

    def prompt(self, row: Row) -> Ids:
        return self.whole.prompt(self._with_own(row))

    def _with_own(self, row: Row) -> Row:
        return self.with_pairs(row, self.own_pairs.get(row.user_id, ()))

    def _has_room(self, row: Row) -> bool:
        """Return whether a row with pairs fits as it is."""
        try:
            pair, cut = self.whole._pair(row)
        except (BadValue, TemplateRefusal):  # with on_long_prompt=error; no turn for them
            return False
        return not cut and pair.longest <= self.max_tokens


def row_tokenizer(
    tokenizer: Tokenizer, options: Mapping[str, Any], own_pairs: OwnPairs | None = None
) -> RowTokenizer:
    """Return the row tokenizer of a model's text options, which are `Card.text`."""
    others = {name: value for name, value in options.items() if name != "context_pairs"}
    if "context_pairs" in options:
        return InContextTokenizer(tokenizer, own_pairs=own_pairs, **others)
    return RowTokenizer(tokenizer, **others)


def show_pairs(pairs: Sequence[Row]) -> str:
    """Write pairs as text, in the form of FSPO."""
    shown = [
        EXAMPLE.format(
            number=number, prompt=_shown(pair), chosen=pair.chosen, rejected=pair.rejected
        )
        for number, pair in enumerate(pairs, 1)
    ]
    return "\n".join([*shown, TASK])


def _shown(row: Row) -> str:
    """Write a prompt as text, a chat as lines with the role in front."""
    if isinstance(row.prompt, str):
        return row.prompt
    turns = [one for one in row.prompt if one["content"]]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{one['role']}: {one['content']}" for one in turns)


def shares_text(one: Row, other: Row) -> bool:
    """Return whether two rows have a prompt and a response in common."""
    same_prompt = one.prompt_id == other.prompt_id or one.prompt == other.prompt
    return same_prompt and not {one.chosen, one.rejected}.isdisjoint((other.chosen, other.rejected))


def put_in_context(
    datasets: Mapping[str, PairDataset],
    tokenizer: InContextTokenizer,
    cache_dir: Path | None,
    *,
    least: int,
    most: int,
    seed: int,
) -> None:
    """Replace the tokens of all datasets by those with train pairs of the users in front of the prompts.

    A train pair has between `least` and `most` other pairs of its user, drawn once for all epochs, as
    tokens and the reference's values are computed once. Val and test pairs have the same `most` pairs
    of their user, by which `tokenizer` knows its users afterwards. The train rows are held in memory.
    """
    train = datasets["train"]
    rows = list(train.rows)
    drawn = TrainPairs(rows, train.user_id.numpy(), least=min(least, most), most=most, seed=seed)
    if len(rows) > 0:
        users = np.unique(train.user_id.numpy())
        fixed = [rows[place] for place in drawn.order[drawn.starts[users]]]  # a row of each
        places, present = drawn.draw_fixed(users)
        tokenizer.own_pairs = {
            one.user_id: [rows[place] for place in own[there]]
            for one, own, there in zip(fixed, places, present, strict=True)
        }

    def with_drawn() -> Iterator[Row]:
        everything = np.arange(len(rows))
        found = drawn.draw(train.user_id.numpy(), everything, drawn.texts, epoch=0)
        for row, own, there in zip(rows, *found, strict=True):
            yield tokenizer.with_pairs(row, [rows[place] for place in own[there]])

    for split, dataset in datasets.items():
        fixed_rows = (tokenizer._with_own(row) for row in dataset.rows)
        in_context = Rows.from_rows(with_drawn() if split == "train" else fixed_rows)
        dataset.pairs = load_or_tokenize(in_context, tokenizer.whole, cache_dir=cache_dir)
