"""Models built from their card: fresh, or with the weights of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from plrhf.aggregators import Aggregator
from plrhf.backbone.loading import load_backbone
from plrhf.backbone.model import Backbone
from plrhf.core.components import build, locate
from plrhf.core.errors import bad_value
from plrhf.encoders import UserEncoder
from plrhf.models.card import CARD, Card, read_card
from plrhf.models.export import USER_MODEL, user_model_state

Model = TypeVar("Model", bound=nn.Module)


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
