"""A run that was killed goes on as if it had not been: weights, metrics, choice of the best."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule
from runs import TINY, check_run, launch
from tiny import LORA, assert_same, language_model, make_model

from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import train_tokenizer
from plrhf.core.errors import BadValue
from plrhf.data.module import PreferenceData
from plrhf.data.sources.personas import PersonasSource
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from plrhf.training.loggers import MetricsFile
from plrhf.training.processes import rank_shard_of
from plrhf.training.progress import RunProgressBar, TrainingLines
from plrhf.training.trainer import build_trainer, fit

N_USERS, N_ROWS = 3, 21


class Snapshots(Callback):
    """Copies the run directory around steps and before validations: what a kill then leaves."""

    def __init__(self, run_dir: Path, copies: Path) -> None:
        self.run_dir, self.copies = run_dir, copies

    def on_train_batch_start(self, *_: Any) -> None:
        self.copy("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.copy("saved")

    def on_validation_start(self, *_: Any) -> None:
        self.copy("validation")

    def copy(self, moment: str) -> None:
        if (self.run_dir / "checkpoints/last.ckpt").is_file():
            shutil.copytree(
                self.run_dir, self.copies / f"{len(list(self.copies.iterdir())):03d}-{moment}"
            )


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
    run_dir: Path,
    tokenizer: Any,
    *,
    copies: Path | None = None,
    extra: Sequence[Callback] = (),
    lr: float = 1e-2,
    batch_tokens: int | None = None,
    **settings: Any,
) -> LightningModule:
    """3 users' 21 pairs in batches of 5, so 5 steps an epoch, the last of 1 pair; LoRA dropout."""
    lightning.seed_everything(0, verbose=False)
    data = PreferenceData(
        source=world(),
        seed=3,
        batch_size=5,
        batch_tokens=batch_tokens,
        eval_batch_size=64,
        max_tokens=99,
    )
    data.tokenize(tokenizer, layout="packed")
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
    data.set_shard(rank_shard_of(trainer))
    if copies is not None:
        trainer.callbacks.append(Snapshots(run_dir, copies))
    trainer.callbacks.extend(extra)
    fit(model, data, trainer, resume_from=last if last.is_file() else None)
    return model


