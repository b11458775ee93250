"""Differential privacy for whole users: what all users share learns from clipped, noised gradients.

docs/trust.md says what is protected, and from whom.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from pydantic import Field
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from plrhf.core.checks import PositiveFloat, check_arguments
from plrhf.core.types import GENERIC_USER, PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.models.adaptation.fitting import user_tables
from plrhf.models.functional import call_method

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

NUMBERS_AT_ONCE = 2**25
"""Largest number of gradient entries, over users and parameters, that are in memory together."""

Named = dict[str, Tensor]


@check_arguments("privacy")
@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Settings of differential privacy for whole users.

    Args:
        noise: standard deviation of the noise in a step's sum of gradients, in units of `clip`; None: no
            privacy.
        clip: largest 2-norm of one user's gradient.
        delta: probability with which epsilon need not hold; far below 1 / number of users.
    """

    noise: PositiveFloat | None = None
    clip: PositiveFloat = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def epsilon(self, *, sample_rate: float, steps: int) -> float:
        """Return the epsilon of so many steps, each of which draws a user with probability `sample_rate`.

        It is an upper bound, at most 0.02 too large, by Opacus' PRV accountant (Gopi et al. 2021, arXiv
        2106.02848) for data sets that differ by all rows of one user.
        """
        from opacus.accountants import PRVAccountant  # an extra

        assert self.noise is not None
        if steps == 0:
            return 0.0
        accountant = PRVAccountant()
        accountant.history = [(self.noise, sample_rate, steps)]
        with np.errstate(divide="ignore"):  # log(1 - sample_rate)
            return float(accountant.get_epsilon(delta=self.delta))


class OfUsers(NamedTuple):
    """Gradients of U users by name of the parameter, [U, ...], of tables with rows of users [U, 2, ...].

    Of these there are the generic user's row and the user's own. `loss` and `accuracy` are [U].
    """

    users: Tensor
    gradients: Named
    loss: Tensor
    accuracy: Tensor


class PrivateGradient:
    """Computes training losses whose gradients are differentially private for whole users.

    A user's gradient is that of the mean loss of their pairs in the batch. Its part for shared parameters
    is scaled to a 2-norm of at most `clip`; the parts of all users are summed, and Gaussian noise of
    standard deviation noise * clip is added (DP-FedAvg with one local step, McMahan et al. 2018, arXiv
    1710.06963). The sum is divided by `users_per_batch`, whoever was drawn. A user's own row of the
    encoder's tables depends on no other user's pairs, and gets its plain gradient.

    The noise comes from a seed of the operating system that is kept nowhere: who knew it could take the
    noise off again.
    """

    def __init__(self, privacy: Privacy, *, users_per_batch: int) -> None:
        assert privacy.noise is not None
        self.clip, self.std = privacy.clip, privacy.noise * privacy.clip
        self.users_per_batch = users_per_batch
        self.seed = secrets.randbits(63)
        self._generator: torch.Generator | None = None

    def __call__(self, model: PersonalModule, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the mean training loss over users, with the private gradient, and their mean accuracy."""
        learned = {name: one for name, one in model.named_parameters() if one.requires_grad}
        gradient, losses = self.gradient(model, batch, learned)
        products = [(learned[name] * one).sum() for name, one in gradient.items()]
        linear = torch.stack(products).sum()  # whose gradient is the private one
        loss, accuracy = losses.mean(dim=0) if len(losses) > 0 else losses.new_zeros(2)
        return loss.to(linear.device) + linear - linear.detach(), accuracy

    def gradient(
        self, model: PersonalModule, batch: PreferenceBatch, learned: dict[str, nn.Parameter]
    ) -> tuple[Named, Tensor]:
        """Compute the private gradients by name, and each user's loss and accuracy, [U, 2]."""
        tables = {f"encoder.{name}" for name in user_tables(model.encoder)}
        fixed = fixed_generic_rows(model)
        total = {name: torch.zeros_like(one) for name, one in learned.items()}
        shared = {  # views of `total`
            name: one[GENERIC_USER] if name in tables else one
            for name, one in total.items()
            if name not in fixed
        }
        losses = [torch.empty(0, 2)]
        for found in gradients_of_users(model, batch, learned, tables & learned.keys()):
            of_all = dict(found.gradients)
            for name in tables & of_all.keys():
                of_all[name], own = of_all[name].unbind(dim=1)
                total[name][found.users] = own
            of_all = {name: of_all[name] for name in shared}
            factor = clip_factors(of_all, self.clip)
            for name, one in of_all.items():
                shared[name] += torch.tensordot(factor.to(one), one, dims=1)
            losses.append(torch.stack([found.loss, found.accuracy], dim=1).cpu())
        for one in shared.values():
            one += self._noise(one)
        return {name: one / self.users_per_batch for name, one in total.items()}, torch.cat(losses)

    def _noise(self, like: Tensor) -> Tensor:
        """Draw Gaussian noise of the shape and on the device of a tensor."""
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self.seed)
        noise = torch.randn(like.shape, generator=self._generator, device=like.device)
        return self.std * noise.to(like.dtype)


def clip_factors(gradients: Named, limit: float) -> Tensor:
    """Return factors [U] that make the gradients of each user, [U, ...] by name, at most `limit` long."""
    squares = [one.float().flatten(1).square().sum(dim=1) for one in gradients.values()]
    norms = torch.stack(squares).sum(dim=0).sqrt()
    return limit / norms.clamp(min=limit)


