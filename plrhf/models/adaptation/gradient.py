"""Fits a new user by a fixed number of gradient steps without a prior, as most published methods do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from plrhf.core.checks import NonNegativeInt, PositiveFloat, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.fitting import Coordinates, PairLosses, RowSpace

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


@check_arguments("eval.adaptation")
class Gradient(Adaptation):
    """Takes gradient steps on a user's mean loss, with respect to the user's rows of the tables.

    There is no prior, so the number of steps and the learning rate decide how closely a user is fitted.
    docs/adaptation.md has the settings of LoRe, PAL, PReF and MRM. A user without pairs is the generic
    user, whatever `start` is.

    Args:
        steps: number of steps. lr: learning rate. optimiser: ``adam``, or plain gradient descent
            (``sgd``).
        start: ``generic``: the generic user's rows; ``mean``: the mean of the train users' rows;
            ``random``: each number from N(0, 1).
        seed: of the random start.
    """

    def __init__(
        self,
        *,
        steps: PositiveInt = 500,
        lr: PositiveFloat = 0.1,
        optimiser: Literal["adam", "sgd"] = "adam",
        start: Literal["generic", "mean", "random"] = "generic",
        seed: NonNegativeInt = 0,
    ) -> None:
        self.steps, self.lr, self.optimiser = steps, lr, optimiser
        self.start, self.seed = start, seed

    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        space = RowSpace(model.encoder)
        width, like = len(space.generic), space.generic
        identity = torch.eye(width, dtype=like.dtype, device=like.device)
        coordinates = Coordinates(space, space.generic, identity)
        losses = PairLosses(model, batches, coordinates, n_users=n_users, features=features)
        t = (self._first(space, n_users) - space.generic).requires_grad_()
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.SGD
        optimizer = kind([t], lr=self.lr)
        weight = 1 / losses.counts.clamp(min=1)
        for _ in range(self.steps):
            if losses.linear is None:
                t.grad = losses.gradient(t, weight)[1]
            else:
                t.grad = weight[:, None] * losses.linear.derivatives(t.detach())[0].to(t)
            optimizer.step()
        return losses.users_at(torch.where(losses.counts[:, None] > 0, t.detach(), 0.0))

    def _first(self, space: RowSpace, n_users: int) -> Tensor:
        """Return the starting points [N, D] of N users."""
        if self.start == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(n_users, len(space.generic), generator=generator)
            return drawn.to(space.generic)
        point = space.generic if self.start == "generic" else space.train.mean(dim=0)
        return point.repeat(n_users, 1)
