"""Types and ranges of settings, written as annotations and checked in one place.

The author of a component annotates the constructor's arguments with their ranges, and decorates the
class with the name of its settings on the command line:

    from plrhf.core.checks import Fraction, PositiveInt, check_arguments

    @check_arguments("encoder")
    class MyEncoder(UserEncoder):
        def __init__(self, *, user_dim: int, rank: PositiveInt | None = None,
                     dropout: Fraction = 0.0, mode: Literal["sum", "mean"] = "sum") -> None:

Values are then checked whenever the class is built, from settings (`components.build`) or from Python,
with the same message. A float must be finite unless it is annotated with ``Field(allow_inf_nan=True)``.
Other ranges are written as ``Annotated[int, Field(ge=2)]``. Conditions on several arguments are checked
in the constructor's body with `errors.bad_value`.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import ConfigDict, Field, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from plrhf.core.errors import BadValue, bad_value

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

NO_DEFAULT = inspect.Parameter.empty
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    Path: "a path",
}
C = TypeVar("C", bound=Callable[..., Any])


def checked(value: Any, kind: Any, field: str, *, default: Any = NO_DEFAULT) -> Any:
    """Check a value against an annotation and convert it: 1 becomes 1.0 for a float, "1" never becomes 1.

    Args:
        value: as YAML or Python gives it.
        kind: an annotation, e.g. ``int | None`` or `PositiveInt`; a class that pydantic does not know
            accepts every value.
        field: the setting's dotted name, for the message.
        default: the setting's default, which the message proposes.

    Raises:
        ValueError: the value has another type or is out of range.
    """
    adapter = type_adapter(kind)
    if adapter is None:
        return value
    try:
        # JSON knows lists but no tuples, and text but no paths, as YAML does.
        text = json.dumps(value, default=_plain)
    except (TypeError, ValueError):
        return _checked_object(adapter, value, kind, field, default)
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise refusal(field, value, kind, default=default) from error


def refusal(field: str, value: object, kind: Any, *, default: Any = NO_DEFAULT) -> BadValue:
    """Return the error for a value that does not match its annotation."""
    example = default
    if default is NO_DEFAULT or default is None:
        example = _example(kind)
    cure = f"Give {field} such a value"
    if example is not NO_DEFAULT:
        cure = f"Set {field}={_in_yaml(example)}"
    return bad_value(field, value, describe(kind), cure)


def check_arguments(field: str) -> Callable[[C], C]:
    """Decorate a class or function so that its arguments are checked at each call.

    Only arguments annotated with numbers, text, choices, and lists or mappings of them are checked, so
    tensors and modules cost nothing. A subclass that passes ``**arguments`` on is checked by the
    decorators of its bases.

    Args:
        field: name of the component's settings, e.g. ``model``; empty for none.
    """

    def decorate(target: C) -> C:
        function: Any = target.__init__ if inspect.isclass(target) else target
        signature = inspect.signature(function)
        owner: Any = target if inspect.isclass(target) else None

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                given = signature.bind(*arguments, **named).arguments
            except TypeError:  # Python words a missing or unknown argument itself
                given = {}
            for name, kind in _plain_kinds(function, owner).items():
                if name in given:
                    prefix = f"{field}." if field else ""
                    default = signature.parameters[name].default
                    checked(given[name], kind, f"{prefix}{name}", default=default)
            return function(*arguments, **named)

        if inspect.isclass(target):
            target.__init__ = call  # type: ignore[method-assign]
            return target
        return call  # type: ignore[return-value]

    return decorate


def describe(kind: Any) -> str:
    """Describe in words what an annotation allows, e.g. "a number from 0 to 1 or null"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{describe(arguments[0])}{_range(_bounds(kind))}"
    if origin is Literal:
        return _alternatives([_in_yaml(choice) for choice in arguments])
    if origin in (Union, types.UnionType):
        return _alternatives([describe(one) for one in arguments])
    if kind in NAMES:
        return NAMES[kind]
    container = origin if origin is not None else kind
    if (
        container in (list, tuple, set, frozenset)
        or getattr(container, "__name__", "") == "Sequence"
    ):
        items = [one for one in arguments if one is not Ellipsis]
        return f"a list, each item {describe(items[0])}" if len(items) == 1 else "a list"
    if container is dict or getattr(container, "__name__", "") == "Mapping":
        return "a mapping"
    return f"a value of type {getattr(kind, '__name__', kind)}"


