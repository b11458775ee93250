"""Reward model and policy: contexts, batches, reference, checkpoints; and the supervised policy."""

from __future__ import annotations

import contextlib
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from tiny import (
    AGGREGATORS,
    LORA,
    USERS,
    WIDTH,
    assert_same,
    gradients,
    language_model,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
)
from torch import Tensor, nn, tensor
from torch.utils.data import DataLoader

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.core.logprobs import naive_response_logps
from plrhf.data.packing import TokenPair, packed, two_rows
from plrhf.encoders import LookupEncoder
from plrhf.models.base import PersonalModule
from plrhf.models.loading import positions_for_text
from plrhf.models.optim import Optim
from plrhf.models.parts import check_finite
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel, pool_responses
from plrhf.models.sft import SupervisedPolicy

both_models = pytest.mark.parametrize("model_class", [PersonalRewardModel, PersonalDPOPolicy])
all_aggregators = pytest.mark.parametrize("aggregator", AGGREGATORS)


def film_with_layer() -> FiLM:
    film = FiLM(hidden_size=WIDTH, n_blocks=3, layer_width=WIDTH, user_dim=WIDTH)
    nn.init.normal_(film.to_film.weight, std=0.1)
    return film


def test_pool_responses_by_hand() -> None:
    hidden = tensor([[[9.0], [1.0], [3.0], [10.0], [20.0], [30.0], [7.0]]])[None]  # [1, 1, L, 1]
    segment = tensor([[0, 1, 1, 2, 2, 2, -1]])
    for pooling, expected in (("mean", [2.0, 20.0]), ("last", [3.0, 30.0])):
        found = pool_responses(hidden, segment, n_pairs=1, pooling=pooling)
        assert found[0, 0, :, 0].tolist() == expected
    # The same pair in two rows.
    hidden = tensor([[9.0, 1.0, 3.0, 5.0], [9.0, 10.0, 20.0, 30.0]])[None, :, :, None]
    segment = tensor([[0, 1, 1, -1], [0, 2, 2, 2]])
    for pooling, expected in (("mean", [2.0, 20.0]), ("last", [3.0, 30.0])):
        found = pool_responses(hidden, segment, n_pairs=1, pooling=pooling)
        assert found[0, 0, :, 0].tolist() == expected


