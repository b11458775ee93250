"""Accuracy and means in training, as torchmetrics with exact sums over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torchmetrics import Metric

from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch


def user_counts(margins: Tensor, user_id: Tensor, n_users: int) -> Tensor:
    """Count for each user: correct pairs (ties one half), pairs, and summed nll; [B], [B] -> [3, n_users].

    float64, in which halves add up exactly, however batches are formed.

    Raises:
        ValueError: a user index is not in 0 .. n_users - 1. Of a GPU that would have to be waited for.
    """
    is_at_hand = user_id.is_cpu and user_id.numel() > 0
    if is_at_hand and not 0 <= int(user_id.min()) <= int(user_id.max()) < n_users:
        raise bad_value(
            "user_id",
            [int(user_id.min()), int(user_id.max())],
            f"indices from 0 to {n_users - 1}",
            "Build UserAccuracy with n_users above the largest user index",
        )
    margins = margins.detach().double()
    correct = 0.5 * (margins.sign() + 1)
    values = torch.stack([correct, torch.ones_like(correct), softplus(-margins)])  # [3, B]
    return values.new_zeros(3, n_users).index_add_(1, user_id, values)


def correct(margins: Tensor, batch: PreferenceBatch) -> Tensor:
    """Return 1 where the chosen response has the higher reward, 0 where the lower, 0.5 for ties; [B]."""
    found = 0.5 * (margins.detach().sign() + 1)
    return found if batch.feedback is None else found.masked_fill(batch.feedback.is_tie, 0.5)


def accuracy_from_counts(counts: Tensor) -> dict[str, Tensor]:
    """Compute micro and macro accuracy, and nll in nats, from `user_counts`; NaN without pairs."""
    correct, count, nll = counts
    asked = count > 0
    return {
        "accuracy_micro": correct.sum() / count.sum(),
        "accuracy_macro": (correct[asked] / count[asked]).mean(),
        "nll": nll.sum() / count.sum(),
    }


class UserAccuracy(Metric):
    """Accuracy and nll from sums for each user over all batches and processes.

    Means of batch means are never taken. Users who share an index, such as unseen users at index 0,
    count as one user in the macro accuracy. Where that matters, give them indices of their own.
    """

    full_state_update = False
    is_differentiable = False
    counts: Tensor  # [3, n_users]

    def __init__(self, *, n_users: int) -> None:
        super().__init__()
        self.n_users = n_users
        self.add_state(
            "counts", default=torch.zeros(3, n_users, dtype=torch.float64), dist_reduce_fx="sum"
        )

    def update(self, margins: Tensor, user_id: Tensor) -> None:
        """Add a batch: margins [B] in nats, user_id [B] int64."""
        self.counts += user_counts(margins, user_id, self.n_users)

    def compute(self) -> dict[str, Tensor]:
        """Return 0-dim tensors ``accuracy_micro``, ``accuracy_macro``, ``nll``."""
        return accuracy_from_counts(self.counts)


class ExactMean(Metric):
    """Weighted mean over all batches and processes, summed in float64.

    Lightning's own mean counts in float32, which rounds.
    """

    full_state_update = False
    is_differentiable = False
    sums: Tensor  # [2]: weighted values, weights

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, weight: Tensor) -> None:
        """Add a sum of weighted values and the sum of their weights, both 0-dim."""
        self.sums += torch.stack([total.detach().double(), weight.double()])

    def compute(self) -> Tensor:
        """Return the mean, 0-dim float64."""
        return self.sums[0] / self.sums[1]
