"""The parameters that are fitted for a new user, and the loss of their pairs as a function of them."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from plrhf.core.errors import bad_value
from plrhf.core.second_order import second_derivatives
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.features import FeatureSchema
from plrhf.encoders import UserEncoder
from plrhf.models.adaptation.base import (
    KEPT_NUMBERS,
    AdaptedUsers,
    margin_gradients,
    score_pairs,
    with_precomputed,
)
from plrhf.models.adaptation.linear import LinearMargins, newton

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

LINEAR = 1e-4
"""Margins are taken as linear if they differ from linear ones by less than this, relatively."""


def user_tables(encoder: UserEncoder) -> dict[str, nn.Parameter]:
    """Return the encoder's parameters that have one row for each user, by name."""
    own = {id(parameter) for parameter in encoder.user_parameters()}
    return {name: one for name, one in encoder.named_parameters() if id(one) in own}


def check_has_user_tables(encoder: UserEncoder) -> None:
    """Raise a ValueError if an encoder has no parameters that belong to single users."""
    if len(user_tables(encoder)) == 0:
        raise bad_value(
            "encoder",
            type(encoder).__name__,
            "one with parameters of single users",
            "Adapt a model trained with encoder=lookup or encoder=cluster",
        )


@contextlib.contextmanager
def dense_gradients(encoder: UserEncoder) -> Iterator[None]:
    """Make sparse embeddings give dense gradients in this context, as autograd needs to go on from them."""
    modules: list[Any] = [one for one in encoder.modules() if getattr(one, "sparse", False) is True]
    for module in modules:
        module.sparse = False
    try:
        yield
    finally:
        for module in modules:
            module.sparse = True


class UserSpace(ABC):
    """A space in which each point stands for a user.

    Attributes:
        generic: point of the generic user, [D]. train: points of the n train users, [n, D].
    """

    generic: Tensor
    train: Tensor

    @abstractmethod
    def vectors(self, points: Tensor, features: Tensor) -> Tensor:
        """Compute user vectors [N, user_dim] from points [N, D] and the users' features [N, F]."""

    def rows(self, points: Tensor) -> dict[str, Tensor] | None:
        """Return the rows [N, ...] of the encoder's tables for points [N, D]; None if they have none."""
        return None


class RowSpace(UserSpace):
    """The space of a user's rows in all of the encoder's tables, flattened and concatenated.

    Args:
        encoder: a trained encoder that has tables with a row for each user.
    """

    def __init__(self, encoder: UserEncoder) -> None:
        check_has_user_tables(encoder)
        self.encoder = encoder
        tables = user_tables(encoder)
        self.shapes = {name: table.shape[1:] for name, table in tables.items()}
        flat = torch.cat(
            [table.detach().reshape(len(table), -1) for table in tables.values()], dim=1
        )  # [n+1, D]
        self.generic, self.train = flat[GENERIC_USER], flat[GENERIC_USER + 1 :]

    def rows(self, points: Tensor) -> dict[str, Tensor]:
        parts = points.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if len(shape) > 0 else part[:, 0]
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def vectors(self, points: Tensor, features: Tensor) -> Tensor:
        """Compute user vectors with the encoder's own `forward`, its tables replaced by the points."""
        tables = self.rows(torch.cat([self.generic[None], points]))
        users = UserBatch(
            user_id=torch.arange(1, len(points) + 1, device=points.device), features=features
        )
        with torch.autocast(points.device.type, enabled=False), dense_gradients(self.encoder):
            found: Tensor = functional_call(self.encoder, tables, (users,))
        return found


class VectorSpace(UserSpace):
    """The space of user vectors e_u, in which train users may span a subspace only.

    Args:
        model: its encoder must have tables with a row for each user.
    """

    def __init__(self, model: PersonalModule) -> None:
        rows = RowSpace(model.encoder)
        with torch.no_grad():
            self.train = rows.vectors(rows.train, features_of_users(model, (), len(rows.train)))
            self.generic = model.encoder.generic(1)[0].to(self.train.device)

    def vectors(self, points: Tensor, features: Tensor) -> Tensor:
        return points