def rows_through_trunk(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all batches that will go through the trunk."""
    rows: list[int] = []
    forward = model.backbone.forward

    def counted(inputs: Tensor, *rest: Tensor, **how: bool) -> Tensor:
        rows.append(len(inputs))
        return forward(inputs, *rest, **how)

    monkeypatch.setattr(model.backbone, "forward", counted)
    return rows


@pytest.mark.sampled
@both_models
@all_aggregators
@pytest.mark.parametrize(("alpha", "n_contexts"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_alpha_of_0_or_1_costs_one_context(
    model_class: Any, aggregator: str, alpha: float, n_contexts: int, monkeypatch: Any
) -> None:
    model = make_model(model_class, aggregator=aggregator, alpha=alpha)
    rows = rows_through_trunk(model, monkeypatch)
    asked: list[str] = []
    for name in ("forward", "generic"):
        function = getattr(model.encoder, name)

        def seen(*given: Any, name: str = name, function: Any = function) -> Tensor:
            asked.append(name)
            return function(*given)

        monkeypatch.setattr(model.encoder, name, seen)
    model.loss(make_batch(make_pairs()))
    reference = [7] if model_class is PersonalDPOPolicy else []
    # After the trunk users cost nothing: one pass serves both contexts.
    trunk = [7] if aggregator == "film_last" else [7 * n_contexts]
    assert rows == trunk + reference
    assert asked == {0.0: ["generic"], 0.5: ["forward", "generic"], 1.0: ["forward"]}[alpha]


@both_models
def test_without_a_user_model_both_contexts_are_one(model_class: Any, monkeypatch: Any) -> None:
    model = make_model(model_class, personal=False, alpha=0.5)
    rows = rows_through_trunk(model, monkeypatch)
    batch = make_batch(make_pairs())
    margins = model.context_margins(batch)
    assert margins["user"] is margins["generic"] or margins["user"].equal(margins["generic"])
    model.loss(batch)
    assert set(rows) == {7}


@both_models
@all_aggregators
@torch.no_grad()
def test_loss_mixes_the_contexts_by_alpha(model_class: Any, aggregator: str) -> None:
    batch = make_batch(make_pairs())

    def loss(alpha: float) -> Tensor:
        return make_model(model_class, aggregator=aggregator, alpha=alpha).loss(batch)[0]

    user, generic = loss(1.0), loss(0.0)
    assert (user - generic)[[0, 1, 2, 4, 5, 6]].abs().min() > 1e-5  # pair 3 is of user 0
    torch.testing.assert_close(user[3], generic[3])
    torch.testing.assert_close(loss(0.25), 0.25 * user + 0.75 * generic, atol=1e-6, rtol=0)


@both_models
@all_aggregators
def test_margins_of_a_context_depend_on_its_user_only(model_class: Any, aggregator: str) -> None:
    model = make_model(model_class, aggregator=aggregator)
    pairs = make_pairs()
    one = model.context_margins(make_batch(pairs, users=[1, 2, 3, 4, 5, 1, 0]))
    other = model.context_margins(make_batch(pairs, users=[1, 2, 3, 4, 5, 2, 0]))
    changed = (one["user"] - other["user"]).abs() > 1e-6
    assert changed.tolist() == [False] * 5 + [True, False]
    assert one["generic"].equal(other["generic"])
    torch.testing.assert_close(one["user"][6], one["generic"][6], atol=1e-6, rtol=0)


@pytest.mark.slow
@both_models
@all_aggregators
def test_loss_and_gradient_do_not_depend_on_batches(model_class: Any, aggregator: str) -> None:
    pairs, users = make_pairs(12), [1, 2, 3, 0, 5, 1, 2, 4, 4, 1, 0, 3]

    def run(*batches: range) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of all pairs, and the gradient of their mean taken batch by batch."""
        model = make_model(model_class, aggregator=aggregator, alpha=0.5)
        losses = []
        for batch in batches:
            found, _ = model.loss(
                make_batch([pairs[i] for i in batch], users=[users[i] for i in batch])
            )
            (found.mean() * len(batch) / 12).backward()
            losses.append(found.detach())
        return torch.cat(losses), gradients(model)

    whole_loss, whole_gradient = run(range(12))
    for batches in (
        [range(0, 4), range(4, 8), range(8, 12)],
        [range(0, 5), range(5, 12)],
        [range(i, i + 1) for i in range(12)],
    ):
        loss, gradient = run(*batches)
        torch.testing.assert_close(loss, whole_loss, atol=1e-6, rtol=0)
        assert_same(gradient, whole_gradient, atol=1e-6)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loader(size: int, n_pairs: int = 12) -> Any:
    pairs = make_pairs(n_pairs)
    return DataLoader(
        range(n_pairs),  # type: ignore[arg-type]
        batch_size=size,
        collate_fn=lambda places: make_batch(
            [pairs[i] for i in places], users=[USERS[i % 7] for i in places]
        ),
    )


@pytest.mark.slow
@both_models
def test_a_step_with_accumulation_is_the_step_of_one_batch(model_class: Any) -> None:
    stepped = []
    for size, accumulate in ((12, 1), (4, 3)):
        model = make_model(model_class)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.configure_optimizers = lambda m=model: torch.optim.SGD(m.parameters(), lr=1.0)
        Trainer(max_steps=1, accumulate_grad_batches=accumulate, **QUIET).fit(model, loader(size))
        after = model.state_dict()
        stepped.append({name: after[name] - before[name] for name in after})
    assert stepped[0]["encoder.basis"].abs().max() > 1e-3
    assert_same(*stepped, atol=1e-6)


@both_models
def test_validation_is_the_mean_over_rows_not_over_batches(model_class: Any) -> None:
    model = make_model(model_class, alpha=0.5)
    (found,) = Trainer(**QUIET).validate(model, loader(5, 7), verbose=False)
    with torch.no_grad():
        loss, _ = model.loss(make_batch(make_pairs(7)))
    margins = model.context_margins(make_batch(make_pairs(7)))["user"]
    assert found["val/loss"] == pytest.approx(loss.mean().item(), abs=1e-6)
    assert found["val/accuracy_micro"] == pytest.approx((margins > 0).double().mean().item())
    nll = nn.functional.softplus(-margins).mean().item()
    assert found["val/nll"] == pytest.approx(nll, abs=1e-6)


@both_models
def test_prediction_says_which_rows(model_class: Any) -> None:
    model = make_model(model_class)
    batch = make_batch(make_pairs(3))
    batch.row = tensor([4, 9, 2])
    found = model.predict_step(batch, 0)
    assert found["row"].tolist() == [4, 9, 2]
    assert found["user"].shape == found["generic"].shape == (3,)
    assert not found["user"].requires_grad


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@torch.no_grad()
def test_the_reference_is_the_base_model(kind: str) -> None:
    pairs = make_pairs()
    model = make_model(PersonalDPOPolicy, backbone=make_backbone(kind)).train()
    for module in model.backbone.modules():  # which training drops, the reference must not
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    apart = make_batch(pairs, layout=two_rows)
    base = language_model(kind).eval()
    mask = (apart.segment >= 0).long()
    hidden = base(apart.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = naive_response_logps(
        hidden, apart.input_ids, apart.segment, base.get_output_embeddings(), n_pairs=7
    )
    found = model.reference_logps(make_batch(pairs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    policy = model.logps(model.hidden(make_batch(pairs), ("generic",))[0], make_batch(pairs))
    assert (policy - found).abs().max() > 0.1


def test_the_reference_takes_no_gradient_and_leaves_things_as_they_were(monkeypatch: Any) -> None:
    model = make_model(PersonalDPOPolicy)
    monkeypatch.setattr(model.encoder, "forward", None)  # whoever asks who the user is fails
    monkeypatch.setattr(model.encoder, "generic", None)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    for training in (True, False):
        model.train(training)
        assert not model.reference_logps(make_batch(make_pairs())).requires_grad
        with model.backbone.reference():
            assert not torch.is_grad_enabled()
        with contextlib.suppress(RuntimeError), model.backbone.reference():
            raise RuntimeError
        assert all(module.training == training for module in model.modules())
        assert trainable == {name for name, one in model.named_parameters() if one.requires_grad}
        assert torch.is_grad_enabled()


def test_reference_logps_given_are_used(monkeypatch: Any) -> None:
    model = make_model(PersonalDPOPolicy)
    batch = make_batch(make_pairs())
    online, _ = model.loss(batch)
    batch.ref_logps = model.reference_logps(batch)
    rows = rows_through_trunk(model, monkeypatch)
    given, _ = model.loss(batch)
    assert rows == [14]  # no reference pass
    torch.testing.assert_close(given, online)


@both_models
def test_a_checkpoint_holds_what_is_learned_and_no_more(model_class: Any) -> None:
    model = make_model(model_class)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    kept = checkpoint["state_dict"]
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in kept if "rotary" not in name and "counts" not in name} == trainable
    assert any("lora_A" in name for name in kept)

    kept = {name: value.clone() for name, value in kept.items()}
    fresh = make_model(model_class, backbone=Backbone(model=language_model(), lora=LORA))
    with torch.no_grad():
        for value in fresh.parameters():
            if value.requires_grad:
                value.normal_()
    fresh.load_state_dict(kept, strict=fresh.strict_loading)
    batch = make_batch(make_pairs())
    expected = model.context_margins(batch)["user"]
    torch.testing.assert_close(fresh.context_margins(batch)["user"], expected)


@pytest.mark.parametrize(
    ("model_class", "aggregator"),
    [
        (PersonalRewardModel, "soft_prompt"),
        (PersonalRewardModel, film_with_layer()),
        (PersonalDPOPolicy, "film_every_block"),
    ],
)
def test_each_weight_learns_at_its_own_rate(
    model_class: Any, aggregator: Any, monkeypatch: Any
) -> None:
    optim = Optim(lr=1.0, user_lr=2.0, head_lr=3.0, warmup_steps=0)
    model = make_model(model_class, aggregator=aggregator, optim=optim)
    trainer = property(lambda _: SimpleNamespace(estimated_stepping_batches=10))
    monkeypatch.setattr(PersonalModule, "trainer", trainer)
    optimizer = model.configure_optimizers()["optimizer"]
    rate_of = {
        id(one): group["initial_lr"] for group in optimizer.param_groups for one in group["params"]
    }
    assert len(rate_of) == sum(len(group["params"]) for group in optimizer.param_groups)

    def expected(name: str) -> float:
        if name.startswith("backbone"):
            return 1.0
        return 3.0 if name.startswith(("head", "aggregator.layer")) else 2.0

    trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert {name: rate_of[id(one)] for name, one in trainable.items()} == {
        name: expected(name) for name in trainable
    }
    assert len(rate_of) == len(trainable)


def test_target_margin_and_centring_enter_the_reward_loss() -> None:
    batch = make_batch(make_pairs())
    plain = make_model(PersonalRewardModel, alpha=1.0)
    rewards = plain.rewards(batch)
    chosen, rejected = rewards.unbind(1)
    loss, _ = make_model(PersonalRewardModel, alpha=1.0, target_margin=0.5, centring=0.1).loss(
        batch
    )
    expected = [
        log(1 + exp(-(c - r - 0.5))) + 0.1 * (c + r) ** 2
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, tensor(expected))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "cdpo"])
def test_policy_hands_its_settings_to_the_loss(loss: str) -> None:
    batch = make_batch(make_pairs())
    settings: dict[str, Any] = {
        "beta": 0.4,
        "loss": loss,
        "label_smoothing": 0.1 if loss == "cdpo" else 0.0,
    }
    model = make_model(PersonalDPOPolicy, alpha=1.0, **settings)
    h = model.context_margins(batch)["user"] / 0.4
    expected = {
        "sigmoid": (1 + (-0.4 * h).exp()).log(),
        "ipo": (h - 1.25) ** 2,
        "hinge": (1 - 0.4 * h).clamp(min=0),
        "cdpo": 0.9 * (1 + (-0.4 * h).exp()).log() + 0.1 * (1 + (0.4 * h).exp()).log(),
    }[loss]
    torch.testing.assert_close(model.loss(batch)[0], expected)


@pytest.mark.parametrize("responses", ["chosen", "both"])
def test_supervised_loss_is_hugging_faces(responses: str) -> None:
    model = SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses=responses)
    apart = make_batch(make_pairs(), layout=two_rows)
    scored = apart.segment == 1
    if responses == "both":
        scored |= apart.segment == 2
    labels = apart.input_ids.masked_fill(~scored, -100)
    mask = (apart.segment >= 0).long()
    expected = model.backbone.model(apart.input_ids, attention_mask=mask, labels=labels).loss
    found = model.nll(model.on_before_batch_transfer(make_batch(make_pairs(), layout=packed), 0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_supervision_by_chosen_does_not_see_rejected() -> None:
    model = SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses="chosen")
    pairs = make_pairs()
    changed = [TokenPair(pair.prompt, pair.chosen, (5, 5, 5)) for pair in pairs]
    batches = (model.on_before_batch_transfer(make_batch(one), 0) for one in (pairs, changed))
    torch.testing.assert_close(*(model.nll(one) for one in batches))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_validation_of_supervision_is_the_mean_over_tokens(batch_size: int) -> None:
    model = SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses="both")
    (found,) = Trainer(**QUIET).validate(model, loader(batch_size, 7), verbose=False)
    with torch.no_grad():
        expected = model.nll(make_batch(make_pairs(7)))  # of all seven at once
    assert found["val/loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_ties_count_one_half_in_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(PersonalRewardModel)
    logged: dict[str, float] = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: float(value)}))
    with torch.no_grad():
        model.head.weight.zero_()  # so that every margin is 0
    model.training_step(make_batch(make_pairs()), 0)
    assert logged["train/accuracy"] == 0.5


