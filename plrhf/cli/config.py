"""The settings of train.py as typed, frozen objects, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from plrhf.backbone.adapters import add_lora
from plrhf.backbone.quantization import Quantization
from plrhf.cli.combinations import check_combinations
from plrhf.cli.sections import DataConfig, Section, Seed, check_writable
from plrhf.core.checks import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from plrhf.core.components import (
    check_only_own_code,
    checked_settings,
    parameter_types,
    unknown_key,
)
from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.evaluation.generations import GenerationOptions
from plrhf.evaluation.records import read_settings
from plrhf.models.optim import Optim
from plrhf.models.privacy import Privacy
from plrhf.training.plan import Machine
from plrhf.training.trainer import MaxSteps, Monitor
from plrhf.training.zero import Zero3


class TinyShape(Section):
    """Settings ``backbone.tiny``: the shape of a GPT-J that is created and fine-tuned before the run."""

    vocab_size: PositiveInt
    n_layers: PositiveInt
    width: PositiveInt
    n_heads: PositiveInt
    max_positions: PositiveInt


class SftConfig(Section):
    """Settings ``backbone.sft``: how the tiny backbone is fine-tuned."""

    responses: Literal["chosen", "both"]
    max_steps: PositiveInt
    max_epochs: PositiveInt | None
    patience: PositiveInt | None
    batch_size: PositiveInt
    lr: PositiveFloat
    warmup_steps: NonNegativeInt


class BackboneConfig(Section):
    """Settings of the language model; see `backbone.loading.load_backbone`."""

    name: str
    path: str | None
    architecture: dict[str, Any] | None
    pad_token: str | None
    chat_template: Literal["plain"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"]
    attention: str | None
    quantization: Quantization | None
    trust_remote_code: bool
    trainable: Literal["lora", "frozen", "full"]
    lora: dict[str, Any] | None  # arguments of `add_lora`
    gradient_checkpointing: bool
    compiled: bool
    tiny: TinyShape | None
    sft: SftConfig

    @classmethod
    def read(cls, settings: Mapping[str, Any], field: str) -> Self:
        config = super().read(settings, field)
        if config.lora is not None:
            of_lora = {
                name: kind for name, kind in parameter_types(add_lora).items() if name != "model"
            }
            checked_settings(config.lora, of_lora, f"{field}.lora")
        if config.path is None and config.tiny is None:
            raise bad_value(
                f"{field}.path", None, "a directory or hub name", f"Set {field}.path=DIR"
            )
        return config


class TrainerConfig(Section):
    """Settings of the trainer; see `training.trainer.build_trainer`."""

    name: str
    accelerator: str
    devices: PositiveInt
    num_nodes: PositiveInt
    zero3: Zero3 | None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    matmul_precision: Literal["highest", "high", "medium"]
    max_epochs: PositiveInt | None
    max_steps: MaxSteps
    accumulate_grad_batches: PositiveInt
    gradient_clip_val: PositiveFloat | None
    monitor: Monitor
    patience: PositiveInt | None
    val_every_n_steps: PositiveInt | None
    checkpoint_every_n_steps: PositiveInt | None
    log_every_n_steps: PositiveInt
    progress: bool

    @classmethod
    def read(cls, settings: Mapping[str, Any], field: str) -> Self:
        config = super().read(settings, field)
        if config.max_steps == -1 and config.max_epochs is None:
            raise bad_value(
                f"{field}.max_steps",
                -1,
                f"a number of steps, or {field}.max_epochs",
                f"Set {field}.max_steps=1000",
            )
        return config


class LoggerConfig(Section):
    """Settings of further loggers beside metrics.csv; see `training.loggers.build_loggers`."""

    name: str
    tensorboard: bool = False
    wandb: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None


class RefereeConfig(Section):
    """How ``eval=referee`` tunes and tests a method; training does not read it.

    Attributes:
        grid: dotted setting -> values to try. The trials of a method are points of their product.
        adaptation: rule by which users that training has not seen are inferred from their pairs: a name
            in ``conf/eval/adaptation``, or a mapping with ``name`` and settings; None: they stay generic.
        features: what stands for a text: ``text``, the frozen backbone's pooled output, or, for
            controls, ``length``, ``shape``, ``style`` or ``item`` (see `referee.features`).
        shots: pairs given of users that training has not seen, where rows allow others than
            ``eval.shots``.
        trials: points of the grid at most, where rows take long and fewer than ``eval.trials`` are to do.
    """

    grid: dict[str, list[Any]] = {}
    adaptation: str | dict[str, Any] | None = "posterior"
    features: Literal["text", "length", "shape", "style", "item"] = "text"
    shots: list[NonNegativeInt] | None = None
    trials: PositiveInt | None = None


class RunConfig(Section):
    """All settings of train.py."""

    seed: Seed
    shrinkage: ShrinkageKind  # what encoders take for theirs
    run_dir: str
    cache_dir: str
    ckpt: Literal["last"] | None
    overwrite: bool
    plan: bool
    debug: bool
    data: DataConfig
    backbone: BackboneConfig
    encoder: dict[str, Any]  # of this and the next two: ``_target_`` and arguments
    aggregator: dict[str, Any]
    model: dict[str, Any]
    optim: Optim
    privacy: Privacy
    trainer: TrainerConfig
    logger: LoggerConfig
    samples: GenerationOptions
    plan_for: Machine
    referee: RefereeConfig | None
    resolved: dict[str, Any]  # the plain settings, as config.yaml keeps them

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Check the settings of a command line and return them as objects.

        Raises:
            ValueError: a setting is wrong, or two settings do not go together.
        """
        config = cls.parse(settings)
        for name in ("run_dir", "cache_dir"):
            check_writable(name, getattr(config, name))
        check_combinations(config)
        return config

    @classmethod
    def of_run(cls, run_dir: Path, *, trust_components: bool = False) -> Self:
        """Read the config.yaml of a run, which need not be trusted.

        Args:
            trust_components: allow it to name classes from outside plrhf, which are then imported, and
                a backbone whose repository runs its own code.

        Raises:
            ValueError: a wrong setting, or code from outside plrhf that is not trusted.
        """
        settings = read_settings(run_dir / "config.yaml")
        if not trust_components:
            check_only_own_code(settings, "")
        return cls.parse(settings)

    @classmethod
    def parse(cls, settings: dict[str, Any]) -> Self:
        """Check each setting alone, without relations between settings."""
        if "resolved" in settings:
            raise unknown_key("resolved", settings["resolved"], list(settings))
        return cls.read({**settings, "resolved": settings}, "")

    @property
    def is_supervised(self) -> bool:
        """Whether the run is supervised fine-tuning (model=sft), without a user model."""
        return self.model.get("name") == "sft"
