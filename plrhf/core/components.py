"""Builds components from ``_target_`` and arguments, checked against the constructor's annotations."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, TypeVar

from plrhf.core.checks import NO_DEFAULT, checked, type_hints
from plrhf.core.errors import BadValue, bad_value

NOT_FOR_THE_CONSTRUCTOR = ("_target_", "name")
Settings = dict[str, Any]  # a config as a plain dict
T = TypeVar("T")

WITHOUT_EFFECT = (
    *("run_dir", "cache_dir", "ckpt", "overwrite", "plan", "plan_for", "debug", "logger"),
    "referee",
)
"""Settings of where and how a run is executed, which do not affect its results."""


def locate(target: object, field: str) -> Any:
    """Import the class or function with this dotted path.

    Raises:
        ValueError: there is none; `field`._target_ is named.
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


def check_only_own_code(settings: Any, field: str) -> None:
    """Raise a ValueError if untrusted settings name code outside plrhf. Nothing is imported.

    Args:
        settings: plain dicts and lists. field: their name, for messages; empty for a whole config.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            dotted = f"{field}.{name}" if field else str(name)
            is_foreign = name == "_target_" and not str(value).startswith("plrhf.")
            if is_foreign or (name == "trust_remote_code" and value is not False):
                allowed = "a class of plrhf" if is_foreign else "false"
                raise bad_value(
                    dotted,
                    value,
                    f"{allowed}, as it comes from elsewhere and would run code",
                    "If you trust where it comes from, set trust_components=true",
                )
            check_only_own_code(value, dotted)
    elif isinstance(settings, list):
        for value in settings:
            check_only_own_code(value, field)


def parameters(component: Any) -> dict[str, Parameter]:
    """Return the parameters of a constructor or function by name, with resolved types.

    If a constructor takes ``**arguments``, the parameters of its base class are included.
    """
    found: dict[str, Parameter] = {}
    functions = (
        [(vars(c)["__init__"], c) for c in component.__mro__ if "__init__" in vars(c)]
        if inspect.isclass(component)
        else [(component, None)]
    )
    for function, owner in functions:
        if function is object.__init__:
            break
        hints = type_hints(function, owner)
        signature = inspect.signature(function).parameters.values()
        for one in signature:
            if one.name != "self" and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                found.setdefault(one.name, one.replace(annotation=hints.get(one.name, Any)))
        if not any(one.kind == one.VAR_KEYWORD for one in signature):
            break
    return found


def parameter_types(component: Any) -> dict[str, Any]:
    """Return the types of a constructor's or function's parameters by name."""
    return {name: one.annotation for name, one in parameters(component).items()}


def build(
    settings: Mapping[str, Any], field: str, *, kind: type | None = None, **provided: Any
) -> Any:
    """Build an object of the class ``_target_`` from its settings.

    The constructor gets its settings, and those values of `provided` that it has a parameter for. So
    any class can ask for a provided value by naming a parameter. Names, types and ranges of settings
    are checked against the constructor's annotations (see `core.checks`).

    Args:
        settings: plain dict with ``_target_``. field: its name in the config, for messages.
        kind: required base class. provided: values that the run offers.

    Raises:
        ValueError: a setting is unknown, missing or of the wrong type, or the class is of another kind.
    """
    component = locate(settings.get("_target_"), field)
    if kind is not None and not (inspect.isclass(component) and issubclass(component, kind)):
        raise bad_value(
            f"{field}._target_",
            settings.get("_target_"),
            f"the dotted path of a subclass of {kind.__module__}.{kind.__qualname__}",
            "Name such a class",
        )
    return construct(component, settings, field, **provided)


def construct(
    component: Callable[..., T], settings: Mapping[str, Any], field: str, **provided: Any
) -> T:
    """Call a class or function with its settings, checked as in `build`.

    Raises:
        ValueError: a setting is unknown, missing, of the wrong type or out of range.
    """
    takes = parameters(component)
    own = {name: one for name, one in takes.items() if name not in provided}
    given = checked_settings(
        settings,
        {name: one.annotation for name, one in own.items()},
        field,
        defaults={name: one.default for name, one in own.items()},
    )
    for name, one in own.items():
        if one.default is Parameter.empty and name not in given:
            raise bad_value(f"{field}.{name}", None, "a value", f"Set +{field}.{name}=VALUE")
    return component(**given, **{k: v for k, v in provided.items() if k in takes})


def named_settings(
    given: object, known: Mapping[str, type], field: str, example: str
) -> dict[str, Any]:
    """Return the settings of a component with ``_target_``, given by name or as a mapping.

    Args:
        given: a name in `known`, or a mapping with such a ``name`` or a ``_target_``, and settings of
            the component. field: dotted name of `given`, for messages. example: a name to propose.

    Raises:
        ValueError: neither a known name nor a ``_target_``.
    """
    settings = {"name": given} if isinstance(given, str) else given
    if isinstance(settings, Mapping) and "_target_" in settings:
        return dict(settings)
    found = known.get(str(settings.get("name"))) if isinstance(settings, Mapping) else None
    if found is None:
        allowed = f"one of {', '.join(known)}, or a _target_"
        raise bad_value(field, given, allowed, f"Set {field}={example}")
    return {**settings, "_target_": f"{found.__module__}.{found.__qualname__}"}  # type: ignore[dict-item]


def checked_settings(
    settings: Mapping[str, Any],
    kinds: Mapping[str, Any],
    field: str,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check settings, convert them to the types in `kinds`, and leave out ``name`` and ``_target_``.

    Args:
        kinds: name -> annotation, see `checks.checked`. field: the settings' name, for messages.
        defaults: name -> default, which a message proposes.

    Raises:
        ValueError: a setting that is not in `kinds`, or one of the wrong type or out of range.
    """
    given = {k: v for k, v in settings.items() if k not in NOT_FOR_THE_CONSTRUCTOR}
    prefix = f"{field}." if field else ""
    for name, value in given.items():
        if name not in kinds:
            raise unknown_key(f"{prefix}{name}", value, list(kinds))
        default = NO_DEFAULT if defaults is None else defaults.get(name, NO_DEFAULT)
        given[name] = checked(value, kinds[name], f"{prefix}{name}", default=default)
    return given


def unknown_key(field: str, value: object, allowed: list[str], *, rest: str = "") -> BadValue:
    """Return the error for an unknown key, which proposes the most similar known one.

    Args:
        field: dotted name up to the first unknown part. rest: the part after it.
    """
    parent, _, name = field.rpartition(".")
    near = difflib.get_close_matches(name, allowed, n=1)
    prefix = f"{parent}." if parent else ""
    cure = f"Write {prefix}{near[0]}{rest}" if near else "Remove it or correct its name"
    keys = f"one of the keys {', '.join(sorted(allowed))}" if allowed else f"no key below {parent}"
    return bad_value(f"{field}{rest}", value, keys, cure)


def first_difference(now: Any, before: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """Find the first setting in which two configs differ.

    Returns:
        Its dotted name, its value in `now` and its value in `before`; None if they are equal.
    """
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for name in dict.fromkeys((*now, *before)):
            below = f"{field}.{name}" if field else str(name)
            found = first_difference(now.get(name), before.get(name), below)
            if found is not None:
                return found
        return None
    return None if now == before else (field, now, before)
