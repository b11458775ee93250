"""How the losses of pairs are averaged: over pairs, over users, or with more weight on hard users."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["pairs", "users", "tail"]

TAIL_QUANTILE, TAIL_TEMPERATURE = 0.5, 0.5
"""The authors' settings of ``tail`` (MRM, arXiv 2601.18731)."""


class Reduction:
    """Computes weights of pairs, so that a plain mean over pairs becomes the wanted mean.

    The numbers of pairs are counted over the whole train set, so the objective depends neither on batch
    size nor on gradient accumulation.

    * ``pairs``: all pairs have the same weight.
    * ``users``: all users have the same weight, w_i = N / (U n_u) for N pairs, U users and n_u pairs of
      i's user: 1/N sum_i w_i loss_i = 1/U sum_u mean_u.
    * ``tail``: as ``users``, times sigma((L_u - tau) / gamma), where tau is the median of the L_u
      (robust preference optimisation of MRM, arXiv 2601.18731). L_u is the user's mean loss in the last
      optimiser step that included the user; a user without one has L_u = tau. The weight has no
      gradient.

    Args:
        n_users: number of user indices, including the generic user's.
    """

    def __init__(self, kind: Reduce, *, n_users: int) -> None:
        self.kind = kind
        self.share = torch.ones(n_users)  # weight of each user's pairs
        self.losses = torch.full((n_users,), torch.nan)  # L_u
        self._sums, self._counts = torch.zeros(n_users), torch.zeros(n_users)

    def count(self, user_id: Tensor) -> None:
        """Count the pairs of each user in the train set, `user_id` [N]."""
        counts = user_id.bincount(minlength=len(self.share)).float()
        n_users = int((counts > 0).sum())
        self.share = len(user_id) / (n_users * counts.clamp(min=1))

    def weights(self, user_id: Tensor) -> Tensor | None:
        """Return the weights [B] of pairs of these users; None if all are 1."""
        if self.kind == "pairs":
            return None
        self.follow(user_id.device)
        weights = self.share if self.kind == "users" else self.share * self.tail_weights()
        return weights[user_id]

    def follow(self, device: torch.device) -> None:
        """Move the users' statistics to the device of the batches, so that a GPU is not waited for."""
        for name in ("share", "losses", "_sums", "_counts"):
            setattr(self, name, getattr(self, name).to(device))  # nothing where it is there

    def tail_weights(self) -> Tensor:
        """Return sigma((L_u - tau) / gamma) of every user, [n_users]."""
        tau = self.losses.nanquantile(TAIL_QUANTILE)
        return ((self.losses - tau) / TAIL_TEMPERATURE).nan_to_num(0.0).sigmoid()

    def record(self, user_id: Tensor, losses: Tensor) -> None:
        """Add the losses [B] of a batch's pairs to the next L_u."""
        if self.kind == "tail":
            self.follow(user_id.device)
            losses = losses.detach().float()
            self._sums.index_add_(0, user_id, losses)
            self._counts.index_add_(0, user_id, torch.ones_like(losses))

    def step(self) -> None:
        """Update the L_u by the losses recorded since the last optimiser step."""
        if self.kind != "tail":
            return
        met = self._counts > 0
        self.losses = torch.where(met, self._sums / self._counts.clamp(min=1), self.losses)
        self._sums.zero_()
        self._counts.zero_()
