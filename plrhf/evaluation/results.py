"""What an evaluation found: results.json beside predictions.parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from plrhf.core.components import Settings
from plrhf.data.module import PreferenceData
from plrhf.evaluation.metrics import choose_length_rule, summarise

RESULTS_SCHEMA = 1


def summarise_run(
    predictions: pd.DataFrame,
    settings: Settings,
    data: PreferenceData,
    probes: dict[str, Any],
    how: dict[str, Any],
) -> dict[str, Any]:
    """results.json from predictions; the length rule's direction is read off val, never off test."""
    longer_wins = choose_length_rule(predictions[predictions["split"] == "val"])
    return {
        "schema": RESULTS_SCHEMA,
        "config": settings,
        **summarise(predictions, longer_wins=longer_wins),
        "data": data.counts(),
        "probes": probes,
        "run": how,
    }


def write_evaluation(directory: Path, results: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Write predictions.parquet and results.json."""
    directory.mkdir(parents=True, exist_ok=True)
    predictions.to_parquet(directory / "predictions.parquet", index=False)
    (directory / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
