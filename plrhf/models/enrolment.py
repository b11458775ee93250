"""Users added to an export, or taken out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plrhf.core.errors import bad_value
from plrhf.models.adaptation import NewUser, user_tables
from plrhf.models.base import PersonalModule
from plrhf.models.export import replace_users


def enrol(directory: str | Path, user_id: str, user: NewUser, **options: Any) -> None:
    """Add an adapted user to an export, so that models loaded from it know the id.

    Args:
        directory: an export. user: what `adapt` gave for its model. options: of `from_pretrained`.

    Raises:
        ValueError: the id is taken, or the user was adapted to a model of another shape.
    """
    model = PersonalModule.from_pretrained(directory, **options)
    if user_id in model.card.users:
        raise bad_value("user_id", user_id, "an id the export does not have", "Call forget first")
    tables = user_tables(model.encoder)
    shapes = {name: tuple(table.shape[1:]) for name, table in tables.items()}
    given = {name: tuple(row.shape) for name, row in user.rows.items()}
    if given != shapes:
        raise bad_value("user", given, f"rows of shapes {shapes}", "Adapt the user to this export")
    grown = {name: torch.cat([table, user.rows[name][None]]) for name, table in tables.items()}
    replace_users(directory, [*model.card.users, user_id], grown)


def forget(directory: str | Path, user_id: str, **options: Any) -> None:
    """Take a user out of an export: their id and their rows go, users after them move up by one.

    What users share, learned from this one too, stays, as does what else the run left beside the
    export (predictions.parquet, checkpoints).

    Args:
        directory: an export. options: of `from_pretrained`, e.g. ``backbone_path``.

    Raises:
        ValueError: the export does not have this user.
    """
    model = PersonalModule.from_pretrained(directory, **options)
    place = model.card.user_index(user_id)
    users = [user for user in model.card.users if user != user_id]
    shrunk = {
        name: torch.cat([table[:place], table[place + 1 :]])
        for name, table in user_tables(model.encoder).items()
    }
    replace_users(directory, users, shrunk)
