"""A finished run, as its directory tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from plrhf.core.errors import bad_value
from plrhf.core.stats import Outcomes
from plrhf.evaluation.metrics import outcomes

ROLES = {
    "plrhf.encoders.NoneEncoder": "vanilla",
    "plrhf.encoders.UniformEncoder": "uniform",
}
PERSONAL, SHUFFLED = "personal", "shuffled"
SETTINGS = ("model", "data", "encoder", "aggregator", "seed")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory."""

    path: Path
    name: str
    results: dict[str, Any]
    predictions: pd.DataFrame = field(repr=False)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What tells runs apart, as text."""
        return {key: _component(self.results["config"], key) for key in SETTINGS}

    @property
    def role(self) -> str:
        """What the run is in a comparison; see `role`."""
        return role(self.results["config"])

    @cached_property
    def learned(self) -> Any:
        """users.json: what the user model learned; None where users are not told apart."""
        return self._json("users.json")

    @cached_property
    def adapted(self) -> Any:
        """adapt.json: what new users' pairs gave; None before eval=adapt."""
        return self._json("adapt.json")

    @cached_property
    def winrate(self) -> Any:
        """winrate.json: how the run's texts fared; None before eval=winrate."""
        return self._json("winrate.json")

    def _json(self, name: str) -> Any:
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def outcomes(self, user_kind: str, context: str = "user") -> Outcomes:
        """The run's test pairs of one kind of user."""
        return outcomes(self.predictions, user_kind=user_kind, context=context)


def read_run(run_dir: Path | str, *, name: str | None = None) -> Run:
    """Read results.json and predictions.parquet of a run directory.

    Raises:
        ValueError: one of the two is not there.
    """
    path = Path(run_dir)
    for file in ("results.json", "predictions.parquet"):
        if not (path / file).is_file():
            raise bad_value(
                "run", str(path), f"a directory that holds {file}", "Evaluate the run first"
            )
    return Run(
        path=path,
        name=path.resolve().name if name is None else name,
        results=json.loads((path / "results.json").read_text(encoding="utf-8")),
        predictions=pd.read_parquet(path / "predictions.parquet"),
    )


def role(config: Mapping[str, Any]) -> str:
    """What a run is in a comparison, by its settings alone, so that no control passes as a result.

    Shuffled ids come first: whatever is trained on them is a control. Encoders count by class, as
    an outsider's may go by any name.
    """
    if config["data"].get("shuffle_users") is True:
        return SHUFFLED
    return ROLES.get(config["encoder"]["_target_"], PERSONAL)


def read_users(run: Run) -> pd.DataFrame:
    """users.json as a table: one row a user, the generic user last.

    Raises:
        ValueError: the run's encoder tells no users apart, so there is none.
    """
    if run.learned is None:
        raise bad_value(
            "run", str(run.path), "a run that left users.json", "Train with encoder=lookup"
        )
    generic = {"user_id": "generic user", **run.learned["generic"]}
    return pd.DataFrame([*run.learned["users"], generic])


def _component(config: Mapping[str, Any], key: str) -> str:
    """Name of a part of the config: its name, or the last word of its dotted path."""
    part = config.get(key)
    if part is None:
        return "none"
    if not isinstance(part, Mapping):
        return str(part)
    return str(part.get("name", part.get("_target_", "–"))).rsplit(".", 1)[-1]
