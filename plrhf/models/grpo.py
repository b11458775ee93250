"""Online reinforcement learning of the personalised policy, by group-relative policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.core import losses
from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.logprobs import sum_by_response
from plrhf.core.policy_gradient import (
    Advantage,
    clipped_surrogate,
    group_advantages,
    kl_estimate,
    response_losses,
    token_losses,
)
from plrhf.core.types import GENERIC_USER, PreferenceBatch
from plrhf.data.rows import Row
from plrhf.data.tokenizer import Tokenizer
from plrhf.models.generation import check_room
from plrhf.models.metrics import ExactMean
from plrhf.models.policy import PersonalPolicy
from plrhf.models.reward import PersonalRewardModel, load_reward
from plrhf.models.rollouts import (
    Ids,
    Rollouts,
    group_rewards,
    pairs_of_groups,
    prompts_of,
    requests,
    sample_responses,
    seeds_of,
)

VALIDATION_SEED = 0
"""Responses to val prompts are sampled with the same seed each time, so that validations compare."""

JUDGED = ("reward", "kl", "length", "true_preference")
"""What is logged of sampled responses, as ``val/`` and (but for the last) ``train/`` metrics."""


@check_arguments("model")
class PersonalGRPOPolicy(PersonalPolicy):
    """Learns a policy from the rewards of its own responses (GRPO, Shao et al. 2024, arXiv 2402.03300).

    For each train prompt and its user, the policy samples a group of responses for that user. A frozen
    personalised reward model rewards them for that user. The advantage of a response is its reward
    compared with the rest of its group. With weight 1 - alpha, the same is done for the generic user,
    by the generic user's reward, as in P-DPO. Preferences of the train pairs are not read.

    A step samples responses and learns from them; with `n_updates` above 1 the next steps learn from
    the same responses, and the prompts of their own batches are left out. Validation samples one
    response for each val pair; ``val/loss`` is beta * KL - reward, with the KL of a
    response divided as `response_losses` does.

    Args:
        reward: run or export of a `PersonalRewardModel` of the same users; needed for training only.
        reduce: see `reduction.Reduction`; with ``tail`` a user's loss is how far the rewards of the
            user's responses are below the rewards of the responses in the train pairs, see `record_gains`.
        group_size: responses sampled for each prompt and context. max_new_tokens: of each.
        advantage: see `policy_gradient.group_advantages` and `policy_gradient.response_losses`.
        clip_low, clip_high: see `policy_gradient.clipped_surrogate`.
        n_updates: optimiser steps on each batch of responses.
        start_users: see `start_users_from_reward`.
        batch_size: responses that are written or rewarded at once.
        policy: see `PersonalPolicy`; `beta` is the weight of the KL divergence.

    Attributes:
        true_score: a user's true preference of a text in log odds, where it is known. It is logged on
            val prompts and never learned from.
        text_tokenizer: of prompts and responses.

    Raises:
        ValueError: an argument that does not go with sampled responses.
    """

    learns_from_pairs = False
    true_score: Callable[[str, str], float | None] | None = None
    text_tokenizer: Tokenizer
    sampling_seed: Tensor

    def __init__(
        self,
        *,
        reward: str | None = None,
        group_size: Annotated[int, Field(ge=2)] = 8,
        max_new_tokens: PositiveInt = 64,
        advantage: Advantage = "grpo",
        clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        clip_high: PositiveFloat = 0.2,
        n_updates: PositiveInt = 1,
        start_users: bool = True,
        batch_size: PositiveInt = 256,
        **policy: Any,
    ) -> None:
        super().__init__(**policy)
        if self.inner is not None:
            allowed = "null with model=grpo, which reads no preferences of train pairs"
            raise bad_value("model.inner", vars(self.inner), allowed, "Set model.inner=null")
        self.reward, self.group_size, self.max_new_tokens = reward, group_size, max_new_tokens
        self.advantage, self.n_updates, self.batch_size = advantage, n_updates, batch_size
        self.start_users = start_users
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.judged: Any = nn.ModuleDict({name: ExactMean() for name in JUDGED})
        self.register_buffer("sampling_seed", torch.randint(2**31, ()), persistent=False)
        self._reward_model: list[PersonalRewardModel] = []  # no part of the policy's weights
        self._rollouts: Rollouts | None = None
        self._updates_left = 0

    def open_reward(self) -> PersonalRewardModel:
        """Load the frozen reward model, if that has not been done.

        Raises:
            ValueError: none is given, or it is no reward model or does not know all users.
        """
        if len(self._reward_model) == 0:
            cure = "Train one with model=reward on the same rows, and set model.reward=RUN_DIR"
            if self.reward is None:
                allowed = "the run or export of a reward model"
                raise bad_value("model.reward", None, allowed, cure)
            model = load_reward(self.reward, "model.reward")
            unknown = [user for user in self.card.users if user not in model.card.places]
            if len(unknown) > 0:
                allowed = f"a reward model of the run's users ({unknown[0]} is not known to it)"
                raise bad_value("model.reward", self.reward, allowed, cure)
            self._reward_model.append(model.requires_grad_(False))
        return self._reward_model[0]

    @torch.no_grad()
    def start_users_from_reward(self) -> bool:
        """Set the parameters of each user to those that the reward model has learned for that user.

        Users that are judged alike are then alike from the first step, and the policy need only learn
        what to write for them. It is done with `start_users`, where both encoders have parameters of
        users of the same shape; what encoder and aggregator share stays as it is.

        Returns:
            Whether it was done.
        """
        reward = self.open_reward()
        places = [0, *(reward.card.places[user] for user in self.card.users)]
        own, theirs = (list(one.encoder.user_parameters()) for one in (self, reward))
        rows = [one[places] for one in theirs]
        if not self.start_users or [one.shape for one in own] != [one.shape for one in rows]:
            return False
        for parameter, learned in zip(own, rows, strict=True):
            parameter.copy_(learned)
        return True

    @property
    def reuses_rollouts(self) -> bool:
        """Whether the next step learns from the responses of the last one."""
        return self._updates_left > 0

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.n_updates > 1 and self.trainer.accumulate_grad_batches > 1:
            allowed = "1 with model.n_updates above 1"
            cure = "Set model.n_updates=1, or a larger data.batch_size"
            n_summed = self.trainer.accumulate_grad_batches
            raise bad_value("trainer.accumulate_grad_batches", n_summed, allowed, cure)
        data: Any = self.trainer.datamodule.data  # type: ignore[attr-defined]
        longest = max(int(one.lengths[:, 0].max(initial=0)) for one in data.datasets.values())
        check_room(self, [(0,) * longest], max_new_tokens=self.max_new_tokens, field="model")
        self.text_tokenizer = data.row_tokenizer.tokenizer
        self.open_reward().to(self.device)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        reused = self._rollouts if self.reuses_rollouts else None
        super().on_train_batch_start(batch if reused is None else reused.asked, batch_idx)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        if not self.reuses_rollouts:
            rows = self._train_pairs().rows
            self._rollouts = self.rollouts(batch, [rows[place] for place in batch.row.tolist()])
            self._updates_left = self.n_updates
        assert self._rollouts is not None
        self._updates_left -= 1
        loss, found = self.policy_loss(self._rollouts)
        for name, value in {"loss": loss, **found}.items():
            self.log(  # loggers are told by `training.StepMetrics`
                f"train/{name}",
                value,
                prog_bar=name in ("loss", "reward"),
                logger=False,
                batch_size=len(batch),
                sync_dist=True,
            )
        return self._rollouts.asked.step_weight * loss

    @torch.no_grad()
    def rollouts(self, batch: PreferenceBatch, rows: Sequence[Row]) -> Rollouts:
        """Sample a group of responses for each pair of a batch and context, and reward them.

        Args:
            rows: of the batch's pairs, for the reward model.
        """
        was_training = self.training
        self.eval()
        user, _ = self.user_vectors(batch, self.context_names)  # [C * B, user_dim]
        prompts = prompts_of(batch) * len(self.context_names)
        which = {"seed": int(self.sampling_seed), "step": self.global_step}
        seeds = seeds_of(batch, len(self.context_names), self.group_size, **which)
        responses, texts = self._sample(prompts, user, seeds)
        asked = requests(rows, (batch.user_id != GENERIC_USER).tolist(), self.context_names)
        reward = self.open_reward()
        rewards = group_rewards(reward, asked, texts, batch_size=self.batch_size).to(user.device)
        advantages = group_advantages(rewards, kind=self.advantage)
        self.record_gains(batch.user_id, rewards[: len(batch)], rows, asked[: len(batch)])
        pairs = pairs_of_groups(self, prompts, responses)
        found = Rollouts(
            asked=batch,
            pairs=pairs,
            rewards=rewards.view(-1, len(batch), self.group_size),
            advantages=nn.functional.pad(advantages, (0, self.group_size % 2)).view(-1, 2),
            ref_logps=self.reference_token_logps(pairs),
        )
        self.train(was_training)
        return found

    def record_gains(
        self,
        user_id: Tensor,
        rewards: Tensor,
        rows: Sequence[Row],
        asked: Sequence[Mapping[str, Any]],
    ) -> None:
        """Tell the reduction how far a user's responses are below those of the user's pairs.

        Levels of rewards of different users cannot be compared, but differences are log odds of a choice:
        here of a sampled response over a response of the train pair, chosen or rejected.

        Args:
            rewards: of the B pairs' groups, [B, G]. rows, asked: see `rollouts`, of the B pairs.
        """
        if self.reduction.kind == "tail":
            given = [[row.chosen, row.rejected] for row in rows]
            reward = self.open_reward()
            level = group_rewards(reward, asked, given, batch_size=self.batch_size).mean(dim=1)
            self.reduction.record(user_id, level.to(rewards.device) - rewards.mean(dim=1))

    def _sample(
        self, prompts: Sequence[Ids], user: Tensor, seeds: Sequence[int]
    ) -> tuple[list[list[Ids]], list[list[str]]]:
        """Sample responses to each of N prompts for its user, one a seed: token ids and texts, [N][G]."""
        size = len(seeds) // len(prompts)
        flat = sample_responses(
            self,
            self.text_tokenizer,
            [prompt for prompt in prompts for _ in range(size)],
            user.repeat_interleave(size, dim=0),
            seeds=seeds,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        texts = self.text_tokenizer.batch_decode(flat, skip_special_tokens=True)
        starts = range(0, len(flat), size)
        return [flat[at : at + size] for at in starts], [texts[at : at + size] for at in starts]

    def reference_token_logps(self, pairs: PreferenceBatch) -> Tensor:
        """Compute the log-probability of each response token under the reference, [R, L], in nats."""
        with self.backbone.reference():
            return self.token_logps(self.trunk(pairs), pairs)

    def policy_loss(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the GRPO loss of sampled responses, and what is logged of them; all scalars."""
        asked, pairs = rollouts.asked, rollouts.pairs
        user, user_penalty = self.user_vectors(asked, self.context_names)  # [C * B, user_dim]
        of_pairs = user.repeat_interleave(len(pairs) // len(user), dim=0)
        logps = self.token_logps(self.hidden_for(pairs, of_pairs)[0], pairs)  # [R, L]
        if rollouts.old_logps is None:
            rollouts.old_logps = logps.detach()
        advantages = rollouts.of_tokens(rollouts.advantages)
        of_tokens = token_losses(
            logps, rollouts.old_logps, rollouts.ref_logps, advantages, beta=self.beta, **self.clip
        )
        sums = sum_by_response(of_tokens, pairs.segment, len(pairs))
        lengths = response_lengths(pairs)
        of_responses = response_losses(
            sums, lengths, kind=self.advantage, max_tokens=self.max_new_tokens
        )
        of_context = rollouts.by_group(of_responses).mean(dim=-1)  # [C, B]
        per_pair = losses.mixed(of_context, alpha=self.alpha)
        weights = self.reduction.weights(asked.user_id)
        loss = asked.mean(per_pair if weights is None else weights * per_pair)
        found = self._describe(rollouts, logps.detach(), lengths)
        return loss + self.penalties(asked, user_penalty), found

    @torch.no_grad()
    def _describe(self, rollouts: Rollouts, logps: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Compute means over responses: reward, KL (nats), length and share of clipped tokens."""
        assert rollouts.old_logps is not None
        segment = rollouts.pairs.segment
        kl = sum_by_response(kl_estimate(logps, rollouts.ref_logps), segment, len(rollouts.pairs))
        ratio, advantages = (
            (logps - rollouts.old_logps).exp(),
            rollouts.of_tokens(rollouts.advantages),
        )
        clipped = clipped_surrogate(ratio, advantages, **self.clip) < ratio * advantages
        n_clipped = sum_by_response(clipped.float(), segment, len(rollouts.pairs))
        groups = (rollouts.by_group(one) for one in (kl, lengths, n_clipped / lengths.clamp(min=1)))
        of_groups = dict(zip(("kl", "length", "clipped"), groups, strict=True))
        of_groups["reward"] = rollouts.rewards
        return {name: rollouts.asked.mean(one[0].mean(-1)) for name, one in of_groups.items()}

    def pair_loss(
        self, margins: Tensor, extra: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> Tensor:
        """Compute the logistic loss of given pairs, by which new users are fitted."""
        return losses.dpo(extra, beta=self.beta)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        rows = self.trainer.datamodule.data.datasets["val"].rows  # type: ignore[attr-defined]
        kept = batch.counted()
        self.val_accuracy.update(self(batch)[kept], batch.user_id[kept])
        found = self.judge(batch, [rows[place] for place in batch.row.tolist()])
        loss = self.validation_loss(found)
        self.val_loss.update((loss.double() * kept).sum(), kept.sum())
        for name, mean in self.judged.items():
            values = found.get(name, torch.zeros_like(loss))
            mean.update((values.double() * kept).sum(), kept.sum() * (name in found))

    def validation_loss(self, found: Mapping[str, Tensor]) -> Tensor:
        """Return beta * KL - reward of each response, [B], its KL divided as in the training loss."""
        how: dict[str, Any] = {"kind": self.advantage, "max_tokens": self.max_new_tokens}
        return self.beta * response_losses(found["kl"], found["length"], **how) - found["reward"]

    @torch.no_grad()
    def judge(self, batch: PreferenceBatch, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Sample one response for each pair's user, and compute the values `JUDGED` of it, each [B].

        The true preference is left out where it is not known.
        """
        user, _ = self.user_vectors(batch, ("user",))
        prompts = prompts_of(batch)
        seeds = seeds_of(batch, 1, 1, seed=VALIDATION_SEED, step=0)
        responses, texts = self._sample(prompts, user, seeds)
        asked = requests(rows, (batch.user_id != GENERIC_USER).tolist(), ("user",))
        rewards = group_rewards(self.open_reward(), asked, texts, batch_size=self.batch_size)
        pairs = pairs_of_groups(self, prompts, responses)
        logps = self.token_logps(self.hidden_for(pairs, user)[0], pairs)
        kl = kl_estimate(logps, self.reference_token_logps(pairs))
        found = {
            "reward": rewards[:, 0].to(kl.device),
            "kl": sum_by_response(kl, pairs.segment, len(pairs))[:, 0],
            "length": response_lengths(pairs)[:, 0],
        }
        if self.true_score is not None:
            known = [
                self.true_score(row.user_id, text) for row, (text,) in zip(rows, texts, strict=True)
            ]
            if None not in known:
                found["true_preference"] = torch.tensor(known, device=kl.device)
        return found

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for name, mean in self.judged.items():
            # Processes sum up together: even one whose pairs have no true preference must not skip it.
            value = mean.compute().float()
            if bool(value.isfinite()):
                self.log(f"val/{name}", value, prog_bar=name == "reward")
            mean.reset()


def response_lengths(pairs: PreferenceBatch) -> Tensor:
    """Count the tokens of each pair's two responses, [n, 2] float32."""
    return sum_by_response(
        torch.ones(pairs.segment.shape, device=pairs.segment.device), pairs.segment, len(pairs)
    )