SETTINGS = {
    "epochs": {"max_epochs": 2},
    "often": {"max_epochs": 2, "checkpoint_every_n_steps": 1},
    "between epochs": {"max_steps": 11, "checkpoint_every_n_steps": 3},
    "validation by steps": {"max_steps": 9, "val_every_n_steps": 2, "checkpoint_every_n_steps": 1},
    "validation by steps alone": {"max_steps": 10, "val_every_n_steps": 3},
    "summed gradients": {
        "max_steps": 9,
        "accumulate_grad_batches": 2,
        "val_every_n_steps": 2,
        "checkpoint_every_n_steps": 1,
    },
    "summed gradients, epochs": {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "checkpoint_every_n_steps": 1,
    },
    "budget of tokens": {
        "max_steps": 9,
        "batch_tokens": 250,
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


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    return {"step": torch.tensor(last["global_step"]), **last["state_dict"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_before_any_step_ends_the_same(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    run_dir, copies = tmp_path / "run", tmp_path / "copies"
    copies.mkdir()
    best = fit_once(run_dir, tokenizer, copies=copies, **SETTINGS[name]).state_dict()
    final, metrics = final_state(run_dir), (run_dir / "metrics.csv").read_text()
    killed = sorted(copies.iterdir())
    assert len(killed) > 1
    if "patience" in SETTINGS[name]:
        assert final["step"] < SETTINGS[name].get("max_steps", 9 * 5)
    finished = shutil.copytree(run_dir, tmp_path / "finished")
    validating = [path for path in killed if "validation" in path.name]
    saved = [path for path in killed if "saved" in path.name]
    for snapshot in [*killed[:: -(-len(killed) // 2)], *saved[1:2], *validating[:1], finished]:
        shutil.rmtree(run_dir)
        shutil.copytree(snapshot, run_dir)
        resumed = fit_once(run_dir, tokenizer, **SETTINGS[name]).state_dict()
        for found, expected in ((resumed, best), (final_state(run_dir), final)):
            assert_same(found, expected, atol=0)
        assert (run_dir / "metrics.csv").read_text() == metrics, snapshot.name


@pytest.mark.slow
def test_a_killed_run_may_be_moved(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"max_steps": 30, "val_every_n_steps": 1, "patience": 3, "lr": 0.05}
    (tmp_path / "copies").mkdir()
    best = fit_once(tmp_path / "run", tokenizer, copies=tmp_path / "copies", **settings)
    snapshot = sorted((tmp_path / "copies").iterdir())[-1]  # the best lies behind it
    shutil.rmtree(tmp_path / "run")
    moved = fit_once(snapshot, tokenizer, **settings)
    assert_same(moved.state_dict(), best.state_dict(), atol=0)


@pytest.mark.slow
def test_a_finished_run_may_be_made_longer(tmp_path: Path, tokenizer: Any) -> None:
    fit_once(tmp_path / "long", tokenizer, max_epochs=3)
    fit_once(tmp_path / "short", tokenizer, max_epochs=2)
    fit_once(tmp_path / "short", tokenizer, max_epochs=3)
    assert_same(final_state(tmp_path / "short"), final_state(tmp_path / "long"), atol=0)


@pytest.mark.slow
def test_epochs_differ_in_order_and_take_every_pair(tmp_path: Path, tokenizer: Any) -> None:
    taken: list[int] = []

    class Taken(Callback):
        def on_train_batch_start(self, _: Any, __: Any, batch: Any, ___: int) -> None:
            taken.extend(batch.row.tolist())

    fit_once(tmp_path / "run", tokenizer, extra=[Taken()], max_epochs=3)
    epochs = [taken[start : start + N_ROWS] for start in range(0, len(taken), N_ROWS)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == list(range(N_ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_kill_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(complete(step=1), path)
    really = torch.save

    def half(checkpoint: Any, to: Any) -> None:
        really(checkpoint, to)
        Path(to).write_bytes(Path(to).read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(complete(step=2), path)
    assert read_checkpoint(path)["step"] == 1


def complete(**content: Any) -> dict[str, Any]:
    needed = ("state_dict", "optimizer_states", "loops", "random_states", "train_loader")
    return {**dict.fromkeys(needed, {}), **content}


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # messages shorten long paths
    path = Path("last.ckpt")
    values = torch.arange(700.0)
    AtomicCheckpointIO().save_checkpoint(complete(state_dict={"weight": values}), path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], values)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    whole = path.read_bytes()
    place = whole.index(values[300:310].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[place] ^= 1
    start = f"ckpt='{path}' is not allowed: expected a whole checkpoint, as train.py wrote it. "
    for content in (bytes(flipped), whole[:-100], whole[:1500], b"", b"of another program\n" * 9):
        path.write_bytes(content)
        with pytest.raises(BadValue) as error:
            read_checkpoint(path)
        assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_a_file_of_weights_alone_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("last.ckpt")
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(BadValue) as error:
        read_checkpoint(path)
    assert str(error.value) == (
        f"ckpt='{path}' is not allowed: expected a checkpoint of train.py (it holds ['weight']). "
        "Begin anew without it."
    )


@pytest.mark.parametrize("part", ["users", "encoder", "backbone"])
def test_a_checkpoint_made_for_something_else(part: str, reward_run: Path) -> None:
    model = PersonalRewardModel.from_pretrained(reward_run / "export")
    checkpoint = torch.load(reward_run / "checkpoints/last.ckpt", weights_only=True)
    model.on_load_checkpoint(checkpoint)  # its own
    own = checkpoint["made_for"][part]
    checkpoint["made_for"][part] = "another"
    with pytest.raises(BadValue) as error:
        model.on_load_checkpoint(checkpoint)
    assert str(error.value).startswith(
        f"ckpt='made for {part} another' is not allowed: expected a "
    )
    assert str(error.value).count(own) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_the_run_in_one_line(
    reward_run: Path, cache_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={run}", "ckpt=last")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: ckpt='{str(last)[:20]}") and err.count("\n") == 1


def test_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("of an earlier run")
    metrics = MetricsFile(path)
    metrics.log_metrics({"b": 0.5, "epoch": 0}, 3)
    assert path.read_text() == "b,epoch,step\n0.5,0,3\n"  # at once, a kill may come
    metrics.log_metrics({"a": 0.25, "epoch": 0}, 4)
    metrics.log_metrics({"b": 1e-9, "epoch": 1}, 5)
    whole = "a,b,epoch,step\n,0.5,0,3\n0.25,,0,4\n,1e-09,1,5\n"
    assert path.read_text() == whole
    path.write_text(whole + ",0.2")  # the kill came in the middle of a row
    again = MetricsFile(path)
    again.keep_steps(5)  # steps 0 to 4 are done
    again.log_metrics({"b": 1e-9, "epoch": 1}, 5)
    assert path.read_text() == whole


@pytest.mark.slow
def test_going_on_through_the_entry_point(
    reward_run: Path, cache_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))  # Lightning notes where it lay
    before = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()

    same = [*TINY, f"cache_dir={cache_dir}", f"run_dir={run}", "ckpt=last"]
    launch("train", *same)  # it had finished, so nothing is left but to evaluate
    check_run(run)
    after = json.loads((run / "results.json").read_text())
    for key in ("test", "oracle", "controls", "data"):
        assert after[key] == before[key]
    for name in ("metrics.csv", "predictions.parquet", "export/user_encoder.safetensors"):
        assert (run / name).read_bytes() == (reward_run / name).read_bytes()

    capsys.readouterr()
    config = (run / "config.yaml").read_text()
    for override, message in {
        "encoder.rank=2": "encoder.rank=2 is not allowed: expected 4, which the run began with. "
        "Repeat its command with ckpt=last.",
        "seed=1": "seed=1 is not allowed: expected 0, which the run began with. "
        "Repeat its command with ckpt=last.",
    }.items():
        with pytest.raises(SystemExit):
            launch("train", *same, override)
        assert capsys.readouterr().err == f"error: {message}\n"
    assert (run / "config.yaml").read_text() == config


@pytest.mark.slow
def test_a_run_begun_anew_is_no_longer_finished(
    reward_run: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))

    def killed(*_: Any, **__: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr("plrhf.cli.run.fit", killed)
    with pytest.raises(InterruptedError):
        launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={run}", "overwrite=true")
    assert not (run / "results.json").exists()
    assert not (run / "metrics.csv").exists()
    assert not (run / "checkpoints/last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 200])
def test_one_bar_counts_the_batches_of_the_whole_run(
    tmp_path: Path, tokenizer: Any, width: int
) -> None:
    screen = StringIO()
    bar = RunProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": width})
    fit_once(tmp_path / "run", tokenizer, extra=[bar], max_steps=7, max_epochs=3)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    found = re.findall(r"Training +\S+ (\d+)/(\d+)", shown)
    assert {total for _, total in found} == {"7"}  # 5 an epoch
    counts = [int(count) for count, _ in found]
    assert counts == sorted(counts) and counts[-1] == 7
    assert "Epoch" not in shown
    assert re.search(r"Training .*best val/loss: \d\.\d{4}", shown)


@pytest.mark.slow
def test_without_a_terminal_lines_say_how_far_training_is(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("plrhf.core.progress.LINE_EVERY", 0.0)
    fit_once(tmp_path / "run", tokenizer, extra=[TrainingLines()], max_steps=7, max_epochs=3)
    lines = [one for one in capsys.readouterr().out.splitlines() if one.startswith("training: ")]
    assert len(lines) == 7 and lines[0].startswith("training: 1 of 7 (14%), about 00:")
    assert re.fullmatch(
        r"training: 7 of 7 \(100%\), about 00:00 left, best val/loss=\d\.\d{4}", lines[-1]
    )
