"""An inner loop in training: gradient steps from the generic user to each user, as in MAML."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.second_order import second_derivatives
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.encoders import UserEncoder
from plrhf.models.adaptation.fitting import dense_gradients, user_tables
from plrhf.models.pair_batches import POOLED_AT_ONCE

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


Tables: TypeAlias = dict[str, Tensor]


@check_arguments("model.inner")
@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """Settings of the inner loop (MAML as in MRM, arXiv 2601.18731).

    A user's parameters start at the generic user's, z <- z_0, and take `steps` gradient steps z <- z -
    lr * gradient on the mean loss of the user's support pairs. Training minimises the loss of the query
    pairs at the final z. Its gradient goes through the steps, so z_0 and all shared parameters learn to
    make users easy to fit.

    Args:
        lr: learning rate of these steps. query_share: share of a user's pairs in a batch that are query
            pairs.
    """

    steps: PositiveInt = 1
    lr: PositiveFloat = 1.0
    query_share: Annotated[float, Field(gt=0, lt=1)] = 0.5


@dataclass(frozen=True)
class Support:
    """Support pairs: those that users are fitted to.

    Attributes:
        task: row of each pair's user in the tables, [B] int64 from 1.
        weight: weight of each pair's loss, [B]; a user's weights sum to 1, query pairs have weight 0.
    """

    batch: PreferenceBatch
    task: Tensor
    weight: Tensor


def number_tasks(user_id: Tensor, query_share: float) -> tuple[Tensor, Tensor]:
    """Number a batch's users from 1, and divide their pairs into support and query pairs.

    A user's first pairs in the batch are support pairs, at least one. A user with one pair has no query
    pair.

    Returns:
        The user's number of each pair, [B] int64, and whether it is a query pair, [B] bool.
    """
    _, task, counts = user_id.unique(return_inverse=True, return_counts=True)
    order = task.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(task)
    rank[order] = torch.arange(len(task), device=task.device) - starts[task[order]]
    n_support = (counts - (query_share * counts).round().long()).clamp(min=1)
    return task + 1, rank >= n_support[task]


def mean_weights(task: Tensor, chosen: Tensor) -> Tensor:
    """Return weights [B] that sum to 1 over each task's `chosen` pairs [B] bool and are 0 elsewhere."""
    counts = torch.zeros(int(task.max()) + 1, device=task.device)
    counts.index_add_(0, task, chosen.float())
    return chosen / counts[task].clamp(min=1)


def vectors_from_tables(
    model: PersonalModule, batch: PreferenceBatch, task: Tensor, tables: Tables
) -> Tensor:
    """Compute the user vectors [B, user_dim] of pairs by the encoder, its tables replaced by `tables`.

    Args:
        task: row of each pair's user in the tables, [B].
    """
    users = UserBatch(user_id=task, features=batch.features)
    off = torch.autocast(task.device.type, enabled=False)
    with off, dense_gradients(model.encoder):
        return functional_call(model.encoder, tables, (users,))


def fitted_tables(
    model: PersonalModule, given: Sequence[Support], inner: InnerLoop, *, n_tasks: int
) -> Tables:
    """Take the inner gradient steps for all tasks at once; their losses are independent.

    Returns:
        Tables by name, [1 + n_tasks, ...], the generic user's row first. They are differentiable with
        respect to all learned parameters.

    Raises:
        ValueError: the encoder has no tables with a row for each user.
    """
    generic = _generic_rows(model.encoder)

    def tables_of(rows: Tables) -> Tables:
        return {name: torch.cat([generic[name], row]) for name, row in rows.items()}

    def loss(rows: Tables, one: Support) -> Tensor:
        user = vectors_from_tables(model, one.batch, one.task, tables_of(rows))
        return (model.pair_losses(one.batch, user)[1][0] * one.weight).sum()

    rows = {name: row.expand(n_tasks, *row.shape[1:]) for name, row in generic.items()}
    for _ in range(inner.steps):
        gradients = [_gradient(partial(loss, one=one), rows) for one in given]
        rows = {
            name: row - inner.lr * sum(gradient[name] for gradient in gradients)
            for name, row in rows.items()
        }
    return tables_of(rows)


def _gradient(loss: Callable[[Tables], Tensor], rows: Tables) -> Tables:
    """Compute the gradient of a loss at some rows; where gradients are on, it is differentiable itself."""
    twice = torch.is_grad_enabled()
    at = {
        name: row if twice and row.requires_grad else row.detach().requires_grad_()
        for name, row in rows.items()
    }
    with torch.enable_grad(), second_derivatives() if twice else contextlib.nullcontext():
        found = torch.autograd.grad(
            loss(at), list(at.values()), create_graph=twice, materialize_grads=True
        )
    return dict(zip(at, found, strict=True))


def _generic_rows(encoder: UserEncoder) -> Tables:
    """Return the generic user's row of each table, [1, ...]; rows that are not trained have no gradient."""
    tables = user_tables(encoder)
    if len(tables) == 0:
        raise bad_value(
            "model.inner",
            type(encoder).__name__,
            "null with an encoder that has no parameters of single users",
            "Set encoder=lookup or encoder=cluster, or model.inner=null",
        )
    embeddings = (one for one in encoder.modules() if isinstance(one, nn.Embedding))
    fixed = {id(one.weight) for one in embeddings if one.padding_idx == GENERIC_USER}
    return {
        name: (table.detach() if id(table) in fixed else table)[GENERIC_USER : GENERIC_USER + 1]
        for name, table in tables.items()
    }


def task_vectors(
    model: PersonalModule, batch: PreferenceBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    """Fit a batch's users to their support pairs.

    Returns:
        User vectors [B, user_dim], differentiable, and weights [B], with which a mean over the batch
        becomes the mean over its query pairs.
    """
    task, is_query = number_tasks(batch.user_id, inner.query_share)
    given = [Support(batch, task, mean_weights(task, ~is_query))]
    n_tasks = int(task.max())
    tables = fitted_tables(model, given, inner, n_tasks=n_tasks)
    asked = is_query * (len(task) / is_query.sum().clamp(min=1))
    return vectors_from_tables(model, batch, task, tables), asked


@torch.no_grad()
def fit_train_users(model: PersonalModule, dataset: PairDataset, inner: InnerLoop) -> None:
    """Fit all train users to all of their train pairs, and write their rows into the encoder's tables."""
    device = next(model.parameters()).device
    users = dataset.user_id.to(device)
    weight = mean_weights(users, users > GENERIC_USER)
    given = []
    for start in range(0, len(dataset), POOLED_AT_ONCE):
        places = range(start, min(start + POOLED_AT_ONCE, len(dataset)))
        batch = move_data_to_device(dataset.batch(places), device)
        given.append(Support(batch, batch.user_id, weight[start : places.stop]))
    own = user_tables(model.encoder)
    n_users = len(next(iter(own.values()))) - 1
    tables = fitted_tables(model, given, inner, n_tasks=n_users)
    for name, table in own.items():
        table[GENERIC_USER + 1 :] = tables[name][GENERIC_USER + 1 :]
