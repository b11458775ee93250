"""User vectors as a soft prompt, before the text or between prompt and response."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.aggregators.base import Aggregator, spread_over_rows
from plrhf.backbone.hooks import replaced_first_embeddings
from plrhf.backbone.model import Backbone
from plrhf.backbone.prompt_cache import can_keep_prompts, continue_prompts, read_prompts
from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.row_packing import NO_USER, RowPacking, UserSlots
from plrhf.core.types import PreferenceBatch


@check_arguments("aggregator")
class ConcatSoftPrompt(Aggregator):
    """Inserts T_u vectors of the user among the input embeddings (arXiv 2402.05133, section 4).

    They take positions, attend causally and are never predicted. Before the prompt, as in the paper,
    all hidden states depend on the user. After the prompt only the responses do, and the prompt is
    computed once for all contexts and users (see `RowPacking`).

    Args:
        hidden_size: d of the backbone. embedding_size: width of its token embeddings; None: d.
        n_tokens: T_u; with encoder=none there are no vectors.
        position: ``before`` the prompt, or ``after_prompt``, between prompt and response.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        embedding_size: int | None = None,
        n_tokens: PositiveInt = 10,
        position: Literal["before", "after_prompt"] = "before",
    ) -> None:
        super().__init__()
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.output_size = hidden_size
        self.user_dim = n_tokens * self.embedding_size
        self.n_positions = n_tokens
        self.after_prompt = self.needs_causal = self.shares_prompts = position == "after_prompt"

    def user_slots(self, n_contexts: int) -> UserSlots:
        return UserSlots(self.n_positions, n_contexts if self.after_prompt else None)

    def _vectors(self, user: Tensor, dtype: torch.dtype) -> Tensor:
        """Reshape user vectors to soft prompts [..., T, e]."""
        n_tokens = user.shape[-1] // self.embedding_size  # 0 where there is no user model
        return user.to(dtype).unflatten(-1, (n_tokens, self.embedding_size))

    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        vectors = self._vectors(spread_over_rows(user, batch), backbone.embedding_dtype)
        n_contexts, n_rows, n_tokens, _ = vectors.shape  # [C, R, T, e]
        if batch.prompts is not None and n_tokens > 0:
            of_contexts = [continue_prompts(backbone, batch, one, batch.prompts) for one in vectors]
            return torch.stack(of_contexts)
        packing = self._packing(backbone, batch, n_contexts, n_tokens)
        hidden = backbone(
            batch.input_ids.repeat(n_contexts, 1),
            batch.segment.repeat(n_contexts, 1),
            batch.position_ids.repeat(n_contexts, 1),
            user_vectors=vectors.flatten(0, 1),
            packing=packing,
            extent=batch.extent,
        )
        return hidden[:, n_tokens:].unflatten(0, (n_contexts, n_rows))

    def without_user(self, backbone: Backbone, batch: PreferenceBatch) -> PreferenceBatch:
        if not self.after_prompt or not can_keep_prompts(backbone):
            return batch
        return replace(batch, prompts=read_prompts(backbone, batch))

    def _packing(
        self, backbone: Backbone, batch: PreferenceBatch, n_contexts: int, n_tokens: int
    ) -> RowPacking | None:
        """Return how the rows of all contexts are packed; usually the loader has already made it."""
        together = backbone.layout == "packed"
        slots = self.user_slots(n_contexts if together else 1) if n_tokens > 0 else NO_USER
        packing = batch.packing_for(slots)
        if packing is None and slots.n_contexts is not None:  # made for another number of contexts
            packing = RowPacking.of(batch.segment.cpu(), slots, together=together)
            packing = move_data_to_device(packing, batch.segment.device)
        if packing is None:
            return None
        return packing.repeated(n_contexts // (packing.n_contexts or 1))

    @contextlib.contextmanager
    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> Iterator[dict[str, Any]]:
        vectors = self._vectors(user, backbone.embedding_dtype)  # [N, T, e]
        n_tokens, length = vectors.shape[1], input_ids.shape[1]
        if n_tokens == 0:  # no user model
            yield {"input_ids": input_ids, "attention_mask": attention_mask}
            return
        # Padding stays on the left, as windows and chunks count from the first token they see.
        n_padded = (attention_mask == 0).sum(dim=1, keepdim=True)  # [N, 1]
        first = torch.full_like(n_padded, length) if self.after_prompt else n_padded
        columns = torch.arange(n_tokens + length, device=user.device)
        is_user = (columns >= first) & (columns < first + n_tokens)  # [N, T + L]
        is_text = (columns >= n_padded) & ~is_user
        ids = torch.full_like(is_user, backbone.placeholder, dtype=input_ids.dtype)
        ids[is_text] = input_ids[attention_mask != 0]
        whole = backbone.embed(ids)
        whole[is_user] = vectors.flatten(0, 1)
        mask = (columns >= n_padded).to(attention_mask.dtype)
        table = backbone.trunk.get_input_embeddings()
        with replaced_first_embeddings(table, whole, n_last=1 + n_tokens):
            yield {"input_ids": ids, "attention_mask": mask}

    def continuing(self, backbone: Backbone, user: Tensor) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()  # all that users do is in the cache
