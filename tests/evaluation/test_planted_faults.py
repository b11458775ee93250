"""Faults that made published gains, planted one by one: each is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from runs import launch, rows_of_world, world, world_tokenizer
from tiny import language_model, make_model
from torch import Tensor

from plrhf.backbone.model import Backbone
from plrhf.data.digests import json_text
from plrhf.data.module import PreferenceData
from plrhf.data.sources.base import Source
from plrhf.evaluation.probes import probe
from plrhf.models.metrics import UserAccuracy
from plrhf.models.reward import PersonalRewardModel
from plrhf.reporting.runs import role
from plrhf.training.trainer import build_trainer, fit


class Rows(Source):
    """Records as they are."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def records(self) -> Iterator[Any]:
        return ((f"row {number}", one) for number, one in enumerate(self.rows))


def caught(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    """Names of the probes that find something in the rows."""
    how: dict[str, Any] = {"seed": 1, "batch_size": 9, "eval_batch_size": 9, **settings}
    found = probe(PreferenceData(source=Rows(rows), **how).splits)
    return [line.removeprefix("probe ").split(":")[0] for line in found["warnings"]]


def fair_rows() -> list[dict[str, Any]]:
    """Rows with no split of their own, in which a coin decided what was chosen."""
    rows = rows_of_world(n_users=9, pairs_per_user=40, n_prompts=90)
    for number, row in enumerate(rows):
        del row["split"]
        if number % 2 == 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


@pytest.mark.slow
def test_fair_rows_raise_no_alarm() -> None:
    assert caught(fair_rows(), val_fraction=0.3) == []


@pytest.mark.slow
def test_a_label_that_the_format_gives_away() -> None:
    rows = fair_rows()
    for row in rows:  # a reply list turned into text, as one published loader did
        row["rejected"] = str([row["rejected"]])
    assert "format_only" in caught(rows, val_fraction=0.3)


def test_a_reply_list_where_text_belongs() -> None:
    rows = fair_rows()
    for row in rows[::3]:
        row["rejected"] = [row["rejected"]]
    data = PreferenceData(source=Rows(rows), seed=1, batch_size=9, eval_batch_size=9)
    assert data.report.refused == {"field that is not text": len(rows[::3])}


def test_an_unseen_user_who_was_trained_on() -> None:
    rows = rows_of_world(val_pairs_per_user=3, test_pairs_per_user=4)
    unseen = world().user_ids[5]
    assert "unseen_user" not in caught(rows)
    for row in rows[:2]:
        row["user_id"] = unseen.upper()
    assert "unseen_user" in caught(rows)


@pytest.mark.parametrize("fault", ["by id", "by text"])
def test_a_prompt_in_two_splits(fault: str) -> None:
    rows = rows_of_world(val_pairs_per_user=3, test_pairs_per_user=4)
    assert "prompt" not in caught(rows)
    trained = next(row for row in rows if row["split"] == "train")
    tested = next(row for row in rows if row["split"] == "test")
    field = "prompt_id" if fault == "by id" else "prompt"
    tested[field] = trained[field]
    assert "prompt" in caught(rows)


def small_data() -> PreferenceData:
    """70 train, 15 val and 28 test pairs; evaluated four at a time, three at last."""
    source = world(val_pairs_per_user=3, test_pairs_per_user=4)
    data = PreferenceData(source=source, seed=3, batch_size=32, eval_batch_size=4, max_tokens=99)
    data.tokenize(world_tokenizer(), layout="packed")
    return data


def small_model(data: PreferenceData) -> Any:
    vocabulary = len(data.row_tokenizer.tokenizer)  # type: ignore[arg-type]
    backbone = Backbone(model=language_model(vocabulary=vocabulary), trainable="frozen")
    return make_model(PersonalRewardModel, backbone=backbone, aggregator="film_last")


class SelectsOnTest(Callback):
    """Watches the test loss, to stop where it is lowest."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule.data  # type: ignore[attr-defined]
        for batch in data.evaluation_loader("test"):
            pl_module.validation_step(batch, 0)


@pytest.mark.slow
def test_selection_on_test(tmp_path: Path) -> None:
    data = small_data()
    trainer = build_trainer(
        run_dir=tmp_path,
        loggers=[],
        has_val=True,
        max_epochs=1,
        accelerator="cpu",
        progress=False,
    )
    trainer.callbacks.append(SelectsOnTest())
    with pytest.raises(LookupError, match="^test pairs are closed here"):
        fit(small_model(data), data, trainer, resume_from=None)


@pytest.mark.slow
def test_a_monitor_that_looks_at_test(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch("train", "trainer.monitor=test/loss")
    assert "error: trainer.monitor='test/loss' is not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_shuffled_ids_scored_as_personal(reward_run: Path, tmp_path: Path) -> None:
    config = json.loads((reward_run / "results.json").read_text())["config"]
    assert role(config) == "personal"
    config["data"]["shuffle_users"] = True
    assert role(config) == "shuffled"


@pytest.mark.slow
def test_vectors_that_belong_to_other_users(
    reward_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    card = json.loads((run / "export/plrhf.json").read_text())
    card["users"] = card["users"][::-1]
    (run / "export/plrhf.json").write_text(json_text(card))
    with pytest.raises(SystemExit):
        launch("eval", f"run={run}")
    assert "expected the 5 users of training" in capsys.readouterr().err


class MeanOfBatchMeans(UserAccuracy):
    """The fault: a last batch of three counts as much as one of four."""

    def __init__(self, *, n_users: int) -> None:
        super().__init__(n_users=n_users)
        self.means: list[dict[str, Tensor]] = []

    def update(self, margins: Tensor, user_id: Tensor) -> None:
        batch = UserAccuracy(n_users=self.n_users)
        batch.update(margins, user_id)
        self.means.append(batch.compute())

    def compute(self) -> dict[str, Tensor]:
        names = self.means[0]
        return {name: torch.stack([one[name] for one in self.means]).mean() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UserAccuracy, MeanOfBatchMeans])
def test_mean_of_batch_means(kind: type[UserAccuracy]) -> None:
    data = small_data()
    model = small_model(data).eval()
    model.val_accuracy = kind(n_users=data.n_users + 1)
    batch = data.datasets["val"].batch(range(15))
    losses, margins = model.loss(batch)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    (logged,) = trainer.validate(model, data.val_dataloader(), verbose=False)
    nll = torch.nn.functional.softplus(-margins).mean().item()
    right = logged["val/nll"] == pytest.approx(nll, rel=1e-5)
    assert right == (kind is UserAccuracy)
    assert logged["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
