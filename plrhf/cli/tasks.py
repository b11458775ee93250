"""The tasks of eval.py: score, generate, winrate, adapt, compare and referee."""

from __future__ import annotations

import math
from pathlib import Path

import lightning
from lightning import Trainer

from plrhf.backbone.loading import load_tokenizer
from plrhf.cli.assemble import check_same_world, print_lines
from plrhf.cli.config import RunConfig
from plrhf.cli.eval_config import AdaptTask, EvalConfig, WinrateTask
from plrhf.cli.jobs import failure_line
from plrhf.cli.outputs import Outputs
from plrhf.cli.referee import referee
from plrhf.cli.rows import build_data, build_source
from plrhf.cli.run import this_command
from plrhf.cli.sections import check_writable
from plrhf.core.components import Settings, build
from plrhf.core.errors import bad_value, printable
from plrhf.data.module import PreferenceData
from plrhf.evaluation.best_of import describe_curve
from plrhf.evaluation.few_shot import learning_curve
from plrhf.evaluation.generations import (
    GeneratedText,
    GenerationOptions,
    read_generations,
    write_generations,
)
from plrhf.evaluation.judges import Contest, Judge, JudgedRun, win_rates
from plrhf.evaluation.metrics import LONGER_WINS
from plrhf.evaluation.predictions import predict, prepare
from plrhf.evaluation.probes import probe
from plrhf.evaluation.records import write_record
from plrhf.evaluation.results import (
    provenance_of,
    read_results,
    summarise_run,
    write_evaluation,
)
from plrhf.evaluation.users import write_users
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card, read_card
from plrhf.models.policy import PersonalPolicy
from plrhf.reporting import comparison, comparison_page, report, tables
from plrhf.reporting.over_seeds import seeds_table
from plrhf.training.loggers import build_loggers, log_files, log_settings


def evaluate(settings: Settings) -> None:
    """Run the task ``eval.name``."""
    config = EvalConfig.from_settings(settings)
    tasks = {
        "score": score,
        "generate": write,
        "winrate": winrate,
        "adapt": adapt,
        "compare": compare,
        "referee": referee,
    }
    tasks[settings["eval"]["name"]](config)


def score(config: EvalConfig) -> None:
    """Evaluate a run again, on its own rows or on others; write results and report."""
    run = finished_run(config)
    model, data, trainer, trained = load_run(run, config)
    out = Path(config.out or run / "eval")
    prepare(model, data.restrict_to("val", "test"), trainer, cache_dir=Path(config.cache_dir))
    predictions = predict(model, data, trainer)
    before = read_results(run)
    results = summarise_run(
        predictions,
        config=trained.resolved,
        counts=data.counts(),
        probes=probe(data.splits),
        run=before.run,
        provenance=provenance_of(
            data,
            settings=(config.data or trained.data).model_dump(mode="json"),
            how=this_command(),
            fingerprint=before.fingerprint,
        ),
        # The rule that the run chose on its val pairs; other rows have none to choose it on.
        longer_wins=before.controls["length_only"]["rule"] == LONGER_WINS,
    )
    write_evaluation(out, results, predictions)
    tables.console().print(tables.closing_table(results))
    outputs = Outputs(debug=config.debug)
    with outputs.writing(out / "users.json"):
        write_users(out / "users.json", model, data, before.fingerprint)
    with outputs.writing(out / "report.html"):
        print(f"report: {report.write_report(out)}")
    outputs.check()


def write(config: EvalConfig) -> None:
    """Generate texts of a policy (and the reference) for many users; write generations.jsonl and report."""
    texts: GenerationOptions = config.task
    run = finished_run(config)
    model, data, _, trained = load_run(run, config)
    if not isinstance(model, PersonalPolicy):
        raise bad_value(
            "run", str(run), "a run of model=dpo or grpo", "Give a run that trained a policy"
        )
    if texts.best_of is not None:
        reward = texts.best_of.reward
        check_same_world("eval.best_of.reward", reward, build_source(trained.data))
    out = Path(config.out or run)
    out.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(trained.seed if config.seed is None else config.seed, verbose=False)
    fingerprint = read_results(run).fingerprint
    curves = write_generations(out / "generations.jsonl", model, data, texts, fingerprint)
    print(f"texts: {out / 'generations.jsonl'}")
    for writer, points in curves.items():
        print(f"best of n texts of the {writer}, expected over all choices of n of those written:")
        print(describe_curve(points))
    rewrite_report(out, config)


