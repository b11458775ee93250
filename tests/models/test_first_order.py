"""P-DPO to first order: log-ratios of small user effects, from gradients that are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import N_LAYERS, WIDTH, make_backbone, make_batch, make_model, make_pairs, perturb

from plrhf.aggregators import FiLM
from plrhf.core.errors import BadValue
from plrhf.data.packing import packed, two_rows
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


def first_order_policy(std: float, **film: Any) -> PersonalDPOPolicy:
    aggregator = FiLM(hidden_size=WIDTH, n_blocks=N_LAYERS, **film)
    perturb(aggregator, "to_film", std=std)
    frozen = make_backbone("llama", trainable="frozen", lora=None)
    settings: dict[str, Any] = {"aggregator": aggregator, "first_order": True, "beta": 0.7}
    policy: PersonalDPOPolicy = make_model(PersonalDPOPolicy, backbone=frozen, **settings)
    return policy.eval()


@pytest.mark.parametrize("layout", [packed, two_rows])
@pytest.mark.parametrize(
    "film",
    [
        {},
        {"scale": False},
        {"shift": False},
        {"site": "every_block"},
        {"site": "every_block", "scale": False},
        {"site": "every_block", "from_depth": 0.7},
    ],
)
def test_small_effects_have_the_log_ratios_of_the_model(layout: Any, film: dict[str, Any]) -> None:
    """The error falls with the square of the effect, so its share falls with the effect."""
    batch = make_batch(make_pairs(), layout=layout, slots=None)
    errors = []
    largest = 0.01 if film.get("site") == "every_block" else 1.0
    for std in (largest, 0.1 * largest):
        policy = first_order_policy(std, **film)
        user, _ = policy.user_vectors(batch, ("user", "generic"))
        with torch.no_grad():
            gradients = policy.pooled_trunk(batch)  # [B, 2, n_outputs]
        texts = torch.arange(2 * len(batch)).view(-1, 2)
        found, _ = policy.margins_for(batch.pooled(gradients.flatten(0, 1), texts), user)
        with torch.no_grad():
            exact, _ = policy.margins_for(batch, user)
        assert found.shape == exact.shape == (2, len(batch))
        found = found.detach()
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    assert errors[1] < 0.02 and errors[1] < 0.5 * errors[0]


def test_it_needs_a_frozen_trunk_and_film() -> None:
    message = "model.first_order=True is not allowed"
    with pytest.raises(BadValue, match=message):
        make_model(PersonalDPOPolicy, aggregator="film_last", first_order=True)
    frozen = make_backbone(trainable="frozen", lora=None)
    with pytest.raises(BadValue, match=message):
        make_model(PersonalDPOPolicy, backbone=frozen, aggregator="soft_prompt", first_order=True)


def test_a_reward_model_needs_the_scale() -> None:
    film = FiLM(hidden_size=WIDTH, n_blocks=N_LAYERS, scale=False)
    with pytest.raises(BadValue, match="aggregator.scale=False is not allowed"):
        make_model(PersonalRewardModel, aggregator=film)