def _alternatives(words: list[str]) -> str:
    """Join words by commas and "or"."""
    distinct = list(dict.fromkeys(words))
    return " or ".join(filter(None, [", ".join(distinct[:-1]), distinct[-1]]))


def _bounds(kind: Any) -> dict[str, float]:
    """Return the bounds ``ge``, ``gt``, ``le`` and ``lt`` of an annotated number."""
    found: dict[str, float] = {}
    for one in kind.__metadata__:
        for bound in one.metadata if isinstance(one, FieldInfo) else [one]:
            names = [name for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)]
            found |= {name: getattr(bound, name) for name in names}
    return found


def _range(bounds: dict[str, float]) -> str:
    """Describe bounds in words, e.g. " from 0 to 1"."""
    words = {"ge": "from {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    if "ge" in bounds and "le" in bounds:
        words["le"] = "to {}"
        return "".join(f" {words[name]}".format(bounds[name]) for name in ("ge", "le"))
    said = [words[name].format(bounds[name]) for name in words if name in bounds]
    return f" {' and '.join(said)}" if len(said) > 0 else ""


def _example(kind: Any) -> Any:
    """Return a value that an annotation allows, for messages; `NO_DEFAULT` if there is no simple one."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        found = [_example(one) for one in arguments if one is not types.NoneType]
        found += [None for one in arguments if one is types.NoneType]
        return next((one for one in found if one is not NO_DEFAULT), NO_DEFAULT)
    bounds = _bounds(kind) if origin is Annotated else {}
    number = arguments[0] if origin is Annotated else kind
    if number not in (int, float):
        return True if number is bool else NO_DEFAULT
    low = bounds.get("ge", bounds.get("gt", 0))
    high = bounds.get("le", bounds.get("lt"))
    if number is int:
        least = int(low) + (1 if "gt" in bounds else 0)
        return least if low > 0 or "gt" in bounds or high is not None else max(1, least)
    return low + 1.0 if high is None else (low + high) / 2


def _in_yaml(value: Any) -> str:
    """Format a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _checked_object(
    adapter: TypeAdapter[Any], value: Any, kind: Any, field: str, default: Any
) -> Any:
    """Do what `checked` does for a Python object that YAML cannot hold, e.g. a path or a tensor."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise refusal(field, value, kind, default=default) from error


def type_adapter(kind: Any) -> TypeAdapter[Any] | None:
    """Return the cached pydantic adapter of a type; None if pydantic cannot handle the type."""
    try:
        return _kept_adapter(kind)
    except TypeError:  # an annotation that cannot be hashed
        return _new_adapter(kind)


def _new_adapter(kind: Any) -> TypeAdapter[Any] | None:
    """Make a pydantic adapter for values of a type; None if pydantic cannot handle the type."""
    try:
        return TypeAdapter(
            kind, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        )
    except PydanticSchemaGenerationError:
        return None
    except Exception as error:  # a class of its own configuration takes no other
        if getattr(error, "code", None) != "type-adapter-config-unused":
            raise
        return TypeAdapter(kind)


_kept_adapter = functools.cache(_new_adapter)


def type_hints(function: Callable[..., Any], owner: type | None) -> dict[str, Any]:
    """Return the types of a function's arguments by name, with ranges.

    The generated ``__init__`` of a dataclass also has fields of base classes in other modules. Their
    types are resolved in the module of each class.

    Args:
        owner: the class whose constructor the function is; None for other functions.
    """
    return typing.get_type_hints(owner if is_dataclass(owner) else function, include_extras=True)


@functools.cache
def _plain_kinds(function: Callable[..., Any], owner: type | None) -> dict[str, Any]:
    """Return the arguments of a function that can be checked, with their types."""
    hints = type_hints(function, owner)
    named = inspect.signature(function).parameters.values()
    own = [one.name for one in named if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    return {name: hints[name] for name in own if name in hints and _is_plain(hints[name])}


def _is_plain(kind: Any) -> bool:
    """Return whether a type consists of numbers, text, choices, lists and mappings only."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal or kind in (int, float, bool, str, types.NoneType, Any, Ellipsis):
        return True
    if origin is Annotated:
        return _is_plain(arguments[0])
    known = (Union, types.UnionType, list, tuple, dict)
    return kind in (list, tuple, dict) or (origin in known and all(map(_is_plain, arguments)))