class Coordinates:
    """Describes each user by r numbers t: the user's point is origin + t F.

    Args:
        space: the space of the points. origin: point of t = 0, [D]. factor: F, [r, D].
    """

    def __init__(self, space: UserSpace, origin: Tensor, factor: Tensor) -> None:
        self.space, self.origin, self.factor = space, origin, factor

    def points(self, t: Tensor) -> Tensor:
        """Compute the points [N, D] of t [N, r]."""
        return self.origin + t @ self.factor

    def scaled(self, scale: Tensor) -> Coordinates:
        """Return coordinates t / scale of the same points; scale is [r]."""
        return Coordinates(self.space, self.origin, scale[:, None] * self.factor)


class PairLosses:
    """The loss of new users' pairs as a function of their coordinates t, [N, r].

    A user's loss does not depend on other users' t. One solver can therefore fit all users at once, and
    the Hessian consists of one block [r, r] for each user.

    Args:
        batches: the pairs, with `user_id` from 0 to n_users - 1. features: see `Adaptation.fit`.
    """

    def __init__(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        coordinates: Coordinates,
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> None:
        self.model, self.coordinates, self.n_users = model, coordinates, n_users
        self.batches = with_precomputed(model, batches)
        if features is None:
            features = features_of_users(model, self.batches, n_users)
        self.features = features.to(model.device)
        self.counts = coordinates.origin.new_zeros(n_users)  # pairs of each user
        for batch in self.batches:
            self.counts += torch.bincount(batch.user_id, minlength=n_users)

    def scaled(self, scale: Tensor) -> PairLosses:
        """Return the same losses as a function of t / scale, with scale [r]."""
        found = copy.copy(self)
        found.coordinates = self.coordinates.scaled(scale)
        found.linear = None if self.linear is None else self.linear.scaled(scale)
        return found

    def start(self) -> Tensor:
        """Return t = 0 of all users, [N, r]."""
        return self.coordinates.origin.new_zeros(self.n_users, len(self.coordinates.factor))

    def vectors(self, t: Tensor) -> Tensor:
        """Compute the user vectors [N, user_dim]."""
        return self.coordinates.space.vectors(self.coordinates.points(t), self.features)

    def gradient(self, t: Tensor, weight: Tensor | None = None) -> tuple[float, Tensor]:
        """Compute the sum of the losses of all pairs, and its gradient [N, r].

        Args:
            weight: factor on each user's pairs, [N]; None: 1.
        """
        t = t.detach().requires_grad_()
        vectors = self.vectors(t)
        at = vectors.detach().requires_grad_()
        total, slope = 0.0, torch.zeros_like(at)
        for batch in self.batches:
            losses = score_pairs(self.model, batch, at)[1].double()
            loss = (losses if weight is None else losses * weight[batch.user_id]).sum()
            slope += torch.autograd.grad(loss, at)[0]
            total += loss.item()
        return total, torch.autograd.grad(vectors, t, slope)[0]

    @cached_property
    def linear(self) -> LinearMargins | None:
        """The pairs with margins as linear functions of t; None if they are not linear.

        They are if users act by FiLM behind the trunk and the head is linear. This is tested at one
        random t a user, and so is that losses are logistic, as those of ties and of weighted pairs are not.
        """
        target = self.model.logistic_target
        t = self.start()
        size = int(self.counts.max()) * t.numel()
        if target is None or not self.model.aggregator.after_trunk or not 0 < size < KEPT_NUMBERS:
            return None
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(t.shape, generator=generator).to(t)
        with torch.no_grad():
            origin, elsewhere, directions = self.vectors(t), self.vectors(probe), self.directions(t)
        constants, slopes = [], []
        for batch in self.batches:
            margins, of_vector = margin_gradients(self.model, batch, origin)
            of_t = torch.einsum("bru,bu->br", directions[batch.user_id], of_vector)
            with torch.no_grad():
                found, losses = score_pairs(self.model, batch, elsewhere)
            expected = margins + (of_t * probe[batch.user_id]).sum(dim=1)
            if (found - expected).abs().max() > LINEAR * (1 + found.abs().max()):
                return None
            if (losses + logsigmoid(found - target)).abs().max() > LINEAR * (
                1 + losses.abs().max()
            ):
                return None
            constants.append(margins - target)
            slopes.append(of_t)
        users = torch.cat([batch.user_id for batch in self.batches])
        given = (users, torch.cat(constants), torch.cat(slopes))
        return LinearMargins.of_pairs(*given, n_users=self.n_users)

    @torch.no_grad()
    def by_user(self, t: Tensor) -> Tensor:
        """Compute the sum of the losses of each user's pairs, [N] float64."""
        if self.linear is not None:
            return self.linear.by_user(t)
        vectors = self.vectors(t)
        found = torch.zeros(self.n_users, dtype=torch.float64, device=t.device)
        for batch in self.batches:
            losses = score_pairs(self.model, batch, vectors)[1]
            found.index_add_(0, batch.user_id, losses.double())
        return found

    def hessian(self, t: Tensor) -> Tensor:
        """Compute the Hessian of each user's summed loss, [N, r, r]."""
        if self.linear is not None:
            return self.linear.derivatives(t)[1].to(t.dtype)
        t = t.detach().requires_grad_()
        found = t.new_zeros(*t.shape, t.shape[1])
        with torch.enable_grad(), second_derivatives():
            for batch in self.batches:
                loss = score_pairs(self.model, batch, self.vectors(t))[1].double().sum()
                (gradient,) = torch.autograd.grad(loss, t, create_graph=True)
                if not gradient.requires_grad:  # a loss without curvature
                    continue
                for place in range(t.shape[1]):
                    of_one = gradient[:, place].sum()
                    column = torch.autograd.grad(of_one, t, retain_graph=True, allow_unused=True)[0]
                    if column is not None:
                        found[:, place] += column
        return 0.5 * (found + found.mT)

    def directions(self, t: Tensor) -> Tensor:
        """Compute the derivatives of the user vectors with respect to t, [N, r, user_dim]."""
        n_users, n = t.shape
        features = self.features.repeat_interleave(n, dim=0)
        # Each user stands n times in one call, moved along one number each time.
        units = torch.eye(n, dtype=t.dtype, device=t.device).repeat(n_users, 1)

        def vectors(of_each: Tensor) -> Tensor:
            return self.coordinates.space.vectors(self.coordinates.points(of_each), features)

        found: Tensor = torch.func.jvp(
            vectors, (t.detach().repeat_interleave(n, dim=0),), (units,)
        )[1]
        return found.unflatten(0, (n_users, n))

    def users_at(self, t: Tensor, covariance: Tensor | None = None) -> AdaptedUsers:
        """Return the users with coordinates t [N, r], and the covariance of t if it is given."""
        with torch.no_grad():
            points = self.coordinates.points(t.detach())
            return AdaptedUsers(
                vectors=self.vectors(t.detach()),
                rows=self.coordinates.space.rows(points),
                covariance=covariance,
                directions=None if covariance is None else self.directions(t),
            )


def features_of_users(
    model: PersonalModule, batches: Sequence[PreferenceBatch], n_users: int
) -> Tensor:
    """Return the encoded features of users, as their pairs give them, [N, F] float32; NaN where missing."""
    schema = model.card.feature_schema() if hasattr(model, "card") else FeatureSchema.fit(())
    width = len(schema.numbers) + len(schema.category_sizes)
    found = torch.full((n_users, width), torch.nan, device=model.device)
    for batch in batches:
        found[batch.user_id] = batch.features
    return found


def most_likely(losses: PairLosses, *, steps: int, penalty: float = 1.0) -> Tensor:
    """Minimise sum_pairs loss + penalty |t|^2 / 2 for each user from t = 0; return t [N, r].

    Newton's method is used where margins are linear in t, and L-BFGS elsewhere.

    Args:
        steps: largest number of iterations; it stops earlier on convergence.
    """
    if losses.linear is not None:
        return newton(losses.linear, steps=steps, penalty=penalty).to(losses.start())
    t = losses.start().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [t], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        total, gradient = losses.gradient(t)
        t.grad = gradient + penalty * t.detach()
        return total + 0.5 * penalty * t.detach().double().square().sum().item()

    optimizer.step(objective)
    return t.detach()


def laplace_covariance(losses: PairLosses, t: Tensor, *, penalty: float = 1.0) -> Tensor:
    """Compute the covariance [N, r, r] of the Laplace approximation to each user's posterior of t.

    It is the inverse Hessian of -log p(t | pairs) at the mode (MacKay 1992, "A practical Bayesian
    framework for backpropagation networks"). An eigenvalue of the Hessian that is not positive, as
    where a fit stopped before its minimum, is replaced by the prior's.
    """
    eye = torch.eye(t.shape[1], dtype=torch.float64, device=t.device)
    values, basis = torch.linalg.eigh(losses.hessian(t).double() + penalty * eye)
    values = torch.where(values > 0, values, penalty)
    return ((basis / values[:, None]) @ basis.mT).to(t.dtype)
