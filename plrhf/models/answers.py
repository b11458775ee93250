"""How people answer, apart from what they like: how noisily they choose, how readily they call a tie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.core.choices import davidson, margins_with_errors, plackett_luce
from plrhf.core.errors import bad_value
from plrhf.core.types import Feedback
from plrhf.data.rows import Ties
from plrhf.encoders import UserEncoder

Noise = Literal["none", "temperature", "errors"]

RatingScale = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Lowest and highest rating."""

MOST_LEVELS = 100
"""Largest number of levels of a scale."""

FIRST_ERROR_LOGIT = -3.0
"""Where the error rate starts: one answer in twenty is random."""


class UserNumber(nn.Module):
    """Computes a number for each user: a shared one, plus a linear map of the user's vector.

    The map starts at zero. As the number is read from the user's vector, it is shrunk, adapted, enrolled
    and forgotten with it.

    Args:
        start: the shared number at the start. user_dim: width of user vectors; 0: no map.
        learn_shared: whether the shared number is learned.
    """

    def __init__(self, *, start: float, user_dim: int, learn_shared: bool = True) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor(start), requires_grad=learn_shared)
        self.own = nn.Parameter(torch.zeros(user_dim))

    def forward(self, user: Tensor) -> Tensor:
        """Compute the numbers [N] float32 of users with vectors [N, D]."""
        if len(self.own) == 0:
            return self.shared.expand(len(user))
        return self.shared + (user.float() * self.own).sum(dim=-1)  # a product @ would be autocast


def tie_parameter(ties: Ties, encoder: UserEncoder, *, user_dim: int) -> UserNumber | None:
    """Build log nu of `choices.davidson`, of all users or each user's own; None if ties are left out.

    Raises:
        ValueError: users are to have their own, but the encoder does not tell them apart.
    """
    if ties == "own" and not encoder.personal:
        allowed = "none or shared with an encoder that does not tell users apart"
        raise bad_value("model.ties", ties, allowed, "Set model.ties=shared, or encoder=lookup")
    if ties == "none":
        return None
    return UserNumber(start=0.0, user_dim=user_dim if ties == "own" else 0)


def answer_losses(
    margins: Tensor,
    feedback: Feedback | None,
    log_tie: Tensor | None,
    of_pairs: Callable[[], Tensor],
) -> Tensor:
    """Compute the negative log-likelihood of choices among several responses, or of choices and ties.

    Args:
        margins: [C, B], log-odds of each pair's choice.
        log_tie: log nu of each, [C * B]; None: there are no ties.
        of_pairs: computes the losses [C, B] of plain choices, without ties.
    """
    if feedback is not None and feedback.choice is not None:
        return plackett_luce(margins, feedback.choice)
    if log_tie is None:
        return of_pairs()
    is_tie = torch.zeros_like(margins[0], dtype=torch.bool) if feedback is None else feedback.is_tie
    return davidson(margins, log_tie.view_as(margins), is_tie)


def refuse_choices(clashes: Iterable[tuple[str, bool]]) -> None:
    """Raise a ValueError if a choice among several responses has no likelihood with these settings.

    Args:
        clashes: names of settings, and whether each is set to something that has none.
    """
    for setting, is_set in clashes:
        if is_set:
            allowed = f"pairs of their own with this {setting}, not choices among several"
            cure = "Set that to its default, or give pairs without group_id"
            raise bad_value("group_id", "of a ranking", allowed, cure)


class Temperature(nn.Module):
    """Divides a user's margins by a temperature t_u = exp(v . e_u): above 1, choices are noisier.

    All users together have the temperature 1, since the rewards have a scale of their own.
    """

    def __init__(self, *, user_dim: int) -> None:
        super().__init__()
        self.log_temperature = UserNumber(start=0.0, user_dim=user_dim, learn_shared=False)

    def forward(self, margins: Tensor, user: Tensor) -> Tensor:
        """Return the log-odds [C, B] of choices with margins [C, B] by users [C * B, D]."""
        return margins * (-self.log_temperature(user)).exp().view_as(margins)


class Errors(nn.Module):
    """Gives each user a rate of random answers, sigma(b + v . e_u); see `choices.margins_with_errors`."""

    def __init__(self, *, user_dim: int) -> None:
        super().__init__()
        self.error_logit = UserNumber(start=FIRST_ERROR_LOGIT, user_dim=user_dim)

    def forward(self, margins: Tensor, user: Tensor) -> Tensor:
        """Return the log-odds [C, B] of choices with margins [C, B] by users [C * B, D]."""
        return margins_with_errors(margins, self.error_logit(user).view_as(margins))


NOISES: dict[str, type[Temperature] | type[Errors]] = {
    "temperature": Temperature,
    "errors": Errors,
}


class Thresholds(nn.Module):
    """Computes the thresholds between a user's ratings, theta_1 < ... < theta_{K-1}.

    The first, and the logarithms of the gaps between them, are shared numbers plus a linear map of the
    user's vector that starts at zero, like `UserNumber`.

    Args:
        n_levels: K, at least 2. user_dim: width of user vectors; 0: all users have the shared thresholds.
    """

    def __init__(self, *, n_levels: int, user_dim: int) -> None:
        super().__init__()
        if not 2 <= n_levels <= MOST_LEVELS:
            allowed = f"two whole numbers, from which to which there are 2 to {MOST_LEVELS}"
            cure = "Set model.rating_scale=[1,5]"
            raise bad_value("model.rating_scale", f"{n_levels} levels", allowed, cure)
        start = torch.zeros(n_levels - 1)  # gaps of 1, around 0
        start[0] = 1 - 0.5 * n_levels
        self.shared = nn.Parameter(start)
        self.own = nn.Parameter(torch.zeros(n_levels - 1, user_dim))

    def forward(self, user: Tensor) -> Tensor:
        """Compute the thresholds [N, K - 1] float32 of users with vectors [N, D]."""
        numbers = self.shared.expand(len(user), -1)
        if self.own.shape[1] > 0:
            numbers = numbers + (user.float()[:, None] * self.own).sum(dim=-1)
        return torch.cat([numbers[:, :1], numbers[:, 1:].exp()], dim=1).cumsum(dim=1)
