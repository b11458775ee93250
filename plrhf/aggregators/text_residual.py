"""What choices say of a text beyond its features: a shrunk residual vector for each text that repeats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plrhf.core.shrinkage import Shrinkage, ShrunkLinear

RANK, FIRST_SCALE = 8, 0.1
"""Numbers of a text, and their standard deviation at the start."""


class TextResidual(nn.Module):
    """Adds to a text's features h a residual r_t A of a few numbers r_t of the text.

    Where a few texts are judged by many people, choices say more of them than features do; factorisation
    of ids has r_t alone. Both r_t and A have learned priors (`core.shrinkage`): where features say it all,
    residuals go to zero. A text that is not among those of `know` has none.

    Attributes:
        keys: of the texts, ascending, [n_texts] int64, see `text_value_cache.text_keys`.
        n_pairs: independent train pairs of each text, the first one of no text, [n_texts + 1, 1].
    """

    keys: Tensor
    n_pairs: Tensor

    def __init__(self, hidden_size: int, n_texts: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(n_texts + 1, RANK, padding_idx=0)
        with torch.no_grad():
            self.rows.weight *= FIRST_SCALE
        self.shrinkage = Shrinkage(RANK)
        self.to_hidden = ShrunkLinear(RANK, hidden_size)
        nn.init.zeros_(self.to_hidden.weight)
        for prior in (
            self.shrinkage,
            self.to_hidden.shrinkage,
        ):  # one draw a text and step: little noise
            nn.init.zeros_(prior.log_information)
        self.register_buffer("keys", torch.arange(n_texts))
        self.register_buffer("n_pairs", torch.ones(n_texts + 1, 1), persistent=False)

    def know(self, keys: Tensor, counts: Tensor, n_pairs: int) -> None:
        """Set the texts before training.

        Args:
            keys: ascending, [n_texts]. counts: train pairs of each, [n_texts].
            n_pairs: independent pairs of all users.
        """
        self.keys.copy_(keys)
        self.n_pairs[1:, 0] = (counts * (2 * n_pairs / max(1, int(counts.sum())))).clamp(min=1.0)
        self.to_hidden.n_pairs.fill_(n_pairs)

    def forward(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Add residuals to the features of texts, [M, d], by their keys, [M]."""
        number = self.number(keys)
        rows = self.rows(number)
        if self.training:
            known = (number > 0)[:, None]
            rows = known * self.shrinkage.sample(rows, self.n_pairs[number], number)
        return hidden + self.to_hidden(rows).to(hidden.dtype)

    def number(self, keys: Tensor) -> Tensor:
        """Return each text's row in `rows`, [M]: from 1 for the texts of `know`, 0 for all others."""
        if len(self.keys) == 0:
            return torch.zeros_like(keys)
        keys = keys + 0 * self.keys[:1]  # alike in layout, where many models are one call
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, place + 1, 0)

    def penalty(self) -> Tensor | None:
        """Return the divergence of all residuals from their prior, divided by the number of train pairs.

        It is None if the model was not in training mode, in which nothing is drawn.
        """
        of_map, self.to_hidden.penalty = self.to_hidden.penalty, None
        if of_map is None:
            return None
        each = self.shrinkage(self.rows.weight[1:], self.n_pairs[1:]) * self.n_pairs[1:, 0]
        return of_map + each.sum() / self.to_hidden.n_pairs[0]
