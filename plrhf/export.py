"""A trained model as files to ship: safetensors, tokenizer, one plrhf.json; nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plrhf.backbone import Backbone, load_backbone
from plrhf.config import build
from plrhf.data.features import FeatureSchema
from plrhf.errors import bad_value

CARD, USER_MODEL = "plrhf.json", "user_encoder.safetensors"
SCHEMA = 1
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Card:
    """What a model was made from: enough to build it again and to feed it.

    Attributes:
        model, encoder, aggregator, backbone: their settings, as in the config.
        users: ids of the train users; user index = place + 1.
        features: `FeatureSchema.to_dict`. text: settings of `RowTokenizer`.
        fingerprint: of the frozen backbone's weights, see `fingerprint`.
    """

    model: dict[str, Any]
    encoder: dict[str, Any]
    aggregator: dict[str, Any]
    backbone: dict[str, Any]
    users: list[str]
    features: dict[str, Any]
    text: dict[str, Any]
    fingerprint: str = ""
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


def build_model(backbone: Backbone, card: Card, **provided: Any) -> Any:
    """A model of the card's settings on this backbone, its user model freshly initialised."""
    aggregator = build(
        card.aggregator,
        "aggregator",
        hidden_size=backbone.hidden_size,
        n_blocks=backbone.config.num_hidden_layers,
    )
    schema = card.feature_schema()
    encoder = build(
        card.encoder,
        "encoder",
        n_users=len(card.users),
        user_dim=aggregator.user_dim,
        n_numbers=len(schema.numbers),
        category_sizes=schema.category_sizes,
        vocabulary=backbone.vocabulary(),
    )
    return build(
        card.model,
        "model",
        backbone=backbone,
        encoder=encoder,
        aggregator=aggregator,
        n_users=len(card.users) + 1,
        **provided,
    )


def user_model_state(model: Any) -> dict[str, Tensor]:
    """Encoder, aggregator and head: all that is not the language model."""
    state = model.state_dict().items()
    return {n: v.detach().cpu().contiguous() for n, v in state if not n.startswith("backbone.")}


def save_export(directory: Path, model: Any, card: Card, tokenizer: Any) -> None:
    """Write `directory`: PEFT adapter and user model as safetensors, tokenizer, plrhf.json."""
    directory.mkdir(parents=True, exist_ok=True)
    model.backbone.save(directory)
    save_file(user_model_state(model), directory / USER_MODEL)
    tokenizer.save_pretrained(directory)
    card = replace(card, fingerprint=model.backbone.fingerprint())
    (directory / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def read_card(directory: str | Path) -> Card:
    """The card of an export.

    Raises:
        ValueError: no export there, or one of another version.
    """
    path = Path(directory, CARD)
    if not path.is_file():
        raise bad_value("export", str(directory), f"a directory with {CARD}", "Give RUN_DIR/export")
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise bad_value(
            f"{CARD} schema", content.get("schema"), f"{SCHEMA}", "Export the model anew"
        )
    return Card(**content)


def load_export(
    model_class: type[Model], directory: str | Path, *, backbone_path: str | None = None
) -> Model:
    """The model of an export, in eval mode; its card is `model.card`.

    Args:
        model_class: what the export must hold. directory: what `save_export` wrote.
        backbone_path: where the frozen backbone lies now, if it has moved.

    Raises:
        ValueError: not an export, of another class, or a backbone with other weights.
    """
    card = read_card(directory)
    settings = dict(card.backbone)
    if backbone_path is not None:
        settings["path"] = backbone_path
    if settings["trainable"] == "full":
        settings["path"] = str(Path(directory, "backbone"))
    backbone = load_backbone(**settings)
    model = build_model(backbone, card)
    if not isinstance(model, model_class):
        raise bad_value(
            "export",
            type(model).__name__,
            model_class.__name__,
            f"Load it with {type(model).__name__}.from_pretrained",
        )
    if settings["trainable"] != "full" and backbone.fingerprint() != card.fingerprint:
        raise bad_value(
            "backbone.path",
            settings["path"],
            "the backbone the model was trained on",
            "Give its directory as backbone_path",
        )
    backbone.load_adapter(Path(directory))
    state = load_file(Path(directory, USER_MODEL))
    missing = [n for n in user_model_state(model) if n not in state]
    if len(missing) > 0:
        raise bad_value(
            USER_MODEL,
            missing[0],
            "a file with every weight of the user model",
            "Export the model anew",
        )
    model.load_state_dict(state, strict=False)
    model.card = card  # type: ignore[assignment]
    return model.eval()