def fixed_generic_rows(model: PersonalModule) -> set[str]:
    """Return the names of tables whose generic row is always zero, as it is padding."""
    named = model.named_modules()
    return {
        f"{name}.weight"
        for name, one in named
        if isinstance(one, nn.Embedding) and one.padding_idx == GENERIC_USER
    }


def gradients_of_users(
    model: PersonalModule,
    batch: PreferenceBatch,
    learned: dict[str, nn.Parameter],
    tables: set[str],
) -> Iterator[OfUsers]:
    """Compute the gradient of each user's mean loss, for as many users together as memory allows.

    Pooled texts of a frozen trunk are differentiated for many users in one call. With other models, one
    user follows the other.

    Args:
        tables: names of those parameters that have one row for each user.
    """
    users = batch.user_id.unique()
    if len(users) == 0:
        return
    if batch.hidden is None or batch.context is not None:
        pairs = model._train_pairs()
        for user in users.tolist():
            yield _of_one_user(model, batch, pairs, learned, tables, user)
        return
    n_numbers = sum(one.numel() for name, one in learned.items() if name not in tables)
    size = max(1, NUMBERS_AT_ONCE // max(1, n_numbers))
    for some in users.split(size):
        yield _of_several_users(model, batch, learned, tables, some)


def _of_one_user(
    model: PersonalModule,
    batch: PreferenceBatch,
    pairs: PairDataset,
    learned: dict[str, nn.Parameter],
    tables: set[str],
    user: int,
) -> OfUsers:
    """Compute the gradients of one user, whose pairs are made a batch of their own."""
    places = batch.row[batch.user_id == user].tolist()
    own = move_data_to_device(pairs.batch(places, epoch=model.current_epoch), batch.row.device)
    loss, accuracy = model.training_loss(own)
    found = torch.autograd.grad(loss, [*learned.values()], allow_unused=True)
    gradients = {
        name: torch.zeros_like(one) if gradient is None else gradient
        for (name, one), gradient in zip(learned.items(), found, strict=True)
    }
    rows = {name: gradients[name][[GENERIC_USER, user]] for name in tables}
    return OfUsers(
        users=torch.tensor([user], device=batch.row.device),
        gradients={name: one[None] for name, one in {**gradients, **rows}.items()},
        loss=loss.detach()[None],
        accuracy=accuracy.detach()[None],
    )


def _of_several_users(
    model: PersonalModule,
    batch: PreferenceBatch,
    learned: dict[str, nn.Parameter],
    tables: set[str],
    users: Tensor,
) -> OfUsers:
    """Compute the gradients of users whose texts are pooled, in one vmapped call.

    Each user has tables of two rows, the generic user's and the own one.
    """
    at, weight = places_of_users(batch.user_id, users)  # [U, K]
    n_pairs = at.shape[1]
    own_texts = torch.arange(2 * n_pairs, device=at.device).view(n_pairs, 2)
    assert batch.hidden is not None and batch.texts is not None
    texts = batch.texts[at].flatten(1)  # [U, 2 K]
    part: dict[str, Any] = {
        "hidden": batch.hidden[texts],
        "features": batch.features[at],
        "row": batch.row[at],
        "weight": weight,
    }
    for name in ("text_keys", "ref_logps"):
        value = getattr(batch, name)
        if value is not None:
            part[name] = value[texts if name == "text_keys" else at]
    one = batch.pooled(batch.hidden, own_texts)
    blank = torch.zeros(n_pairs, 2, dtype=torch.int64, device=at.device)
    one = replace(one, user_id=torch.ones_like(blank[:, 0]), input_ids=blank, position_ids=blank)
    one = replace(one, segment=one.segment[:1].expand(n_pairs, 2))

    def loss(weights: Named, rows: Named, part: dict[str, Any]) -> Any:
        return call_method(model, {**weights, **rows}, "training_loss", replace(one, **part))

    weights = {name: value.detach() for name, value in learned.items() if name not in tables}
    rows = {name: _two_rows(learned[name].detach(), users) for name in tables}
    compute = vmap(
        grad_and_value(loss, argnums=(0, 1), has_aux=True),
        in_dims=(None, 0, 0),
        randomness="different",
    )
    (of_shared, of_rows), (losses, accuracy) = compute(weights, rows, part)
    return OfUsers(users, {**of_shared, **of_rows}, losses, accuracy)


def _two_rows(table: Tensor, users: Tensor) -> Tensor:
    """Return the generic user's row and each user's own, [U, 2, ...]."""
    own = table[users]
    return torch.stack([table[GENERIC_USER].expand_as(own), own], dim=1)


def places_of_users(user_id: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places [U, K] of each user's pairs in a batch, and weights of them that sum to 1.

    Users with fewer than K pairs have places of weight 0 at their end.

    Args:
        user_id: of the batch's pairs, [B]. users: distinct ones with pairs there, [U].
    """
    in_order, order = user_id.sort(stable=True)
    starts = torch.searchsorted(in_order, users)
    counts = torch.searchsorted(in_order, users, right=True) - starts
    turn = torch.arange(int(counts.max()), device=user_id.device)
    at = order[(starts[:, None] + turn).clamp(max=len(order) - 1)]
    return at, (turn < counts[:, None]) / counts[:, None]