def winrate(config: EvalConfig) -> None:
    """Measure how often a judge prefers a run's texts to another run's; write winrate.json and report.

    Both texts answer the same prompt for the same user. Ties count one half. The interval is a
    bootstrap over users.
    """
    task: WinrateTask = config.task
    run = finished_run(config)
    contests = find_contests(run, task.against, writer=task.writer)
    if "export" in task.judge and task.judge.get("users") == "own":
        trained = RunConfig.of_run(run, trust_components=config.trust_components)
        check_same_world("eval.judge.export", task.judge["export"], build_source(trained.data))
    judge: Judge = build(task.judge, "eval.judge", kind=Judge)
    result = JudgedRun(
        **win_rates(contests, judge.compare(contests)).model_dump(),
        fingerprint=read_results(run).fingerprint,
        run=str(run),
        writer=task.writer,
        against=task.against,
        judge=task.judge,
    )
    out = Path(config.out or run)
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / "winrate.json", result)
    low, high = result.win_rate["ci95"] or (math.nan, math.nan)
    print(
        f"win rate of {run} against {task.against}: {result.win_rate['value']:.3f} "
        f"[{low:.3f}, {high:.3f}] over {result.n_texts} texts, {result.ties:.3f} ties"
    )
    if result.cost is not None:
        print(_judging(result))
    rewrite_report(out, config)


def find_contests(run: Path, against: str, *, writer: str = "policy") -> list[Contest]:
    """Pair a writer's texts with those of the reference, or of another run, by user and prompt.

    Raises:
        ValueError: the other has no text for one of them.
    """
    ours = _texts(run, writer, field="run")
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
    return [Contest(ours=text, theirs=theirs[key]) for key, text in ours.items()]


def adapt(config: EvalConfig) -> None:
    """Measure the few-shot curve of new users; write adapt.json and report."""
    task: AdaptTask = config.task
    run = finished_run(config)
    model, data, trainer, _ = load_run(run, config)
    model.to(trainer.strategy.root_device)
    seed = 0 if config.seed is None else config.seed
    with trainer.precision_plugin.forward_context():
        fingerprint = read_results(run).fingerprint
        result = learning_curve(
            model, data, task.options, task.rule, seed=seed, fingerprint=fingerprint
        )
    result = result.model_copy(update={"adaptation": task.adaptation})
    out = Path(config.out or run)
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("adapt.json" if task.options.users == "unseen" else "adapt_seen.json")
    write_record(path, result)
    tables.console().print(tables.few_shot_closing_table(result))
    print(f"curve: {path}")
    rewrite_report(out, config)


def compare(config: EvalConfig) -> None:
    """Compare all runs of a glob in one table, figure and report."""
    if config.runs is None or config.out is None:
        name = "runs" if config.runs is None else "out"
        raise bad_value(
            name,
            None,
            "a glob of run directories" if name == "runs" else "a directory",
            "Write eval=compare runs='DIR/*' out=DIR",
        )
    loggers = []
    if config.logger is not None:
        others = {name: one for name, one in config.logger if name != "name"}
        loggers = build_loggers(run_dir=Path(config.out), name=Path(config.out).name, **others)
    made = comparison_page.compare(config.runs, config.out, baseline=config.task.baseline)
    if made.over_seeds is None:
        tables.console().print(comparison.comparison_table(made.frame))
    else:
        title = "Test results over seeds, 95% intervals over users"
        table = seeds_table(made.over_seeds)
        tables.console().print(tables.rich_table(table, title=title, without=["by seed"]))
    if made.frame["baseline"].isna().all() and any(run.role != "vanilla" for run in made.runs):
        print(
            "note: nothing is compared with a baseline, as no run of encoder=none has the same model, rows "
            "and seed: add one, or name a run by eval.baseline=DIR"
        )
    for path in made.skipped:
        line = f"skipped, as it holds no results.json: {path}{failure_line(Path(path))}"
        print(printable(line))
    print(f"report: {Path(config.out) / 'report.html'}")
    log_settings(loggers, {"runs": config.runs, "baseline": config.task.baseline})
    log_files(loggers, comparison_page.files(Path(config.out)))


def rewrite_report(out: Path, config: EvalConfig) -> None:
    """Update the report of a directory that has an evaluation.

    Raises:
        FilesMissing: it cannot be written.
    """
    outputs = Outputs(debug=config.debug)
    if (out / "results.json").is_file():
        with outputs.writing(out / "report.html"):
            report.write_report(out)
    outputs.check()


