"""Builds models from their card: untrained, or with the weights of an export or a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from plrhf.aggregators import Aggregator
from plrhf.backbone.loading import load_backbone, load_tokenizer
from plrhf.backbone.model import Backbone
from plrhf.backbone.saving import check_tensors, read_tensors
from plrhf.core.components import build, check_only_own_code, locate
from plrhf.core.errors import BadValue, bad_value
from plrhf.core.torch_files import DAMAGED, load_checked
from plrhf.data.in_context import row_tokenizer
from plrhf.encoders import UserEncoder
from plrhf.models.card import CARD, Card, card_of, read_card
from plrhf.models.export import (
    BACKBONE,
    ENROLLED,
    USER_MODEL,
    check_files,
    enrolled_vectors,
    read_own_pairs,
    restore,
    user_model_state,
)
from plrhf.models.optim import Optim

Model = TypeVar("Model", bound=nn.Module)


def build_model(backbone: Backbone, card: Card, **provided: Any) -> Any:
    """Build the model of a card on a backbone, with an untrained user model.

    Args:
        provided: other arguments that its constructor may have, e.g. ``optim``.
    """
    aggregator = build_aggregator(backbone, card.aggregator, n_texts=card.n_texts)
    # With learned shrinkage all else starts as with encoder=none: what differs is due to the users.
    is_apart = card.encoder.get("shrinkage") == "learned"
    with torch.random.fork_rng(devices=[], enabled=is_apart):
        encoder = build_encoder(backbone, aggregator, card)
    model = build(
        card.model,
        "model",
        kind=nn.Module,
        backbone=backbone,
        encoder=encoder,
        aggregator=aggregator,
        n_users=len(card.users) + 1,
        **provided,
    )
    model.set_card(card)
    return model


def build_aggregator(
    backbone: Backbone, settings: Mapping[str, Any], *, n_texts: int
) -> Aggregator:
    """Build the aggregator of the settings for a backbone."""
    aggregator: Aggregator = build(
        settings,
        "aggregator",
        kind=Aggregator,
        hidden_size=backbone.hidden_size,
        block_size=backbone.block_size,
        embedding_size=backbone.embedding_size,
        n_blocks=backbone.config.num_hidden_layers,
        n_texts=n_texts,
    )
    return aggregator


def positions_for_text(backbone: Backbone, aggregator: Mapping[str, Any]) -> int | None:
    """Return how many positions a backbone has beside an aggregator's; None for no limit."""
    if backbone.max_positions is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return (
            backbone.max_positions - build_aggregator(backbone, aggregator, n_texts=0).n_positions
        )


def build_encoder(backbone: Backbone, aggregator: Aggregator, card: Card) -> UserEncoder:
    """Build the untrained encoder of a card for the card's users."""
    schema = card.feature_schema()
    encoder: UserEncoder = build(
        card.encoder,
        "encoder",
        kind=UserEncoder,
        n_users=card.n_in_tables,
        user_dim=aggregator.user_dim,
        hidden_size=backbone.hidden_size,
        n_numbers=len(schema.numbers),
        category_sizes=schema.category_sizes,
        vocabulary=backbone.vocabulary(),
    )
    return encoder


def load_export(
    model_class: type[Model],
    directory: str | Path,
    *,
    backbone_path: str | None = None,
    trust_remote_code: bool = False,
    trust_components: bool = False,
) -> Model:
    """Load the model of an export, in eval mode; its card is `model.card`.

    Args:
        model_class: the expected class. directory: written by `save_export`.
        backbone_path: where the frozen backbone is now, if it has moved.
        trust_remote_code: allow the backbone's repository to run its own code. An export cannot ask for
            it.
        trust_components: import classes from outside plrhf that the export names.

    Raises:
        ValueError: not an export, a damaged one, another class, or a backbone with other weights.
    """
    directory = Path(directory)
    restore(directory)
    explained: contextlib.AbstractContextManager[None] = (
        contextlib.nullcontext() if trust_components else _explain_damage(directory)
    )
    with explained:
        card = read_card(directory)
        check_files(directory, card)
        _check_class(model_class, card, trust_components=trust_components)
        path = backbone_path or str(card.backbone["path"])
        if card.backbone["trainable"] == "full" or (backbone_path is None and card.ships_backbone):
            path = str(directory / BACKBONE)
        backbone = _load_frozen(card, path, trust_remote_code=trust_remote_code)
        model = build_model(backbone, card)
        backbone.load_adapter(directory)
        _load_user_model(model, directory / USER_MODEL)
        _load_enrolled(model, directory)
        model.directory = directory
        model.tokenizer = load_tokenizer(str(directory))
        row_tokenizer(model.tokenizer, card.text, model.own_pairs)  # raises if it cannot be made
    return model.eval()


