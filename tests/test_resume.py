"""A run that was killed goes on as if it had not been: weights, metrics, choice of the best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tiny import LORA, language_model, make_model

from plrhf.backbone import Backbone, train_tokenizer
from plrhf.data.module import PreferenceData
from plrhf.data.sources.personas import PersonasSource
from plrhf.optim import Optim
from plrhf.reward import PersonalRewardModel
from plrhf.training import MetricsFile, build_trainer, fit

N_USERS, N_ROWS = 3, 21


class Snapshots(Callback):
    """Copies the run directory before every step, which is what a kill at that moment leaves."""

    def __init__(self, run_dir: Path, copies: Path) -> None:
        self.run_dir, self.copies = run_dir, copies

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if (self.run_dir / "checkpoints/last.ckpt").is_file():
            shutil.copytree(self.run_dir, self.copies / f"{len(list(self.copies.iterdir())):03d}")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    fields = ("prompt", "chosen", "rejected")
    texts = [str(row[name]) for _, row in world().records() for name in fields]
    return train_tokenizer(texts, vocab_size=700)


def world() -> PersonasSource:
    return PersonasSource(
        kind="individual",
        n_users=N_USERS,
        n_unseen_users=0,
        pairs_per_user=7,
        val_pairs_per_user=2,
        test_pairs_per_user=1,
        n_prompts=20,
    )


def fit_once(
    run_dir: Path, tokenizer: Any, *, copies: Path | None = None, lr: float = 1e-2, **settings: Any
) -> LightningModule:
    """3 users' 21 pairs in batches of 5, so 5 steps an epoch, the last of 1 pair; LoRA dropout."""
    lightning.seed_everything(0, verbose=False)
    data = PreferenceData(source=world(), seed=3, batch_size=5, eval_batch_size=64, max_tokens=99)
    data.tokenize(tokenizer, causal=True)
    assert len(data.datasets["train"]) == N_ROWS
    backbone = Backbone(
        model=language_model(vocabulary=len(tokenizer)), lora={**LORA, "dropout": 0.3}
    )
    optim = Optim(lr=lr, user_lr=lr, head_lr=lr, warmup_steps=2, schedule="constant")
    model: LightningModule = make_model(
        PersonalRewardModel, backbone=backbone, aggregator="film_last", optim=optim
    )
    run_dir.mkdir(exist_ok=True)
    last = run_dir / "checkpoints/last.ckpt"
    trainer = build_trainer(
        run_dir=run_dir,
        loggers=[MetricsFile(run_dir / "metrics.csv")],
        accelerator="cpu",
        log_every_n_steps=1,
        progress=False,
        **{"has_val": True, **settings},
    )
    if copies is not None:
        trainer.callbacks.append(Snapshots(run_dir, copies))
    fit(model, data, trainer, resume_from=last if last.is_file() else None)
    return model


SETTINGS = {
    "epochs": {"max_epochs": 2},
    "often": {"max_epochs": 2, "checkpoint_every_n_steps": 1},
    "between epochs": {"max_steps": 11, "checkpoint_every_n_steps": 3},
    "validation by steps": {"max_steps": 9, "val_every_n_steps": 2, "checkpoint_every_n_steps": 1},
    "validation by steps alone": {"max_steps": 10, "val_every_n_steps": 3},
    "summed gradients": {
        "max_steps": 8,
        "accumulate_grad_batches": 2,
        "val_every_n_steps": 1,
        "checkpoint_every_n_steps": 1,
    },
    "summed gradients, epochs": {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "checkpoint_every_n_steps": 1,
    },
    "no val": {"max_epochs": 2, "has_val": False, "checkpoint_every_n_steps": 2},
    "no val, epochs": {"max_epochs": 2, "has_val": False},
    "early stop": {"max_steps": 30, "val_every_n_steps": 1, "patience": 2, "lr": 0.05},
    "early stop, epochs": {
        "max_epochs": 9,
        "patience": 1,
        "lr": 0.05,
        "checkpoint_every_n_steps": 2,
        "monitor": "val/accuracy_micro",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_before_any_step_ends_the_same(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    run_dir, copies = tmp_path / "run", tmp_path / "copies"
    copies.mkdir()
    whole = fit_once(run_dir, tokenizer, copies=copies, **SETTINGS[name])
    expected = {key: value.clone() for key, value in whole.state_dict().items()}
    metrics = (run_dir / "metrics.csv").read_text()
    finished = tmp_path / "finished"
    shutil.copytree(run_dir, finished)
    snapshots = [*sorted(copies.iterdir()), finished]
    assert len(snapshots) > 2
    for snapshot in snapshots:
        shutil.rmtree(run_dir)
        shutil.copytree(snapshot, run_dir)
        resumed = fit_once(run_dir, tokenizer, **SETTINGS[name])
        for key, value in resumed.state_dict().items():
            assert torch.equal(value, expected[key]), f"{snapshot.name}: {key}"
        assert (run_dir / "metrics.csv").read_text() == metrics, snapshot.name
