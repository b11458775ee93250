"""The card of a model, ``plrhf.json``: the settings it was built from, its users and their features."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plrhf.core.components import checked_settings, parameter_types
from plrhf.core.errors import bad_value
from plrhf.data.digests import DIGEST, check_digest, content_hash, json_text
from plrhf.data.features import FeatureSchema

CARD = "plrhf.json"
SCHEMA = 1
ADDED = {"enrolled": 0, "user_dim": 0, "n_texts": 0}
"""Defaults of fields that older exports and checkpoints of schema 1 lack."""


@dataclass(frozen=True)
class Card:
    """All that is needed to build a model again and to encode its inputs.

    Attributes:
        model, encoder, aggregator, backbone: their settings, as in the config.
        users: ids of the train users; the user index is the position in this list plus 1.
        features: `FeatureSchema.to_dict`. text: settings of `RowTokenizer`.
        fingerprint: of the frozen backbone's weights, see `Backbone.fingerprint`.
        precision: the trainer's; a loaded model computes in the same.
        ships_backbone: whether the export contains the frozen backbone, in ``backbone/``.
        user_tables: names of the encoder's parameters that have one row for each user.
        enrolled: number of users (the last ones) who have no rows in the tables but a vector of their
            own in ``enrolled.safetensors``.
        user_dim: width of user vectors; 0 in old exports that do not say it.
        n_texts: number of train texts that repeat, for `aggregator.text_residual`.
        files: BLAKE2b digests of the export's other files by name; empty for a checkpoint.
    """

    model: dict[str, Any]
    encoder: dict[str, Any]
    aggregator: dict[str, Any]
    backbone: dict[str, Any]
    users: list[str]
    features: dict[str, Any]
    text: dict[str, Any]
    fingerprint: str
    precision: str = "32-true"
    ships_backbone: bool = False
    user_tables: list[str] = field(default_factory=list)
    enrolled: int = 0
    user_dim: int = 0
    n_texts: int = 0
    files: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def feature_schema(self) -> FeatureSchema:
        """Return the schema by which features of users are encoded."""
        return FeatureSchema.from_dict(self.features)

    @property
    def n_in_tables(self) -> int:
        """Number of users who have rows in the encoder's tables."""
        return len(self.users) - self.enrolled

    def made_for(self) -> dict[str, str]:
        """Return short descriptions of what the learned weights depend on, for comparing checkpoints."""
        return {
            "users": f"{len(self.users)} ({content_hash(self.users)})",
            "model": str(self.model["name"]),
            "encoder": f"{self.encoder['name']} ({content_hash(self.encoder)})",
            "aggregator": f"{self.aggregator['name']} ({content_hash(self.aggregator)})",
            "backbone": self.fingerprint,  # not where it lies: that may change
        }

    def check_made_for(self, before: Mapping[str, str]) -> None:
        """Raise a ValueError if a checkpoint was made for another model, naming the difference.

        Args:
            before: `made_for` of the model whose checkpoint it is.
        """
        for name, value in self.made_for().items():
            if before.get(name) != value:
                raise bad_value(
                    "ckpt",
                    f"made for {name} {before.get(name)}",
                    f"a checkpoint made for {name} {value}",
                    "Give the rows and settings it was made with, or begin anew without ckpt=last",
                )

    @cached_property
    def places(self) -> dict[str, int]:
        """Index of each train user, from 1, by id."""
        return {user: place for place, user in enumerate(self.users, start=1)}

    def user_index(self, user_id: str, field: str = "user_id") -> int:
        """Return the index of a train user.

        Raises:
            ValueError: the model was not trained on this user.
        """
        index = self.places.get(user_id)
        if index is None:
            shown = ", ".join(self.users[:5]) + (", ..." if len(self.users) > 5 else "")
            raise bad_value(
                field,
                user_id,
                f"one of the {len(self.users)} users the model was trained on ({shown})",
                "Name one of them, or leave it out for the generic user",
            )
        return index


def card_text(card: Card) -> str:
    """Return the text of a card's file."""
    return json_text(asdict(card), indent=2)


def read_card(directory: str | Path) -> Card:
    """Read the card of an export.

    Raises:
        ValueError: there is no export, or it is damaged or of another version.
    """
    path = Path(directory, CARD)
    if not path.is_file():
        raise bad_value("export", str(directory), f"a directory with {CARD}", "Give RUN_DIR/export")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _no_object(path, error) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise _no_object(path, "no schema")
    check_digest(CARD, content, "Export the model anew")
    content.pop(DIGEST, None)
    return card_of(content, CARD)


def card_of(content: Mapping[str, Any], origin: str) -> Card:
    """Build a card from plain data, as read from JSON.

    Args:
        origin: where the data come from, for messages.

    Raises:
        ValueError: another version, a missing or unknown field, or a duplicate user.
    """
    if content.get("schema") != SCHEMA:
        raise bad_value(
            f"{origin} schema", content.get("schema"), f"{SCHEMA}", "Export the model anew"
        )
    takes = parameter_types(Card)
    given = checked_settings({**ADDED, **content}, takes, origin)
    for name in takes:
        if name not in given:
            raise bad_value(f"{origin}.{name}", None, "a value", "Export the model anew")
    card = Card(**given)
    user, count = next(iter(Counter(card.users).most_common(1)), ("", 1))
    if count > 1:
        raise bad_value(f"{origin}.users", user, "each user once", "Export the model anew")
    return card


def _no_object(path: Path, reason: object) -> ValueError:
    return bad_value("export", str(path), "a JSON object with a schema", f"Export anew ({reason})")
