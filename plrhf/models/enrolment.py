"""Adds users to an export, or removes one or all of them. Only files change; no backbone is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.files import check_new
from plrhf.core.types import GENERIC_USER
from plrhf.models.card import Card, read_card
from plrhf.models.export import (
    USER_MODEL,
    check_files,
    copy_listed,
    enrolled_vectors,
    read_own_pairs,
    replace_users,
    write_model_card,
)

if TYPE_CHECKING:
    from plrhf.models.adaptation import NewUser


def enrol(directory: str | Path, user_id: str, user: NewUser) -> None:
    """Add an adapted user to an export, so that models loaded from it know the id.

    A user with rows gets a row in each of the encoder's tables. The vector of a user without rows is
    written to ``enrolled.safetensors``; these users are the last ones of the card.

    Args:
        directory: an export. user: result of `adapt` for its model.

    Raises:
        ValueError: the id is not text or is taken, the user was adapted to a model of another shape, or the
            export is damaged.
    """
    if not isinstance(user_id, str) or not user_id.strip():
        raise bad_value("user_id", user_id, "text that is not blank", f"Write {str(user_id)!r}")
    card = read_card(directory)
    check_files(Path(directory), card)  # what is damaged must not get new digests
    if user_id in card.places:
        raise bad_value("user_id", user_id, "an id the export does not have", "Call forget first")
    for name, value in {"vector": user.vector, **(user.rows or {})}.items():
        if not bool(value.isfinite().all()):
            raise bad_value("user", name, "finite numbers", "Adapt the user to this export")
    tables, vectors = _tables(directory), enrolled_vectors(Path(directory))
    own_pairs = read_own_pairs(Path(directory))
    if own_pairs is not None:
        own_pairs[user_id] = list(user.pairs)
    if user.rows is None:
        vectors = _with_vector(card, vectors, user.vector)
        replace_users(directory, [*card.users, user_id], tables, vectors, own_pairs)
        return
    shapes = {name: tuple(table.shape[1:]) for name, table in tables.items()}
    given = {name: tuple(row.shape) for name, row in user.rows.items()}
    if given != shapes:
        raise bad_value("user", given, f"rows of shapes {shapes}", "Adapt the user to this export")
    grown = {
        name: torch.cat([table, user.rows[name][None].to(table)]) for name, table in tables.items()
    }
    in_tables, others = card.users[: card.n_in_tables], card.users[card.n_in_tables :]
    replace_users(directory, [*in_tables, user_id, *others], grown, vectors, own_pairs)


def forget(directory: str | Path, user_id: str) -> None:
    """Remove a user's id and rows from an export. The indices of later users decrease by one.

    Parameters that all users share were learned from this user too, and stay. So do the other files of
    the run (predictions.parquet, checkpoints).

    Args:
        directory: an export.

    Raises:
        ValueError: the export does not have this user, or is damaged.
    """
    card = read_card(directory)
    place = card.user_index(user_id)
    check_files(Path(directory), card)
    users = [user for user in card.users if user != user_id]
    tables, vectors = _tables(directory), enrolled_vectors(Path(directory))
    if vectors is not None and place > card.n_in_tables:
        vectors = _without(vectors, place - 1 - card.n_in_tables)
    else:
        tables = {name: _without(table, place) for name, table in tables.items()}
    own_pairs = read_own_pairs(Path(directory))
    if own_pairs is not None:
        own_pairs.pop(user_id, None)
    replace_users(directory, users, tables, vectors, own_pairs)


def save_shared(directory: str | Path, out: str | Path) -> None:
    """Copy an export without its users: their ids, rows, vectors and pairs, and notes on its results.

    What is left is the same for everybody. It answers as the generic user; new users are adapted by a
    rule that needs no train users (`Gradient`).

    Args:
        directory: an export. out: empty, or made.

    Raises:
        ValueError: the export is damaged, or `out` is not empty.
    """
    card = read_card(directory)
    check_files(Path(directory), card)
    check_new("out", Path(out))
    copy_listed(Path(directory), Path(out), card)
    generic = {name: table[: GENERIC_USER + 1] for name, table in _tables(directory).items()}
    replace_users(out, [], generic, None, None if read_own_pairs(Path(out)) is None else {})
    write_model_card(Path(out), read_card(out))


def _with_vector(card: Card, vectors: Tensor | None, vector: Tensor) -> Tensor:
    """Append a vector to those of the enrolled users.

    Raises:
        ValueError: its width is not that of the export's vectors.
    """
    before = vector.new_empty(0, len(vector)) if vectors is None else vectors
    width = before.shape[1] if vectors is not None or card.user_dim == 0 else card.user_dim
    if tuple(vector.shape) != (width,):
        raise bad_value(
            "user",
            tuple(vector.shape),
            f"a vector of shape {(width,)}",
            "Adapt the user to this export",
        )
    return torch.cat([before, vector[None].to(before)])


def _without(table: Tensor, place: int) -> Tensor:
    """Return a table without the row at `place`."""
    return torch.cat([table[:place], table[place + 1 :]])


def _tables(directory: str | Path) -> dict[str, Tensor]:
    """Read the tables of an export's encoder that have a row for each user, by name in the encoder."""
    state = load_file(Path(directory, USER_MODEL))
    return {name: state[f"encoder.{name}"] for name in read_card(directory).user_tables}
