"""The parameters of a model by learning rate, and its learned priors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from plrhf.aggregators import Aggregator
from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import Shrinkage
from plrhf.data.module import PreferenceData
from plrhf.data.text_values import independent_pairs, repeated_texts

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def priors_of(model: PersonalModule) -> list[Shrinkage]:
    """Return the modules of a user model that learn shrinkage."""
    of_users = (model.encoder, model.aggregator)  # not the language model: every step asks
    return [one for part in of_users for one in part.modules() if isinstance(one, Shrinkage)]


def user_maps(aggregator: Aggregator) -> list[nn.Parameter]:
    """Return the parameters of an aggregator that act on user vectors."""
    of_text = {id(one) for one in aggregator.text_parameters()}
    return [one for one in aggregator.parameters() if id(one) not in of_text]


def divide_parameters(model: PersonalModule) -> dict[str, list[nn.Parameter]]:
    """Divide a model's parameters by learning rate; see `Optim.rate_and_decay`."""
    variances = [one for prior in priors_of(model) for one in prior.parameters()]
    apart = {id(one) for one in variances}
    of_users = [*model.encoder.parameters(), *user_maps(model.aggregator)]
    of_text = [one for one in model.aggregator.text_parameters() if id(one) not in apart]
    return {
        "backbone": [*model.backbone.parameters()],
        "user": [one for one in of_users if id(one) not in apart],
        "shrinkage": variances,
        "head": [*model.head_parameters(), *of_text],
    }


def count_pairs(model: PersonalModule, data: PreferenceData | None) -> None:
    """Tell the learned priors, if there are any, how many independent train pairs each user has."""
    if len(priors_of(model)) == 0:
        return
    assert data is not None, "learned shrinkage needs the rows, not loaders alone"
    train = data.datasets["train"]
    counts = independent_pairs(train, model.val_accuracy.n_users)
    n_pairs = int(counts.sum())
    model.encoder.count_pairs(counts)
    model.aggregator.count_pairs(n_pairs)
    if model.aggregator.residual is not None:
        model.aggregator.residual.know(*repeated_texts(train), n_pairs)


def weigh_priors(model: PersonalModule, step: int) -> None:
    """Set the weight of learned shrinkage in the loss of a step, and the step that its noise depends on."""
    for prior in priors_of(model):
        prior.weight.fill_(model.optim.shrinkage_factor(step))
        prior.step.fill_(step)


def check_finite(model: nn.Module) -> None:
    """Raise a ValueError if a learned number is nan or infinite."""
    for name, value in model.named_parameters():
        if value.requires_grad and not bool(value.isfinite().all()):
            raise bad_value(
                name,
                "nan or inf",
                "finite numbers",
                "The model diverged: train with lower learning rates (optim.lr, optim.user_lr, "
                "optim.head_lr), or set trainer.gradient_clip_val=1.0",
            )
