"""Makes batches for a trained model from rows that no data module has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.in_context import row_tokenizer
from plrhf.data.packing import LAYOUTS
from plrhf.data.rows import Row
from plrhf.data.text_value_cache import KnownTextValues
from plrhf.data.text_values import compute_text_values
from plrhf.data.tokenizer import RowTokenizer

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

POOLED_AT_ONCE = 4096
"""Number of pairs in a batch that has only pooled trunk outputs, which are small."""


def row_tokenizer_of(model: PersonalModule) -> RowTokenizer:
    """Return the row tokenizer of a loaded model, which knows its users' own pairs if they are read.

    Raises:
        ValueError: the model reads own pairs and does not have them.
    """
    if "context_pairs" in model.card.text and model.own_pairs is None:
        allowed = "pairs of the users, which the model puts in front of their prompts"
        raise bad_value("own_pairs", None, allowed, "Load the run's export, not a checkpoint")
    return row_tokenizer(model.tokenizer, model.card.text, model.own_pairs)


def dataset_of(
    model: PersonalModule,
    row_tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_size: int,
    known: PairDataset | None = None,
) -> PairDataset:
    """Tokenise rows, and precompute the values that do not depend on any user.

    These are pooled trunk outputs, or reference log-probabilities. Rows that are too long are left out
    and counted by `row_tokenizer`.

    Args:
        known: a dataset of the same model; values of texts that are in it are taken from there.
    """
    kept, pairs = row_tokenizer(rows)
    dataset = PairDataset(
        kept,
        pairs,
        layout=LAYOUTS[model.backbone.layout],
        user_index={},
        schema=model.card.feature_schema(),
        user_slots=model.user_slots,
    )
    if dataset.feedback is not None:  # pairs are asked and fitted to one by one
        dataset.feedback = replace(dataset.feedback, choice=None)
    dataset.groups = None
    device = next(model.parameters()).device

    def values_of(
        compute: Callable[[PreferenceBatch], Tensor], before: TextValues | None
    ) -> TextValues | None:
        cache = None
        if before is not None and before.keys is not None:
            cache = KnownTextValues(before.keys.numpy(), before.values.numpy())
        return compute_text_values(
            dataset,
            lambda batch: compute(move_data_to_device(batch, device)).cpu(),
            batch_size,
            cache,
        )

    # An encoder that reads pairs needs their tokens, unless it reads them as the model does.
    needs_tokens = model.encoder.reads_context and not model.needs_only_pooled
    with torch.no_grad():
        for name, compute in model.values_without_user().items():
            if name != "hidden" or not needs_tokens:
                setattr(dataset, name, values_of(compute, getattr(known, name, None)))
    return dataset


def batches_of(
    dataset: PairDataset, places: Sequence[int], owners: Sequence[int], *, batch_size: int
) -> list[PreferenceBatch]:
    """Make batches of the pairs with these indices, in which each pair belongs to its entry of `owners`.

    Pairs of similar length are put together, so that there is little padding. `row` of a batch says
    which entries of `places` its pairs are.
    """
    if dataset.hidden is not None:
        batch_size = max(batch_size, POOLED_AT_ONCE)
    lengths = [len(one.prompt) + len(one.chosen) + len(one.rejected) for one in dataset.pairs]
    order = sorted(range(len(places)), key=lambda at: lengths[places[at]])
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        replace(
            dataset.batch([places[at] for at in chunk]),
            user_id=torch.tensor([owners[at] for at in chunk]),
            row=torch.tensor(chunk),
        )
        for chunk in chunks
    ]


def compute_per_pair(
    compute: Callable[[PreferenceBatch], Tensor],
    batches: Sequence[PreferenceBatch],
    device: torch.device,
) -> Tensor:
    """Compute values [B, ...] of all batches on the device; return them in the order of `row`, [N, ...]."""
    values = [compute(move_data_to_device(batch, device)).detach().cpu() for batch in batches]
    rows = torch.cat([batch.row for batch in batches])
    return torch.cat(values)[rows.argsort()]
