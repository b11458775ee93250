"""What an evaluation found and where it came from: results.json beside predictions.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field
from typing_extensions import TypedDict

from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import STATISTICS
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row, content_hash
from plrhf.evaluation.metrics import UserKind, choose_length_rule, summarise
from plrhf.evaluation.records import Record, read_record, write_record

RESULTS, PREDICTIONS = "results.json", "predictions.parquet"


class Measures(TypedDict):
    """Statistics of some pairs, each with its interval; those not defined are None."""

    accuracy_micro: Estimate
    accuracy_macro: Estimate
    accuracy_worst10: Estimate
    nll: Estimate
    ece: Estimate
    n_pairs: int
    n_users: int


class ByContext(TypedDict):
    """The same pairs as the model sees them with and without knowing the user."""

    user: Measures
    generic: Measures


class ByUserKind(TypedDict):
    """Measures of users that training saw, and of those it did not."""

    seen: Measures
    unseen: Measures


class LengthOnly(ByUserKind):
    """The control that goes by length alone, and the direction it chose on val."""

    rule: str


class Controls(TypedDict):
    """What needs no model."""

    length_only: LengthOnly


class Command(Record):
    """How a run was made: its command and the versions of the libraries."""

    command: str
    versions: dict[str, str]


class Provenance(Command):
    """What was evaluated, and by which command and versions.

    Attributes:
        fingerprint: of the trained model. Files that other commands add to the run's directory carry
            it too, so that those of an older model in the same directory are recognised.
        data: settings of the rows that were evaluated.
        rows: hash of all rows. test_pairs: hash of the test pairs' ids, users and texts.
        world: of synthetic people: what tells them from people with the same ids in another world.
    """

    fingerprint: str | None
    data: dict[str, Any]
    rows: str
    test_pairs: str
    world: str | None


class Results(Record):
    """results.json, schema 1.

    Attributes:
        config: the settings of the training run, as config.yaml has them.
        test: by kind of user. cells: by kind of user and of prompt, None without pairs.
        oracle: what true preferences get; None for human data.
        data: counts of rows. probes: see `plrhf.evaluation.probes`.
        run: how the model was trained; None in a file made by hand.
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
    run: Command | None = None
    provenance: Provenance | None = None

    @property
    def fingerprint(self) -> str | None:
        """The trained model's fingerprint, None where the file does not know it."""
        return None if self.provenance is None else self.provenance.fingerprint

    def test_values(self) -> dict[str, float]:
        """Return the test statistics without intervals, by names like test/seen/user/nll."""
        cells: dict[str, Any] = {
            f"test/{kind}/{context}": cell
            for kind, contexts in self.test.items()
            for context, cell in contexts.items()
        }
        return {
            f"{place}/{name}": cell[name]["value"]
            for place, cell in cells.items()
            for name in STATISTICS
            if cell[name]["value"] is not None
        }


def pairs_hash(rows: Sequence[Row]) -> str:
    """Hash ids, users and texts of pairs in any order; the same for the same pairs alone."""
    return content_hash(
        sorted(
            content_hash(row.pair_id, row.user_id, row.prompt, row.chosen, row.rejected)
            for row in rows
        )
    )


def model_fingerprint(*, config: object, backbone: str, rows: str, versions: object) -> str:
    """Hash all that decides what training arrives at.

    Args:
        config: settings of the run but those of where and how it is made.
        backbone: fingerprint of the weights it starts from.
        rows: hash of the rows, see `PreferenceData.content_hash`.
        versions: of the libraries.
    """
    return content_hash(config, backbone, rows, versions)


def provenance_of(
    data: PreferenceData, *, settings: dict[str, Any], how: Command, fingerprint: str | None
) -> Provenance:
    """Say what is evaluated.

    Args:
        data: the rows. settings: what they were made from. how: this command.
        fingerprint: of the model.
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
) -> Results:
    """Compute results.json from predictions.

    Args:
        longer_wins: direction of the length rule, of a run that is evaluated on rows without val;
            None: it is chosen on val, never on test.
    """
    if longer_wins is None:
        longer_wins = choose_length_rule(predictions[predictions["split"] == "val"])
    return Results(
        config=config,
        **summarise(predictions, longer_wins=longer_wins),
        data=counts,
        probes=probes,
        run=run,
        provenance=provenance,
    )


def write_evaluation(directory: Path, results: Results, predictions: pd.DataFrame) -> None:
    """Write predictions.parquet and results.json."""
    directory.mkdir(parents=True, exist_ok=True)
    predictions.to_parquet(directory / PREDICTIONS, index=False)
    write_record(directory / RESULTS, results)


def read_results(directory: Path) -> Results:
    """Read a directory's results.json.

    Raises:
        ValueError: it is not there, damaged, or of another version.
    """
    return read_record(directory / RESULTS, Results)
