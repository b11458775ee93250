"""The results of an evaluation and their provenance: results.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import Field
from typing_extensions import TypedDict

from plrhf.core.bootstrap import Estimate
from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.core.stats import STATISTICS
from plrhf.data.digests import content_hash, file_digest
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.evaluation.metrics import UserKind, choose_length_rule, summarise
from plrhf.evaluation.records import Record, read_record, record_text

RESULTS, PREDICTIONS, METRICS = "results.json", "predictions.parquet", "metrics.csv"

TEXT_COLUMNS = ("split", "user_kind", "prompt_kind", "context", "user_id", "pair_id", "prompt_id")
NUMBER_COLUMNS = ("margin", "correct", "chosen_tokens", "rejected_tokens")
"""Columns of predictions.parquet."""

EVALUATE_ANEW = "Evaluate the run anew"


class Measures(TypedDict):
    """Statistics of a set of pairs, each with its interval; None if undefined."""

    accuracy_micro: Estimate
    accuracy_macro: Estimate
    accuracy_worst10: Estimate
    nll: Estimate
    ece: Estimate
    n_pairs: int
    n_users: int


class ByContext(TypedDict):
    """Measures of the same pairs in the user's and in the generic context."""

    user: Measures
    generic: Measures


class ByUserKind(TypedDict):
    """Measures of users that training has seen, and of users it has not."""

    seen: Measures
    unseen: Measures


class LengthOnly(ByUserKind):
    """The control that predicts by length alone. `rule` is its direction, chosen on val."""

    rule: str


class Controls(TypedDict):
    """Controls that need no model."""

    length_only: LengthOnly


class Command(Record):
    """The command of a run and the versions of its libraries."""

    command: str
    versions: dict[str, str]


class Provenance(Command):
    """What was evaluated, and by which command and library versions.

    Attributes:
        fingerprint: of the trained model. Files that other commands add to the directory have it too,
            so that files of an older model are recognised.
        data: settings of the rows that were evaluated.
        rows: hash of all rows. test_pairs: hash of the test pairs' ids, users and texts.
        world: of synthetic users: differs from another world whose users have the same ids.
        files: digests of the files that the results were computed from, by name.
    """

    fingerprint: str | None
    data: dict[str, Any]
    rows: str
    test_pairs: str
    world: str | None
    files: dict[str, str] = {}


class Results(Record):
    """results.json, schema 1.

    Attributes:
        config: settings of the training run, as in config.yaml.
        test: by kind of user. cells: by kind of user and of prompt, None without pairs.
        oracle: results of the true preferences; None for real data.
        data: counts of rows. probes: see `plrhf.evaluation.probes`.
        privacy: epsilon, delta and what they come from; None: trained without differential privacy.
        run: command of the training; None in a file made by hand.
        provenance: of this evaluation; None in a file made by hand.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    config: dict[str, Any]
    test: dict[UserKind, ByContext]
    cells: dict[str, ByContext | None]
    oracle: ByUserKind | None
    controls: Controls
    data: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    privacy: dict[str, Any] | None = None
    run: Command | None = None
    provenance: Provenance | None = None

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the trained model; None if the file lacks it."""
        return None if self.provenance is None else self.provenance.fingerprint

    def test_values(self) -> dict[str, float]:
        """Return the test statistics, such as test/seen/user/nll with test/seen/user/nll/low and high."""
        cells: dict[str, Any] = {
            f"test/{kind}/{context}": cell
            for kind, contexts in self.test.items()
            for context, cell in contexts.items()
        }
        found: dict[str, float] = {}
        for place, cell in cells.items():
            for name in STATISTICS:
                estimate, at = cell[name], f"{place}/{name}"
                if estimate["value"] is not None:
                    found[at] = estimate["value"]
                if estimate["ci95"] is not None:
                    found[f"{at}/low"], found[f"{at}/high"] = estimate["ci95"]
        return found


def pairs_hash(rows: Sequence[Row]) -> str:
    """Hash ids, users and texts of pairs; the order does not matter."""
    return content_hash(
        sorted(
            content_hash(row.pair_id, row.user_id, row.prompt, row.chosen, row.rejected)
            for row in rows
        )
    )


