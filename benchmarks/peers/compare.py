"""Whether a method here does what its authors' code does, on the same small features and the same
pairs.

    git clone https://github.com/facebookresearch/LoRe /tmp/LoRe
    python benchmarks/peers/compare.py lore /tmp/LoRe --seeds 0 1 2

Methods: lore (facebookresearch/LoRe), pref (idanshen/PReF_code), mrm (ModalityDance/MRM), pal_a
(RamyaLab/pluralistic-alignment), vpl (WEIRDLabUW/vpl_llm), gpo
(jamqd/Group-Preference-Optimization). The authors' code is run from the copy and is no part of this
repository; `METHOD.py` beside this file says what of it is run and what had to be put around it.
Ours is `experiment=method/METHOD` with the settings named there.

The world: texts are 16 numbers, people differ in three directions of them, and 240 pairs of texts
are judged by everybody in part. Accuracies in % on other pairs of 60 train users, and of 40 new
users after 16 of theirs; a line a seed (of world, start and batches), then the mean difference and
its standard error over seeds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from world import N_GIVEN, N_PAIRS, WIDTH, Accuracies, World, make_rows, of_users, set_features

from plrhf.backbone.tiny import train_tokenizer
from plrhf.cli.assemble import build_run_model
from plrhf.cli.main import silence_libraries
from plrhf.cli.methods import read_method
from plrhf.cli.rows import build_data
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import draw_context
from plrhf.evaluation.few_shot import FewShotOptions
from plrhf.referee.features import FixedFeatures
from plrhf.referee.new_users import NEW, FewShots, add_new_users, new_user_margins
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import train_side_by_side


def our_run(
    name: str, settings: Sequence[str], *, seed: int, folder: Path
) -> tuple[World, Accuracies]:
    """Train `method/NAME` on a world, and return both."""
    rows, features = make_rows(seed)
    path = folder / f"{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = "trainer.val_every_n_steps=${trainer.max_steps}"  # nothing is chosen on val
    where = ["data=jsonl", f"data.path={path}", last, *settings]
    method = read_method(name, None, where, seed=seed, n_trials=1)
    config = method.config
    data: PreferenceData = build_data(config.data)
    data.tokenize(
        train_tokenizer([str(n) for n in range(2 * N_PAIRS)], vocab_size=300), layout="packed"
    )
    given = add_new_users(data, layout="packed")
    for dataset in data.datasets.values():
        set_features(dataset, features)
    lightning.seed_everything(seed, verbose=False)
    backbone: Any = FixedFeatures(WIDTH)
    model: Any = build_run_model(config, data, backbone, "")
    train = data.datasets["train"]
    if model.encoder.reads_context:
        train.context_hidden = train.hidden
        trained = {split: one for split, one in data.datasets.items() if split != NEW}
        least, most = model.encoder.min_pairs, model.encoder.max_pairs
        draw_context(trained, least=least, most=most, seed=seed)
    seen = data.restrict_to("train", "val")
    steps = method.training.total_steps(len(seen.train_dataloader()))
    model.initialise(seen, total_steps=steps)
    train_side_by_side([model], data, method.training)
    shots = FewShots.draw(data, given, FewShotOptions(shots=[N_GIVEN], draws=1), seed=seed)
    assert shots is not None and method.rule is not None
    test = data.datasets["test"]
    known = test.user_id > 0
    margins = margins_on(model, test, batch_size=4096)[known.numpy(), 0]
    of_new, _ = new_user_margins(model, shots, method.rule, batch_size=4096)
    own = of_new[of_new["who"] == "own"]["margin"]
    hidden = shots.dataset.hidden
    assert hidden is not None
    texts = features[hidden.of_pair]
    world = World(
        train=of_users(train, features),
        test=of_users(test, features)[1:],  # the first are the new users', whose index is 0
        given=[texts[trial.given] for trial in shots.trials[0]],
        asked=[texts[trial.asked] for trial in shots.trials[0]],
    )
    return world, Accuracies(float((margins > 0).mean()), float((own > 0).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("method")
    parser.add_argument("copy", type=Path, help="folder of the authors' code")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    silence_libraries()
    adapter: Any = importlib.import_module(asked.method)
    differences: dict[str, list[float]] = {"seen": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in asked.seeds:
            name, settings = getattr(adapter, "OURS", (asked.method, []))
            world, ours = our_run(name, settings, seed=seed, folder=Path(folder))
            torch.manual_seed(seed)
            theirs: Accuracies = adapter.theirs(asked.copy.resolve(), world)
            line = f"{asked.method} seed {seed}:"
            for kind, found in differences.items():
                one, other = (100 * getattr(result, kind) for result in (ours, theirs))
                found.append(one - other)
                line += f"  {kind} users: ours {one:.1f}, theirs {other:.1f}"
            print(line, flush=True)
    for kind, found in differences.items():
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        print(
            f"{asked.method} {kind} users: ours - theirs {statistics.mean(found):+.1f} +- {error:.1f}"
        )


if __name__ == "__main__":
    main()
