"""Reward models that learn from ties, weights and strengths, and how noisily each user answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import gradients, make_batch, make_model, make_pairs
from torch import Tensor, tensor

from plrhf.core.choices import cumulative_logit, davidson, margins_with_errors
from plrhf.core.losses import bradley_terry
from plrhf.core.types import Feedback, PreferenceBatch
from plrhf.data.packing import TokenPair
from plrhf.models.adaptation.base import score_pairs
from plrhf.models.adaptation.reweight import log_likelihoods
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

WEIGHTS = tensor([0.5, 2.0, 1.0, 0.5, 1.5, 1.0, 0.5])
STRENGTHS = tensor([0.0, 1.0, 3.0, 2.0, 0.5, 1.0, 1.0])
IS_TIE = tensor([False, True, False, False, True, False, False])


def batch_with(**given: Tensor) -> PreferenceBatch:
    """Seven pairs whose feedback is plain but for what is given."""
    plain = {"is_tie": torch.zeros(7, dtype=torch.bool), "weight": torch.ones(7)}
    feedback = Feedback(**{**plain, "strength": torch.ones(7), **given})
    return replace(make_batch(make_pairs()), feedback=feedback)


def own_numbers(model: Any) -> None:
    """Let user vectors change the user's numbers."""
    for part in (model.log_tie, getattr(model, "noise", None)):
        for name, one in [] if part is None else part.named_parameters():
            if name.endswith("own"):
                torch.nn.init.normal_(one, std=0.3)


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_a_weight_counts_a_pair_so_often(kind: Any) -> None:
    model, batch = make_model(kind), batch_with(weight=WEIGHTS)
    weighted, margins = model.loss(batch)
    plain, same = model.loss(replace(batch, feedback=None))
    torch.testing.assert_close(weighted, WEIGHTS * plain)
    assert margins.equal(same)
    vectors = model.user_vectors(batch, ("user",))[0].detach()
    fitted = replace(batch, user_id=torch.arange(7))
    user_loss = score_pairs(model, replace(fitted, feedback=None), vectors)[1]
    torch.testing.assert_close(score_pairs(model, fitted, vectors)[1], WEIGHTS * user_loss)


def test_a_target_margin_grows_with_the_strength() -> None:
    model = make_model(PersonalRewardModel, alpha=1.0, target_margin=0.5)
    batch = batch_with(strength=STRENGTHS)
    losses, margins = model.loss(batch)
    torch.testing.assert_close(losses, bradley_terry(margins - 0.5 * STRENGTHS))
    everybody = replace(batch, feedback=None)
    torch.testing.assert_close(model.loss(everybody)[0], bradley_terry(margins - 0.5))


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
@pytest.mark.parametrize("ties", ["shared", "own"])
def test_ties_have_their_likelihood_in_both_contexts(ties: str, kind: Any) -> None:
    model = make_model(kind, ties=ties, alpha=0.25)
    own_numbers(model)
    batch = batch_with(is_tie=IS_TIE)
    user, _ = model.user_vectors(batch, model.context_names)
    margins, _ = model.margins_for(batch, user)
    log_tie = model.log_tie(user).view(2, 7)
    assert (log_tie.std() > 0) == (ties == "own")
    expected = davidson(margins, log_tie, IS_TIE)
    loss, _ = model.loss(batch)
    torch.testing.assert_close(loss, 0.25 * expected[0] + 0.75 * expected[1])
    loss.sum().backward()
    learned = gradients(model)
    assert learned["log_tie.shared"] != 0
    assert ("log_tie.own" in learned and learned["log_tie.own"].abs().max() > 0) == (ties == "own")
    names = {id(one) for one in model.trainable_parts()["head"]}
    assert id(model.log_tie.shared) in names


def test_a_tie_counts_one_half_in_the_accuracy_of_training() -> None:
    model = make_model(PersonalRewardModel, ties="shared")
    _, accuracy = model.training_loss(batch_with(is_tie=IS_TIE))
    right = model(batch_with())[~IS_TIE] > 0
    torch.testing.assert_close(accuracy, (right.float().sum() + 1.0) / 7)


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_ties_that_nobody_calls_change_nothing(kind: Any) -> None:
    model = make_model(kind)
    expected, _ = model.loss(make_batch(make_pairs()))
    expected.sum().backward()
    tied = make_model(kind, ties="shared")
    with torch.no_grad():
        tied.log_tie.shared.fill_(-40.0)
    found, _ = tied.loss(batch_with())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found.sum().backward()
    wanted, got = gradients(model), gradients(tied)
    for name, one in wanted.items():
        torch.testing.assert_close(got[name], one, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["temperature", "errors"])
def test_noise_changes_log_odds_and_never_who_wins(noise: str) -> None:
    model, plain = make_model(PersonalRewardModel, noise=noise), make_model(PersonalRewardModel)
    own_numbers(model)
    batch = make_batch(make_pairs())
    user, _ = model.user_vectors(batch, ("user", "generic"))
    margins, rewards = plain.margins_for(batch, user)
    found, same = model.margins_for(batch, user)
    assert same.equal(rewards)
    assert found.sign().equal(margins.sign())
    vectors = user.double()
    if noise == "temperature":
        expected = margins / (vectors @ model.noise.log_temperature.own.double()).exp().view(2, 7)
    else:
        number = model.noise.error_logit
        expected = margins_with_errors(margins, (vectors @ number.own.double() - 3).view(2, 7))
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)
    model.loss(batch)[0].sum().backward()
    assert all(
        one.grad is not None and bool(one.grad.abs().max() > 0)
        for one in model.noise.parameters()
        if one.requires_grad
    )


LEVELS = tensor([0, 4, -1, 2, 3, 1, -1])


