"""Settings into components: checked by name and type against the constructor they are meant for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from plrhf.errors import BadValue, bad_value

NOT_FOR_THE_CONSTRUCTOR = ("_target_", "name")


def locate(target: object, field: str) -> Any:
    """The class or function a dotted path names.

    Raises:
        ValueError: `field`._target_ does not lead to one.
    """
    module, _, attribute = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise bad_value(
            f"{field}._target_",
            target,
            "the dotted path of an importable class",
            f"Check the path and that its folder is on PYTHONPATH ({error})",
        ) from error
    return found


def parameters(component: Any) -> dict[str, Any]:
    """Names a constructor takes -> their types; ``**parts`` is followed up to the base classes."""
    found: dict[str, Any] = {}
    functions = (
        [vars(c)["__init__"] for c in component.__mro__ if "__init__" in vars(c)]
        if inspect.isclass(component)
        else [component]
    )
    for function in functions:
        if function is object.__init__:
            break
        hints = typing.get_type_hints(function)
        signature = inspect.signature(function).parameters.values()
        for one in signature:
            if one.name != "self" and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                found.setdefault(one.name, hints.get(one.name, Any))
        if not any(one.kind == one.VAR_KEYWORD for one in signature):
            break
    return found


def build(settings: Mapping[str, Any], field: str, **provided: Any) -> Any:
    """Construct what ``settings._target_`` names from its settings and what the run provides.

    Of `provided` only what the constructor names is handed over, so that an outsider's class asks
    for what it needs. Names and types of settings are checked against the constructor.

    Args:
        settings: plain dict with ``_target_``. field: its name in the config, for messages.

    Raises:
        ValueError: unknown or missing setting, or one of the wrong type.
    """
    component = locate(settings["_target_"], field)
    takes = parameters(component)
    given = {k: v for k, v in settings.items() if k not in NOT_FOR_THE_CONSTRUCTOR}
    for name, value in given.items():
        if name not in takes:
            raise unknown_key(f"{field}.{name}", value, [k for k in takes if k not in provided])
        given[name] = checked(value, takes[name], f"{field}.{name}")
    offered = {
        name: value for name, value in provided.items() if name in takes and name not in given
    }
    return component(**given, **offered)


def unknown_key(field: str, value: object, allowed: list[str]) -> BadValue:
    """The error for a key nobody reads, with the nearest one that is read."""
    parent, _, name = field.rpartition(".")
    near = difflib.get_close_matches(name, allowed, n=1)
    prefix = f"{parent}." if parent else ""
    cure = f"Write {prefix}{near[0]}" if near else "Remove it or correct its name"
    return bad_value(field, value, f"one of the keys {', '.join(sorted(allowed))}", cure)


def checked(value: Any, kind: Any, field: str) -> Any:
    """`value` as the annotated type, e.g. 1 as 1.0 for a float.

    Raises:
        ValueError: it is of another type.
    """
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return value
    except Exception as error:  # a class of its own configuration takes no other
        if getattr(error, "code", None) != "type-adapter-config-unused":
            raise
        adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise bad_value(field, value, reason, f"Give {field} such a value") from error
