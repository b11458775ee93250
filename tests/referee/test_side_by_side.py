"""Trials trained side by side against one run of the Lightning trainer each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import WORLD, world, world_tokenizer
from torch import Tensor, nn

from plrhf.aggregators import FiLM
from plrhf.core.types import UserBatch
from plrhf.data.module import PreferenceData
from plrhf.encoders import LookupEncoder
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.features import FixedFeatures, with_features
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import (
    Stack,
    StackedAdamW,
    Training,
    clip,
    train_side_by_side,
    validate,
)
from plrhf.training.trainer import build_trainer, fit

N_STEPS = 11


@pytest.fixture(scope="module")
def data() -> PreferenceData:
    """A small world whose texts are known by their shape."""
    found = PreferenceData(source=world(), seed=3, batch_size=13, eval_batch_size=7, max_tokens=128)
    found.tokenize(world_tokenizer(), layout="packed")
    return with_features(found, "shape")


class Branching(LookupEncoder):
    """Looks at values to decide what to do, which `vmap` cannot follow."""

    def forward(self, users: UserBatch) -> Tensor:
        vectors = super().forward(users)
        return vectors if bool(vectors.sum() > -1e9) else -vectors


def make(
    data: PreferenceData,
    optim: Optim,
    encoder: type[LookupEncoder] = LookupEncoder,
    shrinkage: Any = "fixed",
) -> Any:
    """A model that always starts alike."""
    torch.manual_seed(5)
    hidden = data.datasets["train"].hidden
    assert hidden is not None
    backbone: Any = FixedFeatures(hidden.values.shape[1])
    layer: Any = {"layer_width": 9, "layer_dropout": 0.3, "shrinkage": shrinkage}
    film = FiLM(hidden_size=backbone.hidden_size, n_blocks=1, user_dim=6, **layer)
    own: Any = {"rank": 2, "init": "normal", "shrinkage": shrinkage}
    users = encoder(n_users=data.n_users, user_dim=6, vocabulary=torch.zeros(1, 1), **own)
    parts = {"backbone": backbone, "encoder": users, "aggregator": film}
    return PersonalRewardModel(**parts, n_users=data.n_users + 1, optim=optim, alpha=0.7)


OPTIMS = [
    Optim(user_lr=0.05, head_lr=0.02, user_weight_decay=0.3, warmup_steps=3),
    Optim(user_lr=0.01, head_lr=0.05, warmup_steps=1, schedule="constant", shared_steps=4),
    Optim(user_lr=0.2, head_lr=0.001, user_weight_decay=3.0, warmup_steps=0),
]
LIMITS: dict[str, Any] = {"val_every_n_steps": 2, "max_steps": N_STEPS, "gradient_clip_val": 0.5}


@pytest.mark.parametrize("shrinkage", ["fixed", "learned"])
def test_a_stack_learns_what_single_runs_learn(
    shrinkage: str, data: PreferenceData, tmp_path: Path
) -> None:
    assert data.n_users == WORLD["n_users"]
    stacked = [make(data, optim, shrinkage=shrinkage) for optim in OPTIMS]
    found = train_side_by_side(stacked, data, Training(**LIMITS, patience=3))
    assert all(one.vmapped for one in found)
    for optim, ours, result in zip(OPTIMS, stacked, found, strict=True):
        trainer = build_trainer(
            run_dir=tmp_path / str(id(optim)),
            loggers=[],
            has_val=True,
            accelerator="cpu",
            patience=3,
            **LIMITS,
        )
        theirs = make(data, optim, shrinkage=shrinkage)
        fit(theirs, data, trainer, resume_from=None)
        margins = [
            margins_on(one, data.datasets["test"], batch_size=6) for one in (ours, theirs.eval())
        ]
        assert np.abs(margins[0]).max() > 0.01
        np.testing.assert_allclose(*margins, rtol=0, atol=1e-6)
        best = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
        assert result.score == pytest.approx(float(best), abs=1e-5)
        assert result.step % 2 == 0


@contextmanager
def floats_of(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute in `dtype` wherever the code says float32."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", lambda one: one.to(dtype))
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_single_runs_have_otherwise_is_rounding(
    data: PreferenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 nothing is left of the difference, which in float32 grows step by step."""
    optim = Optim(user_lr=0.03, head_lr=0.01, user_weight_decay=1.0, warmup_steps=3)
    limits: dict[str, Any] = {"val_every_n_steps": 40, "max_steps": 120}
    apart = {}
    for dtype in (torch.float32, torch.float64):
        seen = copy(data)
        seen.datasets = {name: copy(one) for name, one in data.datasets.items()}
        for one in seen.datasets.values():
            assert one.hidden is not None
            one.hidden = replace(one.hidden, values=one.hidden.values.to(dtype))
        with floats_of(dtype, monkeypatch):
            ours = make(data, optim).to(dtype)
            train_side_by_side([ours], seen, Training(**limits))
            how: dict[str, Any] = {"loggers": [], "has_val": True, "accelerator": "cpu", **limits}
            trainer = build_trainer(run_dir=tmp_path / str(dtype), patience=None, **how)
            theirs = make(data, optim).to(dtype)
            fit(theirs, seen, trainer, resume_from=None)
            test = seen.datasets["test"]
            margins = [margins_on(one.eval(), test, batch_size=60) for one in (ours, theirs)]
        apart[dtype] = np.abs(margins[0] - margins[1]).max()
    assert apart[torch.float64] < 1e-11
    assert apart[torch.float32] > 1e3 * apart[torch.float64]