@both_models
def test_a_model_is_called_for_the_margins_of_its_users(model_class: Any) -> None:
    model, batch = make_model(model_class), make_batch(make_pairs())
    torch.testing.assert_close(model(batch).detach(), model.context_margins(batch)["user"])
    assert model(batch).requires_grad


class Penalised(LookupEncoder):
    """A lookup that asks training for a penalty of 3 a user."""

    penalty_weight = 0.5

    def encode(self, users: Any) -> tuple[Tensor, Tensor | None]:
        return self(users), torch.full((len(users.user_id),), 3.0)


@both_models
def test_penalties_are_added_in_training_alone(model_class: Any, monkeypatch: Any) -> None:
    model, batch = make_model(model_class), make_batch(make_pairs())
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    plain, val = model.training_step(batch, 0), model.loss(batch)[0]
    model.encoder.__class__ = Penalised
    monkeypatch.setattr(model.aggregator, "penalty", lambda: tensor(10.0))
    monkeypatch.setattr(model.aggregator, "penalty_weight", 0.1, raising=False)
    found = model.training_step(batch, 0)
    torch.testing.assert_close(found, plain + model.alpha * (0.5 * 3.0 + 0.1 * 10.0))
    assert model.loss(batch)[0].equal(val)


def test_a_diverged_model_is_said_to_be_one() -> None:
    model = make_model(PersonalRewardModel)
    check_finite(model)
    with torch.no_grad():
        model.encoder.basis[1, 2] = torch.inf
    with pytest.raises(ValueError) as caught:
        check_finite(model)
    assert str(caught.value).startswith(
        "encoder.basis='nan or inf' is not allowed: expected finite numbers. The model diverged"
    )


