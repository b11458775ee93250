"""A trained model as files to ship: safetensors, tokenizer, one plrhf.json; nothing is ever unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor

from plrhf.backbone.sharding import gathered
from plrhf.core.errors import bad_value
from plrhf.models.card import CARD, Card, card_text, read_card

USER_MODEL = "user_encoder.safetensors"


def user_model_state(model: Any) -> dict[str, Tensor]:
    """Encoder, aggregator and head: all that is not the language model."""
    state = model.state_dict().items()
    return {n: v.detach().cpu().contiguous() for n, v in state if not n.startswith("backbone.")}


def save_export(directory: Path, model: Any, card: Card, tokenizer: Any) -> None:
    """Write `directory`: PEFT adapter and user model as safetensors, tokenizer, plrhf.json."""
    model.backbone.save(directory)
    named = model.named_parameters()
    with gathered([one for name, one in named if not name.startswith("backbone.")]):
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            directory.mkdir(parents=True, exist_ok=True)
            save_file(user_model_state(model), directory / USER_MODEL)
            tokenizer.save_pretrained(directory)
            (directory / CARD).write_text(card_text(card))


def replace_users(
    directory: str | Path, users: Sequence[str], tables: Mapping[str, Tensor]
) -> None:
    """Give an export other users: their ids, and the encoder's `tables` of one row a user.

    Args:
        tables: by name in the encoder, [1 + number of users, ...]; other weights stay as they are.

    Raises:
        ValueError: a table with another number of rows, so that rows are not those of users.
    """
    for name, table in tables.items():
        if len(table) != len(users) + 1:
            raise bad_value(
                f"encoder {name}",
                f"{len(table)} rows",
                f"{len(users) + 1}, one a user and the generic user's",
                "Let user_parameters() name only parameters whose row u belongs to user u",
            )
    model_file, card_file = Path(directory, USER_MODEL), Path(directory, CARD)
    rows = {f"encoder.{name}": table.detach().contiguous() for name, table in tables.items()}
    state = {**load_file(model_file), **rows}
    card = replace(read_card(directory), users=list(users))
    # Both aside first, as an export with one of them new and the other old does not load.
    parts = [one.with_name(f"{one.name}.part") for one in (model_file, card_file)]
    save_file(state, parts[0])
    parts[1].write_text(card_text(card))
    os.replace(parts[0], model_file)
    os.replace(parts[1], card_file)
