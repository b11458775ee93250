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
from torch import Tensor

from plrhf.aggregators import FiLM
from plrhf.core.errors import BadValue
from plrhf.core.types import UserBatch
from plrhf.data.module import PreferenceData
from plrhf.encoders import LookupEncoder
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee import side_by_side
from plrhf.referee.features import FixedFeatures, with_features
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import Trained, Training, train_groups, train_side_by_side
from plrhf.referee.stack import Stack, validate
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_worse_half_stops_and_the_others_are_as_without(
    data: PreferenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom to stop is read off the val scores of trials that all go on to the end."""
    scores: dict[int, list[float]] = {}  # by group of models: val loss at each validation, [V][T]

    def recorded(stack: Stack, batches: Any) -> Tensor:
        found = validate(stack, batches)
        scores.setdefault(id(stack), []).append(found[:, 0].tolist())
        return found

    optims = [*OPTIMS, replace(OPTIMS[0], head_lr=1e-4), replace(OPTIMS[1], user_lr=1e-4)]

    def trained(halvings: tuple[float, ...]) -> tuple[list[Trained], list[np.ndarray]]:
        groups = [[make(data, one) for one in some] for some in (optims[:2], optims[2:])]
        training = Training(**LIMITS, halvings=halvings)
        found = train_groups(groups, data, training, [torch.get_rng_state()] * 2)
        test = data.datasets["test"]
        margins = [margins_on(model, test, batch_size=60) for model in (*groups[0], *groups[1])]
        return [*found[0], *found[1]], margins

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "validate", recorded)
        whole, expected = trained(())
    curves = np.concatenate([np.array(one) for one in scores.values()], axis=1).T  # [5, V]
    at_steps = {4: 3, 6: 2}  # the first validations after 0.25 and 0.5 of 11 steps: who goes on
    n_steps, racing = np.full(5, N_STEPS), np.ones(5, dtype=bool)
    for step, n_kept in at_steps.items():
        best = np.where(racing, curves[:, : step // 2].min(axis=1), np.inf)
        stopped = best.argsort()[n_kept:]
        n_steps[stopped[racing[stopped]]] = step
        racing[stopped] = False
    found, margins = trained((0.25, 0.5))
    assert [one.n_steps for one in found] == n_steps.tolist()
    assert [one.n_steps for one in whole] == [N_STEPS] * 5
    for place in np.flatnonzero(racing):
        assert found[place].step == whole[place].step
        np.testing.assert_allclose(margins[place], expected[place], rtol=0, atol=1e-6)


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


def test_only_what_is_learned_is_stacked(data: PreferenceData) -> None:
    model = make(data, OPTIMS[0])
    model.head.requires_grad_(False)
    stack = Stack([model, model])
    assert "encoder.basis" in stack.learned and "head.weight" not in stack.learned
    assert stack.weights["head.weight"].shape[0] == 2
    assert not any(name.startswith(("backbone.", "val_")) for name in stack.weights)


@pytest.mark.parametrize("monitor", ["val/nll", "val/true_preference"])
def test_a_metric_that_trials_do_not_have_is_refused(monitor: str) -> None:
    with pytest.raises(BadValue, match="expected val/loss or val/accuracy_micro"):
        Training(max_steps=5, monitor=monitor)  # type: ignore[arg-type]
