"""The policy trained by GRPO: against a loss written out by hand, updates, users' own responses, errors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pandas as pd
import pytest
import torch
from lightning import Callback
from runs import world, world_tokenizer
from tiny import (
    LORA,
    N_USERS,
    USERS,
    assert_same,
    gradients,
    language_model,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
)
from torch import Tensor, tensor

import plrhf
from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue
from plrhf.core.types import PreferenceBatch, UserBatch
from plrhf.data.module import PreferenceData
from plrhf.data.packing import LAYOUTS
from plrhf.data.rows import Row
from plrhf.evaluation.predictions import PrepareData
from plrhf.models.grpo import PersonalGRPOPolicy
from plrhf.models.metrics import ExactMean
from plrhf.models.optim import Optim
from plrhf.models.pair_batches import row_tokenizer_of
from plrhf.models.policy import PersonalPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.rollouts import (
    Rollouts,
    check_reward_room,
    group_rewards,
    prompts_of,
    requests,
    sample_responses,
    seeds_of,
)
from plrhf.training.loggers import MetricsFile
from plrhf.training.trainer import build_trainer, fit

N_NEW = 5


class Numbers:
    """A tokenizer whose text is the token numbers."""

    eos_token_id = pad_token_id = 0

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(token) for token in row if token != 0) for row in rows]


class LikesSmallNumbers:
    """A reward model: the higher a user's number, the more its user likes small tokens."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def score(self, asked: Any, *, batch_size: int) -> Tensor:
        self.asked += asked
        users = [int(one.get("user_id", 0)) for one in asked]
        means = [sum(map(int, one["response"].split())) / 97 for one in asked]
        return tensor([-(1 + user) * mean for user, mean in zip(users, means, strict=True)])


class LikesShortTexts:
    """A reward model that can be given to a trainer."""

    def to(self, device: Any) -> LikesShortTexts:
        return self

    def score(self, asked: Any, *, batch_size: int) -> Tensor:
        return tensor([-len(one["response"]) / 10 for one in asked])


def make_policy(
    kind: str | Backbone = "gptj",
    aggregator: str = "film_last",
    *,
    strength: float = 1.0,
    **settings: Any,
) -> Any:
    given = {"group_size": 3, "max_new_tokens": N_NEW, "beta": 0.3, "alpha": 0.7, **settings}
    backbone = make_backbone(kind) if isinstance(kind, str) else kind
    policy = make_model(PersonalGRPOPolicy, backbone=backbone, aggregator=aggregator, **given)
    if strength != 1.0:
        with torch.no_grad():
            policy.encoder.offsets.weight.mul_(strength)
    policy.text_tokenizer, policy._reward_model = Numbers(), [LikesSmallNumbers()]
    return policy


def make_asked(policy: Any, n: int = 4) -> tuple[PreferenceBatch, list[Row]]:
    batch = make_batch(make_pairs(n), layout=LAYOUTS[policy.backbone.layout])
    given = {"prompt": "Count.", "chosen": "1", "rejected": "2", "prompt_id": "p"}
    rows = [Row(**given, user_id=str(user), pair_id=f"{user}") for user in USERS[:n]]
    return batch, rows


def rollouts_of(policy: Any, n: int = 4) -> Rollouts:
    found: Rollouts = policy.rollouts(*make_asked(policy, n))
    return found


