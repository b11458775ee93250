"""eval=referee: every method on the same rows by one protocol, and the leaderboard of what is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import pandas as pd
from lightning import Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plrhf.backbone.model import Backbone
from plrhf.cli.assemble import build_data, open_backbone, print_lines
from plrhf.cli.config import RunConfig
from plrhf.cli.eval_config import EvalConfig, RefereeTask, overrides_of
from plrhf.cli.methods import (
    Method,
    Trial,
    build_trial,
    method_names,
    read_method,
    started_trial,
)
from plrhf.core.errors import BadValue, bad_value
from plrhf.data.dataset import TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import draw_context
from plrhf.data.rows import SPLITS, content_hash
from plrhf.evaluation.few_shot import FewShotOptions
from plrhf.evaluation.predictions import prepare
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.facts import Facts, agreed_pairs, span
from plrhf.referee.features import FixedFeatures, with_features
from plrhf.referee.new_users import NEW, FewShots, add_new_users
from plrhf.referee.page import WIDE, write_leaderboard
from plrhf.referee.protocol import referee_job
from plrhf.referee.store import JobRecord, Store
from plrhf.reporting import tables

LOADING = ("batch_size", "eval_batch_size", "batch_tokens", "users_per_batch")
"""Settings of data that change how batches are made and not which pairs there are."""


def referee(config: EvalConfig) -> None:
    """Do the jobs that are not done yet, and write referee.csv, referee.md and report.html."""
    task: RefereeTask = config.task
    overrides = overrides_of("data", "backbone")
    if task.rows is None and config.data is None:
        raise bad_value("data", None, "rows", "Write data=jsonl data.path=FILE, or eval.rows=[...]")
    out = Path(config.out or "runs/referee")
    store = Store(out)
    jobs = list(jobs_of(task, overrides))
    with progress_bar() as bar:
        shown = bar.add_task("", total=len(jobs))
        bench: Bench | None = None
        for job in jobs:
            bar.update(shown, description=job.words)
            if not store.has(*job.place, job.fingerprint):
                if bench is None or bench.of != job.of_rows:
                    bench = Bench(of=job.of_rows, task=task)
                try:
                    store.write(*bench.run(job))
                except BadValue as error:
                    print_lines([f"{job.words}: left out ({error})"])
            bar.advance(shown)
    made = write_leaderboard(out, store)
    for rows, table in made.tables.items():
        tables.console().print(tables.rich_table(table, title=rows, without=WIDE))
    print(f"report: {made.report}")


def progress_bar() -> Progress:
    """Return a bar of jobs with the time left; where there is no terminal it shows nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = tables.console()
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


@dataclass(frozen=True)
class Job:
    """A method on some rows with one seed."""

    rows: str
    method: Method
    seed: int
    fingerprint: str

    @property
    def place(self) -> tuple[str, str, int]:
        """Where the store keeps it."""
        return self.rows, self.method.name, self.seed

    @property
    def of_rows(self) -> tuple[str, int]:
        """What jobs share that work on the same people."""
        return self.rows, self.seed

    @property
    def words(self) -> str:
        """Name it on the progress bar."""
        return f"{self.rows} {self.method.name} seed {self.seed}"


def jobs_of(task: RefereeTask, overrides: Sequence[str]) -> Iterator[Job]:
    """Read the methods of a comparison, rows by rows and seed by seed."""
    names = method_names() if task.methods is None else task.methods
    for rows in [None] if task.rows is None else task.rows:
        for seed in task.seeds:
            for name in names:
                method = read_method(name, rows, overrides, seed=seed, n_trials=task.trials)
                shown = rows_name(rows, method.config)
                yield Job(shown, method, seed, fingerprint(method, task))


def rows_name(rows: str | None, config: RunConfig) -> str:
    """Name the rows: by their experiment, or by their file."""
    if rows is not None:
        return rows.removeprefix("referee/")
    path = config.data.source.get("path")
    return str(config.resolved["data"]["name"]) if path is None else Path(path).name.split(".")[0]


def fingerprint(method: Method, task: RefereeTask) -> str:
    """Hash what decides a job's result: settings of its trials, the file of the rows, the shots."""
    path = Path(str(method.config.data.source.get("path")))
    file = blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
    aside = ("run_dir", "cache_dir", "logger", "plan_for", "samples")
    settings = [
        {name: value for name, value in trial.config.resolved.items() if name not in aside}
        for trial in method.trials
    ]
    return content_hash(settings, file, list(task.shots), task.draws)


@dataclass
class Bench:
    """The rows of a comparison with one seed: read, tokenised and mapped to features once.

    Args:
        of: rows and seed.
    """

    of: tuple[str, int]
    task: RefereeTask
    _data: dict[str, tuple[PreferenceData, Backbone, set[str]]] = field(default_factory=dict)
    _vectors: dict[str, dict[str, TextValues | None]] = field(default_factory=dict)
    _facts: Facts | None = None

    def run(self, job: Job) -> tuple[JobRecord, pd.DataFrame]:
        """Do a job; return its record and its margins on test pairs.

        Raises:
            ValueError: the method does not go with the rows.
        """
        method, config = job.method, job.method.config
        data, backbone, given = self.rows_of(config)
        data = self.with_vectors(method, data, backbone)
        if method.referee.features != "text":
            width = data.datasets["train"].hidden.values.shape[1]  # type: ignore[union-attr]
            backbone = FixedFeatures(width)  # type: ignore[assignment]
        options = FewShotOptions(
            shots=method.referee.shots or self.task.shots, draws=self.task.draws
        )
        shots = FewShots.draw(data, given, options, seed=job.seed)

        def build(trial: Trial) -> PersonalRewardModel:
            return started_trial(trial, method, data, backbone)

        facts = self.facts_of(config, data)
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
            world=data.source.world(),
            trials=[
                {"point": trial.point, **asdict(one)}
                for trial, one in zip(result.tuned.trials, result.tuned.results, strict=True)
            ],
            **result.record,
        )
        return record, result.margins

    def facts_of(self, config: RunConfig, data: PreferenceData) -> Facts:
        """Return the facts of the rows; the span is that of the features the first method had."""
        if self._facts is None:
            rows = [row for split in SPLITS for row in getattr(data.splits, split)]
            self._facts = Facts(agreed_pairs(rows), span(data.datasets["train"]))
        return self._facts

    def rows_of(self, config: RunConfig) -> tuple[PreferenceData, Backbone, set[str]]:
        """Return the tokenised rows of a config, the backbone, and ids of pairs only given."""
        settings = config.data.model_dump(mode="json", exclude=set(LOADING))
        key = content_hash(settings, config.backbone.model_dump(mode="json"))
        if key not in self._data:
            path = config.backbone.path
            if path is None:
                raise bad_value("backbone.path", None, "a directory", "Set backbone.path=DIR")
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
        """Return the rows with a vector for every text, of the kind that the method asks for."""
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


def plain_trainer() -> Trainer:
    """Return a trainer that writes nothing, for what asks on which device to compute."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
