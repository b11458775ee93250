"""Reads and splits the rows that the settings name. It loads no model library but torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plrhf.cli.sections import DataConfig
from plrhf.core.components import build
from plrhf.data.features import FeatureSchema
from plrhf.data.module import PreferenceData
from plrhf.data.sources.base import Source


def build_data(
    config: DataConfig,
    *,
    users: Sequence[str] | None = None,
    schema: FeatureSchema | None = None,
    **options: Any,
) -> PreferenceData:
    """Read and split the rows of the config's source.

    Args:
        users, schema: of a trained model that is evaluated on these rows, see `PreferenceData`.
        options: values that replace the config's, e.g. the text options of a trained model.
    """
    given = {name: getattr(config, name) for name in DataConfig.model_fields if name != "source"}
    return PreferenceData(
        **{**given, **options}, source=build_source(config), users=users, schema=schema
    )


def build_source(config: DataConfig) -> Source:
    """Build the config's source; its rows are not read yet."""
    source: Source = build(config.source, "data", kind=Source)
    return source