def written_out(policy: Any, rollouts: Rollouts, old: Any, size: int) -> Tensor:
    """The loss of eq. 3 of arXiv 2402.03300, response by response and token by token."""
    asked, total = rollouts.asked, torch.zeros(())
    pairs = rollouts.pairs
    per_group, n = -(-size // 2), len(asked)
    for context, weight in ((0, policy.alpha), (1, 1 - policy.alpha)):
        for place in range(n):
            user = policy.encoder(asked.users) if context == 0 else policy.encoder.generic(n)
            rewards = rollouts.rewards[context, place]
            spread = ((rewards - rewards.mean()).square().sum() / (size - 1)).sqrt() + 1e-4
            for number in range(size):
                row = (context * n + place) * per_group + number // 2
                if policy.backbone.layout == "two_rows":
                    row += len(pairs) * (number % 2)
                segment = pairs.segment[row]
                keep = (segment == 0) | (segment == 1 + number % 2)
                ids = pairs.input_ids[row][keep][None]
                n_prompt = int((segment == 0).sum())
                one = replace(
                    asked,
                    user_id=asked.user_id[place : place + 1],
                    features=asked.features[place : place + 1],
                    row=asked.row[:1],
                    input_ids=ids,
                    segment=segment[keep].clamp(max=1)[None],
                    position_ids=torch.arange(ids.shape[1])[None],
                    packing=None,
                    index=None,
                )
                hidden = policy.hidden_for(one, user[place : place + 1])[0]
                logps = policy.backbone.unembed(hidden).log_softmax(-1)[0, n_prompt - 1 : -1]
                with torch.no_grad(), policy.backbone.reference():
                    trunk = policy.backbone.read_text(one)
                    reference = policy.backbone.unembed(trunk).log_softmax(-1)[0, n_prompt - 1 : -1]
                terms = []
                for at, token in enumerate(ids[0, n_prompt:].tolist()):
                    logp, ref = logps[at, token], reference[at, token].detach()
                    before = logp.detach() if old is None else old[row][keep][n_prompt + at]
                    ratio = (logp - before).exp()
                    advantage = (rewards[number] - rewards.mean()) / spread
                    clipped = ratio.clamp(0.8, 1.2)
                    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
                    kl = (ref - logp).exp() - (ref - logp) - 1
                    terms.append(policy.beta * kl - surrogate)
                total = total + weight * torch.stack(terms).mean() / (size * n)
    return total


WRITTEN_OUT = [
    ("gptj", "film_last", "packed"),
    ("gptj", "late_soft_prompt", "packed"),
    ("llama", "soft_prompt", "packed"),
    ("llama", "film_last", "two_rows"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "aggregator", "layout"), WRITTEN_OUT)
def test_equals_the_loss_written_out(kind: str, aggregator: str, layout: str) -> None:
    policy = make_policy(kind, aggregator)
    policy.backbone.layout = layout
    rollouts = rollouts_of(policy, 3)
    old = None
    for _ in range(2):  # at the policy that sampled, and after it has moved
        policy.zero_grad()
        loss, _ = policy.policy_loss(rollouts)
        loss.backward()
        ours = gradients(policy)
        policy.zero_grad()
        twin = written_out(policy, rollouts, old, 3)
        twin.backward()
        torch.testing.assert_close(loss, twin, atol=1e-5, rtol=0)
        assert max(float(one.abs().max()) for one in ours.values()) > 1e-3
        assert_same(ours, gradients(policy), atol=2e-5)
        old = rollouts.old_logps
        with torch.no_grad():
            for value in policy.parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn_like(value))


def test_the_second_update_is_clipped_against_the_first() -> None:
    policy = make_policy()
    rollouts = rollouts_of(policy)
    _, first = policy.policy_loss(rollouts)
    assert first["clipped"] == 0
    kept = rollouts.old_logps
    with torch.no_grad():
        policy.aggregator.to_film.weight.mul_(30.0)
    _, second = policy.policy_loss(rollouts)
    assert rollouts.old_logps is kept and second["clipped"] > 0
    assert second["kl"] > first["kl"] and second["reward"] == first["reward"]


def test_a_policy_without_users_learns_from_each_users_reward() -> None:
    policy = make_policy(personal=False)
    rollouts = rollouts_of(policy)
    assert rollouts.rewards.shape == (1, 4, 3)
    reward: Any = policy._reward_model[0]
    assert {one.get("user_id") for one in reward.asked} == {"1", "2", "3", None}
    loss, _ = policy.policy_loss(rollouts)
    loss.backward()
    assert any(float(one.abs().max()) > 0 for one in gradients(policy).values())


