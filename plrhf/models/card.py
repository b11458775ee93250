"""The card of a model, ``plrhf.json``: the settings it was built from, its users, its features."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plrhf.core.components import accepted, kinds
from plrhf.core.errors import bad_value
from plrhf.data.features import FeatureSchema

CARD = "plrhf.json"
SCHEMA = 1


@dataclass(frozen=True)
class Card:
    """What a model was made from: enough to build it again and to feed it.

    Attributes:
        model, encoder, aggregator, backbone: their settings, as in the config.
        users: ids of the train users; user index = place + 1.
        features: `FeatureSchema.to_dict`. text: settings of `RowTokenizer`.
        fingerprint: of the frozen backbone's weights, see `Backbone.fingerprint`.
    """

    model: dict[str, Any]
    encoder: dict[str, Any]
    aggregator: dict[str, Any]
    backbone: dict[str, Any]
    users: list[str]
    features: dict[str, Any]
    text: dict[str, Any]
    fingerprint: str
    schema: int = SCHEMA

    def feature_schema(self) -> FeatureSchema:
        """How features of users are encoded."""
        return FeatureSchema.from_dict(self.features)

    def user_index(self, user_id: str, field: str = "user_id") -> int:
        """Index of a train user.

        Raises:
            ValueError: the model was not trained on this user.
        """
        if user_id not in self.users:
            shown = ", ".join(self.users[:5]) + (", ..." if len(self.users) > 5 else "")
            raise bad_value(
                field,
                user_id,
                f"one of the {len(self.users)} users the model was trained on ({shown})",
                "Name one of them, or leave it out for the generic user",
            )
        return self.users.index(user_id) + 1


def card_text(card: Card) -> str:
    return json.dumps(asdict(card), indent=2) + "\n"


def read_card(directory: str | Path) -> Card:
    """The card of an export.

    Raises:
        ValueError: no export there, or one of another version, or damaged.
    """
    path = Path(directory, CARD)
    if not path.is_file():
        raise bad_value("export", str(directory), f"a directory with {CARD}", "Give RUN_DIR/export")
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise bad_value(
            "export", str(path), "a JSON object with a schema", f"Export anew ({error})"
        ) from error
    if schema != SCHEMA:
        raise bad_value(f"{CARD} schema", schema, f"{SCHEMA}", "Export the model anew")
    takes = kinds(Card)
    given = accepted(content, takes, CARD)
    for name in takes:
        if name not in given:
            raise bad_value(f"{CARD}.{name}", None, "a value", "Export the model anew")
    return Card(**given)
