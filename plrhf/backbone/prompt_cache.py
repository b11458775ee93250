"""Computes the prompts of a batch once, and responses for many user vectors after them."""

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
    """Return whether a backbone can continue rows from cached keys and values of their prompts."""
    in_blocks = backbone.config._attn_implementation == FLEX  # whose masks are of whole rows
    return backbone.layout == "packed" and not in_blocks


def read_prompts(backbone: Backbone, batch: PreferenceBatch) -> KeysAndValues:
    """Compute the keys and values of a batch's prompts, [R, H, P, d / H] in each block.

    P is the number of tokens of the longest prompt.
    """
    length = int((batch.segment == PROMPT).sum(dim=1).max())
    rows = _prompt_rows(batch, length)
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


def continue_prompts(
    backbone: Backbone, batch: PreferenceBatch, vectors: Tensor, prompts: KeysAndValues
) -> Tensor:
    """Compute the last hidden states [R, L, d] of responses after cached prompts and user vectors.

    The naive twin is `Backbone.forward` with a `RowPacking` of one context. As there, a prompt's last
    position gets the hidden state of the last user vector; earlier positions are not meaningful.

    Args:
        vectors: user vectors, [R, T, e]. prompts: result of `read_prompts` for this batch.
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
    before = _prompt_rows(batch, prompts[0][0].shape[2])
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


def _prompt_rows(batch: PreferenceBatch, length: int) -> PackedRows:
    """Return the prompts of a batch as rows of `length` tokens."""
    segment = batch.segment[:, :length]
    return PackedRows(
        segment.masked_fill(segment != PROMPT, PADDING), batch.position_ids[:, :length]
    )
