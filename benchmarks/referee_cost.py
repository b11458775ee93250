"""What the referee's methods cost, by part, and what a comparison of all of them would.

python benchmarks/referee_cost.py --path DIR                                   # Polis, all methods
python benchmarks/referee_cost.py --path DIR --rows referee/llmfao --methods gpo,spl --steps 40

All trials of a method are trained for some steps, and then for twice as many; by the difference the rest is
extrapolated, with as many trials as `--halvings` leaves at each step, and all else is done whole.
Times are CPU seconds of one thread and one seed. Features come from the cache; with `--random-features`
they are random vectors of the same width, which cost as much to learn from.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from plrhf.backbone.model import Backbone
from plrhf.cli import referee_job
from plrhf.cli.main import silence_libraries
from plrhf.cli.methods import Method, Trial, method_names, read_method, started_trial
from plrhf.cli.referee_job import Bench
from plrhf.core.errors import BadValue
from plrhf.data.dataset import TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.text_value_cache import text_keys
from plrhf.data.text_values import distinct_texts
from plrhf.evaluation.trials import FewShotOptions
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.new_users import FewShots
from plrhf.referee.protocol import seen_margins, tune, unseen_margins

T = TypeVar("T")

PARTS = ("settings", "rows", "start", "training", "seen users", "new users", "all")


def main() -> None:
    """Print a line for each method, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="directory of the backbone")
    parser.add_argument("--rows", default="referee/polis")
    parser.add_argument("--methods", default=",".join(method_names()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--halvings", default="0.25,0.5", help="of eval.halvings; '': none")
    parser.add_argument("--steps", type=int, default=20, help="of validation or a multiple")
    parser.add_argument("--shots", default="0,1,2,4,8,16,32")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--random-features", action="store_true")
    given = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    if given.random_features:
        referee_job.prepare = with_random_features  # type: ignore[assignment]
    bench = Bench((given.rows, given.seed))
    print(f"| method | {' | '.join(PARTS)} |", flush=True)
    print(f"|---|{'---:|' * len(PARTS)}", flush=True)
    total = dict.fromkeys(PARTS, 0.0)
    for name in given.methods.split(","):
        try:
            found = cost(name, given, bench)
        except BadValue as error:
            print(f"{name}: {error}", file=sys.stderr)
            print(f"| {name} |{' |' * len(PARTS)}", flush=True)
            continue
        total = {part: total[part] + found[part] for part in PARTS}
        print(line(name, found), flush=True)
    print(line("all", total))


def line(name: str, seconds: dict[str, float]) -> str:
    """Return a line of the table."""
    return f"| {name} | {' | '.join(f'{seconds[part]:.1f}' for part in PARTS)} |"


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what a call returns, and its CPU seconds."""
    started = time.process_time()
    return call(), time.process_time() - started


def cost(name: str, given: argparse.Namespace, bench: Bench) -> dict[str, float]:
    """Return the CPU seconds of a job by part, training extrapolated.

    Raises:
        ValueError: the method does not work with these rows.
    """
    where = [f"backbone.path={given.path}"]

    halvings = [float(share) for share in given.halvings.split(",") if share]

    def read() -> Method:
        how = {"seed": given.seed, "n_trials": given.trials}
        return read_method(name, given.rows, where, **how, halvings=halvings)

    method, of_settings = timed(read)
    (data, backbone, ids), of_rows = timed(lambda: rows_of(method, bench))
    building, built = 0.0, {}

    def build(trial: Trial) -> PersonalRewardModel:
        nonlocal building
        if id(trial) not in built:
            made, seconds = timed(lambda: started_trial(trial, method, data, backbone))
            built[id(trial)], building = made, building + seconds
        return built[id(trial)]

    whole = method.training.max_steps
    steps = min(given.steps, whole)
    until = min(2 * steps, whole)
    some, more = (replace(method.training, max_steps=n, halvings=()) for n in (steps, until))
    first = tune(method.groups(), data, some, build).seconds - building
    tuned = tune(method.groups(), data, more, build)
    rest = (tuned.seconds - first) / steps * full_steps(method, data, until)
    model = tuned.model
    _, seen = timed(lambda: seen_margins(model, data, seed=given.seed))
    shots = [int(one) for one in given.shots.split(",")]
    options = FewShotOptions(shots=method.referee.shots or shots, draws=given.draws)
    drawn, new = FewShots.draw(data, ids, options, seed=given.seed), 0.0
    if drawn is not None:
        _, new = timed(lambda: unseen_margins(model, data, drawn, method.rule))
    seconds = (of_settings, of_rows, building, tuned.seconds + rest, seen, new)
    return dict(zip(PARTS, (*seconds, sum(seconds)), strict=True))


def rows_of(method: Method, bench: Bench) -> tuple[PreferenceData, Backbone, set[str]]:
    """Return the rows with their features, the backbone, and the pairs that are only given."""
    data, backbone, ids = bench.rows_of(method.config)
    data = bench.with_vectors(method, data, backbone)
    return data, bench.backbone_for(method, data, backbone), ids


def with_random_features(
    model: PersonalRewardModel, data: PreferenceData, *_: Any, **__: Any
) -> None:
    """Stand in for `prepare`: random vectors for texts and, where the head reads them, for prompts."""
    width, generator = model.backbone.hidden_size, torch.Generator().manual_seed(0)
    for dataset in data.datasets.values():
        texts, of_pair = distinct_texts(dataset.pairs)
        values = torch.randn(len(texts), width, generator=generator)
        if model.head.reads_prompt:
            numbers: dict[tuple[int, ...], int] = {}
            places = [numbers.setdefault(prompt, len(numbers)) for prompt, _ in texts]
            prompts = torch.randn(len(numbers), width, generator=generator)
            values = torch.cat([values, prompts[places]], dim=1)
        keys = torch.from_numpy(text_keys(texts))
        dataset.hidden = TextValues(values, of_pair, keys)


def full_steps(method: Method, data: PreferenceData, start: int) -> float:
    """Return how many steps of all trials those from `start` on are worth."""
    n_trials, whole = len(method.trials), method.training.max_steps
    n_batches = len(data.restrict_to("train", "val").train_dataloader())
    total, going, done = 0.0, n_trials, 0
    for step in [*sorted(method.training.halving_steps(n_batches)), whole]:
        total += max(0, step - max(done, start)) * going / n_trials
        going, done = math.ceil(going / 2), step
    return total


if __name__ == "__main__":
    main()
