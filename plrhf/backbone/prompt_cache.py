"""The prompts of a batch read once, for calls with many user vectors after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from plrhf.backbone.hooks import replaced_output
from plrhf.backbone.masks import FLEX, PackedRows, packed_rows
from plrhf.backbone.model import Backbone
from plrhf.core.types import PADDING, PROMPT, KeysAndValues, PreferenceBatch


def can_keep_prompts(backbone: Backbone) -> bool:
    """Say whether a backbone can go on from keys and values of prompts that stand for all that is read."""
    in_blocks = backbone.config._attn_implementation == FLEX  # whose masks are of whole rows
    return backbone.layout == "packed" and not in_blocks


def read_prompts(backbone: Backbone, batch: PreferenceBatch) -> KeysAndValues:
    """Compute keys and values of a batch's prompts, P tokens at most, in each block: [R, H, P, d / H]."""
    length = int((batch.segment == PROMPT).sum(dim=1).max())
    rows = _prompts(batch, length)
    cache: Any = DynamicCache()
    with packed_rows(rows):
        backbone.trunk(
            input_ids=batch.input_ids[:, :length],
            attention_mask=(rows.segment != PADDING).long(),
            position_ids=rows.positions + backbone.first_position,
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def read_on(
    backbone: Backbone, batch: PreferenceBatch, vectors: Tensor, prompts: KeysAndValues
) -> Tensor:
    """Compute last hidden states [R, L, d] of responses that follow user vectors that follow prompts.

    The naive twin is `Backbone.forward` with a `RowPacking` of one context. As there, the hidden state of
    a prompt's last position is that of the last vector; nobody reads earlier ones.

    Args:
        vectors: [R, T, e]. prompts: what `read_prompts` gave for this batch.
    """
    n_vectors, n_columns = vectors.shape[1], batch.segment.shape[1]
    device = batch.segment.device
    n_prompt = (batch.segment == PROMPT).sum(dim=1, keepdim=True)  # [R, 1]
    column = torch.arange(n_columns, device=device)
    behind = n_prompt + column[: n_columns - int(n_prompt.min())]  # [R, M], of responses
    outside, behind = behind >= n_columns, behind.clamp(max=n_columns - 1)
    ids = batch.input_ids.gather(1, behind)
    segment = batch.segment.gather(1, behind).masked_fill(outside, PADDING)
    own = torch.arange(n_vectors, device=device)
    positions = torch.cat([n_prompt + own, batch.position_ids.gather(1, behind) + n_vectors], dim=1)
    before = _prompts(batch, prompts[0][0].shape[2])
    rows = PackedRows(
        torch.cat([before.segment, nn.functional.pad(segment, (n_vectors, 0), value=PROMPT)], 1),
        torch.cat([before.positions, positions], dim=1),
    )
    cache = DynamicCache()
    for block, states in enumerate(prompts):
        cache.update(*states, block)
    embeddings = torch.cat([vectors, backbone.embed(ids)], dim=1)
    with (
        packed_rows(rows),
        replaced_output(backbone.trunk.get_input_embeddings(), embeddings),
    ):
        hidden = backbone.trunk(
            input_ids=nn.functional.pad(ids, (n_vectors, 0), value=backbone.placeholder),
            attention_mask=(rows.segment != PADDING).long(),
            position_ids=positions + backbone.first_position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    back = (column - n_prompt + n_vectors).clamp(0, hidden.shape[1] - 1)  # [R, L]
    return hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))


def _prompts(batch: PreferenceBatch, length: int) -> PackedRows:
    """The prompts of a batch as rows of that length."""
    segment = batch.segment[:, :length]
    return PackedRows(
        segment.masked_fill(segment != PROMPT, PADDING), batch.position_ids[:, :length]
    )
