"""Shows how far a training is: a bar on a terminal, a line every minute elsewhere."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from rich.progress import BarColumn

from plrhf.core.progress import Progress

BAR_WIDTH = 10  # characters
NARROW = 120
"""Fewer characters than this have no room for several metrics beside the bar."""

METRICS_EVERY = 10
"""Batches between two updates of the metrics beside the bar."""


def batches_in_all(trainer: Trainer, of_epoch: int | float) -> int | float:
    """Return the number of batches until training ends, unless it stops early.

    Args:
        of_epoch: number of batches of an epoch.
    """
    limits = []
    if trainer.max_epochs not in (None, -1):
        limits.append(of_epoch * int(trainer.max_epochs or 0))
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(limits)


def best_on_val(trainer: Trainer) -> dict[str, str]:
    """Return the best value of the monitored metric so far, by name; empty before there is one."""
    kept = trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or kept.best_model_score is None:
        return {}
    return {f"best {kept.monitor}": f"{float(kept.best_model_score):.4f}"}


class TrainingLines(Callback):
    """Prints a line every minute: batches of all epochs, the time left, the best value on val."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, at the place where a resumed training goes on."""
        self.progress = Progress(
            "training",
            total=int(batches_in_all(trainer, trainer.num_training_batches)),
            initial=trainer.fit_loop.total_batch_idx + 1,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self.progress.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the best value for the next line."""
        if trainer.training or trainer.validating:
            self.progress.set_postfix(best_on_val(trainer), refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self.progress.close()


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
        return batches_in_all(self.trainer, super().total_train_batches)

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

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Let the bar itself be short, for its words to have room."""
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Add the best value on val to Lightning's metrics, and leave out the number of the run.

        A narrow terminal has room for the best value alone.
        """
        if self._console is not None and self._console.width < NARROW:
            return dict(best_on_val(trainer))
        metrics = {**super().get_metrics(trainer, pl_module), **best_on_val(trainer)}
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training".ljust(len(self.validation_description))
