"""The settings of train.py as typed, frozen objects, checked before anything runs."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from plrhf.backbone.adapters import add_lora
from plrhf.backbone.quantization import Quantization
from plrhf.cli.combinations import check_combinations
from plrhf.core.checks import (
    FractionBelowOne,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    checked,
)
from plrhf.core.components import (
    NOT_FOR_THE_CONSTRUCTOR,
    build,
    check_only_own_code,
    checked_settings,
    construct,
    locate,
    parameter_types,
    parameters,
    unknown_key,
)
from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.data.rows import Ties
from plrhf.data.split_by import SplitBy
from plrhf.evaluation.generations import GenerationOptions
from plrhf.evaluation.records import read_settings
from plrhf.models.optim import Optim
from plrhf.models.privacy import Privacy
from plrhf.training.plan import Machine
from plrhf.training.trainer import MaxSteps, Monitor
from plrhf.training.zero import Zero3

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Section(BaseModel):
    """A part of the settings as a frozen object with one field for each setting.

    Fields are annotated like the arguments of a component (`core.checks`). A field whose type is
    another `Section` or a dataclass is read from a nested mapping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def read(cls, settings: Mapping[str, Any], field: str) -> Self:
        """Check plain settings and return them as this section.

        Args:
            field: dotted name of the section, for messages; empty for the whole config.

        Raises:
            ValueError: a setting is unknown, missing, of the wrong type or out of range.
        """
        annotations = cls.annotations()
        checked(settings, dict[str, Any], field)
        given: dict[str, Any] = {}
        for name, value in settings.items():
            dotted = f"{field}.{name}" if field else name
            if name not in annotations:
                raise unknown_key(dotted, value, list(annotations))
            given[name] = _read(value, annotations[name], dotted)
        for name, one in cls.model_fields.items():
            if name not in given and one.is_required():
                dotted = f"{field}.{name}" if field else name
                raise bad_value(dotted, None, "a value", f"Set +{dotted}=VALUE")
        return cls.model_construct(**given)

    @classmethod
    def annotations(cls) -> dict[str, Any]:
        """Return the types and ranges of this section's settings by name."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return {name: hints[name] for name in cls.model_fields}


def _read(value: Any, kind: Any, field: str) -> Any:
    """Check one setting, which may be a section or a dataclass."""
    choices = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    for choice in choices:
        below = isinstance(choice, type) and (issubclass(choice, Section) or is_dataclass(choice))
        if not below or (value is None and types.NoneType in choices):
            continue
        checked(value, dict[str, Any], field)
        if issubclass(choice, Section):
            return choice.read(value, field)
        if "_target_" in value:
            return build(value, field, kind=choice)
        provided = {"origin": field} if "origin" in parameter_types(choice) else {}
        return construct(choice, value, field, **provided)
    return checked(value, kind, field)


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


class DataConfig(Section):
    """Settings of the rows, their splits and batches; see `PreferenceData`."""

    source: dict[str, Any]  # the source's ``_target_`` and arguments
    seed: Seed
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    batch_tokens: PositiveInt | None
    users_per_batch: PositiveInt | None
    on_bad_row: Literal["refuse", "error"]
    ties: Ties = "none"
    val_fraction: FractionBelowOne | None
    test_fraction: FractionBelowOne | None
    seen_prompt_test_fraction: FractionBelowOne
    split_by: SplitBy
    unseen_fraction: FractionBelowOne
    min_pairs_per_user: PositiveInt
    max_users: PositiveInt | None
    shuffle_users: bool
    max_prompt_tokens: NonNegativeInt | None
    max_tokens: PositiveInt | None
    on_long_prompt: Literal["truncate", "error"]
    on_long_response: Literal["drop", "truncate"]
    separator: str
    use_user_text: bool
    use_user_features: bool
    history_turns: PositiveInt | None
    context_pairs: NonNegativeInt
    min_context_pairs: NonNegativeInt

    @classmethod
    def read(cls, settings: Mapping[str, Any], field: str) -> Self:
        """Read the settings of data and source, which share one mapping in the config.

        A setting that both have, such as ``val_fraction`` of a source with its own splits, goes to
        both.
        """
        own = [name for name in cls.model_fields if name != "source"]
        of_source = parameters(locate(settings.get("_target_"), field))
        allowed = {*own, *of_source, *NOT_FOR_THE_CONSTRUCTOR}
        for name, value in settings.items():
            if name not in allowed:
                raise unknown_key(f"{field}.{name}", value, sorted(allowed))
        source = {k: v for k, v in settings.items() if k in ("_target_", *of_source)}
        return super().read(
            {"source": source, **{k: v for k, v in settings.items() if k in own}}, field
        )


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


def check_writable(field: str, path: str) -> None:
    """Raise a ValueError if a path, which need not exist yet, cannot be written to."""
    existing = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        allowed = f"a directory that can be written, unlike {existing}"
        raise bad_value(field, path, allowed, f"Set {field} to another")
