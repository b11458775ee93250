"""Fits users the model has not met to a few of their pairs; only their own parameters are fitted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.func import functional_call

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.parsing import parse_row
from plrhf.data.tokenizer import RowTokenizer
from plrhf.encoders import UserEncoder
from plrhf.models.pair_batches import batches_of, dataset_of

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

BATCH_SIZE = 32
KEPT_NUMBERS = 2**28
"""Most numbers of trunk outputs kept while users are fitted: 1 GiB in float32."""


@check_arguments("eval")
@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a new user is fitted: the most likely parameters under a prior learned from train users.

    Args:
        steps: iterations of L-BFGS at most; it stops earlier where nothing moves any more.
        prior_scale: factor on the prior's standard deviation: the smaller it is, the nearer new users
            stay to the generic one.
    """

    steps: PositiveInt = 40
    prior_scale: PositiveFloat = 1.0


class Prior:
    """The distribution of a new user's own parameters z before a pair is seen: N(z_0, scale^2 M).

    z_0 are the generic user's, and M = 1/n sum_u (z_u - z_0)(z_u - z_0)^T over the n train users. As
    z = z_0 + t F with F^T F = scale^2 M and t ~ N(0, 1), a new user is a combination of how the
    train users differ from the generic one.

    Args:
        encoder: a trained one. scale: see `Fit`.

    Attributes:
        generic: z_0, [D]. factor: F, [r, D] with r <= min(D, n).

    Raises:
        ValueError: the encoder has no parameters of single users.
    """

    def __init__(self, encoder: UserEncoder, *, scale: float = 1.0) -> None:
        tables = user_tables(encoder)
        if len(tables) == 0:
            raise bad_value(
                "encoder",
                type(encoder).__name__,
                "one with parameters of single users",
                "Adapt a model trained with encoder=lookup or encoder=cluster",
            )
        self.shapes = {name: table.shape[1:] for name, table in tables.items()}
        flat = torch.cat(
            [table.detach().reshape(len(table), -1) for table in tables.values()], dim=1
        )  # [n+1, D]
        self.generic = flat[GENERIC_USER]
        departures = flat[GENERIC_USER + 1 :] - self.generic
        _, sizes, directions = torch.linalg.svd(departures, full_matrices=False)
        self.factor = scale * len(departures) ** -0.5 * sizes[:, None] * directions

    def tables(self, t: Tensor) -> dict[str, Tensor]:
        """Turn t [N, r] of users into tables by name, [N + 1, ...], the generic user before them."""
        flat = torch.cat([self.generic[None], self.generic + t @ self.factor])
        parts = flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if len(shape) > 0 else part[:, 0]
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def user_tables(encoder: UserEncoder) -> dict[str, nn.Parameter]:
    """Return the parameters whose row u belongs to user u, by name."""
    own = {id(parameter) for parameter in encoder.user_parameters()}
    return {name: one for name, one in encoder.named_parameters() if id(one) in own}


@contextlib.contextmanager
def dense_gradients(encoder: UserEncoder) -> Iterator[None]:
    """Let sparse tables give dense gradients: sparse ones cannot pass through `Prior.tables`."""
    sparse = [one for one in encoder.modules() if getattr(one, "sparse", False) is True]
    modules: list[Any] = list(sparse)
    for module in modules:
        module.sparse = False
    try:
        yield
    finally:
        for module in modules:
            module.sparse = True