def test_trials_that_go_on_are_validated_without_dropout(data: PreferenceData) -> None:
    models = [make(data, optim) for optim in OPTIMS[:2]]
    val = list(data.val_dataloader())
    alone = validate(Stack(models[1:]), val)
    stack = Stack(models)
    stack.train(True)
    stack.keep(torch.tensor([False, True]))  # the first one has stopped
    torch.testing.assert_close(validate(stack, val), alone)


def test_what_vmap_cannot_take_is_trained_one_after_the_other(data: PreferenceData) -> None:
    training = Training(max_steps=4, val_every_n_steps=2)
    one_call = [make(data, optim) for optim in OPTIMS[:2]]
    train_side_by_side(one_call, data, training)
    in_turn = [make(data, optim, Branching) for optim in OPTIMS[:2]]
    found = train_side_by_side(in_turn, data, training)
    assert not any(one.vmapped for one in found)
    for ours, theirs in zip(in_turn, one_call, strict=True):
        test = data.datasets["test"]
        np.testing.assert_allclose(
            margins_on(ours, test, batch_size=9), margins_on(theirs, test, batch_size=9), atol=1e-5
        )


def test_stacked_adamw_is_torchs() -> None:
    rates, decays = torch.tensor([0.1, 0.03]), torch.tensor([0.0, 0.7])
    start = torch.randn(2, 3, 4)
    stacked = {"w": start.clone()}
    ours = StackedAdamW(stacked, rates={"w": rates}, decays={"w": decays})
    singles = [nn.Parameter(one.clone()) for one in start]
    theirs = [
        torch.optim.AdamW([one], lr=float(rate), weight_decay=float(decay))
        for one, rate, decay in zip(singles, rates, decays, strict=True)
    ]
    for _ in range(5):
        gradient = torch.randn(2, 3, 4)
        ours.step({"w": gradient.clone()}, {"w": torch.ones(2)})
        for one, optimizer, own in zip(singles, theirs, gradient, strict=True):
            one.grad = own.clone()
            optimizer.step()
    torch.testing.assert_close(stacked["w"], torch.stack([one.detach() for one in singles]))


def test_clipping_is_torchs_for_each_trial() -> None:
    gradients = {"a": torch.randn(2, 3), "b": torch.randn(2, 4, 1)}
    gradients["a"][1] *= 1e-3
    gradients["b"][1] *= 1e-3
    expected = []
    for trial in range(2):
        own = [nn.Parameter(torch.zeros_like(one[trial])) for one in gradients.values()]
        for parameter, one in zip(own, gradients.values(), strict=True):
            parameter.grad = one[trial].clone()
        nn.utils.clip_grad_norm_(own, 0.5)
        expected.append([one.grad for one in own])
    clip(gradients, 0.5)
    for trial in range(2):
        for found, wanted in zip(gradients.values(), expected[trial], strict=True):
            torch.testing.assert_close(found[trial], wanted)


def test_only_what_is_learned_is_stacked(data: PreferenceData) -> None:
    model = make(data, OPTIMS[0])
    model.head.requires_grad_(False)
    stack = Stack([model, model])
    assert "encoder.basis" in stack.learned and "head.weight" not in stack.learned
    assert stack.weights["head.weight"].shape[0] == 2
    assert not any(name.startswith(("backbone.", "val_")) for name in stack.weights)
