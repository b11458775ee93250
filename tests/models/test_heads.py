"""Reward heads: rewards by hand, and what a head is handed."""

from __future__ import annotations

import pytest
import torch
from tiny import WIDTH, assert_same, gradients, make_batch, make_model, make_pairs, perturb
from torch import Tensor, nn

from plrhf.aggregators import FiLM
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads import LinearHead, RewardHead, build_head
from plrhf.models.reward import PersonalRewardModel


class Product(RewardHead):
    """An outsider's head: the user's numbers times as many projections of the response."""

    reads_user = True

    def __init__(self, *, hidden_size: int, user_dim: int, scale: float) -> None:
        super().__init__()
        self.project, self.scale = nn.Linear(hidden_size, user_dim, bias=False), scale

    def forward(self, hidden: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        of_user = user.view(*hidden.shape[:2], 1, -1)
        return self.scale * (of_user * self.project(hidden)).sum(-1)


def test_a_head_is_handed_the_users_of_each_context() -> None:
    settings = {"_target_": f"{__name__}.Product", "scale": 2.0}
    head = build_head(settings, hidden_size=WIDTH, user_dim=WIDTH)
    assert isinstance(head, Product)
    model = make_model(PersonalRewardModel, aggregator="film_last", head=head).eval()
    batch = make_batch(make_pairs())
    with torch.no_grad():
        found = model.context_margins(batch)
        user, _ = model.user_vectors(batch, ("user", "generic"))
        hidden = model.hidden_for(batch, user)
        for context, name in enumerate(("user", "generic")):
            vectors = user.view(2, len(batch), -1)[context]
            chosen, rejected = (
                2.0 * (vectors * head.project(hidden[context, :, which])).sum(1) for which in (0, 1)
            )
            torch.testing.assert_close(found[name], chosen - rejected)


def test_a_head_of_no_known_name_is_refused() -> None:
    for head in ("lineal", {"scale": 1.0}):
        with pytest.raises(ValueError, match=r"^model\.head=.* expected one of linear"):
            build_head(head, hidden_size=3, user_dim=2)
    with pytest.raises(ValueError, match=r"^model\.head\.scale=1\.0 is not allowed"):
        build_head({"name": "linear", "scale": 1.0}, hidden_size=3, user_dim=2)
    assert isinstance(build_head("linear", hidden_size=3, user_dim=2), LinearHead)


@pytest.mark.parametrize("personal", [True, False])
def test_terms_of_texts_give_the_rewards_of_hidden_states(personal: bool) -> None:
    """The twin modulates the hidden states of both responses of every pair."""
    film = FiLM(hidden_size=WIDTH, n_blocks=3, layer_width=37)
    perturb(film, "to_film")
    model = make_model(PersonalRewardModel, aggregator=film, personal=personal, alpha=0.4).eval()
    pairs = make_batch(make_pairs())
    batch = model.without_user(pairs)
    user, _ = model.user_vectors(batch, model.context_names)
    found = []
    for way in (model.margins_for, super(PersonalRewardModel, model).margins_for):
        model.zero_grad()
        margins, rewards = way(batch, user)
        (margins.square().sum() + rewards[..., 0].sum()).backward(retain_graph=True)
        found.append({"margins": margins, "rewards": rewards, **gradients(model)})
    assert len(found[0]) > 3
    assert_same(found[0], found[1], atol=1e-5)
