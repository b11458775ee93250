"""Models on packed rows compute what they do on rows that stand apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import assert_same, gradients, make_backbone, make_batch, make_model, make_pairs
from torch import nn

from plrhf.core.row_packing import NO_USER, UserSlots, first_fit_decreasing
from plrhf.data.packing import TokenPair
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.sft import SupervisedPolicy


@pytest.mark.sampled
@pytest.mark.parametrize("backbone", ["gptj", "llama"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_last", "film_every_block"])
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_rows_together_are_rows_apart(kind: Any, aggregator: str, backbone: str) -> None:
    pairs = [*make_pairs(11), TokenPair((1,) * 30, (2,) * 9, (3,) * 9)]
    rows: list[list[int]] = []  # of the trunk, forward by forward
    found = []
    slots = UserSlots(3 if aggregator == "soft_prompt" else 0)
    for together in (slots, None):
        model = make_model(kind, backbone=make_backbone(backbone), aggregator=aggregator)
        block = next(one for one in model.backbone.modules() if isinstance(one, nn.ModuleList))[0]
        rows.append([])
        block.register_forward_pre_hook(lambda _, given: rows[-1].append(len(given[0])))
        batch = make_batch(pairs, padding=2, slots=together)
        loss = model.loss(batch)[0]
        loss.mean().backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)
    n_packed, n_apart = rows[0][0], rows[1][0]
    # Where something in the trunk goes by row, rows stay as they are.
    assert n_packed == n_apart if aggregator == "film_every_block" else n_packed <= n_apart / 2


@pytest.mark.parametrize("responses", ["both", "chosen"])
def test_supervised_texts_together_are_texts_apart(responses: Any) -> None:
    pairs = [*make_pairs(11), TokenPair((1,) * 30, (2,) * 9, (3,) * 9)]
    found = []
    n_packed = []
    for together in (True, False):
        model = SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses=responses)
        batch = model.on_before_batch_transfer(make_batch(pairs), 0)
        if not together:
            batch = replace(batch, packing=None)
        else:
            n_packed.append(batch.packing.n_packed)
        loss = model.nll(batch)
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)
    n_tokens = [len(one.prompt) + len(one.chosen) for one in pairs]
    if responses == "both":
        n_tokens = [n + len(one.rejected) for n, one in zip(n_tokens, pairs, strict=True)]
    longest = 48  # of the last pair
    assert n_packed == [len(first_fit_decreasing(n_tokens, longest))]


def test_rows_of_another_number_of_user_vectors_stay_apart() -> None:
    batch = make_batch(make_pairs(11), padding=9, slots=UserSlots(2))
    assert batch.packing is not None
    model = make_model(PersonalDPOPolicy)  # a soft prompt of three
    found = model.margins_in_contexts(batch, ("user",))[0]
    batch.packing = None
    assert torch.equal(found, model.margins_in_contexts(batch, ("user",))[0])


@pytest.mark.slow
def test_a_model_knows_where_its_user_vectors_stand() -> None:
    def slots(aggregator: str = "soft_prompt", **settings: Any) -> UserSlots:
        return make_model(PersonalDPOPolicy, aggregator=aggregator, **settings).user_slots

    assert slots() == UserSlots(3)
    assert slots("late_soft_prompt") == UserSlots(3, n_contexts=2)
    assert slots("late_soft_prompt", alpha=1.0) == UserSlots(3, n_contexts=1)
    assert slots("late_soft_prompt", personal=False) == slots("film_last") == NO_USER