def model_fingerprint(*, config: object, backbone: str, rows: str, versions: object) -> str:
    """Hash everything that determines the trained model.

    Args:
        config: settings of the run, except where and by which means it runs.
        backbone: fingerprint of the initial weights.
        rows: hash of the rows, see `PreferenceData.content_hash`.
        versions: of the libraries.
    """
    return content_hash(config, backbone, rows, versions)


def provenance_of(
    data: PreferenceData, *, settings: dict[str, Any], how: Command, fingerprint: str | None
) -> Provenance:
    """Collect the provenance of an evaluation.

    Args:
        data: the rows. settings: of these rows. how: this command. fingerprint: of the model.
    """
    return Provenance(
        command=how.command,
        versions=how.versions,
        fingerprint=fingerprint,
        data=settings,
        rows=data.content_hash(),
        test_pairs=pairs_hash(data.splits.test),
        world=data.source.world(),
    )


def summarise_run(
    predictions: pd.DataFrame,
    *,
    config: dict[str, Any],
    counts: dict[str, Any],
    probes: dict[str, Any],
    run: Command | None,
    provenance: Provenance,
    longer_wins: bool | None = None,
    privacy: dict[str, Any] | None = None,
) -> Results:
    """Compute the content of results.json from predictions.

    Args:
        longer_wins: direction of the length rule, for rows without val pairs; None: chosen on val,
            never on test.
        privacy: see `Results`.
    """
    if longer_wins is None:
        longer_wins = choose_length_rule(predictions[predictions["split"] == "val"])
    return Results(
        config=config,
        **summarise(predictions, longer_wins=longer_wins),
        data=counts,
        probes=probes,
        privacy=privacy,
        run=run,
        provenance=provenance,
    )


def write_evaluation(directory: Path, results: Results, predictions: pd.DataFrame) -> None:
    """Write predictions.parquet, and results.json with its digest.

    Both are whole before the first of them appears. A kill between the two renames leaves files that do
    not fit, which `read_predictions` refuses; anything that fails before leaves both old ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    provenance = results.provenance
    paths = directory / RESULTS, directory / PREDICTIONS
    with whole_file(paths[0]) as results_part, whole_file(paths[1]) as predictions_part:
        predictions.to_parquet(predictions_part, index=False)
        if provenance is not None:
            files = {PREDICTIONS: file_digest(predictions_part)}
            if (directory / METRICS).is_file():
                files[METRICS] = file_digest(directory / METRICS)
            provenance = provenance.model_copy(update={"files": files})
        record = results.model_copy(update={"provenance": provenance})
        results_part.write_text(record_text(record), encoding="utf-8", newline="\n")


def read_predictions(directory: Path, results: Results) -> pd.DataFrame:
    """Read predictions.parquet of a directory.

    Raises:
        ValueError: it is damaged, or is not the one that results.json was computed from.
    """
    path = directory / PREDICTIONS
    _check_file(path, results, EVALUATE_ANEW)
    try:
        found = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value(str(path), reason, "a whole Parquet file", EVALUATE_ANEW) from error
    for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS):
        if name not in found or (name in NUMBER_COLUMNS and not is_numeric_dtype(found[name])):
            allowed = f"a column {name}{' of numbers' * (name in NUMBER_COLUMNS)}"
            raise bad_value(str(path), list(found), allowed, EVALUATE_ANEW)
    return found


def read_metrics(directory: Path) -> pd.DataFrame | None:
    """Read metrics.csv, the curves of a training; None if there is none.

    Raises:
        ValueError: it is not the one that was there when results.json was written.
    """
    path = directory / METRICS
    if not path.is_file():
        return None
    if (directory / RESULTS).is_file():
        _check_file(path, read_results(directory), "Remove it, or end its training with ckpt=last")
    return pd.read_csv(path)


def _check_file(path: Path, results: Results, cure: str) -> None:
    """Raise a ValueError if a file is not the one whose digest its results have."""
    digest = None if results.provenance is None else results.provenance.files.get(path.name)
    if digest is not None and digest != file_digest(path):
        raise bad_value(
            str(path), "altered or damaged", f"the file that {RESULTS} was written with", cure
        )


def read_results(directory: Path) -> Results:
    """Read results.json of a directory.

    Raises:
        ValueError: it is missing, damaged or of another version.
    """
    return read_record(directory / RESULTS, Results)
