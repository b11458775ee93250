"""Where a trainer is between batches and optimiser steps."""

from __future__ import annotations

from lightning import Trainer


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the gradient of the last batch still waits for that of the next batch."""
    n_summed = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches
    return n_summed != 0 and not trainer.is_last_batch


def can_resume(trainer: Trainer) -> bool:
    """Return whether training resumed now needs nothing of the last batches: no gradients, no rollouts."""
    reuses_rollouts = getattr(trainer.lightning_module, "reuses_rollouts", False)
    return not is_accumulating(trainer) and not reuses_rollouts


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation within the epoch follows the last batch."""
    every = trainer.val_check_batch
    counts_batches = trainer.enable_validation and trainer.check_val_every_n_epoch is None
    return counts_batches and (trainer.fit_loop.total_batch_idx + 1) % int(every or 1) == 0
