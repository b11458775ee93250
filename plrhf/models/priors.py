"""What priors need to know of a training run: how many pairs there are, and at which step it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from plrhf.core.shrinkage import Shrinkage
from plrhf.data.module import PreferenceData

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def priors_of(model: nn.Module) -> list[Shrinkage]:
    """Return the parts of a model that learn how far numbers are shrunk."""
    return [part for part in model.modules() if isinstance(part, Shrinkage)]


def split_variances(
    model: nn.Module, of_users: list[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Divide parameters of the user model into those of priors and the others."""
    variances = [one for prior in priors_of(model) for one in prior.parameters()]
    apart = {id(one) for one in variances}
    return variances, [one for one in of_users if id(one) not in apart]


def count_pairs(model: PersonalModule, data: PreferenceData) -> None:
    """Tell the parts how many train pairs each user has, which a prior is weighed against."""
    users = data.datasets["train"].user_id
    model.encoder.count_pairs(torch.bincount(users, minlength=model.val_accuracy.n_users))
    model.aggregator.count_pairs(len(users))


def weigh_priors(model: PersonalModule, step: int) -> None:
    """Give learned shrinkage the weight that it has in the loss of a step."""
    for prior in priors_of(model):
        prior.weight.fill_(model.optim.shrinkage_factor(step))