def load_run(
    run: Path, config: EvalConfig
) -> tuple[PersonalModule, PreferenceData, Trainer, RunConfig]:
    """Load a finished run: its exported model, its own rows or those given, a trainer, and its config.

    Raises:
        ValueError: the run's own rows have changed since training.
    """
    check_writable("cache_dir", config.cache_dir)
    trained = RunConfig.of_run(run, trust_components=config.trust_components)
    lightning.seed_everything(trained.seed, verbose=False)
    export = run / "export"
    card = read_card(export)
    if config.data is None:
        data = build_data(trained.data)
    else:
        data = build_data(config.data, users=card.users, schema=card.feature_schema(), **card.text)
    print_lines(data.report.lines())
    model = PersonalModule.from_pretrained(
        export,
        trust_remote_code=trained.backbone.trust_remote_code,
        trust_components=config.trust_components,
    )
    if config.data is not None:
        data.own_pairs = model.own_pairs
    data.tokenize(
        load_tokenizer(str(export)),
        layout=model.backbone.layout,
        max_positions=model.max_positions,
        user_slots=model.user_slots,
        cache_dir=Path(config.cache_dir),
    )
    print_lines(data.tokenizing_notes())
    if config.data is None:
        check_rows_of_run(run, data, card)
    trainer = Trainer(
        # Elsewhere than where it was trained the run is evaluated on what there is.
        accelerator="cpu" if trained.trainer.accelerator == "cpu" else "auto",
        devices=1,
        logger=False,
        precision=trained.trainer.precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return model, data, trainer, trained


def check_rows_of_run(run: Path, data: PreferenceData, card: Card) -> None:
    """Check that a run's own rows are those of training, and set their users to the model's now.

    Users that `forget` removed from the export become unseen, with the generic user's vector. Users
    that `enrol` added count as seen.

    Raises:
        ValueError: the rows are not those that the run was trained on.
    """
    provenance = read_results(run).provenance
    now, then = data.content_hash(), None if provenance is None else provenance.rows
    known, knew = set(card.users), set(data.splits.users)
    if then is None and known != knew or then not in (None, now):
        raise bad_value(
            "data",
            f"{data.n_users} users, rows {now}",
            f"the rows of training{'' if then is None else f', {then}'}",
            "Restore the file that the run read, or name other rows with data=; an earlier version's run, "
            "which hashed rows otherwise, must be trained anew",
        )
    # Neither `forget` nor `enrol` changes the order of the others: vectors would be of other users.
    if [one for one in card.users if one in knew] != [
        one for one in data.splits.users if one in known
    ]:
        raise bad_value(
            "export",
            "users in another order",
            f"the {len(knew)} users of training in their order",
            "Restore the export that the run wrote",
        )
    if list(data.splits.users) != card.users:
        changed = ((knew - known, "forgotten"), (known - knew, "enrolled"))
        said = [f"{len(users)} {what}" for users, what in changed if len(users) > 0]
        print(f"users changed since training: {', '.join(said)}; results are of those known now")
        data.set_known_users(card.users)


def finished_run(config: EvalConfig) -> Path:
    """Return the directory ``run``.

    Raises:
        ValueError: it is not that of a finished run.
    """
    if config.run is None or not (Path(config.run) / "results.json").is_file():
        raise bad_value(
            "run", config.run, "the directory of a finished run", "Give run=DIR as train.py had it"
        )
    return Path(config.run)


def _same_task(one: GeneratedText, other: GeneratedText) -> bool:
    """Return whether two texts answer the same prompt for users with the same profile."""
    return (one.prompt, one.profile) == (other.prompt, other.profile)


def _judging(result: JudgedRun) -> str:
    """Summarise a judge's cost, position bias and missing answers in one line."""
    answers, cost = result.answers or {}, result.cost or {}
    price = "not known" if cost["price"] is None else f"{cost['price']:.4f}"
    return (
        f"judge: {cost['questions']} questions, {cost['from_cache']} answered before; "
        f"{cost['input_tokens']} + {cost['output_tokens']} tokens, price {price}; "
        f"prefers the first text {result.first_position_wins or 0.0:.3f}; "
        f"{answers['refused']} refused, {answers['unparseable']} unparseable"
    )


def _texts(run: Path, writer: str, *, field: str) -> dict[tuple[str, str], GeneratedText]:
    """Return a run's texts by one writer, by user and prompt."""
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
        how = "eval.best_of.n=16 eval.best_of.reward=DIR eval.best_of.writers=[policy,reference]"
        if writer in ("generic", "reference"):
            how = f"eval.{writer}=true"
        allowed = f"a run with texts of the writer {writer}"
        raise bad_value(field, str(run), allowed, f"Write them: eval=generate run={run} {how}")
    return texts
