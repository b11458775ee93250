"""Writing and reading checkpoints, and what resuming restores."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.core.torch_files import DAMAGED, load_checked
from plrhf.training.loggers import MetricsFile
from plrhf.training.processes import gather_objects
from plrhf.training.steps import can_resume, validation_is_due


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it.

    After a kill or on a full disk there is the old checkpoint or the new one, never half of one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as part:
                torch.save(checkpoint, part)
                _sync_to_disk(part)  # else a power cut could leave the new name with old content
        except (OSError, RuntimeError) as error:  # a RuntimeError where torch writes the file
            raise bad_value(
                "run_dir",
                str(path.parent),
                "a directory with room for a checkpoint",
                f"Make room, then go on with ckpt=last ({' '.join(str(error).split())[:120]})",
            ) from error
        _sync_to_disk(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def _sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU and compare its checksums; nothing is unpickled.

    Raises:
        ValueError: the file is cut short or altered, or is not a checkpoint of a run.
    """
    try:
        content = load_checked(path)
    except DAMAGED as error:
        raise bad_value(
            "ckpt",
            str(path),
            "a whole checkpoint, as train.py wrote it",
            f"Begin anew without ckpt=last ({' '.join(str(error).split())[:120]})",
        ) from error
    needed = {"state_dict", "optimizer_states", "loops", "random_states", "train_loader"}
    if not (isinstance(content, dict) and needed <= content.keys()):
        found = sorted(content)[:3] if isinstance(content, dict) else type(content).__name__
        raise bad_value(
            "ckpt",
            str(path),
            f"a checkpoint of train.py (it holds {found})",
            "Begin anew without it",
        )
    return content


def load_best(trainer: Trainer) -> None:
    """Load the weights of the best checkpoint into the model, if the trainer kept one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path != "":
            best = read_checkpoint(Path(callback.best_model_path))
            trainer.strategy.load_model_state_dict(best, strict=False)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt``, only at moments from which training can be resumed exactly.

    Such a moment is after an optimiser step and its validation. Before a validation that is due,
    Lightning would skip it on resuming. Between batches whose gradients are accumulated, the gradients
    would be lost, and between steps that learn from the same sampled responses, the responses.

    Args:
        path: the file.
        every_n_steps: save every so many steps as well; None: only after validation, or after each
            epoch if there are no val pairs.
    """

    def __init__(self, path: Path, *, every_n_steps: int | None) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0

    def _save(self, trainer: Trainer) -> None:
        """Write the checkpoint."""
        self.saved_at = trainer.global_step
        trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        steps = trainer.global_step - self.saved_at
        if self.every_n_steps is None or steps < self.every_n_steps or trainer.is_last_batch:
            return
        if can_resume(trainer) and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if can_resume(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)


class ResumeState(Callback):
    """Saves and restores what Lightning does not: random states, position in the data, metrics.csv, stops.

    Lightning saves the position in the data but loses it when a schedule asks for its length.
    """

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        checkpoint["train_loader"] = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        own = {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        checkpoint["random_states"] = gather_objects(own)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.restored = {"loader": checkpoint["train_loader"]}
        states = checkpoint["random_states"]
        if trainer.global_rank < len(states):
            self.restored |= states[trainer.global_rank]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.keep_steps(checkpoint["global_step"])
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _move_best_to(checkpoint["callbacks"][callback.state_key], callback.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank > 0:  # each process draws its own dropout
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        if self.restored is None:
            return
        trainer.train_dataloader.load_state_dict(self.restored["loader"])  # type: ignore[union-attr]
        self._restore_random_state(self.restored)
        for stopping in trainer.early_stopping_callbacks:
            # The run had stopped early before it was resumed.
            if stopping.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        """Restore this process's random states."""
        if "torch" not in state:  # a process that the earlier run did not have
            return
        random.setstate(state["python"])
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) > 0 and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


def _move_best_to(state: dict[str, Any], folder: Any) -> None:
    """Change the folder in the state of `ModelCheckpoint`, since a run directory may have been moved."""
    if state["best_model_path"] != "":
        best = str(Path(folder, Path(state["best_model_path"]).name))
        scores = dict.fromkeys([best], state["best_model_score"])
        state.update(best_model_path=best, kth_best_model_path=best, best_k_models=scores)
    state["dirpath"] = folder
