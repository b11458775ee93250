"""The interface of an adaptation rule, and how all rules score pairs for given user vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.core.types import PreferenceBatch
from plrhf.data.rows import Row

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

KEPT_NUMBERS = 2**28
"""Largest number of precomputed numbers kept while users are fitted: 1 GiB in float32."""


@dataclass(frozen=True)
class AdaptedUsers:
    """The result of an adaptation rule for N users, on the model's device.

    Attributes:
        vectors: e_u, [N, user_dim] float32.
        rows: the users' rows [N, ...] of the encoder's tables by name, for `enrol`; None: the rule
            gives vectors only.
        covariance: posterior covariance of the r fitted numbers t of each user, [N, r, r]; None: the
            rule gives point estimates only.
        own_pairs: pairs of each user that are put in front of the prompts; None: the model reads none.
        directions: derivative of e_u with respect to t, [N, r, user_dim]; None without a covariance.
        shares: probability of each of K priors given the user's pairs, [N, K]; None: the rule has one.
        resolved: share of the prior's variance that the pairs have removed, [N], given with `shares`.
    """

    vectors: Tensor
    rows: dict[str, Tensor] | None = None
    covariance: Tensor | None = None
    directions: Tensor | None = None
    own_pairs: list[list[Row]] | None = None
    shares: Tensor | None = None
    resolved: Tensor | None = None


class Adaptation(ABC):
    """Fits the vectors of new users, whom training has not seen, to a few of their pairs.

    All other parameters of the model are frozen. A subclass is built by keyword from its settings.
    """

    @abstractmethod
    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        """Fit the vectors of N new users.

        Args:
            model: a trained model in eval mode.
            batches: the users' pairs. `user_id` is the new user's number from 0 to N - 1, their row in
                the result; it is not an index of the encoder. A user may have no pairs.
            features: of the users, encoded, [N, F]; None: as their pairs say. Only encoders that have
                both features and rows of single users read them here.

        Raises:
            ValueError: the model lacks what the rule needs.
        """


def score_pairs(
    model: PersonalModule, batch: PreferenceBatch, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute margins [B] and losses [B] of pairs; `user_id` says which of `vectors` a pair uses."""
    margins, losses = model.pair_losses(batch, vectors[batch.user_id])
    return margins[0], losses[0]


def margin_gradients(
    model: PersonalModule, batch: PreferenceBatch, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute margins [B] and their gradients with respect to the users' vectors, [B, user_dim].

    `user_id` says which row of `vectors` a pair uses.
    """
    user = vectors.detach()[batch.user_id].requires_grad_()
    with torch.enable_grad():
        margins = model.margins_for(batch, user)[0][0]
        (slopes,) = torch.autograd.grad(margins.sum(), user)
    return margins.detach(), slopes


def attenuated_margins(
    model: PersonalModule, batch: PreferenceBatch, users: AdaptedUsers
) -> Tensor:
    """Compute margins [B], made smaller where a user's vector is uncertain, so that they are calibrated.

    With a margin m of variance v under the posterior, E sigma(m) ~ sigma(m / sqrt(1 + pi v / 8))
    (MacKay 1992, "The evidence framework applied to classification networks", eq. 10).

    Args:
        users: must have a covariance.
    """
    assert users.covariance is not None and users.directions is not None
    margins, slopes = margin_gradients(model, batch, users.vectors)
    of_t = torch.einsum("bru,bu->br", users.directions[batch.user_id], slopes)
    variance = torch.einsum("br,brs,bs->b", of_t, users.covariance[batch.user_id], of_t)
    return margins / (1 + torch.pi / 8 * variance.clamp(min=0)).sqrt()


def with_precomputed(
    model: PersonalModule, batches: Sequence[PreferenceBatch]
) -> list[PreferenceBatch]:
    """Move batches to the model's device, and precompute all that does not depend on the user.

    Nothing is precomputed if it would take more than `KEPT_NUMBERS` numbers.
    """
    device = next(model.parameters()).device
    on_device = [move_data_to_device(batch, device) for batch in batches]
    n_positions = sum(batch.input_ids.numel() for batch in on_device)
    # Of a position the last hidden state is kept, or the keys and values of each block.
    kept_states = 1 if model.aggregator.after_trunk else 2 * model.backbone.config.num_hidden_layers
    if n_positions * kept_states * model.backbone.hidden_size > KEPT_NUMBERS:
        return on_device  # the trunk runs again whenever pairs are scored
    with torch.no_grad():
        return [model.precomputed(batch) for batch in on_device]
