"""A trained model as files to ship: safetensors, tokenizer, one plrhf.json; nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plrhf.aggregators import Aggregator
from plrhf.backbone.model import Backbone, load_backbone
from plrhf.backbone.sharding import gathered
from plrhf.core.components import accepted, build, kinds, locate
from plrhf.core.errors import bad_value
from plrhf.data.features import FeatureSchema
from plrhf.encoders import UserEncoder

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


def build_model(backbone: Backbone, card: Card, **provided: Any) -> Any:
    """A model of the card's settings on this backbone, its user model freshly initialised."""
    aggregator = build(
        card.aggregator,
        "aggregator",
        kind=Aggregator,
        hidden_size=backbone.hidden_size,
        n_blocks=backbone.config.num_hidden_layers,
    )
    schema = card.feature_schema()
    encoder = build(
        card.encoder,
        "encoder",
        kind=UserEncoder,
        n_users=len(card.users),
        user_dim=aggregator.user_dim,
        n_numbers=len(schema.numbers),
        category_sizes=schema.category_sizes,
        vocabulary=backbone.vocabulary(),
    )
    return build(
        card.model,
        "model",
        kind=nn.Module,
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
    model.backbone.save(directory)
    named = model.named_parameters()
    with gathered([one for name, one in named if not name.startswith("backbone.")]):
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            directory.mkdir(parents=True, exist_ok=True)
            save_file(user_model_state(model), directory / USER_MODEL)
            tokenizer.save_pretrained(directory)
            (directory / CARD).write_text(_text_of(card))


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
    parts[1].write_text(_text_of(card))
    os.replace(parts[0], model_file)
    os.replace(parts[1], card_file)


def _text_of(card: Card) -> str:
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


def load_export(
    model_class: type[Model],
    directory: str | Path,
    *,
    backbone_path: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model of an export, in eval mode; its card is `model.card`.

    Args:
        model_class: what the export must hold. directory: what `save_export` wrote.
        backbone_path: where the frozen backbone lies now, if it has moved.
        trust_remote_code: let the backbone's repository bring its own code; no export can ask for it.

    Raises:
        ValueError: not an export, of another class, or a backbone with other weights.
    """
    card = read_card(directory)
    target = card.model.get("_target_")
    found = locate(target, f"{CARD}.model")
    if not (isinstance(found, type) and issubclass(found, model_class)):
        raise bad_value(
            "export",
            target,
            f"a {model_class.__name__}",
            "Load it with from_pretrained of its own class",
        )
    settings = {
        **card.backbone,
        "_target_": f"{load_backbone.__module__}.{load_backbone.__qualname__}",
        "trust_remote_code": trust_remote_code,
    }
    if backbone_path is not None:
        settings["path"] = backbone_path
    if settings.get("trainable") == "full":
        settings["path"] = str(Path(directory, "backbone"))
    backbone: Backbone = build(settings, f"{CARD}.backbone")
    if backbone.trainable != "full" and backbone.fingerprint() != card.fingerprint:
        raise bad_value(
            "backbone.path",
            settings["path"],
            "the backbone the model was trained on",
            "Give its directory as backbone_path",
        )
    model = build_model(backbone, card)
    backbone.load_adapter(Path(directory))
    _load_user_model(model, Path(directory, USER_MODEL))
    model.card = card
    return model.eval()


def _load_user_model(model: Any, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise bad_value(
            USER_MODEL, str(path), "a whole safetensors file", f"Export anew ({error})"
        ) from error
    own = user_model_state(model)
    for name in {**own, **state}:
        shapes = [tuple(one[name].shape) if name in one else None for one in (state, own)]
        if shapes[0] != shapes[1]:
            raise bad_value(
                f"{USER_MODEL} {name}", shapes[0], f"shape {shapes[1]}", "Export the model anew"
            )
    model.load_state_dict(state, strict=False)
