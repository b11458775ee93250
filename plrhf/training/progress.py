"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

METRICS_EVERY = 10
"""Batches between two updates of the metrics beside the bar."""


class RunProgressBar(RichProgressBar):
    """Shows one bar for the whole training, with the remaining time.

    Lightning's own bar starts again in each epoch, and treats a run without max_epochs as one of -1
    epochs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(leave=False, **options)

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches until training ends, unless it stops early."""
        of_epoch, limits = super().total_train_batches, []
        if self.trainer.max_epochs not in (None, -1):
            limits.append(of_epoch * int(self.trainer.max_epochs or 0))
        if self.trainer.max_steps != -1:
            limits.append(self.trainer.max_steps * self.trainer.accumulate_grad_batches)
        return min(limits)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.fit_loop.total_batch_idx  # batches of all epochs, this one the last
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # To read one off a GPU is to wait for it.
        if not trainer.training or trainer.fit_loop.total_batch_idx % METRICS_EVERY == 0:
            super()._update_metrics(trainer, pl_module)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training".ljust(len(self.validation_description))