@pytest.mark.slow
def test_responses_are_those_of_each_user() -> None:
    policy = make_policy("gptj", "soft_prompt", strength=30.0).eval()
    prompts, users = [pair.prompt for pair in make_pairs()], tensor(USERS)
    vectors = policy.encoder(UserBatch(user_id=users, features=torch.zeros(len(users), 0)))
    how: dict[str, Any] = {"max_new_tokens": N_NEW, "batch_size": 3}
    seeds = list(range(7))
    together = sample_responses(policy, Numbers(), prompts, vectors, seeds=seeds, **how)
    for place, prompt in enumerate(prompts):
        own = vectors[place : place + 1]
        alone = sample_responses(policy, Numbers(), [prompt], own, seeds=[place], **how)
        assert alone == [together[place]]
    same_user = vectors[:1].expand(7, -1)
    assert sample_responses(policy, Numbers(), prompts, same_user, seeds=seeds, **how) != together
    others = [seed + 7 for seed in seeds]
    assert sample_responses(policy, Numbers(), prompts, vectors, seeds=others, **how) != together


def test_seeds_of_responses_follow_their_pairs() -> None:
    batch, _ = make_asked(make_policy(), 4)
    how: dict[str, Any] = {"n_contexts": 2, "size": 3, "seed": 5}
    found = tensor(seeds_of(batch, **how, step=1)).view(2, 4, 3)
    assert found.unique().numel() == 24
    part = replace(batch, row=batch.row[1::2])  # of another process
    assert seeds_of(part, **how, step=1) == found[:, 1::2].flatten().tolist()
    assert not set(seeds_of(batch, **how, step=2)) & set(found.flatten().tolist())


def test_each_context_is_rewarded_as_itself() -> None:
    policy = make_policy()
    rollouts = rollouts_of(policy)
    reward: Any = policy._reward_model[0]
    users = [one.get("user_id") for one in reward.asked]  # the fourth is the generic user
    assert list(dict.fromkeys(users)) == ["1", "2", "3", None]
    assert rollouts.rewards.shape == (2, 4, 3) and policy.training
    # Rewards stand beside the tokens that earned them.
    segment, advantages = rollouts.pairs.segment, rollouts.by_group(rollouts.advantages)
    for context, place, number in itertools.product(range(2), range(4), range(3)):
        row = (context * 4 + place) * 2 + number // 2
        ids = rollouts.pairs.input_ids[row][segment[row] == 1 + number % 2]
        user = USERS[place] if context == 0 else 0
        group = rollouts.rewards[context, place]
        if (ids != 0).any():  # it is not blank
            torch.testing.assert_close(group[number], -(1 + user) * ids.sum() / 97)
        spread = (group[number] - group.mean()) / (group.std() + 1e-4)
        torch.testing.assert_close(advantages[context, place, number], spread)


@pytest.mark.slow
def test_users_who_gain_least_over_their_pairs_count_most() -> None:
    policy = make_policy(reduce="tail")
    batch, rows = make_asked(policy, 4)
    found = policy.rollouts(batch, rows)
    policy.reduction.step()
    own = batch.user_id.tolist()
    assert len(set(own)) == 4
    level = tensor([-(1 + user) * 1.5 / 97 for user in own])  # of the texts "1" and "2" of a pair
    lost = level - found.rewards[0].mean(dim=1)
    torch.testing.assert_close(policy.reduction.losses[batch.user_id], lost)
    order = policy.reduction.weights(batch.user_id).argsort()
    assert order.equal(lost.argsort()) and lost.unique().numel() == 4
    others = make_policy(reduce="users")
    others.rollouts(batch, rows)
    assert len(others._reward_model[0].asked) == 2 * 4 * 3  # what is given is not asked about


