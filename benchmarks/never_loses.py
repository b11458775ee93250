"""Whether experiment=frozen_features ever loses: its defaults beside vanilla and a hand-tuned grid.

python benchmarks/never_loses.py --path DIR              # val pairs, by which settings are chosen
python benchmarks/never_loses.py --path DIR --split test --seeds 0 1 2
python benchmarks/never_loses.py --path DIR --worlds features features-shuffled --encoders features hybrid

DIR is a sentence encoder. The worlds have something personal (polis, llmfao, personas, features) or nothing
(ukpconvarg1, shuffled users, a coin of 65% for the longer answer). Where there is something, the defaults
also stand beside a grid of encoder=lookup with shrinkage=fixed, of which the best on val is taken. A line a
world, seed and encoder: accuracies in % (val loss, step of the best checkpoint), differences in points with
95% intervals over users, and CPU seconds of training the defaults as a multiple of those of a trial of the
same encoder with shrinkage=fixed.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning
import numpy as np
from omegaconf import OmegaConf

from plrhf.cli.assemble import build_run_model, open_backbone
from plrhf.cli.config import RunConfig
from plrhf.cli.main import CONF
from plrhf.cli.referee_job import plain_trainer
from plrhf.cli.rows import build_data
from plrhf.cli.supervised import cached_tiny_backbone
from plrhf.core.stats import Outcomes, correctness, paired_difference
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.evaluation.predictions import prepare
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import Training, train_side_by_side

SHUFFLED = "data.shuffle_users=true"
POLIS = ["data.path={data}/polis_bowling_green.jsonl.gz", "data.min_pairs_per_user=20"]
LLMFAO = ["data.path={data}/llmfao_a.jsonl.gz"]
UKP = ["data.path={data}/ukpconvarg1.jsonl.gz", "data.min_pairs_per_user=100"]
PERSONAS = ["data=personas", "backbone=tiny_gptj", "backbone.path=null", "data.kind=individual"]
FEATURES = [*PERSONAS[:-1], "data.kind=features"]  # people who differ by what is known of them
WORLDS = {
    "polis": POLIS,
    "llmfao": LLMFAO,
    "personas": PERSONAS,
    "features": FEATURES,
    "ukpconvarg1": UKP,
    "polis-shuffled": [*POLIS, SHUFFLED],
    "llmfao-shuffled": [*LLMFAO, SHUFFLED],
    "personas-shuffled": [*PERSONAS, SHUFFLED],
    "features-shuffled": [*FEATURES, SHUFFLED],
    "coin": ["data.path={cache}/coin.jsonl.gz"],
}
PERSONAL = ("polis", "llmfao", "personas", "features")
FIXED = ["shrinkage=fixed", "aggregator.shrinkage=fixed", "optim.shared_steps=0", "model.alpha=1"]
RANKS, DECAYS = (1, 2, 4), (0.5, 1.0, 2.0, 4.0)


def main() -> None:
    """Print a line for each world, seed and encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="directory of the sentence encoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/plrhf"))
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--encoders", nargs="+", default=["lookup", "cluster"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--no-grid", action="store_true", help="leave out the hand-tuned grid")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the defaults")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    if "coin" in given.worlds:
        write_coin(given.data / "ukpconvarg1.jsonl.gz", given.cache / "coin.jsonl.gz")
    columns = "encoder | vanilla | defaults | over vanilla | tuned | over tuned | times"
    print(f"| world | seed | {columns} |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for world, seed in itertools.product(given.worlds, given.seeds):
        for cells in lines(world, seed, given):
            print("| " + " | ".join(cells) + " |", flush=True)


def lines(world: str, seed: int, given: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the cells of each encoder's line of a world."""
    rows = [one.format(data=given.data, cache=given.cache) for one in WORLDS[world]]
    bench = Bench([f"backbone.path={given.path}", *rows, f"seed={seed}"], given.cache, given.split)
    vanilla, _ = bench.train([["encoder=none"]])
    tuned = None
    if world in PERSONAL and not given.no_grid:
        tuned = min((bench.train(group)[0] for group in grid()), key=lambda one: one.score)
    for encoder in given.encoders:
        chosen = [f"encoder={encoder}", *given.set]
        ours, seconds = bench.train([chosen])
        cells = [world, str(seed), encoder, percent(vanilla), percent(ours)]
        cells.append(difference(ours, vanilla))
        if tuned is None:
            yield [*cells, "", "", ""]
        else:
            fixed = bench.train([[*chosen, *FIXED]])[1]
            yield [*cells, percent(tuned), difference(ours, tuned), f"{seconds / fixed:.2f}"]


def grid() -> Iterator[list[list[str]]]:
    """Yield trials that can be trained side by side: all decays of a rank."""
    for rank in RANKS:
        wide = ["encoder=lookup", *FIXED, f"encoder.rank={rank}", "aggregator.user_dim=32"]
        yield [[*wide, f"optim.user_weight_decay={decay}"] for decay in DECAYS]


class Bench:
    """The rows of a world with a feature vector for each text.

    Args:
        overrides: of rows and backbone. split: pairs that the trained models are asked.
    """

    def __init__(self, overrides: Sequence[str], cache: Path, split: str) -> None:
        self.overrides, self.cache, self.split = overrides, cache, split
        config = self.config([])
        self.data: PreferenceData = build_data(config.data)
        self.path = config.backbone.path or cached_tiny_backbone(config, self.data)
        tokenizer, self.backbone = open_backbone(config.backbone, self.path)
        self.data.tokenize(
            tokenizer,
            layout=self.backbone.layout,
            max_positions=self.backbone.max_positions,
            cache_dir=cache,
        )
        prepare(self.model(config), self.data, plain_trainer(), cache_dir=cache)

    def config(self, changes: Sequence[str]) -> RunConfig:
        """Read the settings of ``train.py experiment=frozen_features`` with changes."""
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            every = [
                "experiment=frozen_features",
                *self.overrides,
                "run_dir=none",
                f"cache_dir={self.cache}",
                *changes,
            ]
            node = hydra.compose("train", overrides=every)
        settings: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return RunConfig.parse(settings)

    def model(self, config: RunConfig) -> Any:
        """Build a model as ``train.py`` does."""
        lightning.seed_everything(config.seed, verbose=False)
        return build_run_model(config, self.data, self.backbone, self.path)

    def train(self, trials: Sequence[Sequence[str]]) -> tuple[Best, float]:
        """Train trials side by side; return the one with the best val loss, and the CPU seconds taken."""
        started = time.process_time()
        configs = [self.config(changes) for changes in trials]
        models = [self.model(config) for config in configs]
        found = train_side_by_side(models, self.data, Training.of(configs[0].trainer))
        seconds = time.process_time() - started
        score, place = min((one.score, place) for place, one in enumerate(found))
        dataset = self.data.datasets[self.split]
        return Best(score, found[place].step, outcomes(models[place], dataset)), seconds


@dataclass(frozen=True)
class Best:
    """A trial: its val loss and the step of its best checkpoint, and what it says of pairs."""

    score: float
    step: int
    user: Outcomes


def outcomes(model: PersonalRewardModel, dataset: PairDataset) -> Outcomes:
    """Ask a model the pairs of seen users, for these users."""
    seen = (dataset.user_id > 0).numpy()
    margins = margins_on(model, dataset, batch_size=8192)[seen]
    rows = [row for row, counts in zip(dataset.rows, seen, strict=True) if counts]
    names = ("pair_id", "user_id")
    ids = [np.array([getattr(row, name) for row in rows]) for name in names]
    return Outcomes(ids[0], ids[1], margins[:, 0], correctness(margins[:, 0]))


def percent(one: Best) -> str:
    """Show the accuracy over pairs, the val loss and the step."""
    return f"{100 * one.user.correct.mean():.1f} ({one.score:.4f} at {one.step})"


def difference(first: Best, second: Best) -> str:
    """Show the difference of accuracies in points, with its interval."""
    found = paired_difference(first.user, second.user)["accuracy_micro"]
    assert found["value"] is not None and found["ci95"] is not None
    low, high = (100 * one for one in found["ci95"])
    return f"{100 * found['value']:+.1f} [{low:+.1f}, {high:+.1f}]"


def write_coin(source: Path, target: Path, *, n_users: int = 80) -> None:
    """Write rows in which a coin of 65% for the longer of two arguments chooses, whoever is asked."""
    draw = random.Random(7)
    texts: dict[str, dict[str, set[str]]] = {}
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            of_prompt = texts.setdefault(row["split"], {}).setdefault(row["prompt"], set())
            of_prompt.update((row["chosen"], row["rejected"]))
    with gzip.open(target, "wt", encoding="utf-8") as file:
        for split, n_pairs in (("train", 40), ("val", 10), ("test", 20)):
            prompts = sorted(texts[split])
            sides = {prompt: sorted(texts[split][prompt]) for prompt in prompts}
            for user in range(n_users * n_pairs):
                prompt = draw.choice(prompts)
                pair = draw.sample(sides[prompt], 2)
                chosen, rejected = sorted(pair, key=len, reverse=draw.random() < 0.65)
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}
                file.write(json.dumps({**row, "user_id": f"u{user % n_users}"}) + "\n")


if __name__ == "__main__":
    main()
