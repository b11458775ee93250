"""User vectors as tokens in front of the text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plrhf.aggregators.base import Aggregator, spread_over_rows
from plrhf.backbone.model import Backbone
from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch


@check_arguments("aggregator")
class ConcatSoftPrompt(Aggregator):
    """Puts T_u vectors of the user in front of the input embeddings (arXiv 2402.05133, section 4).

    They take positions, attend causally and are never predicted.

    Args:
        hidden_size: d of the backbone. embedding_size: width of its token embeddings; None: d.
        n_tokens: T_u; encoder=none gives no user vectors.
    """

    def __init__(
        self, *, hidden_size: int, embedding_size: int | None = None, n_tokens: PositiveInt = 10
    ) -> None:
        super().__init__()
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.output_size = hidden_size
        self.user_dim = n_tokens * self.embedding_size
        self.n_positions = n_tokens

    def _vectors(self, user: Tensor, dtype: torch.dtype) -> Tensor:
        n_tokens = user.shape[-1] // self.embedding_size  # 0 where there is no user model
        return user.to(dtype).unflatten(-1, (n_tokens, self.embedding_size))

    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        vectors = self._vectors(spread_over_rows(user, batch), backbone.embedding_dtype)
        n_contexts, n_rows, n_tokens, _ = vectors.shape  # [C, R, T, e]
        packing = batch.packing_for(n_tokens)
        hidden = backbone(
            batch.input_ids.repeat(n_contexts, 1),
            batch.segment.repeat(n_contexts, 1),
            batch.position_ids.repeat(n_contexts, 1),
            user_vectors=vectors.flatten(0, 1),
            packing=None if packing is None else packing.repeated(n_contexts),
        )
        return hidden[:, n_tokens:].unflatten(0, (n_contexts, n_rows))

    @contextlib.contextmanager
    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> Iterator[dict[str, Any]]:
        text = backbone.embed(input_ids)
        vectors = self._vectors(user, text.dtype)  # [N, T, e]
        n_tokens = vectors.shape[1]
        # Padding stays on the left, as windows and chunks count from the first token they see.
        n_padded = (attention_mask == 0).sum(dim=1, keepdim=True)  # [N, 1]
        columns = n_padded + torch.arange(n_tokens, device=text.device)  # [N, T]
        rows = torch.arange(len(text), device=text.device)[:, None]
        whole = nn.functional.pad(text, (0, 0, n_tokens, 0))
        whole[rows, columns] = vectors
        ids = nn.functional.pad(input_ids, (n_tokens, 0), value=backbone.placeholder)
        mask = torch.arange(ids.shape[1], device=ids.device) >= n_padded  # [N, T + L]
        with backbone.first_embeddings(whole):
            yield {"input_ids": ids, "attention_mask": mask.to(attention_mask.dtype)}
