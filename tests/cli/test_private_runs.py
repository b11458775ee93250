"""Runs with differential privacy: what they report, what they may give away, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import runs

from plrhf.cli.config import RunConfig
from plrhf.cli.privacy import make_private
from plrhf.data.samplers import PoissonUserSampler
from plrhf.models.card import read_card

PRIVATE = [
    *("privacy.noise=2", "privacy.clip=0.5", "privacy.delta=1e-3", "data.users_per_batch=2"),
    *("backbone=hf", "backbone.path=somewhere", "trainer.gradient_clip_val=null"),
    *("encoder=cluster", "encoder.n_clusters=3", "backbone.trainable=frozen"),
]


@pytest.mark.slow
def test_a_private_run_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = runs.save_model(tmp_path / "model")
    run = tmp_path / "run"
    where = [f"backbone.path={backbone}", f"cache_dir={tmp_path / 'cache'}", f"run_dir={run}"]
    tiny = [one for one in runs.TINY if not one.startswith(("backbone", "trainer"))]
    runs.launch(
        "train", *tiny, *PRIVATE, *where, "data.kind=features", "trainer.log_every_n_steps=2"
    )
    results = json.loads((run / "results.json").read_text())
    spent = results["privacy"]
    assert spent["steps"] == 6 and spent["sample_rate"] == 2 / 5 and spent["delta"] == 1e-3
    assert 0.1 < spent["epsilon"] < 20
    line = f"differential privacy for each user: epsilon {spent['epsilon']:.2f} at delta 0.001"
    assert line in capsys.readouterr().out and line in (run / "export/README.md").read_text()
    # Nothing is chosen by val pairs, and no feature of users is read.
    assert not (run / "checkpoints/best.ckpt").exists()
    assert "val/loss" not in pd.read_csv(run / "metrics.csv").columns
    assert read_card(run / "export").features == {"numbers": {}, "categories": {}}


def test_each_user_is_drawn_by_chance() -> None:
    user_id = np.array([3] * 50 + [1] * 2 + [2] * 7 + [9])
    sampler = PoissonUserSampler(
        np.ones((60, 1), dtype=np.int64), user_id, users_per_batch=1, pairs_per_user=4, seed=5
    )
    assert sampler.sample_rate == 0.25 and len(sampler) == 4 and sampler.padding() is None
    n_batches, met = 0, dict.fromkeys([1, 2, 3, 9], 0)
    together = 0
    for epoch in range(500):
        for batch in sampler.epoch(epoch):
            n_batches += 1
            users, counts = np.unique(user_id[batch], return_counts=True)
            assert len(set(batch.tolist())) == len(batch)
            expected = {1: 2, 2: 4, 3: 4, 9: 1}
            assert counts.tolist() == [expected[one] for one in users.tolist()]
            for one in users.tolist():
                met[one] += 1
            together += {1, 2} <= set(users.tolist())
    for count in met.values():  # five standard deviations
        assert abs(count / n_batches - 0.25) < 5 * (0.25 * 0.75 / n_batches) ** 0.5
    assert abs(together / n_batches - 1 / 16) < 5 * (1 / 16 * 15 / 16 / n_batches) ** 0.5
    served = list(sampler)  # empty batches count as steps, too
    assert len(served) == 4 and all(one.step_weight == 1.0 for one in served)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return runs.composed(*PRIVATE)


REFUSED: dict[str, Any] = {
    "trainer.devices": 2,
    "trainer.accumulate_grad_batches": 4,
    "trainer.patience": 3,
    "trainer.gradient_clip_val": 1.0,
    "data.max_users": 3,
    "data.shuffle_users": True,
    "data.users_per_batch": None,
    "model.reduce": "tail",
    "model.start": "svd",
    "model.inner": {"steps": 1},
    "model.name": "grpo",
    "encoder.shrinkage": "learned",
    "encoder.sparse": True,
    "encoder.name": "features",
    "aggregator.shrinkage": "learned",
    "aggregator.text_residual": True,
    "backbone.path": None,
    "privacy.clip": 0.0,
    "privacy.delta": 1.0,
}


@pytest.mark.parametrize("field", REFUSED)
def test_where_privacy_would_not_hold_it_is_refused(field: str, settings: dict[str, Any]) -> None:
    section, name = field.split(".")
    altered = {**settings, section: {**settings[section], name: REFUSED[field]}}
    if field == "backbone.path":
        altered["backbone"]["tiny"] = runs.composed()["backbone"]["tiny"]
    named = section if name == "name" else field
    with pytest.raises(ValueError, match=rf"^{named}=.* (Set|Give) "):
        RunConfig.from_settings(altered)


def test_private_settings_pass(settings: dict[str, Any]) -> None:
    assert RunConfig.from_settings(settings).privacy.noise == 2.0


def test_rows_whose_weights_depend_on_others_are_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.from_settings(settings)
    train, model = SimpleNamespace(feedback=None, groups=None), SimpleNamespace(private=None)
    data: Any = SimpleNamespace(datasets={"train": train}, n_users=100, secret_sampling=False)
    data.train_dataloader = lambda: [None] * 3
    monkeypatch.setattr("plrhf.cli.privacy.spent", lambda *_: None)
    make_private(config, model, data)  # type: ignore[arg-type]
    assert data.secret_sampling and model.private is not None
    train.groups = [1]
    with pytest.raises(ValueError, match=r"^privacy\.noise='2.0 on rows with groups of pairs'"):
        make_private(config, model, data)  # type: ignore[arg-type]
    train.groups, data.n_users = None, 5000
    with pytest.raises(ValueError, match=r"^privacy\.delta=0\.001 .* below 1 / 5,000"):
        make_private(config, model, data)  # type: ignore[arg-type]
