"""Ranges in annotations: refused alike from settings and from Python, in words that give a way out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.cli.eval_config import AdaptTask
from plrhf.core.checks import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_arguments,
    checked,
    describe,
)
from plrhf.core.components import build, parameters


@check_arguments("part")
class Part(nn.Module):
    def __init__(
        self,
        *,
        width: PositiveInt,
        share: Fraction = 0.25,
        rank: PositiveInt | None = None,
        pooling: Literal["mean", "last"] = "mean",
        table: Tensor | None = None,
        free: float = 0.0,
        endless: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0,
    ) -> None:
        super().__init__()
        self.width, self.share, self.rank = width, share, rank


class Deeper(Part):
    def __init__(self, *, depth: int = 1, **part: Any) -> None:
        super().__init__(**part)
        self.depth = depth


@check_arguments("rates")
@dataclass(frozen=True, kw_only=True)
class Rates:
    lr: PositiveFloat = 5e-5
    steps: NonNegativeInt = 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "below the range": (
        {"width": 0},
        "part.width=0 is not allowed: expected a whole number from 1. Set part.width=1.",
    ),
    "above the range": (
        {"width": 1, "share": 2},
        "part.share=2 is not allowed: expected a number from 0 to 1. Set part.share=0.25.",
    ),
    "range or nothing": (
        {"width": 1, "rank": 0},
        "part.rank=0 is not allowed: expected a whole number from 1 or null. Set part.rank=1.",
    ),
    "choice": (
        {"width": 1, "pooling": "max"},
        "part.pooling='max' is not allowed: expected mean or last. Set part.pooling=mean.",
    ),
    "true is no number": (
        {"width": True},
        "part.width=True is not allowed: expected a whole number from 1. Set part.width=1.",
    ),
    "text is no number": (
        {"width": "4"},
        "part.width='4' is not allowed: expected a whole number from 1. Set part.width=1.",
    ),
    "half a number": (
        {"width": 1.5},
        "part.width=1.5 is not allowed: expected a whole number from 1. Set part.width=1.",
    ),
    "not a number": (
        {"width": 1, "free": math.nan},
        "part.free=nan is not allowed: expected a number. Set part.free=0.0.",
    ),
    "infinite": (
        {"width": 1, "free": -math.inf},
        "part.free=-inf is not allowed: expected a number. Set part.free=0.0.",
    ),
    "null": (
        {"width": None},
        "part.width=None is not allowed: expected a whole number from 1. Set part.width=1.",
    ),
}


@pytest.mark.parametrize("kind", [Part, Deeper])
@pytest.mark.parametrize("case", REFUSED)
def test_settings_and_python_are_refused_alike(case: str, kind: type[Part]) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError) as from_python:
        kind(**arguments)
    with pytest.raises(ValueError) as from_settings:
        build({"_target_": f"{__name__}.{kind.__name__}", **arguments}, "part")
    assert str(from_python.value) == str(from_settings.value) == message


def test_what_is_allowed_passes_as_it_is() -> None:
    part = Deeper(depth=2, width=np.int64(3), share=1, table=torch.ones(2), endless=math.inf)
    assert (part.depth, part.width, part.share, part.rank) == (2, 3, 1, None)
    assert isinstance(part, nn.Module) and len(list(part.parameters())) == 0
    assert Rates(lr=1).lr == 1 and Rates() == Rates(lr=5e-5, steps=3)
    assert build({"_target_": f"{__name__}.Part", "width": 2, "share": 1}, "part").share == 1.0


def test_a_missing_or_unknown_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'width'"):
        Part()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'wide'"):
        Part(width=1, wide=2)  # type: ignore[call-arg]


def test_a_dataclass_is_checked_with_its_own_name() -> None:
    for lr in (0, -1.0, math.nan, math.inf):
        with pytest.raises(
            ValueError, match=r"^rates\.lr=.* expected a number above 0\. Set rates"
        ):
            Rates(lr=lr)
    with pytest.raises(
        ValueError, match=r"^rates\.steps=-1 .* whole number from 0\. Set rates\.ste"
    ):
        Rates(steps=-1)


def test_a_dataclass_finds_types_of_a_base_from_another_module() -> None:
    """`Adaptation`, the type of a field of `AdaptTask`, is not among the names of this module."""

    @dataclass(frozen=True)
    class Longer(AdaptTask):
        width: int = 1

    assert parameters(Longer)["rule"].annotation == get_type_hints(AdaptTask)["rule"]

    @check_arguments("more")
    @dataclass(frozen=True, kw_only=True)
    class More(Rates):
        times: PositiveInt = 1

    assert More(lr=1.0, times=2).times == 2
    with pytest.raises(ValueError, match=r"^more\.times=0 is not allowed"):
        More(times=0)


DESCRIBED = [
    (PositiveInt, "a whole number from 1"),
    (NonNegativeFloat, "a number from 0"),
    (FractionBelowOne, "a number from 0 and below 1"),
    (Annotated[int, Field(ge=2, le=5)], "a whole number from 2 to 5"),
    (Annotated[float, Field(gt=0, le=1)], "a number above 0 and at most 1"),
    (Literal["a", 3, None], "a, 3 or null"),
    (int | str | None, "a whole number, text or null"),
    (list[PositiveInt], "a list, each item a whole number from 1"),
    (tuple[str, ...], "a list, each item text"),
    (dict[str, int] | None, "a mapping or null"),
    (bool, "true or false"),
    (Path, "a path"),
]


@pytest.mark.parametrize(("kind", "words"), DESCRIBED, ids=[words for _, words in DESCRIBED])
def test_a_type_in_words(kind: Any, words: str) -> None:
    assert describe(kind) == words


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (PositiveInt, 0),
        (PositiveFloat, 0),
        (FractionBelowOne, 1),
        (Fraction, -0.1),
        (Annotated[int, Field(ge=5, le=9)], 4),
        (Annotated[int, Field(gt=5)], 5),
        (Annotated[float, Field(gt=2.5, lt=3)], 3),
        (Literal["a", "b"], "c"),
        (PositiveInt | None, -1),
        (bool, 1),
    ],
)
def test_the_value_a_message_proposes_is_allowed(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        checked(value, kind, "it")
    proposed = str(error.value).rpartition("Set it=")[2].removesuffix(".")
    checked(proposed if kind == Literal["a", "b"] else json.loads(proposed), kind, "it")


def test_checked_reads_settings_as_yaml_means_them() -> None:
    assert checked([1, 2], tuple[int, ...], "x") == (1, 2)
    assert checked("a/b", Path, "x") == checked(Path("a/b"), Path, "x") == Path("a/b")
    assert checked(None, int | None, "x") is None
    assert checked({"a": 1}, dict[str, Any] | None, "x") == {"a": 1}
    assert type(checked(1, float, "x")) is float
    with pytest.raises(
        ValueError, match="x='1' is not allowed: expected a whole number or a list, "
    ):
        checked("1", int | list[str], "x")
    with pytest.raises(ValueError, match="each item a number. Give x such a value"):
        checked([1.0, math.nan], list[float], "x")
