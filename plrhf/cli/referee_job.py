"""A job of eval=referee: one method, rows and seed. Rows are read and mapped to features once."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from lightning import Trainer

from plrhf.backbone.model import Backbone
from plrhf.cli.assemble import open_backbone, path_of
from plrhf.cli.config import RunConfig
from plrhf.cli.methods import Method, Trial, build_trial, started_trial
from plrhf.cli.rows import build_data
from plrhf.core.errors import BadValue
from plrhf.data.dataset import TextValues
from plrhf.data.digests import content_hash
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import draw_context
from plrhf.data.rows import SPLITS
from plrhf.evaluation.predictions import prepare
from plrhf.evaluation.trials import FewShotOptions
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.facts import Facts, agreed_pairs, span
from plrhf.referee.features import FixedFeatures, with_features
from plrhf.referee.new_users import NEW, FewShots, add_new_users
from plrhf.referee.protocol import referee_job
from plrhf.referee.store import JobRecord, Store

LOADING = ("batch_size", "eval_batch_size", "batch_tokens", "users_per_batch")
"""Settings of data that change how batches are made and not which pairs there are."""


@dataclass(frozen=True)
class Job:
    """A method on some rows with one seed.

    Attributes:
        shots: numbers of pairs given of unseen users, unless the method sets them.
        draws: number of random draws of these pairs for each user.
    """

    rows: str
    method: Method
    seed: int
    shots: tuple[int, ...]
    draws: int
    fingerprint: str

    @property
    def place(self) -> tuple[str, str, int]:
        """The job's key in the store: rows, method, seed."""
        return self.rows, self.method.name, self.seed

    @property
    def of_rows(self) -> tuple[str, int]:
        """Rows and seed, which jobs on the same data share."""
        return self.rows, self.seed

    @property
    def words(self) -> str:
        """Name of the job for the progress bar."""
        return f"{self.rows} {self.method.name} seed {self.seed}"


@dataclass
class Bench:
    """The rows of a comparison with one seed: read, tokenised and mapped to features once for all methods.

    Args:
        of: rows and seed.
    """

    of: tuple[str, int]
    _data: dict[str, tuple[PreferenceData, Backbone, set[str]]] = field(default_factory=dict)
    _vectors: dict[str, dict[str, TextValues | None]] = field(default_factory=dict)
    _agreed: set[str] | None = None
    _span: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind of features

    def run(self, job: Job) -> tuple[JobRecord, pd.DataFrame]:
        """Run a job; return its record and its margins on test pairs.

        Raises:
            ValueError: the method does not work with these rows.
        """
        method, config = job.method, job.method.config
        data, backbone, given = self.rows_of(config)
        data = self.with_vectors(method, data, backbone)
        backbone = self.backbone_for(method, data, backbone)
        options = FewShotOptions(shots=method.referee.shots or list(job.shots), draws=job.draws)
        shots = FewShots.draw(data, given, options, seed=job.seed)

        def build(trial: Trial) -> PersonalRewardModel:
            return started_trial(trial, method, data, backbone)

        facts = self.facts_of(method, data)
        result = referee_job(
            method.groups(),
            data,
            method.training,
            build,
            shots,
            facts,
            rule=method.rule,
            seed=job.seed,
        )
        record = JobRecord(
            rows=job.rows,
            method=method.name,
            features=method.referee.features,
            seed=job.seed,
            fingerprint=job.fingerprint,
            halvings=list(method.halvings),
            world=data.source.world(),
            trials=[
                {"point": trial.point, **asdict(one)}
                for trial, one in zip(result.tuned.trials, result.tuned.results, strict=True)
            ],
            **result.record,
        )
        return record, result.margins

    def backbone_for(self, method: Method, data: PreferenceData, backbone: Backbone) -> Backbone:
        """Return the backbone of a method's models: of other features than texts' none is run."""
        if method.referee.features == "text":
            return backbone
        width = data.datasets["train"].hidden.values.shape[1]  # type: ignore[union-attr]
        return FixedFeatures(width)  # type: ignore[return-value]

    def facts_of(self, method: Method, data: PreferenceData) -> Facts:
        """Return facts about the rows; the span is that of the method's features."""
        if self._agreed is None:
            rows = [row for split in SPLITS for row in getattr(data.splits, split)]
            self._agreed = agreed_pairs(rows)
        kind = method.referee.features
        if kind not in self._span:
            self._span[kind] = span(data.datasets["train"])
        return Facts(self._agreed, self._span[kind])

    def rows_of(self, config: RunConfig) -> tuple[PreferenceData, Backbone, set[str]]:
        """Return the tokenised rows of a config, the backbone, and the ids of pairs that are only given."""
        settings = config.data.model_dump(mode="json", exclude=set(LOADING))
        key = content_hash(settings, config.backbone.model_dump(mode="json"))
        if key not in self._data:
            path = path_of(config.backbone)
            data = build_data(config.data)
            tokenizer, backbone = open_backbone(config.backbone, path)
            data.tokenize(
                tokenizer,
                layout=backbone.layout,
                max_positions=backbone.max_positions,
                cache_dir=Path(config.cache_dir),
            )
            given = add_new_users(data, layout=backbone.layout)
            self._data[key] = (data, backbone, given)
        data, backbone, given = self._data[key]
        loaded = copy(data)
        for name in LOADING:
            setattr(loaded, name, getattr(config.data, name))
        return loaded, backbone, given

    def with_vectors(
        self, method: Method, data: PreferenceData, backbone: Backbone
    ) -> PreferenceData:
        """Return the rows with a feature vector for each text, of the kind that the method uses."""
        config, kind = method.config, method.referee.features
        settings = config.data.model_dump(mode="json", exclude={*LOADING, "shuffle_users"})
        model = build_trial(method.trials[0], data, backbone) if kind == "text" else None
        key = content_hash(settings, kind, None if model is None else model.pooled_name)
        mapped = copy(data)
        mapped.datasets = {name: copy(one) for name, one in data.datasets.items()}
        if key in self._vectors:  # the same texts, whoever chose
            for name, dataset in mapped.datasets.items():
                dataset.hidden = self._vectors[key][name]
        elif model is not None:
            prepare(model, mapped, plain_trainer(), cache_dir=Path(config.cache_dir))
        else:
            mapped = with_features(mapped, kind)
        self._vectors[key] = {name: one.hidden for name, one in mapped.datasets.items()}
        if model is not None and model.encoder.reads_context:
            train, encoder = mapped.datasets["train"], model.encoder
            train.context_hidden = train.hidden  # of a frozen trunk they are the same
            trained = {name: one for name, one in mapped.datasets.items() if name != NEW}
            least, most = encoder.min_pairs, encoder.max_pairs
            draw_context(trained, least=least, most=most, seed=config.data.seed)
        return mapped


@lru_cache(maxsize=1)
def bench_of(of: tuple[str, int]) -> Bench:
    """Return this process's `Bench` for rows and seed; only the last one is kept."""
    return Bench(of)


def do_job(job: Job, store: Store) -> str | None:
    """Run a job and store its result; return why the method was left out, or None."""
    try:
        store.write(*bench_of(job.of_rows).run(job))
    except BadValue as error:
        return str(error)
    return None


def plain_trainer() -> Trainer:
    """Return a trainer that writes nothing, for functions that need one for its device."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
