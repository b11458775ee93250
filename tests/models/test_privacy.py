"""Private gradients: clipping against a loop over users, noise, epsilon against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from tiny import WIDTH, make_backbone, make_batch, make_model, make_pairs
from torch import Tensor, tensor

from plrhf.aggregators import FiLM
from plrhf.encoders import ClusterMixtureEncoder, LookupEncoder, UserEncoder
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.privacy import Privacy, PrivateGradient, clip_factors, places_of_users
from plrhf.models.reward import PersonalRewardModel

USERS = [1, 1, 2, 1, 3, 3, 1]  # 4, 1 and 2 pairs


class Pairs:
    """A dataset of one batch, whose pairs can be had by place."""

    def __init__(self, batch: Any) -> None:
        self.whole = batch

    def batch(self, places: list[int], *, epoch: int = 0) -> Any:
        pairs = make_pairs()
        one = make_batch([pairs[place] for place in places], users=[USERS[at] for at in places])
        if self.whole.ref_logps is not None:
            one = replace(one, ref_logps=self.whole.ref_logps[places])
        return one


def pooled_model(*, clusters: bool) -> Any:
    """A reward model on frozen features, with a layer, a lookup or a mixture of clusters."""
    film = FiLM(hidden_size=WIDTH, n_blocks=3, user_dim=5, layer_width=11)
    torch.nn.init.normal_(film.to_film.weight, std=0.3)
    backbone = make_backbone(trainable="frozen")
    of_users: Any = {"n_users": 5, "user_dim": 5, "vocabulary": torch.empty(1, 1), "init": "normal"}
    encoder: UserEncoder = LookupEncoder(**of_users, rank=2)
    if clusters:
        encoder = ClusterMixtureEncoder(**of_users, n_clusters=3)
    parts: Any = {"backbone": backbone, "encoder": encoder, "aggregator": film}
    return PersonalRewardModel(**parts, n_users=6, alpha=0.7)


def policy() -> tuple[Any, Any]:
    """A policy with LoRA, which is differentiated for one user after the other, and its batch."""
    model = make_model(PersonalDPOPolicy, aggregator="film_last")
    batch = make_batch(make_pairs(), users=USERS)
    return model, replace(batch, ref_logps=torch.randn(7, 2) - 20)


def naive(model: Any, batch: Any, pairs: Pairs, *, clip: float) -> dict[str, Tensor]:
    """The sum of clipped gradients, one user after the other, by `backward`."""
    table = "encoder.offsets.weight"
    learns_generic = not hasattr(model.encoder, "offsets")
    if learns_generic:
        table = "encoder.weights.weight"
    total: dict[str, Tensor] = {}
    for user in sorted(set(USERS)):
        places = [at for at, one in enumerate(USERS) if one == user]
        own = pairs.batch(places)
        if batch.hidden is not None:
            own = model.without_user(own)
        model.zero_grad()
        model.training_loss(own)[0].backward()
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        row = found[table][user].clone()
        found[table][user] = 0.0
        assert found[table][1:].abs().max() == 0  # nobody else's row is touched
        length = math.sqrt(sum(float(one.square().sum()) for one in found.values()))
        for name, one in found.items():
            total.setdefault(name, torch.zeros_like(one)).add_(one, alpha=min(1.0, clip / length))
        total[table][user] = row
    model.zero_grad()
    return total


def private(model: Any, batch: Any, *, noise: float, clip: float) -> PrivateGradient:
    return PrivateGradient(Privacy(noise=noise, clip=clip), users_per_batch=5)


@pytest.mark.parametrize(
    ("kind", "clip"), [("lookup", 0.05), ("lookup", 50.0), ("cluster", 0.05), ("policy", 0.05)]
)
def test_clipped_sums_are_those_of_one_user_after_the_other(kind: str, clip: float) -> None:
    if kind == "policy":
        model, batch = policy()
    else:
        model = pooled_model(clusters=kind == "cluster")
        batch = model.without_user(make_batch(make_pairs(), users=USERS))
    pairs = Pairs(batch)
    model._train_pairs = lambda: pairs
    loss, _ = private(model, batch, noise=1e-12, clip=clip)(model, batch)
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    expected = naive(model, batch, pairs, clip=clip)
    assert len(expected) >= 4
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one / 5, atol=1e-6, rtol=1e-4, msg=name)
    per_user = [
        model.training_loss(pairs.batch([a for a, b in enumerate(USERS) if b == u]))[0].item()
        for u in (1, 2, 3)
    ]
    assert float(loss) == pytest.approx(sum(per_user) / 3, rel=1e-4)


def test_a_long_gradient_is_shortened_over_all_parameters_together() -> None:
    gradients = {"a": tensor([[3.0, 0.0], [0.3, 0.0]]), "b": tensor([[4.0], [0.4]])}
    assert clip_factors(gradients, 2.0).tolist() == pytest.approx([0.4, 1.0])
    assert clip_factors({"a": torch.zeros(2, 3)}, 2.0).tolist() == [1.0, 1.0]


def test_places_of_users_by_hand() -> None:
    at, weight = places_of_users(tensor(USERS), tensor([1, 3]))
    assert at[0].tolist() == [0, 1, 3, 6] and at[1, :2].tolist() == [4, 5]
    assert weight.tolist() == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]


def test_noise_has_its_size_and_falls_on_what_is_shared_alone() -> None:
    """Without anybody in the batch there is noise alone, of deviation noise * clip / users_per_batch."""
    model = pooled_model(clusters=True)
    whole = model.without_user(make_batch(make_pairs(), users=USERS))
    nobody = replace(
        whole,
        **{name: getattr(whole, name)[:0] for name in ("user_id", "features", "row", "texts")},
    )
    draw = private(model, nobody, noise=3.0, clip=0.5)
    values: list[Tensor] = []
    for _ in range(40):
        model.zero_grad()
        loss, accuracy = draw(model, nobody)
        loss.backward()
        assert float(loss) == float(accuracy) == 0.0
        rows = model.encoder.weights.weight.grad
        assert rows[1:].abs().max() == 0 and rows[0].abs().min() > 0
        shared = [one.grad for one in (model.encoder.clusters, *model.aggregator.parameters())]
        values += [rows[0], *(one.flatten() for one in shared)]
    drawn = torch.cat(values)
    n = len(drawn)
    assert float(drawn.std()) == pytest.approx(3.0 * 0.5 / 5, rel=5 / math.sqrt(2 * n))
    assert abs(float(drawn.mean())) < 5 * 0.3 / math.sqrt(n)
    other = private(model, nobody, noise=3.0, clip=0.5)
    assert other.seed != draw.seed  # from the operating system


def closed_form(sigma: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` Gaussian mechanisms (Balle and Wang 2018, theorem 8, mu = sqrt(steps) / sigma)."""
    mu = math.sqrt(steps) / sigma

    def excess(epsilon: float) -> float:
        tail = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        return float(tail) - delta

    return float(brentq(excess, 0.0, 100.0))


