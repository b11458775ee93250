"""train.py: one run from the settings to the files of the run directory."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.cli.assemble import (
    build_run_model,
    build_run_trainer,
    check_model,
    open_backbone,
    open_reward,
    print_lines,
)
from plrhf.cli.commands import command_line
from plrhf.cli.config import RunConfig
from plrhf.cli.jobs import best_value, still_improving
from plrhf.cli.outputs import Outputs
from plrhf.cli.planning import plan_run, plan_table
from plrhf.cli.privacy import make_private, privacy_line, spent
from plrhf.cli.rows import build_data
from plrhf.cli.run_dir import (
    RecordRows,
    Resume,
    begin_run,
    check_same_rows,
    check_unused,
    find_resume,
)
from plrhf.cli.supervised import cached_tiny_backbone, train_supervised
from plrhf.core.components import WITHOUT_EFFECT, Settings
from plrhf.core.errors import bad_value
from plrhf.data.features import NO_FEATURES
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import draw_context
from plrhf.evaluation.generations import requested_rows, write_generations
from plrhf.evaluation.metrics import personal_gain
from plrhf.evaluation.overoptimisation import overoptimised
from plrhf.evaluation.predictions import PrepareData, predict, prepare, runner_with_weights
from plrhf.evaluation.probes import probe
from plrhf.evaluation.results import (
    Command,
    Results,
    model_fingerprint,
    provenance_of,
    summarise_run,
    write_evaluation,
)
from plrhf.evaluation.users import write_users
from plrhf.models.base import PersonalModule
from plrhf.models.context import store_vectors
from plrhf.models.export import README, add_note, save_export
from plrhf.models.grpo import PersonalGRPOPolicy
from plrhf.models.loading import positions_for_text
from plrhf.models.parts import check_finite
from plrhf.models.policy import PersonalPolicy
from plrhf.reporting import report, tables
from plrhf.training.loggers import log_files, log_results, log_settings
from plrhf.training.processes import launched_processes, rank_shard_of, sharding_context
from plrhf.training.trainer import fit

SHARED = ("report.html", "results.json", "metrics.csv")
"""Files of a run that loggers keep; predictions would say how each person chooses."""

PACKAGES = ("plrhf", "torch", "lightning", "transformers", "peft")


def train(settings: Settings) -> float | None:
    """Train and evaluate one run, and write its files to ``run_dir``; see docs/architecture.md.

    Returns:
        The best value of ``trainer.monitor``, for sweepers such as optuna; None without validation.
    """
    config = RunConfig.from_settings(settings)
    if config.plan:
        print_plan(config)
        return None
    check_unused(config)
    resume = find_resume(config)
    is_private = config.privacy.noise is not None
    # Moments and categories of features would tell of people; so would a checkpoint chosen by val pairs.
    data = build_data(config.data, schema=NO_FEATURES if is_private else None)
    print_lines(data.report.lines())
    rows_hash = data.content_hash()
    check_same_rows(resume, rows_hash)
    run_dir = Path(config.run_dir)
    has_val = len(data.splits.val) > 0 and not is_private
    trainer = build_run_trainer(config, run_dir, has_val=has_val)
    trainer.callbacks.append(RecordRows(rows_hash))  # type: ignore[attr-defined]
    lightning.seed_everything(config.seed, verbose=False)
    if config.is_supervised:
        train_supervised(config, data, trainer, resume=resume)
        if trainer.is_global_zero:
            print(f"supervised model: {run_dir / 'export'}")
    else:
        train_personal(config, data, trainer, resume=resume)
    return best_value(run_dir, config.trainer.monitor)


def print_plan(config: RunConfig) -> None:
    """Print the plan of a run. Weights are not read, and data only if users must be counted."""
    if config.model.get("name") in ("sft", "grpo"):
        allowed = f"false for model={config.model['name']}"
        raise bad_value("plan", True, allowed, "Plan model=reward or model=dpo")
    machine = config.plan_for
    if machine.users is None:
        data = build_data(config.data)
        n_users, schema = data.n_users, data.schema
    else:
        n_users, schema = machine.users, NO_FEATURES
    plan = plan_run(config.resolved, n_users=n_users, schema=schema)
    tables.console().print(plan_table(plan, config.resolved, machine))


def train_personal(
    config: RunConfig, data: PreferenceData, trainer: Trainer, *, resume: Resume | None
) -> None:
    """Train a reward model or policy, export it, evaluate its best checkpoint, and write the report."""
    path = config.backbone.path
    if path is None:
        check_model(config, data)
        path = cached_tiny_backbone(config, data)
    cache_dir = Path(config.cache_dir)
    with launched_processes(trainer):
        data.set_shard(rank_shard_of(trainer))
        lightning.seed_everything(config.seed, verbose=False)
        tokenizer, backbone = open_backbone(config.backbone, path, shards=sharding_context(trainer))
        data.tokenize(
            tokenizer,
            layout=backbone.layout,
            max_positions=positions_for_text(backbone, config.aggregator),
            cache_dir=cache_dir,
        )
        if config.backbone.trainable == "frozen":
            # The referee trains on features without loading the backbone, and must start alike.
            lightning.seed_everything(config.seed, verbose=False)
        model = build_run_model(config, data, backbone, path)  # of the users whose rows fit
        data.fit_to_model(max_positions=model.max_positions, user_slots=model.user_slots)
        if model.encoder.reads_context:
            least, most = model.encoder.min_pairs, model.encoder.max_pairs
            draw_context(data.datasets, least=least, most=most, seed=config.data.seed)
        if isinstance(model, PersonalPolicy):
            requested_rows(model, data, config.samples)
        open_reward(model, data, config.trainer.monitor)
        make_private(config, model, data)
        probes = probe(data.splits)
        print_lines(data.tokenizing_notes())
        _print_notes(probes["warnings"], data.padding())
        begin_run(config, resume=resume)
        log_settings(trainer.loggers, config.resolved)
        before = PrepareData(data.restrict_to("train", "val"), cache_dir=cache_dir)
        trainer.callbacks.append(before)  # type: ignore[attr-defined]
        fit(model, data, trainer, resume_from=None if resume is None else resume.path)
        check_finite(model)
        if isinstance(model, PersonalGRPOPolicy):
            warn_if_overoptimised(Path(config.run_dir), probes)
        if model.encoder.reads_context:
            runner_with_weights(model, trainer)(store_vectors, model, data)
        outputs = Outputs(debug=config.debug)
        export = Path(config.run_dir) / "export"
        with outputs.writing(export):
            save_export(export, model, model.card, tokenizer)
        evaluate_run(config, model, data, trainer, probes, outputs)
    outputs.check()


def evaluate_run(
    config: RunConfig,
    model: PersonalModule,
    data: PreferenceData,
    trainer: Trainer,
    probes: dict[str, Any],
    outputs: Outputs,
) -> None:
    """Predict the test pairs, and write results, users, generations and report.

    Predictions and results come first. Errors in the other files are collected in `outputs`.
    """
    run_dir = Path(config.run_dir)
    prepare(model, data.restrict_to("test"), trainer, cache_dir=Path(config.cache_dir))
    predictions = predict(model, data, trainer)
    fingerprint = fingerprint_of(config, model, data)
    results = write_results(config, data, trainer, predictions, probes, fingerprint)
    with outputs.writing(run_dir / "export" / README):
        note_results(run_dir / "export", results)
        note_without_gain(run_dir / "export", predictions, alpha=model.alpha)
    ask = runner_with_weights(model, trainer)
    with outputs.writing(run_dir / "users.json"):
        ask(write_users, run_dir / "users.json", model, data, fingerprint)
    if isinstance(model, PersonalPolicy):
        lightning.seed_everything(config.seed, verbose=False)  # all processes draw alike
        texts = run_dir / "generations.jsonl"
        with outputs.writing(texts):
            ask(write_generations, texts, model, data, config.samples, fingerprint)
    total_steps = int(trainer.estimated_stepping_batches)
    note_if_too_short(config, trainer.global_step, total_steps)  # results go with these curves now
    if trainer.is_global_zero:
        with outputs.writing(run_dir / "report.html"):
            report.write_report(run_dir)
            print(f"report: {run_dir / 'report.html'}")
        log_files(trainer.loggers, [run_dir / name for name in SHARED])


@rank_zero_only
def warn_if_overoptimised(run_dir: Path, probes: dict[str, Any]) -> None:
    """Add a warning to `probes` if a policy has come to exploit its reward model, and print it."""
    metrics = run_dir / "metrics.csv"  # which a run of no step does not leave
    found = overoptimised(pd.read_csv(metrics)) if metrics.is_file() else None
    if found is not None:
        probes["warnings"].append(found)
        print(f"warning: {found}")


@rank_zero_only
def note_if_too_short(config: RunConfig, n_steps: int, total_steps: int) -> None:
    """Print whether training ended before val did, or in its warm-up.

    Args:
        n_steps: that were made. total_steps: that the training would have had.
    """
    found = still_improving(Path(config.run_dir), config.trainer.monitor)
    if found is not None:
        print(f"note: {found}")
    warmup = config.optim.warmup(total_steps)
    if 0 < n_steps <= warmup:
        print(
            f"note: all {n_steps} steps were warm-up, in which learning rates only rise: train for longer, "
            f"or set optim.warmup_steps={n_steps // 10} (now {warmup})"
        )


def note_results(export: Path, results: Results | None) -> None:
    """Add the data and the test results, with intervals and controls, to the card of an export.

    Args:
        results: None on all processes but the first.
    """
    if results is None or not (export / README).is_file():
        return
    rows, users = results.data["rows"], results.data["users"]
    note = (
        f"Rows of data={results.config['data']['name']}: "
        f"{', '.join(f'{n:,} {split} pairs' for split, n in rows.items())}; {users['seen']:,} train users, "
        f"{users['unseen']:,} others in test. {tables.interval_note(results)}"
    )
    if results.privacy is not None:
        note += (
            f" Trained with {privacy_line(results.privacy)}; rows of users are not part of this."
        )
    text = tables.markdown(tables.headline(results), note, title="Data and results")
    add_note(export, re.sub("^#", "##", text, flags=re.MULTILINE).rstrip())


@rank_zero_only
def note_without_gain(export: Path, predictions: pd.DataFrame, *, alpha: float) -> None:
    """Say on the terminal and in the export's card where knowing the user gains nothing on val.

    Args:
        alpha: of the model; at 0 or 1 one of the two contexts is not trained, and nothing is compared.
    """
    gain = personal_gain(predictions) if 0 < alpha < 1 else None
    if gain is None or gain["value"] is None or gain["ci95"] is None or gain["ci95"][0] > 0:
        return
    low, high = (f"{100 * one:+.1f}" for one in gain["ci95"])
    note = (
        "On val pairs the personal model is not better than the generic one: "
        f"{100 * gain['value']:+.1f} points [{low}, {high}]. This export holds both: "
        "asked without user_id it answers as the generic one."
    )
    print(f"warning: {note}")
    if (export / README).is_file():  # else the export has failed, and was reported
        add_note(export, note)


@rank_zero_only
def write_results(
    config: RunConfig,
    data: PreferenceData,
    trainer: Trainer,
    predictions: pd.DataFrame,
    probes: dict[str, Any],
    fingerprint: str,
) -> Results | None:
    """Write predictions.parquet and results.json; print, log and return the test results."""
    how = this_command()
    settings = config.data.model_dump(mode="json")
    results = summarise_run(
        predictions,
        config=config.resolved,
        counts=data.counts(),
        probes=probes,
        run=how,
        provenance=provenance_of(data, settings=settings, how=how, fingerprint=fingerprint),
        privacy=spent(config, data, trainer.global_step),
    )
    write_evaluation(Path(config.run_dir), results, predictions)
    tables.console().print(tables.closing_table(results))
    values = results.test_values()
    if results.privacy is not None:
        values["privacy/epsilon"] = results.privacy["epsilon"]
    log_results(trainer.loggers, config.resolved, values, trainer.global_step)
    return results


@rank_zero_only
def _print_notes(warnings: list[str], padding: float | None) -> None:
    """Print warnings and the fraction of padding."""
    for line in warnings:
        print(f"warning: {line}")
    if padding is not None:
        print(f"padding: {100 * padding:.1f}% of the tokens of train batches")


def this_command() -> Command:
    """Return the command line and the library versions."""
    return Command(command=command_line(), versions=versions())


def fingerprint_of(config: RunConfig, model: PersonalModule, data: PreferenceData) -> str:
    """Return the fingerprint of the run's trained model."""
    aside = (*WITHOUT_EFFECT, "samples")
    settings = {name: value for name, value in config.resolved.items() if name not in aside}
    return model_fingerprint(
        config=settings,
        backbone=model.card.fingerprint,
        rows=data.content_hash(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect a run's numbers."""
    return {name: version(name) for name in PACKAGES}