def test_a_reward_model_learns_no_shift_that_its_loss_cannot_see() -> None:
    plain = make_model(PersonalRewardModel, aggregator="film_last")
    assert plain.aggregator.to_film.weight.shape == (WIDTH, WIDTH)
    centred = make_model(PersonalRewardModel, aggregator="film_last", centring=0.1)
    assert centred.aggregator.to_film.weight.shape == (2 * WIDTH, WIDTH)
    policy = make_model(PersonalDPOPolicy, aggregator="film_last")
    assert policy.aggregator.to_film.weight.shape == (2 * WIDTH, WIDTH)


@both_models
@all_aggregators
def test_every_learned_number_has_a_gradient(model_class: Any, aggregator: str) -> None:
    for personal in (True, False):
        model = make_model(model_class, aggregator=aggregator, personal=personal)
        model.loss(make_batch(make_pairs()))[0].mean().backward()
        for name, value in model.named_parameters():
            if value.requires_grad:
                assert value.grad is not None and value.grad.abs().max() > 0, name


BAD = [
    (
        lambda: make_model(PersonalRewardModel, alpha=1.5),
        "model.alpha=1.5 is not allowed: expected a number from 0 to 1. Set model.alpha=0.5.",
    ),
    (
        lambda: make_model(PersonalRewardModel, pooling="max"),
        "model.pooling='max' is not allowed: expected last or mean. Set model.pooling=mean.",
    ),
    (
        lambda: make_model(PersonalRewardModel, target_margin=-1.0),
        "model.target_margin=-1.0 is not allowed: expected a number from 0. "
        "Set model.target_margin=0.0.",
    ),
    (
        lambda: make_model(PersonalRewardModel, centring=-0.1),
        "model.centring=-0.1 is not allowed: expected a number from 0. Set model.centring=0.0.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, beta=0.0),
        "model.beta=0.0 is not allowed: expected a number above 0. Set model.beta=0.1.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, loss="kto"),
        "model.loss='kto' is not allowed: expected sigmoid, ipo, hinge or cdpo. "
        "Set model.loss=sigmoid.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, label_smoothing=0.5),
        "model.label_smoothing=0.5 is not allowed: expected a number from 0 and below 0.5. "
        "Set model.label_smoothing=0.0.",
    ),
    (
        lambda: make_model(PersonalRewardModel, alpha=float("nan")),
        "model.alpha=nan is not allowed: expected a number from 0 to 1. Set model.alpha=0.5.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, beta=float("inf")),
        "model.beta=inf is not allowed: expected a number above 0. Set model.beta=0.1.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, label_smoothing=0.1),
        "model.label_smoothing=0.1 is not allowed: expected 0 with model.loss=sigmoid, which does "
        "not use it. Set model.loss=cdpo, or model.label_smoothing=0.",
    ),
    (
        lambda: make_model(
            PersonalDPOPolicy,
            backbone=make_backbone(trainable="frozen"),
            aggregator="film_last",
            personal=False,
        ),
        "backbone.trainable='frozen' is not allowed: expected lora, as with encoder=none a frozen "
        "policy has nothing to learn. Set backbone.trainable=lora, or encoder=lookup.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, backbone=make_backbone("bert")),
        "backbone.path='bert' is not allowed: expected a causal language model. "
        "Use a causal backbone, or model=reward.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, aggregator=film_with_layer()),
        "aggregator.layer_width=32 is not allowed: expected null for a policy. "
        "Set aggregator.layer_width=null.",
    ),
    (
        lambda: make_model(PersonalDPOPolicy, backbone=make_backbone(trainable="full")),
        "backbone.trainable='full' is not allowed: expected lora or frozen, as the reference is "
        "the model without its adapters. Set backbone.trainable=lora.",
    ),
    (
        lambda: SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses="rejected"),
        "model.responses='rejected' is not allowed: expected chosen or both. "
        "Set model.responses=chosen.",
    ),
    (
        lambda: SupervisedPolicy(backbone=make_backbone("bert"), optim=Optim()),
        "backbone.path='bert' is not allowed: expected a causal language model. "
        "Use a causal backbone.",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value) == message