def scores(
    model: PersonalModule, batch: PreferenceBatch, tables: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute margins [B] and losses [B] of pairs whose users are rows of `tables`."""
    off = torch.autocast(batch.user_id.device.type, enabled=False)
    with off, dense_gradients(model.encoder):
        users = functional_call(model.encoder, dict(tables), (batch.users,))
    margins, extra = model.margins_for(batch, users)
    return margins[0], model.pair_loss(margins, extra)[0]


def fit_users(
    model: PersonalModule,
    batches: Sequence[PreferenceBatch],
    prior: Prior,
    *,
    n_users: int,
    steps: int,
) -> Tensor:
    """Find t [N, r] of new users 1..N, each maximising their own posterior given their pairs.

    minimise sum_pairs loss(pair, z_0 + t F) + |t|^2 / 2, summed over users: with all else frozen no
    user's term holds another's t, so that one problem solves them all.

    Args:
        batches: their pairs, `user_id` from 1 to N. A user without any keeps t = 0.
    """
    t = prior.factor.new_zeros(n_users, len(prior.factor)).requires_grad_()
    on_device = [move_data_to_device(batch, t.device) for batch in batches]
    n_positions = sum(batch.input_ids.numel() for batch in on_device)
    if n_positions * model.backbone.hidden_size <= KEPT_NUMBERS:
        with (
            torch.no_grad()
        ):  # else the trunk would run again for every evaluation of the objective
            on_device = [model.without_user(batch) for batch in on_device]
    optimizer = torch.optim.LBFGS(
        [t], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        t.grad = t.detach().clone()
        total = 0.5 * t.detach().double().square().sum().item()
        for batch in on_device:
            loss = scores(model, batch, prior.tables(t))[1].double().sum()
            t.grad += torch.autograd.grad(loss, t)[0]
            total += loss.item()
        return total

    optimizer.step(objective)
    return t.detach()


@dataclass(frozen=True)
class NewUser:
    """A user fitted to a model that has not met them.

    Attributes:
        rows: their own parameters by name, on the CPU, a row each of the encoder's tables; see `enrol`.
        vector: e_u, [user_dim], on the CPU.
        n_pairs: pairs the user was fitted to. n_too_long: pairs left out as too long for the model.
    """

    rows: dict[str, Tensor]
    vector: Tensor
    n_pairs: int = 0
    n_too_long: int = 0


def adapt(
    model: PersonalModule, pairs: Sequence[Mapping[str, Any]], fit: Fit | None = None
) -> NewUser:
    """Fit a new user to a few of their pairs; all else of the model is frozen and stays as it is.

    Args:
        model: loaded from an export, so that it has a tokenizer.
        pairs: rows of one user in the row format; `user_id` may be missing. No pairs at all give the
            generic user.

    Raises:
        ValueError: a pair that cannot be used, no pair that is short enough, or an encoder without
            parameters of single users.
    """
    fit = Fit() if fit is None else fit
    prior = Prior(model.encoder, scale=fit.prior_scale)
    row_tokenizer = RowTokenizer(model.tokenizer, **model.card.text)
    rows = [
        parse_row({"user_id": "new", **pair}, f"pair {number}")
        for number, pair in enumerate(pairs, 1)
    ]
    was_training = model.training
    model.eval()
    with model.autocast():
        dataset = dataset_of(model, row_tokenizer, rows, batch_size=BATCH_SIZE)
        if len(dataset) == 0 and len(rows) > 0:
            raise bad_value(
                "pairs",
                f"{len(rows)} too long",
                f"prompt and response of at most {row_tokenizer.max_tokens} tokens",
                "Give shorter pairs, or train with a larger data.max_tokens",
            )
        owners = [1] * len(dataset)
        batches = batches_of(dataset, range(len(dataset)), owners, batch_size=BATCH_SIZE)
        tables = prior.tables(fit_users(model, batches, prior, n_users=1, steps=fit.steps))
    features = model.card.feature_schema().encode(rows[0].user_features if rows else None)
    users = UserBatch(
        user_id=prior.generic.new_ones(1, dtype=torch.int64),
        features=prior.generic.new_tensor([features]),
    )
    with torch.no_grad():
        vector = functional_call(model.encoder, tables, (users,))[0]
    model.train(was_training)
    return NewUser(
        rows={name: table[1].cpu() for name, table in tables.items()},
        vector=vector.cpu(),
        n_pairs=len(dataset),
        n_too_long=len(rows) - len(dataset),
    )
