"""The JSON schema of a command's settings, by which editors complete and check YAML files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema

from plrhf.cli.settings_help import Explained, described
from plrhf.core.checks import type_adapter

INTERPOLATION = {"type": "string", "pattern": r"^\$\{"}
"""A value that is taken from another setting, such as ``${seed}``."""

BESIDE: dict[str, Any] = {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
"""What a file of settings may hold besides."""


def schema_text(config_name: str, given: Sequence[str], conf: Path) -> str:
    """Return the JSON schema of a command's settings.

    A group has the settings of all its choices, since a file may be of any, and allows others, since a
    class of somebody's own has its own.

    Args:
        given: overrides that the command begins with.
    """
    alike: dict[str, list[Explained]] = {}
    for one in _of_all_choices(config_name, given, conf):
        alike.setdefault(one.name, []).append(one)
    properties: dict[str, Any] = {}
    for name, found in alike.items():
        *groups, last = name.split(".")
        level = properties
        for group in groups:
            level = level.setdefault(group, {}).setdefault("properties", {})
        level[last] = {**level.get(last, {}), **_property(found)}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Settings of plrhf {config_name}",
        "type": "object",
        "properties": {**properties, **BESIDE},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1, ensure_ascii=False)


def _of_all_choices(config_name: str, given: Sequence[str], conf: Path) -> Iterator[Explained]:
    """Yield the settings of a command, and those of each group's other choices."""
    groups, settings = described(config_name, given, conf)
    yield from settings
    for group, choice, options in groups:
        if group == "experiment":  # has no settings of its own
            continue
        for option in options:
            if option != choice and not option.endswith("/*"):
                _, settings = described(config_name, [*given, f"{group}={option}"], conf)
                beginning = group.replace("/", ".") + "."
                yield from (one for one in settings if one.name.startswith(beginning))


def _property(found: Sequence[Explained]) -> dict[str, Any]:
    """Return the schema of a setting from what each choice that has it says."""
    types = [_type_of(one) for one in found]
    first = found[0]
    described = "; ".join(filter(None, [first.comment, first.allowed, f"default {first.default}"]))
    if {} in types:  # one of them allows anything
        return {"description": described}
    unlike = [one for place, one in enumerate(types) if one not in types[:place]]
    return {"description": described, "anyOf": [*unlike, INTERPOLATION]}


def _type_of(one: Explained) -> dict[str, Any]:
    """Return the schema of a setting's annotation; empty where there is none that JSON knows."""
    adapter = None if one.kind is None else type_adapter(one.kind)
    if adapter is None:
        return {}
    try:
        schema = adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return {}
    return {} if "$defs" in schema else schema  # of a section, whose settings are there by name
