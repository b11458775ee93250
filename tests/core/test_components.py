"""Components from settings: names and types meet the constructors they are meant for."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from plrhf.core.components import build, parameter_types, parameters
from plrhf.encoders import UserEncoder


class Part:
    def __init__(self, *, width: int, rate: float = 0.5, kind: Literal["a", "b"] = "a") -> None:
        self.width, self.rate, self.kind = width, rate, kind


class Inheriting(Part):
    def __init__(self, *, depth: int | None = None, sizes: tuple[int, ...] = (), **part: Any):
        super().__init__(**part)
        self.depth, self.sizes = depth, sizes


def made(**settings: Any) -> Any:
    return build({"_target_": f"{__name__}.Inheriting", "name": "it", **settings}, "part", depth=3)


def test_build_hands_over_what_is_named_and_nothing_else() -> None:
    part = build({"_target_": f"{__name__}.Part", "width": 4, "rate": 1}, "part", unasked=7)
    assert (part.width, part.rate, type(part.rate)) == (4, 1.0, float)
    inherited = made(width=2, sizes=[3, 1])
    assert (inherited.depth, inherited.sizes, inherited.kind) == (3, (3, 1), "a")
    assert set(parameters(Inheriting)) == {"depth", "sizes", "width", "rate", "kind"}
    assert parameter_types(Inheriting)["width"] is int


REFUSED = {
    "unknown": (
        {"width": 1, "rat": 2},
        "part.rat=2 is not allowed: expected one of the keys kind, rate, sizes, width. "
        "Write part.rate.",
    ),
    "missing": (
        {},
        "part.width=None is not allowed: expected a value. Set +part.width=VALUE.",
    ),
    "text for a number": (
        {"width": "4"},
        "part.width='4' is not allowed: expected a whole number. Set part.width=1.",
    ),
    "bool for a number": (
        {"width": 1, "rate": True},
        "part.rate=True is not allowed: expected a number. Set part.rate=0.5.",
    ),
    "choice": (
        {"width": 1, "kind": "c"},
        "part.kind='c' is not allowed: expected a or b. Set part.kind=a.",
    ),
    "what the run provides": (
        {"width": 1, "depth": 2},
        "part.depth=2 is not allowed: expected one of the keys kind, rate, sizes, width. "
        "Write part.width.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        made(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "target",
    ["os.getcwd", "shutil.rmtree", "plrhf.nowhere.Encoder", "Encoder", None, "torch.nn.Linear"],
)
def test_only_classes_of_the_kind_asked_for_are_called(target: str | None) -> None:
    with pytest.raises(ValueError, match=rf"^encoder\._target_={target!r} is not allowed"):
        build({"_target_": target, "path": "/never"}, "encoder", kind=UserEncoder)