@pytest.mark.parametrize("case", ["same encoder", "another rank", "no users", "switched off"])
def test_a_policys_users_start_at_those_of_the_reward_model(case: str) -> None:
    policy = make_policy(personal=case != "no users", start_users=case != "switched off")
    reward = make_model(PersonalRewardModel)
    names = [f"user {number}" for number in range(1, N_USERS + 1)]
    policy.card = SimpleNamespace(users=names)
    # The reward model knows one user more, and all in another order.
    known = [names[2], "somebody else", *names[:2], *names[3:]]
    reward.card = SimpleNamespace(places={user: place for place, user in enumerate(known, start=1)})
    width = 3 if case == "another rank" else 2
    rows = torch.arange(float(len(known) + 1)).outer(torch.ones(width))
    reward.encoder.offsets = torch.nn.Embedding.from_pretrained(rows)
    policy._reward_model = [reward]
    before = [one.detach().clone() for one in policy.encoder.user_parameters()]
    others = policy.encoder.generic_vector.clone() if case != "no users" else None
    assert policy.start_users_from_reward() == (case == "same encoder")
    if case == "same encoder":
        found = policy.encoder.offsets.weight
        assert found[:, 0].tolist() == [0, 3, 4, 1, *range(5, N_USERS + 2)]
        assert torch.equal(policy.encoder.generic_vector, others) and found.requires_grad
    else:
        assert all(map(torch.equal, before, policy.encoder.user_parameters()))


def test_a_blank_text_is_the_worst_of_its_group() -> None:
    asked = requests(make_asked(make_policy(), 2)[1], [True, False], ("user",))
    assert [one.get("user_id") for one in asked] == ["1", None]
    reward: Any = LikesSmallNumbers()
    found = group_rewards(reward, asked, [["97", " ", "194"], ["", "", ""]], batch_size=4)
    assert found.tolist() == [[-2.0, -4.0, -4.0], [0.0, 0.0, 0.0]]


def test_validation_judges_the_same_responses_each_time() -> None:
    policy = make_policy()
    policy.true_score = lambda user, text: float(user) - len(text)
    state = torch.random.get_rng_state()
    first, second = policy.judge(*make_asked(policy)), policy.judge(*make_asked(policy))
    assert_same(first, second, atol=0)
    assert set(first) == {"reward", "kl", "length", "true_preference"}
    assert torch.equal(state, torch.random.get_rng_state())
    assert (first["length"] >= 1).all() and (first["kl"] > 0).any()


@pytest.mark.parametrize(("advantage", "divisors"), [("grpo", (2, 8)), ("dr_grpo", (5, 5))])
def test_the_validation_loss_divides_kl_as_training_does(advantage: str, divisors: Any) -> None:
    policy = make_policy(advantage=advantage, beta=0.5, max_new_tokens=5)
    found = {"kl": [6.0, 4.0], "length": [2.0, 8.0], "reward": [1.0, -1.0]}
    loss = policy.validation_loss({name: torch.tensor(one) for name, one in found.items()})
    expected = [0.5 * 6.0 / divisors[0] - 1.0, 0.5 * 4.0 / divisors[1] + 1.0]
    assert loss.tolist() == pytest.approx(expected)


