"""Checks settings of train.py that do not go together, each of which is allowed alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plrhf.backbone.masks import FLEX
from plrhf.cli.privacy import check_private_settings
from plrhf.core.errors import bad_value

if TYPE_CHECKING:
    from plrhf.cli.config import RunConfig


def check_combinations(config: RunConfig) -> None:
    """Raise a ValueError that names a setting which does not work with another one."""
    _check_processes(config)
    _check_attention(config)
    _check_quantization(config)
    check_private_settings(config)


def _check_processes(config: RunConfig) -> None:
    """Raise a ValueError if a setting does not work with several processes."""
    zero3, n_processes = config.trainer.zero3, config.trainer.devices * config.trainer.num_nodes
    if config.encoder.get("sparse") is True and (zero3 is not None or n_processes > 1):
        raise bad_value(
            "encoder.sparse",
            True,
            "false with several processes or trainer.zero3, whose gradients are dense",
            "Set encoder.sparse=false",
        )
    model = config.model
    name = "reduce" if model.get("inner") is None else "inner"
    by_user = name == "inner" or model.get("reduce") == "tail"
    if by_user and (zero3 is not None or n_processes > 1):
        raise bad_value(
            f"model.{name}",
            model[name],
            "another with several processes, none of which has all pairs of a user",
            "Set trainer.devices=1, or model.inner=null model.reduce=pairs",
        )
    if zero3 is not None:
        _check_sharded(config)


def _check_sharded(config: RunConfig) -> None:
    """Raise a ValueError if a setting does not work with sharded weights."""
    if config.model.get("name") == "grpo":
        allowed, cure = (
            "another under trainer.zero3, which shards weights",
            "Set trainer.zero3=null",
        )
        raise bad_value("model", "grpo", allowed, cure)
    if config.backbone.compiled:
        raise bad_value(
            "backbone.compiled",
            True,
            "false under trainer.zero3, which gathers weights layer by layer",
            "Set backbone.compiled=false",
        )
    names = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}
    wanted = names[config.trainer.precision]
    if config.backbone.dtype != wanted:
        raise bad_value(
            "backbone.dtype",
            config.backbone.dtype,
            f"{wanted} under trainer.zero3 with trainer.precision={config.trainer.precision}",
            f"Set backbone.dtype={wanted}",
        )


def _check_quantization(config: RunConfig) -> None:
    """Raise a ValueError if a setting needs whole weights but they are quantised."""
    why = None
    if config.is_supervised:
        why = "model=sft, which writes a whole model"
    elif config.backbone.trainable == "full":
        why = "backbone.trainable=full"
    elif config.trainer.zero3 is not None:
        why = "trainer.zero3, which shards weights"
    if config.backbone.quantization is not None and why is not None:
        raise bad_value(
            "backbone.quantization",
            config.backbone.quantization,
            f"null with {why}",
            "Set backbone.quantization=null",
        )


def _check_attention(config: RunConfig) -> None:
    """Raise a ValueError if torch has no backward pass for the chosen attention."""
    if config.backbone.attention == FLEX and config.trainer.accelerator == "cpu":
        raise bad_value(
            "backbone.attention",
            FLEX,
            "null, eager or sdpa with trainer.accelerator=cpu",
            "Set backbone.attention=null, or trainer=gpu",
        )