@pytest.mark.parametrize("personal", [True, False])
def test_ratings_have_thresholds_of_their_users(personal: bool) -> None:
    model = make_model(
        PersonalRewardModel, rating_scale=[1, 5], personal=personal, alpha=0.25 if personal else 1.0
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.thresholds.own, std=0.3)
    batch = batch_with(rating=LEVELS)
    user, _ = model.user_vectors(batch, model.context_names)
    margins, rewards = model.margins_for(batch, user)
    theta = model.thresholds(user)
    assert bool((theta.diff(dim=1) > 0).all())
    assert (theta.std(dim=0).max() > 1e-3) == personal
    of_rating = cumulative_logit(
        rewards[..., 0], LEVELS.clamp(min=0), theta.view(*margins.shape, 4)
    )
    expected = torch.where(LEVELS >= 0, of_rating, bradley_terry(margins))
    loss, _ = model.loss(batch)
    shares = tensor([[0.25], [0.75]]) if personal else tensor([[1.0]])
    torch.testing.assert_close(loss, (shares * expected).sum(0))
    loss.sum().backward()
    assert gradients(model)["thresholds.shared"].abs().min() > 0
    assert personal == (len(model.thresholds.own.flatten()) > 0)


def test_thresholds_start_around_zero_and_shared() -> None:
    thresholds = make_model(PersonalRewardModel, rating_scale=[0, 3]).thresholds
    found = thresholds(torch.randn(2, thresholds.own.shape[1]))
    torch.testing.assert_close(found, tensor([[-1.0, 0.0, 1.0]]).expand(2, 3))


def rewards_of(model: Any, batch: PreferenceBatch) -> Tensor:
    """Rewards [B, 2] of a reward model, or implicit ones of a policy, beta * log(policy / reference)."""
    if isinstance(model, PersonalRewardModel):
        return model.rewards(batch)
    hidden = model.hidden(batch, ("user",))[0]
    return 0.1 * (model.logps(hidden, batch) - model.reference_logps(batch))


RANKING = tensor([0, 0, 0, 3, 3, 5, 6])  # four responses, and a pair


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_a_ranking_has_the_likelihood_of_its_choices(kind: Any) -> None:
    prompt, ranked = (3, 4), [(5, 0), (6, 7, 0), (8, 0), (9, 2, 1, 0)]
    pairs = [TokenPair(prompt, ranked[i], ranked[j]) for i in range(4) for j in range(i + 1, 4)]
    batch = make_batch([*pairs, make_pairs()[0]], users=[2] * 7)
    model = make_model(kind, alpha=1.0)
    expected, margins = model.loss(batch)
    feedback = batch_with(choice=RANKING).feedback
    found, same = model.loss(replace(batch, feedback=feedback))
    assert same.equal(margins)
    torch.testing.assert_close(found[5:], expected[5:])  # of the two last, and of a pair
    rewards = rewards_of(model, batch)
    values = torch.stack([*rewards[[0, 3, 5], 0], rewards[5, 1]])
    likelihood = sum(values[j:].logsumexp(0) - values[j] for j in range(4))
    torch.testing.assert_close(found[:6].sum(), likelihood)


@pytest.mark.parametrize(
    "settings",
    [
        {"ties": "shared"},
        {"noise": "errors"},
        {"loss": "hinge"},
        {"head": "mean_variance"},
        {"kind": PersonalDPOPolicy, "ties": "shared"},
        {"kind": PersonalDPOPolicy, "loss": "ipo"},
    ],
)
def test_rankings_that_have_no_likelihood(settings: dict[str, Any]) -> None:
    model = make_model(**{"kind": PersonalRewardModel, **settings})
    with pytest.raises(ValueError, match="group_id='of a ranking' .* with this model") as caught:
        model.loss(batch_with(choice=RANKING))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ties": "own", "personal": False}, "model.ties='own' .* expected none or shared with an"),
        ({"noise": "errors", "personal": False}, "model.noise='errors' .* expected none with an"),
        ({"ties": "shared", "loss": "hinge"}, "model.ties=.* its default with model.loss=hinge"),
        ({"ties": "shared", "target_margin": 1.0}, "its default with model.target_margin"),
        ({"ties": "shared", "start": "pca"}, "its default with model.start"),
        ({"ties": "many"}, "model.ties='many'"),
        (
            {"kind": PersonalDPOPolicy, "ties": "own", "loss": "ipo"},
            "model.ties='own' .* expected none with another loss than sigmoid",
        ),
        ({"rating_scale": [5, 5]}, "model.rating_scale='1 levels' .* expected two whole numbers"),
        ({"rating_scale": [5]}, "model.rating_scale=.5. is not allowed"),
        ({"rating_scale": [1, 5], "noise": "errors"}, "its default with model.noise"),
        (
            {"rating_scale": [1, 5], "ties": "own"},
            "model.ties=.* its default with model.rating_scale",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_model(**{"kind": PersonalRewardModel, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ties", ["none", "own"])
def test_known_people_are_weighed_by_the_models_own_likelihood(ties: str) -> None:
    model = make_model(PersonalRewardModel, aggregator="film_last", ties=ties).eval()
    own_numbers(model)
    is_tie = IS_TIE if ties == "own" else torch.zeros_like(IS_TIE)
    batch = replace(batch_with(weight=WEIGHTS, is_tie=is_tie), user_id=torch.zeros(7).long())
    particles = torch.randn(5, model.aggregator.user_dim)
    with torch.no_grad():
        found = log_likelihoods(model, model.without_user(batch), particles)
        expected = [-score_pairs(model, batch, one[None])[1] for one in particles]
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.std(dim=0).min() > 0
