"""Builds data, backbone, model, trainer and loggers from a `RunConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.backbone.loading import (
    Shards,
    check_path,
    check_vocabulary,
    load_backbone,
    load_tokenizer,
)
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.cli.config import BackboneConfig, RunConfig
from plrhf.cli.rows import build_source
from plrhf.core.components import WITHOUT_EFFECT, parameter_types
from plrhf.core.errors import bad_value, printable
from plrhf.core.monitor import Monitor
from plrhf.data.module import PreferenceData
from plrhf.data.sources.base import Source
from plrhf.data.text_values import repeated_texts
from plrhf.data.tokenizer import Tokenizer
from plrhf.evaluation.generations import requested_users
from plrhf.models.base import PersonalModule
from plrhf.models.card import CARD, Card
from plrhf.models.grpo import PersonalGRPOPolicy
from plrhf.models.loading import build_model
from plrhf.models.rollouts import check_reward_room
from plrhf.training.loggers import build_loggers
from plrhf.training.trainer import build_trainer

LONGEST_NAME = 100  # characters of a run's name in loggers


@rank_zero_only
def print_lines(lines: Iterable[str]) -> None:
    """Print lines on one of several processes."""
    for line in lines:
        print(printable(line))


def build_run_trainer(config: RunConfig, run_dir: Path, *, has_val: bool) -> Trainer:
    """Build the trainer of the config with its loggers, which write to `run_dir`."""
    others = {name: one for name, one in config.logger if name != "name"}
    loggers = build_loggers(run_dir=run_dir, name=run_name(config), **others)
    options = {name: one for name, one in config.trainer if name != "name"}
    if config.is_supervised and not has_val and options["patience"] == config.backbone.sft.patience:
        options["patience"] = None  # the backbone's own, which nobody has asked for
    return build_trainer(**options, run_dir=run_dir, loggers=loggers, has_val=has_val)


def run_name(config: RunConfig) -> str:
    """Return a name that says how a run differs from others: the settings that were given for it.

    Of a path it has the last part. A name that is too long loses its first settings, as those of a sweep
    stand last.
    """
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    said = [
        re.sub(r"=[^\[{]*/", "=", one)
        for one in given
        if re.split(r"[.=]", one.lstrip("+~"))[0] not in WITHOUT_EFFECT
    ]
    while len(" ".join(said)) > LONGEST_NAME:
        said.pop(0)
    return " ".join(said) or Path(config.run_dir).name


def path_of(config: BackboneConfig) -> str:
    """Return the directory or hub name of a backbone that must be there already.

    Raises:
        ValueError: none is given.
    """
    if config.path is None:
        raise bad_value("backbone.path", None, "a directory", "Set backbone.path=DIR")
    return config.path


def open_backbone(
    config: BackboneConfig, path: str, *, shards: Shards | None = None
) -> tuple[Tokenizer, Backbone]:
    """Load the tokenizer and the backbone at `path`, and check that they fit together.

    Args:
        shards: context in which the weights are sharded while loading; None: they stay whole.
    """
    check_path(path)
    tokenizer = load_tokenizer(
        path,
        pad_token=config.pad_token,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    backbone = load_backbone(**{**load_options(config), "path": path}, shards=shards)
    check_vocabulary(backbone, tokenizer)
    return tokenizer, backbone


def load_options(config: BackboneConfig) -> dict[str, Any]:
    """Return the backbone's settings that are arguments of `load_backbone`."""
    return {
        name: getattr(config, name) for name in parameter_types(load_backbone) if name != "shards"
    }


def build_run_model(
    config: RunConfig, data: PreferenceData, backbone: Backbone, path: str
) -> PersonalModule:
    """Build the reward model or policy of the config on a backbone.

    Args:
        path: where the backbone was loaded from, for the model's card.
    """
    card = make_card(config, data, backbone, path)
    model: PersonalModule = build_model(backbone, card, optim=config.optim)
    model.own_pairs = data.own_pairs
    return model


def make_card(config: RunConfig, data: PreferenceData, backbone: Backbone, path: str) -> Card:
    """Make the card of the run's model, with which it can be built again."""
    local = Path(path)
    n_texts = 0
    if config.aggregator.get("text_residual") is True and "train" in data.datasets:
        n_texts = len(repeated_texts(data.datasets["train"])[0])
    return Card(
        model=config.model,
        encoder=config.encoder,
        aggregator=config.aggregator,
        backbone={
            **load_options(config.backbone),
            "path": str(local.resolve()) if local.is_dir() else path,
        },
        users=list(data.splits.users),
        features=data.schema.to_dict(),
        text=data.tokenizer_options,
        fingerprint=backbone.fingerprint(),
        precision=config.trainer.precision,
        ships_backbone=config.backbone.path is None,
        n_texts=n_texts,
    )


def check_model(config: RunConfig, data: PreferenceData) -> None:
    """Build the model on an untrained tiny backbone, so that errors show before a backbone is trained."""
    assert config.backbone.tiny is not None
    backbone = Backbone(
        model=tiny_gptj(**config.backbone.tiny.model_dump(), eos_token_id=0),
        trainable=config.backbone.trainable,
        lora=config.backbone.lora,
        gradient_checkpointing=config.backbone.gradient_checkpointing,
    )
    model = build_run_model(config, data, backbone, "")
    requested_users(model.card, config.samples)
    open_reward(model, data, config.trainer.monitor)


def open_reward(model: PersonalModule, data: PreferenceData, monitor: Monitor) -> None:
    """Load the reward model of a policy that learns from one, which starts with its users.

    Where true preferences are known, the policy's texts will be judged by them, too.

    Args:
        monitor: metric that chooses the best checkpoint.

    Raises:
        ValueError: there is none, it was trained on other users, or the metric will not be known.
    """
    known = isinstance(model, PersonalGRPOPolicy) and _knows_preferences(data)
    if monitor == "val/true_preference" and not known:
        allowed = (
            "a metric of val pairs; it needs model=grpo and people whose true preferences are known"
        )
        raise bad_value("trainer.monitor", monitor, allowed, "Set trainer.monitor=val/loss")
    if not isinstance(model, PersonalGRPOPolicy):
        return
    reward = model.open_reward()
    if not model.start_users_from_reward() and model.start_users and model.encoder.personal:
        print_lines(
            ["note: users start at random, as the reward model's encoder is of another kind"]
        )
    tokenised = [one for one in data.datasets.values() if len(one) > 0]
    longest = [one.rows[int(one.lengths[:, 0].argmax())] for one in tokenised]
    check_reward_room(reward, longest, model.max_new_tokens)
    model.true_score = data.source.true_score
    check_same_world("model.reward", str(model.reward), data.source)


def _knows_preferences(data: PreferenceData) -> bool:
    """Return whether the source knows how much the users of val pairs like any text."""
    score = data.source.true_score
    return all(score(row.user_id, row.chosen) is not None for row in data.splits.val)


def check_same_world(field: str, reward: str, source: Source) -> None:
    """Raise a ValueError if a reward model was trained on another synthetic world than a source's.

    There the same ids are of other people. Nothing is known of an export that does not lie in its run.

    Args:
        field: the setting that names the reward model, for messages. reward: its run or export.
    """
    folder = Path(reward)
    run = folder.parent if (folder / CARD).is_file() else folder
    if not (run / "config.yaml").is_file():
        return
    if build_source(RunConfig.of_run(run).data).world() != source.world():
        allowed = "a reward model trained on the same world, as its users are other people"
        raise bad_value(field, reward, allowed, "Train one on the same data and seed")
