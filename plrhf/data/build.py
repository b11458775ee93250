"""A data module from the ``data`` settings of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plrhf.core.components import NOT_FOR_THE_CONSTRUCTOR, build, locate, parameters, unknown_key
from plrhf.data.features import FeatureSchema
from plrhf.data.module import PreferenceData


def build_data(
    node: dict[str, Any], *, users: Sequence[str] | None = None, schema: FeatureSchema | None = None
) -> PreferenceData:
    """The data module of a config's ``data``: its source gets the settings its constructor names."""
    own, of_source = parameters(PreferenceData), parameters(locate(node.get("_target_"), "data"))
    allowed = {*own, *of_source, *NOT_FOR_THE_CONSTRUCTOR} - {"source", "users", "schema"}
    for name, value in node.items():
        if name not in allowed:
            raise unknown_key(f"data.{name}", value, sorted(allowed))
    source = build({k: v for k, v in node.items() if k not in own or k in of_source}, "data")
    target = f"{PreferenceData.__module__}.{PreferenceData.__qualname__}"
    settings = {k: v for k, v in node.items() if k in own}
    return build(
        {"_target_": target, **settings}, "data", source=source, users=users, schema=schema
    )
