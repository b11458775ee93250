"""What eval.py does with finished runs: score, generate, winrate, adapt, compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning import Trainer

from plrhf.backbone.loading import load_tokenizer
from plrhf.cli.jobs import why_failed
from plrhf.core.components import Settings, accepted, build
from plrhf.core.errors import bad_value
from plrhf.data.build import build_data
from plrhf.data.module import PreferenceData
from plrhf.evaluation.few_shot import Shots, learning_curve, shots_table
from plrhf.evaluation.generations import (
    GeneratedText,
    GenerationOptions,
    read_generations,
    write_generations,
)
from plrhf.evaluation.judges import Contest, Judge, win_rates
from plrhf.evaluation.predictions import predict, prepare
from plrhf.evaluation.probes import probe
from plrhf.evaluation.results import summarise_run, write_evaluation
from plrhf.evaluation.users import write_users
from plrhf.models.base import PersonalModule
from plrhf.models.card import read_card
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.reporting import comparison, report, tables

KINDS: dict[str, Any] = {
    **dict.fromkeys(("run", "runs", "out"), str | None),
    "data": dict[str, Any] | None,
    "eval": dict[str, Any],
    "seed": int,
    "trust_components": bool,
    "debug": bool,
}


def evaluate(settings: Settings) -> None:
    """Do what ``eval.name`` says."""
    accepted(settings, KINDS, "")
    tasks = {
        "score": score,
        "generate": write,
        "winrate": winrate,
        "adapt": adapt,
        "compare": compare,
    }
    tasks[settings["eval"]["name"]](settings)


def score(settings: Settings) -> None:
    """Evaluate a run again on its own rows, or on others, and write results and report."""
    run = _run_dir(settings)
    model, data, trainer, config = load_run(run, settings)
    out = Path(settings["out"] or run / "eval")
    cache_dir = Path(config["cache_dir"])
    prepare(model, data.restrict_to("val", "test"), trainer, cache_dir=cache_dir)
    predictions = predict(model, data, trainer)
    how = json.loads((run / "results.json").read_text())["run"]
    results = summarise_run(predictions, config, data, probe(data.splits), how)
    write_evaluation(out, results, predictions)
    write_users(out / "users.json", model, data)
    page = report.write_report(out)
    tables.console().print(tables.closing_table(results))
    print(f"report: {page}")


def write(settings: Settings) -> None:
    """Let a policy, and the reference if asked, write for many users: generations.jsonl, report."""
    target = f"{GenerationOptions.__module__}.{GenerationOptions.__qualname__}"
    texts: GenerationOptions = build(
        {"_target_": target, **settings["eval"]}, "eval", origin="eval"
    )
    run = _run_dir(settings)
    model, data, _, _ = load_run(run, settings)
    if not isinstance(model, PersonalDPOPolicy):
        raise bad_value("run", str(run), "a run of model=dpo", "Give a run that trained a policy")
    out = Path(settings["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    write_generations(out / "generations.jsonl", model, data, texts)
    if (out / "results.json").is_file():
        report.write_report(out)
    print(f"texts: {out / 'generations.jsonl'}")


def winrate(settings: Settings) -> None:
    """How often a run's texts please their users more than another's, as a judge sees it.

    Both texts answer the same prompt for the same user; ties count one half; the interval is a
    bootstrap over users.
    """
    asked = _winrate_settings(settings["eval"])
    run, against = _run_dir(settings), asked["against"]
    ours = _texts(run, "policy", field="run")
    theirs = (
        _texts(run, "reference", field="run")
        if against == "reference"
        else _texts(Path(against), "policy", field="eval.against")
    )
    # Users of two worlds may share an id, and then neither taste nor true scores.
    shared = [key for key in ours if key in theirs and _same_task(ours[key], theirs[key])]
    if len(shared) != len(ours):
        raise bad_value(
            "eval.against",
            against,
            f"texts for the same {len(ours)} prompts and users (has {len(shared)} of them)",
            "Write both with the same eval=generate options",
        )
    judge: Judge = build(asked["judge"], "eval.judge", kind=Judge)
    contests = [Contest(ours=text, theirs=theirs[key]) for key, text in ours.items()]
    found = win_rates(contests, judge.compare(contests))
    result = {"run": str(run), "against": against, "judge": asked["judge"], **found}
    out = Path(settings["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    (out / "winrate.json").write_text(json.dumps(result, indent=2) + "\n")
    if (out / "results.json").is_file():
        report.write_report(out)
    low, high = result["win_rate"]["ci95"] or (math.nan, math.nan)
    print(
        f"win rate of {run} against {against}: {result['win_rate']['value']:.3f} "
        f"[{low:.3f}, {high:.3f}] over {result['n_texts']} texts, {result['ties']:.3f} ties"
    )
    if result["cost"] is not None:
        print(_judging(result))


def adapt(settings: Settings) -> None:
    """Measure how well new users are known after a few of their pairs: adapt.json and a table."""
    target = f"{Shots.__module__}.{Shots.__qualname__}"
    options: Shots = build({"_target_": target, **settings["eval"]}, "eval")
    run = _run_dir(settings)
    model, data, trainer, _ = load_run(run, settings)
    model.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        result = learning_curve(model, data, options, seed=settings["seed"])
    out = Path(settings["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("adapt.json" if options.users == "unseen" else "adapt_seen.json")
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    tables.console().print(shots_table(result))
    if (out / "results.json").is_file():
        report.write_report(out)
    print(f"curve: {path}")


def compare(settings: Settings) -> None:
    """One table, one figure, one report of all runs a glob finds."""
    if settings["runs"] is None or settings["out"] is None:
        name = "runs" if settings["runs"] is None else "out"
        raise bad_value(
            name,
            None,
            "a glob of run directories" if name == "runs" else "a directory",
            "Write eval=compare runs='DIR/*' out=DIR",
        )
    baseline = settings["eval"]["baseline"]
    frame = report.compare(settings["runs"], settings["out"], baseline=baseline)
    over_seeds = frame.attrs["over_seeds"]
    if over_seeds is None:
        tables.console().print(comparison.comparison_table(frame))
    else:
        title = "Test results over seeds, 95% intervals over users"
        tables.console().print(tables.rich_table(over_seeds, title=title, without=["by seed"]))
    for path in frame.attrs["skipped"]:
        print(f"skipped, as it holds no results.json: {path}{why_failed(Path(path))}")
    print(f"report: {Path(settings['out']) / 'report.html'}")


def load_run(
    run: Path, settings: Settings
) -> tuple[PersonalModule, PreferenceData, Trainer, Settings]:
    """A finished run's exported model, its data (or the rows asked for), a trainer, its config.

    Raises:
        ValueError: the rows now give other users than the model was trained on.
    """
    config: Settings = yaml.safe_load((run / "config.yaml").read_text())
    lightning.seed_everything(config["seed"], verbose=False)
    export = run / "export"
    card = read_card(export)
    if settings["data"] is None:
        data = build_data(config["data"])
        if list(data.splits.users) != card.users:
            raise bad_value(
                "data",
                f"{data.n_users} users",
                f"the {len(card.users)} users of training",
                "Restore the file that the run read, or name other rows with data=",
            )
    else:
        data = build_data(
            {**settings["data"], **card.text}, users=card.users, schema=card.feature_schema()
        )
    model = PersonalModule.from_pretrained(
        export,
        trust_remote_code=config["backbone"]["trust_remote_code"],
        trust_components=settings["trust_components"],
    )
    data.tokenize(
        load_tokenizer(str(export)),
        causal=model.backbone.causal,
        max_positions=model.max_positions,
        cache_dir=Path(config["cache_dir"]),
    )
    trainer = Trainer(
        # Elsewhere than where it was trained the run is evaluated on what there is.
        accelerator="cpu" if config["trainer"]["accelerator"] == "cpu" else "auto",
        devices=1,
        logger=False,
        precision=config["trainer"]["precision"],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return model, data, trainer, config


def _run_dir(settings: Settings) -> Path:
    run = settings["run"]
    if run is None or not (Path(run) / "results.json").is_file():
        raise bad_value(
            "run", run, "the directory of a finished run", "Give run=DIR as train.py had it"
        )
    return Path(run)


def _winrate_settings(node: Settings) -> Settings:
    """``against`` and ``judge`` of eval=winrate, of the right type."""
    if isinstance(node["judge"], str):
        raise bad_value(
            "eval.judge", node["judge"], "a judge's settings", "Choose one with eval/judge=NAME"
        )
    return accepted(node, {"against": str, "judge": dict[str, Any]}, "eval")


def _same_task(one: GeneratedText, other: GeneratedText) -> bool:
    return (one.prompt, one.profile) == (other.prompt, other.profile)


def _judging(result: dict[str, Any]) -> str:
    """What a judge who was asked did: cost, position bias, answers that were none."""
    answers, cost = result["answers"], result["cost"]
    price = "not known" if cost["price"] is None else f"{cost['price']:.4f}"
    return (
        f"judge: {cost['questions']} questions, {cost['from_cache']} answered before; "
        f"{cost['input_tokens']} + {cost['output_tokens']} tokens, price {price}; "
        f"prefers the first text {result['first_position_wins']:.3f}; "
        f"{answers['refused']} refused, {answers['unparseable']} unparseable"
    )


def _texts(run: Path, writer: str, *, field: str) -> dict[tuple[str, str], GeneratedText]:
    """A run's texts by one writer, by user and prompt."""
    path = run / "generations.jsonl"
    if not path.is_file():
        raise bad_value(
            field, str(run), f"a run with {path.name}", f"Write it: eval=generate run={run}"
        )
    texts = {
        (text.user_id, text.prompt_id): text
        for text in read_generations(path)
        if text.writer == writer
    }
    if len(texts) == 0:
        raise bad_value(
            field,
            str(run),
            f"a run with texts of the {writer}",
            "Write them: eval=generate eval.reference=true",
        )
    return texts
