"""A user as the responses of their pairs themselves, for a head that attends to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plrhf.core.checks import check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import UserContext
from plrhf.encoders.pair_reader import PairReader


@check_arguments("encoder")
class PairTokenEncoder(PairReader):
    """Encodes each response of a user's pairs, with whether it was chosen; `AttendHead` reads the result.

    The vector has, for each of `max_pairs` pairs, a token of the chosen response, one of the rejected
    response, and 1; where there are fewer pairs, 0 and zeros at the end. A token is MLP([h; y]) with y = 1
    for the chosen response, the context point of GPO (arXiv 2310.11523). A user without pairs is the zero
    vector. Of more pairs the first `max_pairs` are read.

    Args:
        user_dim: max_pairs * (2 width + 1), which decides the width of tokens; what is left over is 0.
        hidden_size: width of `UserContext.hidden`. reader: see `PairReader`.
    """

    def __init__(self, *, user_dim: int, hidden_size: int, **reader: Any) -> None:
        super().__init__(user_dim=user_dim, **reader)
        nn.init.zeros_(self.generic_vector).requires_grad_(False)
        width = (user_dim // self.max_pairs - 1) // 2
        if width < 1:
            least = 3 * self.max_pairs
            raise bad_value(
                "aggregator.user_dim",
                user_dim,
                f"at least {least}, room for encoder.max_pairs={self.max_pairs} pairs",
                f"Set aggregator.user_dim={least}",
            )
        self.user_dim = user_dim
        self.response = nn.Linear(hidden_size, width)
        self.chosen = nn.Parameter(torch.randn(width) * hidden_size**-0.5)  # the weight of y
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(width, width))

    def read(self, context: UserContext) -> tuple[Tensor, Tensor | None]:
        # A token depends on text and label only, so that each of these is computed once.
        first = self.response(context.hidden)[:, None]  # [M, 1, width]
        label = torch.stack([self.chosen, torch.zeros_like(self.chosen)])  # y = 1, y = 0
        of_text = self.layers(first + label).flatten(0, 1)  # [2 M, width]
        order = context.present.int().argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.max_pairs]
        there = context.present.gather(1, order)[..., None]  # [B, k, 1]
        texts = context.texts.gather(1, order[..., None].expand(-1, -1, 2))
        places = 2 * texts + torch.arange(2, device=texts.device)
        nothing = len(of_text)  # the place of a token of zeros
        places = torch.where(there, places, nothing)
        table = nn.functional.pad(of_text, (0, 0, 0, 1))
        tokens = nn.functional.embedding(places, table, padding_idx=nothing)  # [B, k, 2, width]
        kept = torch.cat([tokens.flatten(-2), there.to(tokens)], dim=-1).flatten(1)
        return nn.functional.pad(kept, (0, self.user_dim - kept.shape[1])), None
