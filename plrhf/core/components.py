"""Settings into components: checked by name and type against the constructor they are meant for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from plrhf.core.errors import BadValue, bad_value

NOT_FOR_THE_CONSTRUCTOR = ("_target_", "name")
Settings = dict[str, Any]  # a config as a plain dict

ASIDE = ("run_dir", "cache_dir", "ckpt", "plan", "plan_for", "debug", "logger")
"""Settings of where and how a run is made, and not of what comes out of it."""


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


def parameters(component: Any) -> dict[str, Parameter]:
    """What a constructor takes, types resolved; ``**parts`` is followed up to the base classes."""
    found: dict[str, Parameter] = {}
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
                found.setdefault(one.name, one.replace(annotation=hints.get(one.name, Any)))
        if not any(one.kind == one.VAR_KEYWORD for one in signature):
            break
    return found


def kinds(component: Any) -> dict[str, Any]:
    """Names a constructor takes -> their types."""
    return {name: one.annotation for name, one in parameters(component).items()}


def build(
    settings: Mapping[str, Any], field: str, *, kind: type | None = None, **provided: Any
) -> Any:
    """Construct what ``settings._target_`` names from its settings and what the run provides.

    Of `provided` only what the constructor names is handed over, so that an outsider's class asks
    for what it needs. Names and types of settings are checked against the constructor.

    Args:
        settings: plain dict with ``_target_``. field: its name in the config, for messages.
        kind: class that the target must be a subclass of.

    Raises:
        ValueError: unknown or missing setting, one of the wrong type, or a target of another kind.
    """
    component = locate(settings.get("_target_"), field)
    if kind is not None and not (inspect.isclass(component) and issubclass(component, kind)):
        raise bad_value(
            f"{field}._target_",
            settings.get("_target_"),
            f"the dotted path of a subclass of {kind.__module__}.{kind.__qualname__}",
            "Name such a class",
        )
    takes = parameters(component)
    own = {name: one for name, one in takes.items() if name not in provided}
    given = accepted(settings, {name: one.annotation for name, one in own.items()}, field)
    for name, one in own.items():
        if one.default is Parameter.empty and name not in given:
            raise bad_value(f"{field}.{name}", None, "a value", f"Set +{field}.{name}=VALUE")
    return component(**given, **{k: v for k, v in provided.items() if k in takes})


def accepted(settings: Mapping[str, Any], kinds: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The settings in `kinds`, name -> type, each as that type; ``name`` and ``_target_`` left out.

    Raises:
        ValueError: a setting that is not in `kinds`, or one of the wrong type.
    """
    given = {k: v for k, v in settings.items() if k not in NOT_FOR_THE_CONSTRUCTOR}
    prefix = f"{field}." if field else ""
    for name, value in given.items():
        if name not in kinds:
            raise unknown_key(f"{prefix}{name}", value, list(kinds))
        given[name] = checked(value, kinds[name], f"{prefix}{name}")
    return given


def unknown_key(field: str, value: object, allowed: list[str], *, rest: str = "") -> BadValue:
    """The error for a key nobody reads, with the nearest one that is read.

    Args:
        field: up to the first name that is unknown. rest: what was written after it.
    """
    parent, _, name = field.rpartition(".")
    near = difflib.get_close_matches(name, allowed, n=1)
    prefix = f"{parent}." if parent else ""
    cure = f"Write {prefix}{near[0]}{rest}" if near else "Remove it or correct its name"
    keys = f"one of the keys {', '.join(sorted(allowed))}" if allowed else f"no key below {parent}"
    return bad_value(f"{field}{rest}", value, keys, cure)


def checked(value: Any, kind: Any, field: str) -> Any:
    """`value`, as YAML gives it, as the annotated type, e.g. 1 as 1.0 for a float, never "1" as 1.

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
        # Read as JSON, which knows lists but no tuples and text but no paths, as YAML does.
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = [one["msg"].removeprefix("Input should be ") for one in error.errors()]
        in_yaml = [
            one.replace("array", "list").replace("an object", "a mapping") for one in reasons
        ]
        allowed = " or ".join(dict.fromkeys(in_yaml))
        raise bad_value(field, value, allowed, f"Give {field} such a value") from error


def first_difference(now: Any, before: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two configs differ, as (dotted name, now, before), or None."""
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for name in dict.fromkeys((*now, *before)):
            below = f"{field}.{name}" if field else str(name)
            found = first_difference(now.get(name), before.get(name), below)
            if found is not None:
                return found
        return None
    return None if now == before else (field, now, before)