def test_all_processes_sum_up_what_some_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose pairs have no true preference must still take part, or the others wait for ever."""
    summed: list[ExactMean] = []
    monkeypatch.setattr(PersonalPolicy, "on_validation_epoch_end", lambda self: None)
    monkeypatch.setattr(ExactMean, "compute", lambda self: summed.append(self) or self.sums[0] / 0)
    policy = make_policy()
    policy.on_validation_epoch_end()
    assert [id(one) for one in summed] == [id(one) for one in policy.judged.values()]


def test_prompts_are_read_from_either_layout() -> None:
    pairs = make_pairs(3)
    for layout in LAYOUTS.values():
        found = prompts_of(make_batch(pairs, layout=layout, padding=2))
        assert found == [pair.prompt for pair in pairs]


def test_errors() -> None:
    for settings, message in (
        ({"group_size": 1}, r"^model\.group_size=1 is not allowed: expected .* 2"),
        ({"inner": {"steps": 1, "lr": 0.1, "query_share": 0.5}}, r"^model\.inner="),
    ):
        with pytest.raises(BadValue, match=message):
            make_policy(**settings)  # type: ignore[arg-type]
    policy = make_model(PersonalGRPOPolicy, aggregator="film_last")
    with pytest.raises(BadValue, match=r"^model\.reward=None is not allowed: expected the run or"):
        policy.open_reward()
    policy.reward = "/nowhere"
    with pytest.raises(BadValue, match=r"^model\.reward='/nowhere' .* run or export of a reward m"):
        policy.open_reward()


def test_a_reward_model_of_other_users_is_refused(reward_run: Any) -> None:
    policy = make_model(PersonalGRPOPolicy, aggregator="film_last", reward=str(reward_run))
    policy.card = SimpleNamespace(users=["user-1", "somebody else"])
    with pytest.raises(BadValue, match=r"^model\.reward='.*' .* users \(.* is not known to it\)"):
        policy.open_reward()


def test_responses_that_the_reward_model_could_not_read_are_refused(reward_run: Path) -> None:
    model = plrhf.load(reward_run)
    row = Row(prompt="Write a note.", chosen="", rejected="", user_id="", prompt_id="", pair_id="")
    prompt = row_tokenizer_of(model).prompt(row)
    room = model.card.text["max_tokens"] - len(prompt) - 1
    text = "\n" + " note" * (room - 1)
    assert len(model.tokenizer(text)["input_ids"]) == room
    check_reward_room(model, [row], room)
    model.score([{"prompt": row.prompt, "response": text}])
    with pytest.raises(BadValue, match=rf"^model\.max_new_tokens={room + 1} .* at most {room}, as"):
        check_reward_room(model, [row], room + 1)
    with pytest.raises(BadValue, match="^asked='1 too long'"):  # in the middle of a training
        model.score([{"prompt": row.prompt, "response": text + " note"}])


def fit_once(run_dir: Path, *, killed_at: int | None = None) -> Any:
    """Train for 6 steps, 2 on each batch of responses, saving wherever that is possible."""
    lightning.seed_everything(0, verbose=False)
    tokenizer = world_tokenizer()
    data = PreferenceData(
        source=world(val_pairs_per_user=1), seed=3, batch_size=3, eval_batch_size=64, max_tokens=99
    )
    data.tokenize(tokenizer, layout="packed")
    lora = {**LORA, "dropout": 0.1}
    policy = make_policy(
        Backbone(model=language_model(vocabulary=len(tokenizer)), lora=lora),
        n_updates=2,
        optim=Optim(lr=1e-2, user_lr=1e-2, warmup_steps=2),
    )
    policy._reward_model = [LikesShortTexts()]
    run_dir.mkdir(exist_ok=True)
    trainer = build_trainer(
        run_dir=run_dir,
        loggers=[MetricsFile(run_dir / "metrics.csv")],
        has_val=True,
        accelerator="cpu",
        max_steps=6,
        val_every_n_steps=3,
        checkpoint_every_n_steps=1,
        log_every_n_steps=1,
        progress=False,
    )
    before = PrepareData(data.restrict_to("train", "val"), cache_dir=run_dir / "cache")
    trainer.callbacks.append(before)  # type: ignore[attr-defined]
    if killed_at is not None:
        trainer.callbacks.append(KillAt(killed_at))
    last = run_dir / "checkpoints/last.ckpt"
    fit(policy, data, trainer, resume_from=last if last.is_file() else None)
    known = {split: data.datasets[split].ref_logps is not None for split in ("train", "val")}
    assert known == {"train": False, "val": True}  # choices of train pairs are not read
    return policy


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.slow
def test_a_run_killed_between_two_updates_ends_the_same(tmp_path: Path) -> None:
    whole = fit_once(tmp_path / "whole")
    with pytest.raises(KeyError, match="killed"):
        fit_once(tmp_path / "killed", killed_at=5)
    saved = torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4  # not 5, from where the responses are still needed
    resumed = fit_once(tmp_path / "killed")
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]
    metrics = pd.read_csv(tmp_path / "whole/metrics.csv")
    rewards = metrics["train/reward"].dropna()
    assert len(rewards) == 6 and (rewards[::2].values == rewards[1::2].values).all()
    assert {"val/loss", "val/reward", "val/kl", "val/length"} <= set(metrics.columns)
    assert metrics["val/accuracy_micro"].notna().sum() == 2