@pytest.mark.slow
def test_epsilon_where_everybody_is_drawn() -> None:
    pytest.importorskip("opacus")
    for sigma, steps, delta in ((1.0, 1, 1e-5), (4.0, 30, 1e-6)):
        epsilon = Privacy(noise=sigma, delta=delta).epsilon(sample_rate=1.0, steps=steps)
        exact = closed_form(sigma, steps, delta)
        assert exact <= epsilon <= exact + 0.02


@pytest.mark.slow
def test_epsilon_where_few_are_drawn() -> None:
    """Opacus' own test of the PRV accountant has 6.7774 here, and 7.33 for the looser one of moments."""
    pytest.importorskip("opacus")
    privacy = Privacy(noise=1.5, delta=1e-5)
    assert privacy.epsilon(sample_rate=0.04, steps=2249) == pytest.approx(6.7774, abs=0.001)
    assert privacy.epsilon(sample_rate=0.04, steps=0) == 0.0
    # One step of rate q: at most log(1 + q (e^epsilon - 1)), by amplification, at delta q.
    one = Privacy(noise=1.1, delta=1e-5 * 0.1).epsilon(sample_rate=0.1, steps=1)
    bound = math.log(1 + 0.1 * (math.exp(closed_form(1.1, 1, 1e-5)) - 1))
    assert one <= bound + 0.02


def test_settings_are_checked() -> None:
    for name, value in (("noise", 0.0), ("clip", -1.0), ("delta", 1.0), ("delta", 0.0)):
        with pytest.raises(ValueError, match=rf"^privacy\.{name}="):
            Privacy(**{name: value})
