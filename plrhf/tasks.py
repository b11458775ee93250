"""What eval.py does with finished runs: score, generate, winrate, adapt, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import yaml
from lightning import Trainer
from rich.console import Console

from plrhf import report
from plrhf.backbone import load_tokenizer
from plrhf.cli import Settings
from plrhf.config import accepted, build
from plrhf.data.module import PreferenceData, build_data
from plrhf.errors import bad_value
from plrhf.evaluate import Texts, predict, prepare, summarise_run, write_evaluation, write_texts
from plrhf.export import read_card
from plrhf.personal import PersonalModule
from plrhf.policy import PersonalDPOPolicy
from plrhf.shots import Shots, learning_curve, shots_table
from plrhf.stats import ACCURACIES, Outcomes, correctness, summarise_outcomes

KINDS: dict[str, Any] = {
    **dict.fromkeys(("run", "runs", "out"), str | None),
    "data": dict[str, Any] | None,
    "eval": dict[str, Any],
    "seed": int,
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
    prepare(model, data, trainer)
    predictions = predict(model, data, trainer)
    how = json.loads((run / "results.json").read_text())["run"]
    results = summarise_run(predictions, config, data, how)
    write_evaluation(out, results, predictions)
    page = report.write_report(out)
    Console().print(report.closing_table(results))
    print(f"report: {page}")


def write(settings: Settings) -> None:
    """Let a policy, and the reference if asked, write for many users: generations.jsonl, report."""
    target = f"{Texts.__module__}.{Texts.__qualname__}"
    texts: Texts = build({"_target_": target, **settings["eval"]}, "eval", origin="eval")
    run = _run_dir(settings)
    model, data, _, _ = load_run(run, settings)
    if not isinstance(model, PersonalDPOPolicy):
        raise bad_value("run", str(run), "a run of model=dpo", "Give a run that trained a policy")
    out = Path(settings["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    write_texts(out / "generations.jsonl", model, data, texts)
    if (out / "results.json").is_file():
        report.write_report(out)
    print(f"texts: {out / 'generations.jsonl'}")


def winrate(settings: Settings) -> None:
    """How often a run's texts please their users more than another's, by the users' true preferences.

    Both texts answer the same prompt for the same user; ties count one half; the interval is a
    bootstrap over users.
    """
    run = _run_dir(settings)
    against = settings["eval"]["against"]
    ours = _scores(run, "policy", field="run")
    theirs = (
        _scores(run, "reference", field="run")
        if against == "reference"
        else _scores(Path(against), "policy", field="eval.against")
    )
    both = ours.join(theirs, how="inner", lsuffix="_ours", rsuffix="_theirs")
    if len(both) != len(ours) or len(both) == 0:
        raise bad_value(
            "eval.against",
            against,
            f"texts for the same {len(ours)} prompts and users (has {len(both)} of them)",
            "Write both with the same eval=generate options",
        )
    margin = (both["score_ours"] - both["score_theirs"]).to_numpy()
    users, prompts = (both.index.get_level_values(level).to_numpy() for level in (0, 1))
    pair = np.array([f"{user} {prompt}" for user, prompt in zip(users, prompts, strict=True)])
    outcomes = Outcomes(pair_id=pair, user_id=users, margin=margin, correct=correctness(margin))
    found = summarise_outcomes(outcomes, names=ACCURACIES)
    result = {
        "run": str(run),
        "against": against,
        "win_rate": found["accuracy_micro"],
        "ties": float((margin == 0).mean()),
        "n_texts": len(both),
        "n_users": found["n_users"],
    }
    out = Path(settings["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    (out / "winrate.json").write_text(json.dumps(result, indent=2) + "\n")
    low, high = result["win_rate"]["ci95"]
    print(
        f"win rate of {run} against {against}: {result['win_rate']['value']:.3f} "
        f"[{low:.3f}, {high:.3f}] over {len(both)} texts, {result['ties']:.3f} ties"
    )


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
    Console().print(shots_table(result))
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
    frame = report.compare(settings["runs"], settings["out"])
    Console().print(report.comparison_table(frame))
    for path in frame.attrs["skipped"]:
        print(f"skipped, as it holds no results.json: {path}")
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
        export, trust_remote_code=config["backbone"]["trust_remote_code"]
    )
    data.tokenize(
        load_tokenizer(str(export)), causal=model.backbone.causal, max_positions=model.max_positions
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


def _scores(run: Path, writer: str, *, field: str) -> pd.DataFrame:
    """True scores of a run's texts, indexed by user and prompt."""
    path = run / "generations.jsonl"
    if not path.is_file():
        raise bad_value(
            field, str(run), f"a run with {path.name}", f"Write it: eval=generate run={run}"
        )
    texts: Any = pd.read_json(path, lines=True, dtype={"user_id": str, "prompt_id": str})
    texts = texts[texts["writer"] == writer]
    if len(texts) == 0 or texts["score"].isna().any():
        raise bad_value(
            field,
            str(run),
            f"texts of the {writer} with true scores, which only data=personas knows",
            "Write them: eval=generate eval.reference=true",
        )
    return texts.set_index(["user_id", "prompt_id"])[["score"]]
