"""Users added to an export, or taken out of it: its files change, and no backbone is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from plrhf.core.errors import bad_value
from plrhf.models.card import read_card
from plrhf.models.export import USER_MODEL, replace_users

if TYPE_CHECKING:
    from plrhf.models.adaptation import NewUser


def enrol(directory: str | Path, user_id: str, user: NewUser) -> None:
    """Add an adapted user to an export, so that models loaded from it know the id.

    Args:
        directory: an export. user: what `adapt` gave for its model.

    Raises:
        ValueError: an id that is no text or is taken, or a user adapted to a model of another shape.
    """
    if not isinstance(user_id, str) or not user_id.strip():
        raise bad_value("user_id", user_id, "text that is not blank", f"Write {str(user_id)!r}")
    card = read_card(directory)
    if user_id in card.places:
        raise bad_value("user_id", user_id, "an id the export does not have", "Call forget first")
    tables = _tables(directory)
    shapes = {name: tuple(table.shape[1:]) for name, table in tables.items()}
    given = {name: tuple(row.shape) for name, row in user.rows.items()}
    if given != shapes:
        raise bad_value("user", given, f"rows of shapes {shapes}", "Adapt the user to this export")
    for name, row in user.rows.items():
        if not bool(row.isfinite().all()):
            raise bad_value("user", name, "finite numbers", "Adapt the user to this export")
    grown = {
        name: torch.cat([table, user.rows[name][None].to(table)]) for name, table in tables.items()
    }
    replace_users(directory, [*card.users, user_id], grown)


def forget(directory: str | Path, user_id: str) -> None:
    """Take a user out of an export: their id and their rows go, users after them move up by one.

    What users share, learned from this one too, stays, and so does what else the run left beside the
    export (predictions.parquet, checkpoints).

    Args:
        directory: an export.

    Raises:
        ValueError: the export does not have this user.
    """
    card = read_card(directory)
    place = card.user_index(user_id)
    users = [user for user in card.users if user != user_id]
    shrunk = {
        name: torch.cat([table[:place], table[place + 1 :]])
        for name, table in _tables(directory).items()
    }
    replace_users(directory, users, shrunk)


def _tables(directory: str | Path) -> dict[str, torch.Tensor]:
    """The tables of an export's encoder whose rows belong to users, by name in the encoder."""
    state = load_file(Path(directory, USER_MODEL))
    return {name: state[f"encoder.{name}"] for name in read_card(directory).user_tables}