@contextlib.contextmanager
def _explain_damage(directory: Path) -> Iterator[None]:
    """Turn whatever a forged or damaged export makes a library raise into one clear line."""
    try:
        yield
    except BadValue:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        cure = f"Copy the export anew, or export the model anew ({reason})"
        raise bad_value("export", str(directory), "a whole export of plrhf", cure) from error


def reload_users(model: Any, directory: Path) -> None:
    """Update a model to the users that its export has now, in a new encoder; other weights stay."""
    model.card = read_card(directory)
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(model.backbone, model.aggregator, model.card)
    state = load_file(directory / USER_MODEL)
    own = {name.removeprefix("encoder."): value for name, value in state.items()}
    encoder.load_state_dict({name: own[name] for name in encoder.state_dict()})
    model.encoder = encoder.to(model.device).train(model.training)
    _load_enrolled(model, directory)


def load_checkpoint(
    model_class: type[Model],
    path: str | Path,
    *,
    backbone_path: str | None = None,
    trust_remote_code: bool = False,
    trust_components: bool = False,
) -> Model:
    """Load the model of a checkpoint of train.py, in eval mode.

    A checkpoint has the learned weights and the model's card as plain data. The frozen backbone is
    loaded from the path in the card.

    Args:
        path: e.g. ``RUN_DIR/checkpoints/best.ckpt``. others: as in `load_export`.

    Raises:
        ValueError: not such a checkpoint, another class, or a backbone with other weights.
    """
    try:
        content = load_checked(Path(path))
        state, settings = content["state_dict"], content["hyper_parameters"]
        card = card_of(settings["card"], "checkpoint")
    except BadValue:
        raise
    except DAMAGED as error:
        raise bad_value(
            "checkpoint",
            str(path),
            "a whole checkpoint of a reward model or policy, as train.py wrote it",
            f"Give RUN_DIR/checkpoints/best.ckpt ({' '.join(str(error).split())[:120]})",
        ) from error
    _check_class(model_class, card, trust_components=trust_components)
    found = backbone_path or str(card.backbone["path"])
    backbone = _load_frozen(card, found, trust_remote_code=trust_remote_code)
    model = build_model(backbone, card, optim=Optim(**settings["optim"]))
    learned = {name for name, value in model.named_parameters() if value.requires_grad}
    check_tensors(
        {name: state[name] for name in state if name in learned},
        {name: value for name, value in model.named_parameters() if name in learned},
        str(path),
    )
    model.load_state_dict(state, strict=False)
    return model.eval()


def _check_class(model_class: type, card: Card, *, trust_components: bool) -> None:
    """Raise a ValueError if a card's model is of another class, or its classes are not trusted."""
    if not trust_components:
        for part in ("model", "encoder", "aggregator"):
            check_only_own_code(getattr(card, part), f"{CARD}.{part}")
    target = str(card.model.get("_target_"))
    found = locate(target, f"{CARD}.model")
    if not (isinstance(found, type) and issubclass(found, model_class)):
        raise bad_value(
            "export",
            target,
            f"a {model_class.__name__}",
            "Load it with from_pretrained of its own class",
        )


def _load_frozen(card: Card, path: str, *, trust_remote_code: bool) -> Backbone:
    """Load the backbone of a card from `path`, and check that its frozen weights are those of the card.

    Raises:
        ValueError: there is no backbone, or it has other weights.
    """
    settings = {
        **card.backbone,
        "_target_": f"{load_backbone.__module__}.{load_backbone.__qualname__}",
        "path": path,
        "trust_remote_code": trust_remote_code,
    }
    is_gone = Path(path).is_absolute() and not Path(path).is_dir()
    backbone: Backbone | None = None
    if not is_gone:
        backbone = build(settings, f"{CARD}.backbone")
    if backbone is None or (
        backbone.trainable != "full" and backbone.fingerprint() != card.fingerprint
    ):
        raise bad_value(
            "backbone.path",
            path,
            "the backbone the model was trained on",
            "Give its directory as backbone_path",
        )
    return backbone


def _load_user_model(model: Any, path: Path) -> None:
    """Load the weights of encoder, aggregator and head from a file of an export."""
    state = read_tensors(path)
    check_tensors(state, user_model_state(model), USER_MODEL)
    model.load_state_dict(state, strict=False)


def _load_enrolled(model: Any, directory: Path) -> None:
    """Load the vectors of users who were enrolled without rows, and users' own pairs, into a model."""
    wanted = torch.empty(model.card.enrolled, model.aggregator.user_dim, device="meta")
    found = enrolled_vectors(directory)
    state = {} if found is None else {ENROLLED: found}
    check_tensors(state, {ENROLLED: wanted} if len(wanted) > 0 else {}, "export")
    empty = torch.empty(0, model.aggregator.user_dim)
    model.enrolled = (empty if found is None else found).to(model.device)
    model.own_pairs = read_own_pairs(directory)
