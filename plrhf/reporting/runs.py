"""Reads a finished run from its directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from plrhf.core.errors import bad_value
from plrhf.core.stats import Outcomes, as_text
from plrhf.evaluation.few_shot import FewShotCurve
from plrhf.evaluation.generations import GeneratedText, read_generations
from plrhf.evaluation.judges import JudgedRun
from plrhf.evaluation.metrics import USER_KINDS, outcomes
from plrhf.evaluation.records import read_record
from plrhf.evaluation.results import PREDICTIONS, RESULTS, Results, read_predictions, read_results
from plrhf.evaluation.users import LearnedUsers

ROLES = {
    "plrhf.encoders.NoneEncoder": "vanilla",
    "plrhf.encoders.UniformEncoder": "uniform",
}
PERSONAL, SHUFFLED = "personal", "shuffled"
IN_TEXT = ("context_pairs", "use_user_text", "use_user_features")
"""Settings of the data that put the person in front of the prompt."""
SETTINGS = ("model", "data", "encoder", "aggregator", "seed")

F = TypeVar("F", LearnedUsers, FewShotCurve, JudgedRun)


@dataclass(frozen=True)
class Run:
    """A finished run, or runs of several seeds as one.

    Attributes:
        path: its directory. name: by which it is shown.
        of_seeds: the runs that were pooled, in order of their seeds; empty for a single run.
    """

    path: Path
    name: str
    results: Results
    predictions: pd.DataFrame = field(repr=False)
    of_seeds: tuple[Run, ...] = ()
    _outcomes: dict[tuple[str, str], Outcomes] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings it was trained with, as config.yaml has them."""
        return self.results.config

    @cached_property
    def settings(self) -> dict[str, str]:
        """The names of the run's parts (`SETTINGS`), by which tables tell runs apart."""
        return {key: _part_name(self.config, key) for key in SETTINGS}

    @property
    def role(self) -> str:
        """The run's role in a comparison, see `role`."""
        return role(self.config)

    @property
    def singles(self) -> tuple[Run, ...]:
        """The single runs that were pooled into this one, or this run itself."""
        return self.of_seeds if len(self.of_seeds) > 0 else (self,)

    def outcomes(self, user_kind: str, context: str = "user") -> Outcomes:
        """Return the margins on the test pairs of one kind of user; computed once."""
        key = user_kind, context
        if key not in self._outcomes:
            found = outcomes(self.predictions, user_kind=user_kind, context=context)
            self._outcomes[key] = found
        return self._outcomes[key]

    @cached_property
    def test_key(self) -> tuple[str, ...]:
        """A hash of the test pairs: two runs have the same one if ids, users and texts are equal."""
        hashes = [_hash_of_pairs(self.outcomes(kind)) for kind in USER_KINDS]
        provenance = self.results.provenance
        return (*hashes, "" if provenance is None else provenance.test_pairs)

    def tested_as(self, other: Run) -> bool:
        """Whether both were evaluated on the same test pairs of the same users."""
        return self.test_key == other.test_key

    @cached_property
    def val_accuracy(self) -> float | None:
        """Accuracy on the val pairs in user context; None without val pairs."""
        table = self.predictions
        correct = table["correct"][(table["split"] == "val") & (table["context"] == "user")]
        return None if len(correct) == 0 else float(correct.mean())

    @cached_property
    def learned(self) -> LearnedUsers | None:
        """The content of users.json; None if the run's model does not distinguish users."""
        return self._read_own("users.json", LearnedUsers)

    @cached_property
    def adapted(self) -> FewShotCurve | None:
        """The content of adapt.json; None before eval=adapt."""
        return self._read_own("adapt.json", FewShotCurve)

    @cached_property
    def winrate(self) -> JudgedRun | None:
        """The content of winrate.json; None before eval=winrate."""
        return self._read_own("winrate.json", JudgedRun)

    @cached_property
    def texts(self) -> list[GeneratedText]:
        """The texts of generations.jsonl that this run's model wrote; empty if there are none."""
        path = self.path / "generations.jsonl"
        found = read_generations(path) if path.is_file() else []
        return [text for text in found if text.fingerprint == self.results.fingerprint]

    @cached_property
    def files_of_other_models(self) -> list[str]:
        """Names of files in the directory that another model wrote. They are not shown."""
        kinds: tuple[tuple[str, Any], ...] = (
            ("users.json", LearnedUsers),
            ("adapt.json", FewShotCurve),
            ("winrate.json", JudgedRun),
        )
        names = [
            name
            for name, kind in kinds
            if (found := self._read(name, kind)) is not None
            and found.fingerprint != self.results.fingerprint
        ]
        path = self.path / "generations.jsonl"
        if path.is_file() and len(self.texts) == 0 and path.stat().st_size > 0:
            names.append(path.name)
        return names

    def _read(self, name: str, kind: type[F]) -> F | None:
        """Read a file's record; None if the file is missing."""
        path = self.path / name
        return read_record(path, kind) if path.is_file() else None

    def _read_own(self, name: str, kind: type[F]) -> F | None:
        """Read a file's record; None if the file is missing or another model wrote it."""
        found = self._read(name, kind)
        if found is None or found.fingerprint != self.results.fingerprint:
            return None
        return found


