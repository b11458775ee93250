"""What is computed once before training: hidden states and reference, also of bidirectional encoders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from pair_data import make_data
from tiny import WIDTH, make_backbone, make_model
from torch import Tensor, nn, tensor

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.types import CHOSEN, REJECTED
from plrhf.data.dataset import TextValues
from plrhf.data.packing import TokenPair
from plrhf.data.text_values import distinct_texts, independent_pairs, texts_as_pairs
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.trainer import TrainingData


def reward_model(tokenizer: Any, **film: Any) -> Any:
    model = tiny_gptj(
        vocab_size=len(tokenizer),
        n_layers=2,
        width=WIDTH,
        n_heads=4,
        max_positions=256,
        eos_token_id=0,
    )
    aggregator = FiLM(hidden_size=WIDTH, n_blocks=2, **film)
    nn.init.normal_(aggregator.to_film.weight, std=0.2)
    return make_model(
        PersonalRewardModel,
        backbone=Backbone(model=model, trainable="frozen"),
        aggregator=aggregator,
    ).eval()


def margins(model: Any, data: Any, split: str) -> dict[str, Tensor]:
    found = {name: torch.zeros(len(data.datasets[split])) for name in ("user", "generic")}
    for batch in data.evaluation_loader(split):
        for name, values in model.context_margins(batch).items():
            found[name][batch.row] = values
    return found


def test_choices_that_follow_from_others_are_not_independent() -> None:
    """The twin is the rank of the choices as differences of texts."""
    pairs = {
        1: [(0, 1), (1, 2), (0, 2)],  # three choices between three texts: two differences
        2: [(0, 1), (3, 4), (0, 1)],  # one choice twice, and one of other texts
        4: [(4, 3), (1, 0), (2, 3), (0, 3), (1, 4)],
    }
    users = tensor([user for user, own in pairs.items() for _ in own])
    of_pair = tensor([pair for own in pairs.values() for pair in own])
    dataset: Any = SimpleNamespace(
        hidden=TextValues(torch.zeros(5, 2), of_pair), user_id=users, feedback=None
    )
    found = independent_pairs(dataset, 6)
    texts = torch.eye(5)
    differences = texts[of_pair[:, 0]] - texts[of_pair[:, 1]]
    ranks = [int(torch.linalg.matrix_rank(differences[users == user])) for user in pairs]
    assert found.tolist() == [0, ranks[0], ranks[1], 0, ranks[2], 0] == [0, 2, 2, 0, 4, 0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("film", [{}, {"layer_width": 9, "user_dim": WIDTH}])
def test_hidden_states_computed_beforehand_change_nothing(
    tokenizer: Any, film: Any, pooling: str
) -> None:
    model, data = reward_model(tokenizer, **film), make_data(tokenizer)
    model.pooling = pooling
    assert model.needs_only_pooled
    online = {split: margins(model, data, split) for split in data.datasets}
    seen: list[int] = []

    @torch.no_grad()
    def pool(batch: Any) -> Tensor:
        responses = [(batch.segment == mark).any(dim=1).sum() for mark in (CHOSEN, REJECTED)]
        seen.append(int(sum(responses)))
        return model.pooled_trunk(batch)

    data.precompute_hidden(pool)
    distinct = [
        {(pair.prompt, text) for pair in dataset.pairs for text in (pair.chosen, pair.rejected)}
        for dataset in data.datasets.values()
    ]
    assert sum(seen) == sum(map(len, distinct)) < 2 * (17 + 5 + 7)  # each text once
    model.backbone.forward = None  # the trunk is not needed any more
    for split, expected in online.items():
        found = margins(model, data, split)
        for context in ("user", "generic"):
            assert expected[context].std() > 0.01
            torch.testing.assert_close(found[context], expected[context], atol=1e-5, rtol=0)
    batch = next(iter(data.train_dataloader()))
    assert model.loss(batch)[0].shape == (4,)


@pytest.mark.parametrize(
    ("trainable", "site", "suffices"),
    [("frozen", "last", True), ("lora", "last", False), ("frozen", "every_block", False)],
)
def test_when_hidden_states_can_be_computed_beforehand(
    trainable: Any, site: Any, suffices: bool
) -> None:
    model = make_model(
        PersonalRewardModel,
        backbone=make_backbone(trainable=trainable),
        aggregator=FiLM(hidden_size=WIDTH, n_blocks=3, site=site),
    )
    assert model.needs_only_pooled == suffices


@pytest.mark.slow
def test_reference_computed_beforehand_changes_nothing(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    backbone = make_backbone()
    backbone.model.resize_token_embeddings(len(tokenizer))
    policy = make_model(PersonalDPOPolicy, backbone=backbone)
    online = {batch.row: policy.loss(batch)[0] for batch in data.evaluation_loader("train")}
    data.precompute_reference(policy.reference_logps)
    policy.backbone.reference = None  # nor is it asked again
    for (row, expected), batch in zip(online.items(), data.evaluation_loader("train"), strict=True):
        assert batch.row.equal(row)
        torch.testing.assert_close(policy.loss(batch)[0], expected, atol=1e-5, rtol=0)
    assert data.datasets["val"].ref_logps[torch.arange(5)].shape == (5, 2)


def bert_reward_model(**settings: Any) -> Any:
    return make_model(PersonalRewardModel, backbone=make_backbone("bert"), **settings)


@pytest.mark.parametrize(
    ("max_prompt_tokens", "start"),
    [
        (50, "[CLS] write about the [SEP] "),
        (5, "[CLS] write about the [SEP] "),
        (4, "[CLS] about the [SEP] "),
        (2, "[CLS] "),
        (0, "[CLS] "),  # no prompt at all
    ],
)
def test_text_for_a_bidirectional_encoder(
    word_tokenizer: Any, max_prompt_tokens: int, start: str
) -> None:
    data = make_data(word_tokenizer, causal=False, max_prompt_tokens=max_prompt_tokens)
    batch = data.datasets["train"].batch([0, 4])
    assert batch.input_ids.shape[0] == 4 and len(batch) == 2
    written = [
        word_tokenizer.decode(ids[segment >= 0])
        for ids, segment in zip(batch.input_ids, batch.segment, strict=True)
    ]
    assert written[0] == start + "write [SEP]"
    assert written[2] == start + "and calm . [SEP]"


@pytest.mark.slow
@torch.no_grad()
def test_reward_of_a_bidirectional_encoder_is_that_of_one_sequence(word_tokenizer: Any) -> None:
    data = make_data(word_tokenizer, causal=False)
    model = bert_reward_model(aggregator="film_last", personal=False, pooling="mean").eval()
    found = margins(model, data, "train")["user"]
    for place, pair in enumerate(data.datasets["train"].pairs):
        rewards = []
        for response in (pair.chosen, pair.rejected):
            hidden = model.backbone.model(tensor([[*pair.prompt, *response]])).last_hidden_state[0]
            rewards.append(model.head.weight @ hidden[len(pair.prompt) :].mean(0))
        torch.testing.assert_close(found[place], (rewards[0] - rewards[1])[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_last"])
def test_a_bidirectional_reward_model_learns(word_tokenizer: Any, aggregator: str) -> None:
    data = make_data(word_tokenizer, causal=False)
    optim = Optim(lr=1e-2, user_lr=1e-2, head_lr=1e-2, warmup_steps=0)
    model = bert_reward_model(aggregator=aggregator, optim=optim)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )

    def loss() -> float:
        with torch.no_grad():
            every = [model.eval().loss(batch)[0] for batch in data.evaluation_loader("train")]
        return float(torch.cat(every).mean())

    before = loss()
    trainer.fit(model.train(), datamodule=TrainingData(data))
    assert loss() < 0.5 * before
    assert trainer.callback_metrics["val/nll"].isfinite()


@torch.no_grad()
def test_hidden_states_of_a_bidirectional_encoder_beforehand(word_tokenizer: Any) -> None:
    """Also where the loader would have short texts share a row."""
    data = make_data(word_tokenizer, causal=False)
    model = bert_reward_model(aggregator="film_last").eval()
    online = margins(model, data, "train")["user"]
    data.eval_batch_size = 64
    shared: list[bool] = []

    def pool(batch: Any) -> Tensor:
        shared.append(batch.packing is not None)
        return model.pooled_trunk(batch)

    data.precompute_hidden(pool)
    assert shared[0]
    torch.testing.assert_close(margins(model, data, "train")["user"], online, atol=1e-5, rtol=0)


def test_texts_by_hand(tokenizer: Any) -> None:
    dataset = make_data(tokenizer).datasets["val"]
    dataset.pairs = [
        TokenPair((1,), (2,), (3,)),
        TokenPair((1,), (3,), (4,)),
        TokenPair((9,), (2,), (3,)),
    ]
    texts, places = distinct_texts(dataset.pairs)
    assert texts == [((1,), (2,)), ((1,), (3,)), ((1,), (4,)), ((9,), (2,)), ((9,), (3,))]
    assert places.tolist() == [[0, 1], [1, 2], [3, 4]]


def test_texts_of_one_prompt_share_a_row_by_hand() -> None:
    texts = [((1,), (2,)), ((9,), (2,)), ((1,), (3,)), ((1,), (4,)), ((9,), (5,))]
    pairs, places = texts_as_pairs(texts, share_prompts=True)
    assert pairs == [
        TokenPair((1,), (2,), (3,)),
        TokenPair((9,), (2,), (5,)),
        TokenPair((1,), (4,), ()),
    ]
    assert places.tolist() == [[0, 2], [1, 4], [3, 5]]
    pairs, places = texts_as_pairs(texts[:2], share_prompts=False)
    assert pairs == [TokenPair((1,), (2,), ()), TokenPair((9,), (2,), ())]
    assert places.tolist() == [[0, 2], [1, 2]]
