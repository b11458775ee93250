"""Losses: by hand, and against TRL's own code on the same sequences."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_aggregator, make_backbone, make_batch, make_pairs, perturb
from torch import Tensor, tensor
from transformers import LlamaForSequenceClassification

from plrhf.core import losses
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import two_rows
from plrhf.encoders import NoneEncoder
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

LN3, LN4 = log(3), log(4)
AT_HALF = log(1 + exp(0.5))  # -log sigma(-1/2); -log sigma(1/2) is AT_HALF - 1/2


def test_bradley_terry_by_hand() -> None:
    # sigma(ln 3) = 3/4 and sigma(-ln 3) = 1/4, so the losses are ln 4/3 and ln 4.
    margins = tensor([LN3, -LN3, 0.0])
    expected = tensor([LN4 - LN3, LN4, log(2)])
    torch.testing.assert_close(losses.bradley_terry(margins), expected)
    torch.testing.assert_close(losses.bradley_terry(margins + 2.5, target_margin=2.5), expected)


def test_reward_centring_by_hand() -> None:
    centring = losses.reward_centring(tensor([2.0, 1.0]), tensor([-0.5, 1.0]))
    torch.testing.assert_close(centring, tensor([2.25, 4.0]))  # 1.5^2, 2^2


def test_dpo_logits_by_hand() -> None:
    policy, reference = tensor([[-3.0, -5.0], [-7.0, -1.0]]), tensor([[-4.0, -4.5], [-7.0, -2.0]])
    # (-3 + 4) - (-5 + 4.5) = 1.5 and (-7 + 7) - (-1 + 2) = -1
    torch.testing.assert_close(losses.dpo_logits(policy, reference), tensor([1.5, -1.0]))


BY_HAND = [  # at h = 2 ln 3, -1, 0 and b = 1/2, hence b h = ln 3, -1/2, 0
    ("sigmoid", 0.0, (LN4 - LN3, AT_HALF, log(2))),
    ("ipo", 0.0, ((2 * LN3 - 1) ** 2, 4.0, 1.0)),  # (h - 1)^2
    ("hinge", 0.0, (0.0, 1.5, 1.0)),  # ln 3 > 1
    ("cdpo", 0.25, (LN4 - 0.75 * LN3, AT_HALF - 0.125, log(2))),
    ("cdpo", 0.0, (LN4 - LN3, AT_HALF, log(2))),
]


@pytest.mark.parametrize(("loss", "smoothing", "expected"), BY_HAND)
def test_dpo_by_hand(loss: str, smoothing: float, expected: tuple[float, ...]) -> None:
    logits = tensor([2 * LN3, -1.0, 0.0])
    found = losses.dpo(logits, beta=0.5, loss=loss, label_smoothing=smoothing)
    torch.testing.assert_close(found, tensor(expected))


def test_unknown_dpo_loss() -> None:
    with pytest.raises(ValueError) as caught:
        losses.dpo(tensor([0.0]), beta=0.1, loss="kto")
    assert str(caught.value) == (
        "loss='kto' is not allowed: expected one of sigmoid, ipo, hinge, cdpo. "
        "Set model.loss=sigmoid."
    )


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.25, (("user", 0.25), ("generic", 0.75))),
        (1.0, (("user", 1.0),)),
        (0.0, (("generic", 1.0),)),
        (0, (("generic", 1.0),)),
    ],
)
def test_contexts(alpha: float, expected: tuple[tuple[str, float], ...]) -> None:
    assert losses.contexts(alpha) == expected


def test_mixed_by_hand() -> None:
    user, generic = tensor([1.0, 2.0, -4.0]), tensor([3.0, 6.0, 0.0])
    # 0.25 * 1 + 0.75 * 3 = 2.5, 0.25 * 2 + 0.75 * 6 = 5, 0.25 * -4 = -1
    both = torch.stack([user, generic])
    torch.testing.assert_close(losses.mixed(both, alpha=0.25), tensor([2.5, 5.0, -1.0]))
    assert losses.mixed(user[None], alpha=1.0).equal(user)
    assert losses.mixed(generic[None], alpha=0.0).equal(generic)


class AgainstTRL:
    """One vanilla policy, and the TRL trainer of the same weights and adapter."""

    def __init__(self, tokenizer: Any, directory: Path) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        backbone = make_backbone("llama")
        perturb(backbone, "lora_B", std=0.0)
        self.trainer = DPOTrainer(  # copies the adapter, as yet nothing, for its reference
            model=backbone.model,
            args=DPOConfig(output_dir=str(directory), report_to=[], use_cpu=True, bf16=False),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        )
        perturb(backbone, "lora_B.default")
        self.policy = PersonalDPOPolicy(
            backbone=backbone,
            encoder=NoneEncoder(),
            aggregator=make_aggregator("soft_prompt"),
            n_users=6,
        )

    def loss(self, batch: PreferenceBatch, name: str, *, beta: float, smoothing: float) -> float:
        self.trainer.loss_types, self.trainer.loss_weights = [name], [1.0]
        self.trainer.beta, self.trainer.label_smoothing = beta, smoothing
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": (batch.segment >= 0).long(),
            "completion_mask": (batch.segment > 0).long(),
        }
        return self.trainer.compute_loss(self.trainer.model, inputs).item()


@pytest.fixture(scope="module")
def against_trl(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> AgainstTRL:
    return AgainstTRL(tokenizer, tmp_path_factory.mktemp("trl"))


@torch.no_grad()
def our_logps(policy: PersonalDPOPolicy, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    return policy.logps(policy.hidden(batch, ("user",))[0], batch), policy.reference_logps(batch)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_dpo_agrees_with_trl(against_trl: AgainstTRL, loss: str) -> None:
    batch = make_batch(make_pairs(), layout=two_rows)
    ours = losses.dpo(losses.dpo_logits(*our_logps(against_trl.policy, batch)), beta=2.0, loss=loss)
    assert ours.std() > 0.1  # the policy has left its reference, or there is nothing to compare
    theirs = against_trl.loss(batch, loss, beta=2.0, smoothing=0.0)
    assert float(ours.mean()) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_ipo_agrees_with_trl_but_for_its_division_by_length(against_trl: AgainstTRL) -> None:
    # TRL divides log-ratios by the response's tokens; the paper's eq. 17, and ours, does not.
    batch = make_batch(make_pairs(), layout=two_rows)
    policy, reference = our_logps(against_trl.policy, batch)
    lengths = tensor([[len(pair.chosen), len(pair.rejected)] for pair in make_pairs()])
    logits = losses.dpo_logits(policy / lengths, reference / lengths)
    theirs = against_trl.loss(batch, "ipo", beta=2.0, smoothing=0.0)
    assert float(losses.dpo(logits, beta=2.0, loss="ipo").mean()) == pytest.approx(theirs, abs=1e-5)


def test_cdpo_agrees_with_trl(against_trl: AgainstTRL) -> None:
    # TRL smooths labels in its "aot" only: cDPO over sorted pairs, and one pair is sorted.
    for pair in make_pairs(3):
        batch = make_batch([pair], layout=two_rows)
        logits = losses.dpo_logits(*our_logps(against_trl.policy, batch))
        ours = losses.dpo(logits, beta=2.0, loss="cdpo", label_smoothing=0.2)
        theirs = against_trl.loss(batch, "aot", beta=2.0, smoothing=0.2)
        assert float(ours) == pytest.approx(theirs, abs=1e-5)


def test_reward_loss_agrees_with_trl(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    backbone = make_backbone("llama")
    ours = PersonalRewardModel(
        backbone=backbone,
        encoder=NoneEncoder(),
        aggregator=make_aggregator("soft_prompt"),
        n_users=6,
        pooling="last",
        target_margin=0.3,
        centring=0.1,
    )
    backbone.config.num_labels = 1
    theirs = LlamaForSequenceClassification(backbone.config)
    theirs.model, theirs.score = backbone.trunk, torch.nn.Linear(32, 1, bias=False)
    theirs.score.weight = ours.head.weight
    trainer = RewardTrainer(
        model=theirs,
        args=RewardConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            center_rewards_coefficient=0.1,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )
    batch = make_batch(make_pairs(), layout=two_rows)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": (batch.segment >= 0).long(),
        "margin": torch.full((7,), 0.3),
    }
    loss, _ = ours.loss(batch)
    assert loss.std() > 0.1
    assert loss.mean().item() == pytest.approx(
        trainer.compute_loss(theirs, inputs).item(), abs=1e-5
    )
