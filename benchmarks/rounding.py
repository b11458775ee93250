"""How much of the difference between the referee and train.py is rounding.

python benchmarks/rounding.py --path DIR                  # Polis, lookup

Trials of equal structure are trained side by side, and the one with the best val loss once more by the
Lightning trainer; both in float32, as they are, and in float64. It prints how far apart they are on test
pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plrhf.cli.main import silence_libraries
from plrhf.cli.methods import Trial, build_trial, read_method
from plrhf.cli.referee_job import Bench
from plrhf.data.module import PreferenceData
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import Training, train_side_by_side
from plrhf.training.trainer import build_trainer, fit

FLOAT = Tensor.float


def main() -> None:
    """Print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="directory of the backbone")
    parser.add_argument("--rows", default="referee/polis")
    parser.add_argument("--method", default="lookup")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--group", type=int, default=0, help="which of the trials that go together")
    given = parser.parse_args()
    silence_libraries()
    where = [f"backbone.path={given.path}"]
    method = read_method(given.method, given.rows, where, seed=given.seed, n_trials=given.trials)
    bench = Bench((given.rows, given.seed))
    data, backbone, _ = bench.rows_of(method.config)
    data = bench.with_vectors(method, data, backbone)
    group = method.groups()[given.group]
    found: dict[str, np.ndarray] = {}
    best = 0
    for dtype in (torch.float32, torch.float64):
        seen = in_dtype(data, dtype)
        name = str(dtype).removeprefix("torch.")

        def built(trial: Trial, dtype: torch.dtype = dtype) -> PersonalRewardModel:
            model = build_trial(trial, data, backbone)
            for part in ("encoder", "aggregator", "head"):
                getattr(model, part).to(dtype)
            return model

        models = [built(trial) for trial in group]
        with floats_of(dtype):
            results = train_side_by_side(models, seen, method.training)
            best = min(range(len(group)), key=lambda n: results[n].score)
            found[f"referee, {name}"] = asked(models[best], seen)
        single = built(group[best])
        with floats_of(dtype):
            by_trainer(single, seen, method.training)
            found[f"train.py, {name}"] = asked(single, seen)
    print(group[best].point)
    print("| of | and of | margins: median | most | probabilities: most | other choices |")
    print("|---|---|---:|---:|---:|---:|")
    names = ("referee, float32", "train.py, float32", "referee, float64", "train.py, float64")
    for one, other in ((0, 1), (2, 3), (1, 3), (0, 3)):
        cells = apart(found[names[one]], found[names[other]])
        print(f"| {names[one]} | {names[other]} | {' | '.join(cells)} |")


def in_dtype(data: PreferenceData, dtype: torch.dtype) -> PreferenceData:
    """Return a copy of data whose texts are vectors of another dtype."""
    changed = copy(data)
    changed.datasets = {name: copy(one) for name, one in data.datasets.items()}
    for one in changed.datasets.values():
        assert one.hidden is not None
        one.hidden = replace(one.hidden, values=one.hidden.values.to(dtype))
    return changed


@contextmanager
def floats_of(dtype: torch.dtype) -> Iterator[None]:
    """Compute in `dtype` wherever the code says float32."""
    torch.set_default_dtype(dtype)
    Tensor.float = lambda one: one.to(dtype)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        Tensor.float = FLOAT  # type: ignore[method-assign]


def by_trainer(model: PersonalRewardModel, data: PreferenceData, training: Training) -> None:
    """Train a model as train.py does, and leave it with its best weights by val."""
    limits = {
        name: getattr(training, name)
        for name in (
            "max_steps",
            "max_epochs",
            "val_every_n_steps",
            "gradient_clip_val",
            "patience",
        )
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            run_dir=Path(folder), loggers=[], has_val=True, accelerator="cpu", **limits
        )
        fit(model, data, trainer, resume_from=None)


def asked(model: PersonalRewardModel, data: PreferenceData) -> np.ndarray:
    """Return the margins of test pairs for their users."""
    test = data.datasets["test"]
    return margins_on(model.eval(), test, batch_size=8192)[:, 0]


def apart(one: np.ndarray, other: np.ndarray) -> list[str]:
    """Return how far apart margins are: their median and most, most in probability, other choices."""
    gaps = np.abs(one - other)
    chances = np.abs(1 / (1 + np.exp(-one)) - 1 / (1 + np.exp(-other)))
    changed = int(((one > 0) != (other > 0)).sum())
    sizes = (np.median(gaps), gaps.max(), chances.max())
    return [*(f"{size:.1e}" for size in sizes), f"{changed} of {len(one)}"]


if __name__ == "__main__":
    main()
