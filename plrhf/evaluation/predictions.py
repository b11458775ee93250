"""Computes a trained model's margins on val and test pairs: the table of predictions.parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.core.stats import correctness
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.data.splits import Splits, prompt_kinds
from plrhf.data.text_value_cache import TextValueCache, text_values_key
from plrhf.data.text_values import compute_text_values
from plrhf.evaluation.results import NUMBER_COLUMNS, TEXT_COLUMNS
from plrhf.models.base import PersonalModule
from plrhf.models.context import context_features, reusable_context_features
from plrhf.models.policy import PersonalDPOPolicy, PersonalPolicy
from plrhf.models.reward import PersonalRewardModel


class PrepareData(Callback):
    """Calls `prepare` before training, when the model is on its device, and then sets start values."""

    def __init__(self, data: PreferenceData, *, cache_dir: Path) -> None:
        self.data, self.cache_dir = data, cache_dir

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PersonalModule)
        prepare(pl_module, self.data, trainer, cache_dir=self.cache_dir)
        if trainer.ckpt_path is None:
            total_steps = int(trainer.estimated_stepping_batches)
            pl_module.initialise(self.data, total_steps=total_steps)


def prepare(
    model: PersonalModule, data: PreferenceData, trainer: Trainer, *, cache_dir: Path | None = None
) -> None:
    """Precompute what does not change in training: reference, pooled frozen trunk, or context features.

    Args:
        cache_dir: where values are kept for other runs. They do not depend on user model, seed or loss.
    """
    ask = _runner_on_device(model, trainer)

    def cache(*computed: str) -> TextValueCache | None:
        if cache_dir is None:
            return None
        config = model.backbone.config
        key = text_values_key(  # asked of all processes: weights may be sharded
            weights=model.backbone.digest,
            config=config.to_dict(),
            attention=config._attn_implementation,
            layout=" ".join(sorted({one.layout.__name__ for one in data.datasets.values()})),
            precision=f"{trainer.precision} {torch.get_float32_matmul_precision()}",
            computed=computed,
        )
        # Rank 0 alone reads and writes, and tells the others.
        return TextValueCache(cache_dir / f"texts-{key}") if trainer.is_global_zero else None

    with evaluating(model, trainer):
        train = data.datasets.get("train")
        pooled = isinstance(model, PersonalRewardModel) or train is not None  # test pairs: exactly
        if model.needs_only_pooled and pooled:
            assert isinstance(model, PersonalRewardModel | PersonalDPOPolicy)
            data.precompute_hidden(ask(model.pooled_trunk), cache("pooled", model.pooled_name))
        elif isinstance(model, PersonalPolicy):
            head = "head in float32" if model.head_in_float32 else "head as the model"
            read = data if model.learns_from_pairs or train is None else data.restrict_to("val")
            read.precompute_reference(ask(model.reference_logps), cache("reference", head))
        if model.encoder.reads_context and train is not None:
            train.context_hidden = reusable_context_features(model, train)
            if train.context_hidden is None:
                features = ask(partial(context_features, model))
                kept = cache("context", model.pooling)
                train.context_hidden = compute_text_values(
                    train,
                    features,
                    data.eval_batch_size,
                    kept,
                    shard=data.shard,
                    what="features of users' pairs",
                )
    model.train()


@contextlib.contextmanager
def evaluating(model: PersonalModule, trainer: Trainer) -> Iterator[None]:
    """Put the model on the trainer's device, in eval mode and without gradients, in this context."""
    model.to(trainer.strategy.root_device)
    model.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


def runner_with_weights(model: PersonalModule, trainer: Trainer) -> Callable[..., Any]:
    """Return a callable that calls ``function(*arguments)`` while the model's weights are usable.

    A strategy that wraps the model (ZeRO-3) gathers sharded weights during the wrapper's forward. So
    the call goes through the wrapper, as Lightning's own steps do.
    """
    wrapper = trainer.model
    if wrapper is None or wrapper is model:
        return model.run_with_weights
    redirect: Any = trainer.strategy._forward_redirection
    return partial(redirect, wrapper, model, "run_with_weights")


def _runner_on_device(model: PersonalModule, trainer: Trainer) -> Callable[..., Any]:
    """Return a wrapper for functions of a batch: the function is called by `runner_with_weights`.

    The batch is moved to the trainer's device before, and the result to the CPU afterwards.
    """
    device = trainer.strategy.root_device
    through = runner_with_weights(model, trainer)

    def ask(function: Callable[[PreferenceBatch], Tensor]) -> Callable[[PreferenceBatch], Tensor]:
        return lambda batch: through(function, move_data_to_device(batch, device)).cpu()

    return ask


def predict(model: PersonalModule, data: PreferenceData, trainer: Trainer) -> pd.DataFrame:
    """Compute predictions.parquet: one row for each val or test pair and context.

    The oracle is a further context if the source knows true margins.
    """
    ask = _runner_on_device(model, trainer)
    oracle = data.source.oracle_margins()
    frames = []
    for split in ("val", "test"):
        dataset = data.datasets[split]
        margins: dict[str, Tensor] = {}
        if len(dataset) > 0:
            with evaluating(model, trainer):
                found = data.values_per_pair(split, ask(partial(_margins_of_contexts, model)))
            margins = dict(zip(("user", "generic"), found.double().T, strict=True))
        if oracle is not None:
            true = [oracle[row.pair_id] for row in dataset.rows]
            margins["oracle"] = torch.tensor(true, dtype=torch.float64)
        pairs = _columns(dataset, split, data.splits)
        frames += [
            pd.DataFrame(
                {
                    **pairs,
                    "context": context,
                    "margin": values.numpy(),
                    "correct": correctness(values.numpy()),
                }
            )
            for context, values in margins.items()
        ]
    return pd.concat(frames, ignore_index=True)[[*TEXT_COLUMNS, *NUMBER_COLUMNS]]


def _margins_of_contexts(model: PersonalModule, batch: PreferenceBatch) -> Tensor:
    """Compute the margins [B, 2] in the user's and in the generic context."""
    found = model.predict_step(batch, 0)
    return torch.stack([found["user"], found["generic"]], dim=1)


def _columns(dataset: PairDataset, split: str, splits: Splits) -> dict[str, Any]:
    """Return the columns of predictions.parquet that do not depend on the context."""
    rows, seen = dataset.rows, set(splits.users)
    ids = [(row.user_id, row.pair_id, row.prompt_id) for row in rows]
    user_id, pair_id, prompt_id = zip(*ids, strict=True) if len(ids) > 0 else ((), (), ())
    return {
        "split": split,
        "user_kind": ["seen" if user in seen else "unseen" for user in user_id],
        "prompt_kind": prompt_kinds(rows, splits),
        "user_id": user_id,
        "pair_id": pair_id,
        "prompt_id": prompt_id,
        "chosen_tokens": dataset.lengths[:, 1].astype(int),
        "rejected_tokens": dataset.lengths[:, 2].astype(int),
    }
