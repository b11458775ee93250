"""No user vectors: vanilla reward modelling and vanilla DPO."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plrhf.core.types import UserBatch
from plrhf.encoders.base import UserEncoder


class NoneEncoder(UserEncoder):
    """Ignores users: its vectors are empty, [B, 0], and aggregators leave the text unchanged."""

    personal = False

    def forward(self, users: UserBatch) -> Tensor:
        return torch.empty(len(users.user_id), 0, device=users.user_id.device)

    def generic(self, batch_size: int) -> Tensor:
        return torch.empty(batch_size, 0)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return ()