def read_run(run_dir: Path | str, *, name: str | None = None) -> Run:
    """Read results.json and predictions.parquet of a run directory.

    Raises:
        ValueError: one of the two is not there, or is damaged.
    """
    path = Path(run_dir)
    for file in (RESULTS, PREDICTIONS):
        if not (path / file).is_file():
            raise bad_value(
                "run",
                str(path),
                f"a directory that holds {file}",
                "Let its training end (ckpt=last), or name another run",
            )
    results = read_results(path)
    return Run(
        path=path,
        name=path.resolve().name if name is None else name,
        results=results,
        predictions=read_predictions(path, results),
    )


def _hash_of_pairs(found: Outcomes) -> str:
    """Hash the ids of pairs and of their users; the order does not matter."""
    ids = pd.DataFrame({"pair": as_text(found.pair_id), "user": as_text(found.user_id)})
    of_rows = pd.util.hash_pandas_object(ids, index=False).to_numpy()
    return hashlib.blake2b(np.sort(of_rows).tobytes(), digest_size=8).hexdigest()


def role(config: Mapping[str, Any]) -> str:
    """Return a run's role: ``vanilla``, ``uniform``, ``shuffled`` or ``personal``.

    It depends on the settings alone. A run on shuffled user ids is a control, whatever its encoder.
    Encoders are recognised by class, because a user's own encoder may have any name.
    """
    if config["data"].get("shuffle_users") is True:
        return SHUFFLED
    if any(config["data"].get(name) for name in IN_TEXT):
        return PERSONAL
    return ROLES.get(config["encoder"]["_target_"], PERSONAL)


def read_users(run: Run) -> pd.DataFrame:
    """Return users.json as a table with one row for each user, the generic user last.

    Raises:
        ValueError: the run has no users.json, since its encoder does not distinguish users.
    """
    if run.learned is None:
        raise bad_value(
            "run", str(run.path), "a run that left users.json", "Train with encoder=lookup"
        )
    generic = {"user_id": "generic user", **run.learned.generic}
    return pd.DataFrame([*run.learned.users, generic])


def _part_name(config: Mapping[str, Any], key: str) -> str:
    """Return a part's name in the config, or the last word of its class path, or its value.

    A class from outside plrhf goes by its own name: its settings may have begun with those of another.
    """
    part = config.get(key)
    if part is None:
        return "none"
    if not isinstance(part, Mapping):
        return str(part)
    target = str(part.get("_target_", "–"))
    known = target.startswith("plrhf.") or target == "–"
    return str(part.get("name", target) if known else target).rsplit(".", 1)[-1]
