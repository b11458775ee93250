"""Settings as typed, frozen sections, and those of the rows. It loads no model library."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from plrhf.core.checks import FractionBelowOne, NonNegativeInt, PositiveInt, checked
from plrhf.core.components import (
    NOT_FOR_THE_CONSTRUCTOR,
    build,
    construct,
    locate,
    parameter_types,
    parameters,
    unknown_key,
)
from plrhf.core.errors import bad_value
from plrhf.data.parsing import LONGEST_LINE
from plrhf.data.rows import Ties
from plrhf.data.split_by import SplitBy

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


class DataConfig(Section):
    """Settings of the rows, their splits and batches; see `PreferenceData`."""

    source: dict[str, Any]  # the source's ``_target_`` and arguments
    seed: Seed
    batch_size: PositiveInt
    eval_batch_size: PositiveInt
    batch_tokens: PositiveInt | None
    users_per_batch: PositiveInt | None
    on_bad_row: Literal["refuse", "error"]
    max_row_bytes: Annotated[int, Field(gt=0, le=LONGEST_LINE)]
    without_users: str | None
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


def check_writable(field: str, path: str) -> None:
    """Raise a ValueError if a path, which need not exist yet, cannot be written to."""
    existing = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        allowed = f"a directory that can be written, unlike {existing}"
        raise bad_value(field, path, allowed, f"Set {field} to another")