@pytest.mark.slow
@torch.no_grad()
def test_a_users_small_effect_is_not_rounded_away_in_bfloat16() -> None:
    """Log-ratios of a policy whose user acts on the last hidden states, against float64."""
    language = language_model("llama").bfloat16()
    backbone = Backbone(model=language, trainable="frozen")
    policy = make_model(PersonalDPOPolicy, backbone=backbone, aggregator="film_last").eval()
    policy.aggregator.to_film.weight.mul_(0.02)
    batch = make_batch(make_pairs(50), users=[1, 2, 3, 4, 5] * 10)
    trunk, user = policy.trunk(batch), policy.encoder(batch.users)
    gamma, beta = policy.aggregator.film(user)[:, 0].double().unbind(1)
    changed = (1 + gamma[:, None]) * trunk.double() + beta[:, None]
    head = language.get_output_embeddings().weight.double()
    exact = [
        naive_logps(hidden @ head.T, batch) for hidden in (changed, trunk.double())
    ]  # of policy and reference
    effect = exact[0] - exact[1]
    for precision in ("as it is", "mixed"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
            found = policy.logps(policy.hidden(batch, ("user",))[0], batch)
            found = found - policy.reference_logps(batch)
        assert (found.double() - effect).abs().max() < 0.05 * effect.abs().max()


def naive_logps(logits: Tensor, batch: Any) -> Tensor:
    """Sums of log-probabilities of the responses, [B, 2], from logits [B, L, V], token by token."""
    found = torch.zeros(len(batch), 2, dtype=logits.dtype)
    logps = logits.log_softmax(dim=-1)
    for pair, segment in enumerate(batch.segment.tolist()):
        end_of_prompt = segment.count(0) - 1
        for place, mark in enumerate(segment):
            if mark in (1, 2):
                before = place - 1 if segment[place - 1] == mark else end_of_prompt
                found[pair, mark - 1] += logps[pair, before, batch.input_ids[pair, place]]
    return found


def test_text_has_the_positions_that_user_vectors_leave() -> None:
    backbone = make_backbone()
    state = torch.random.get_rng_state()
    soft = {"_target_": "plrhf.aggregators.ConcatSoftPrompt", "n_tokens": 7}
    assert positions_for_text(backbone, soft) == backbone.max_positions - 7
    film = {"_target_": "plrhf.aggregators.FiLM"}
    assert positions_for_text(backbone, film) == backbone.max_positions
    assert torch.equal(torch.random.get_rng_state(), state)  # the model is drawn as before
