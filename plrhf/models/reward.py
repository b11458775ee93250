"""The personalised reward model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from plrhf.core import losses
from plrhf.core.checks import NonNegativeFloat, check_arguments
from plrhf.core.choices import cumulative_logit
from plrhf.core.errors import bad_value
from plrhf.core.pooling import pool_responses
from plrhf.core.types import CHOSEN, PADDING, PROMPT, PreferenceBatch
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Ties
from plrhf.models.answers import (
    NOISES,
    Noise,
    RatingScale,
    Thresholds,
    answer_losses,
    tie_parameter,
)
from plrhf.models.base import PersonalModule
from plrhf.models.card import CARD
from plrhf.models.heads import RewardHead, build_head
from plrhf.models.hub import export_of
from plrhf.models.inference import Asked, load, score
from plrhf.models.loading import build_model
from plrhf.models.reward_checks import (
    check_answers,
    check_choices,
    check_has_ratings,
    check_user_acts,
)
from plrhf.models.start import build_start


def pool_prompts(hidden: Tensor, segment: Tensor, *, n_pairs: int, pooling: str) -> Tensor:
    """Pool hidden states of the prompt of each response, as `pool_responses` does, to [C, B, 2, d].

    In the packed layout both responses have the same prompt.
    """
    prompt = torch.where(segment == PROMPT, CHOSEN, PADDING)
    pooled = pool_responses(hidden, prompt, n_pairs=len(segment), pooling=pooling)[..., 0, :]
    of_rows = pooled.unflatten(1, (-1, n_pairs))  # [C, 1 or 2 rows, B, d]
    return of_rows.expand(-1, 2, -1, -1).transpose(1, 2)


@check_arguments("model")
class PersonalRewardModel(PersonalModule):
    """Rewards a response for a user, r(x, y, u), learned from choices (arXiv 2402.05133, P-RM).

    r = head(pool(h), e_u), where h are the response's hidden states. The user acts in the aggregator,
    which computes h, or in the head.

    Args:
        head: a name of `heads.HEADS`, a mapping with ``name`` or ``_target_`` and settings, or a head.
        loss: ``sigmoid``, `losses.bradley_terry`; or ``hinge``, `losses.reward_hinge`.
        start: a name of `start.STARTS`, or a mapping with ``name`` and its settings.
        pooling: ``last`` response token, or ``mean`` over the response's tokens.
        target_margin: m of these losses, times the row's strength. centring: weight of
            `losses.reward_centring`.
        ties: whether ties are learned from, with a tie parameter of all users (``shared``) or of each
            user (``own``), see `choices.davidson`; ``none``: data leaves ties out.
        rating_scale: lowest and highest rating that data gives one by one; learned from with thresholds of
            each user, see `choices.cumulative_logit`. None: there are none.
        noise: what each user has of one's own: a ``temperature``, a rate of ``errors``, or ``none``, see
            `answers`. Margins are log-odds of choices with this noise.
        parts: see `PersonalModule`.
    """

    def __init__(
        self,
        *,
        head: str | dict[str, Any] | RewardHead = "linear",
        loss: Literal["sigmoid", "hinge"] = "sigmoid",
        start: str | dict[str, Any] = "random",
        pooling: Literal["last", "mean"] = "mean",
        target_margin: NonNegativeFloat = 0.0,
        centring: NonNegativeFloat = 0.0,
        ties: Ties = "none",
        rating_scale: RatingScale | None = None,
        noise: Noise = "none",
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.start = start
        self.choice_loss = losses.reward_hinge if loss == "hinge" else losses.bradley_terry
        self.pooling = pooling
        self.target_margin = target_margin
        self.centring = centring
        self.logistic_target = target_margin if loss == "sigmoid" and centring == 0 else None
        self.head = build_head(
            head, hidden_size=self.aggregator.output_size, user_dim=self.aggregator.user_dim
        )
        if centring == 0 and self.head.shift_cancels:
            self.aggregator.drop_shift()
        user_dim = self.aggregator.user_dim
        self.noise = None if noise == "none" else NOISES[noise](user_dim=user_dim)
        self.log_tie = tie_parameter(ties, self.encoder, user_dim=user_dim)
        self.rating_scale, self.thresholds = rating_scale, None
        if rating_scale is not None:
            n_levels = rating_scale[1] - rating_scale[0] + 1
            own_dim = user_dim if self.encoder.personal else 0
            self.thresholds = Thresholds(n_levels=n_levels, user_dim=own_dim)
        check_user_acts(self)
        check_answers(self)

    def initialise(self, data: PreferenceData, *, total_steps: int) -> None:
        check_has_ratings(self, data.datasets["train"])
        build_start(self.start).apply(self, data, total_steps=total_steps)

    def reinitialised(self) -> Self:
        """Build the same model on the same backbone, with newly initialised user model and head."""
        anew: Self = build_model(self.backbone, self.card, optim=self.optim)
        return anew.to(self.device)

    def head_parameters(self) -> list[nn.Parameter]:
        parts = (self.head, self.noise, self.log_tie, self.thresholds)
        return [one for part in parts if part is not None for one in part.parameters()]

    def score(self, asked: Asked, *, batch_size: int = 32) -> Tensor:
        """Compute the rewards of responses for their users, [N]; see `inference.score`."""
        return score(self, asked, batch_size=batch_size)

    def values_without_user(self) -> dict[str, Callable[[PreferenceBatch], Tensor]]:
        return {"hidden": self.pooled_trunk} if self.aggregator.after_trunk else {}

    def without_user(self, batch: PreferenceBatch) -> PreferenceBatch:
        if not self.aggregator.after_trunk:
            return super().without_user(batch)
        if batch.hidden is not None:
            return batch
        pooled = self.pooled_trunk(batch).flatten(0, 1)
        texts = torch.arange(len(pooled), device=pooled.device).view(len(batch), 2)
        return batch.pooled(pooled, texts)

    def precomputed(self, batch: PreferenceBatch) -> PreferenceBatch:
        batch = self.without_user(batch)
        if self.training or batch.hidden is None:
            return batch
        return replace(batch, read=self._read(self.aggregator.with_residuals(batch)))

    def hidden_for(self, batch: PreferenceBatch, user: Tensor) -> Tensor:
        # A trunk that does not depend on the user is run and pooled once for all contexts.
        if self.aggregator.after_trunk:
            batch = self.without_user(batch)
        return super().hidden_for(batch, user)

    def rewards(self, batch: PreferenceBatch) -> Tensor:
        """Compute rewards [B, 2] float32 of chosen and rejected responses for the users who chose."""
        return self.margins_in_contexts(batch, ("user",))[1][0]

    def margins(
        self, hidden: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute margins [C, B] and rewards [C, B, 2], both float32, from hidden states.

        Args:
            hidden: [C, R, L, d]; with `aggregator.after_trunk` already pooled, [C, B, 2, d].
        """
        pooled = hidden
        if not self.aggregator.after_trunk:
            pooled = pool_responses(hidden, batch.segment, n_pairs=len(batch), pooling=self.pooling)
        dtype = self.head.dtype
        with torch.autocast(pooled.device.type, enabled=False):  # which would round rewards
            features = self.head.read(pooled.to(dtype))
            return self.head.compare(features, user.to(dtype), batch)

    def margins_for(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        margins, rewards = self._margins_without_noise(batch, user)
        return margins if self.noise is None else self.noise(margins, user), rewards

    def _margins_without_noise(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        """Compute margins [C, B] as differences of rewards, and the rewards [C, B, 2]."""
        if batch.hidden is None:
            return super().margins_for(batch, user)
        read = batch.read
        if read is None:
            batch = self.aggregator.with_residuals(batch)
            read = self._read(batch)
        if read is not None:
            return self._margins_of_texts(read, batch, user)
        assert batch.hidden is not None
        # Where rewards are linear in user vectors, texts are reduced to their terms before pairs are made.
        terms, direction = None, self.head.direction
        if direction is not None:
            terms = self.aggregator.reward_terms(batch.hidden, direction, user.shape[-1])
        if terms is None:
            return super().margins_for(batch, user)
        assert batch.texts is not None
        table = torch.cat([terms[0][:, None], terms[1]], dim=1)  # [M, 1 + D]
        of_pair = nn.functional.embedding(batch.texts, table)  # [B, 2, 1 + D]
        users = nn.functional.pad(user.float(), (1, 0), value=1.0)
        of_context = users.view(-1, len(batch), 1, users.shape[1])
        rewards = (of_pair * of_context).sum(dim=-1)  # [C, B, 2]
        return rewards[..., 0] - rewards[..., 1], rewards

    def _read(self, batch: PreferenceBatch) -> Tensor | None:
        """Return what the head reads of a batch's distinct pooled texts, [M, F].

        Returns:
            None if users act on them before the head.
        """
        assert batch.hidden is not None
        texts = self.aggregator.transform_texts(batch.hidden)
        if texts is None:
            return None
        with torch.autocast(texts.device.type, enabled=False):
            return self.head.read(texts.to(self.head.dtype))

    def _margins_of_texts(
        self, read: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute `margins_for` if users act in the head only.

        Args:
            read: what the head reads of the batch's distinct texts, [M, F].
        """
        assert batch.texts is not None
        n_contexts = len(user) // len(batch)
        with torch.autocast(user.device.type, enabled=False):
            of_pair = nn.functional.embedding(batch.texts, read)  # [B, 2, F]
            of_context = of_pair.expand(n_contexts, -1, -1, -1)
            return self.head.compare(of_context, user.to(self.head.dtype), batch)

    def pair_loss(
        self, margins: Tensor, extra: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> Tensor:
        feedback = batch.feedback
        target = self.target_margin * (1.0 if feedback is None else feedback.strength)
        if feedback is not None and feedback.choice is not None:
            check_choices(self)
        log_tie = None if self.log_tie is None else self.log_tie(user)
        loss = answer_losses(
            margins - target,
            feedback,
            log_tie,
            lambda: self.choice_loss(margins, target_margin=target),
        )
        if feedback is not None and feedback.rating is not None and self.thresholds is not None:
            level, latent = feedback.rating, extra[..., 0]
            theta = self.thresholds(user).view(*latent.shape, -1)
            of_rating = cumulative_logit(latent, level.clamp(min=0), theta)
            loss = torch.where(level >= 0, of_rating, loss)
        return loss + self.centring * losses.reward_centring(extra[..., 0], extra[..., 1])

    @property
    def needs_only_pooled(self) -> bool:
        """Whether training needs only the trunk's pooled outputs, which are then computed once."""
        return self.aggregator.after_trunk and self.backbone.trainable == "frozen"

    def pooled_trunk(self, batch: PreferenceBatch) -> Tensor:
        """Compute the pooled trunk outputs of a batch without users, [B, 2, d] float32.

        If the head reads prompts, the pooled prompts are appended, [B, 2, 2 d].
        """
        reads_prompt = self.head.reads_prompt
        hidden = self.backbone.read_text(batch, reads_prompt=reads_prompt)[None]
        how: dict[str, Any] = {"n_pairs": len(batch), "pooling": self.pooling}
        pooled = pool_responses(hidden, batch.segment, **how)
        if reads_prompt:
            of_prompts = hidden if self.backbone.causal else self._prompts_alone(batch)[None]
            pooled = torch.cat([pooled, pool_prompts(of_prompts, batch.segment, **how)], dim=-1)
        return pooled[0].float()

    def _prompts_alone(self, batch: PreferenceBatch) -> Tensor:
        """Compute hidden states [R, L, d] of prompts that no response has changed.

        A trunk that reads both ways would let a prompt know of the response that follows it.
        """
        segment = batch.segment.masked_fill(batch.segment != PROMPT, PADDING)
        return self.backbone(batch.input_ids, segment, batch.position_ids)

    @property
    def pooled_name(self) -> str:
        """Short description of what `pooled_trunk` returns, for the key of its cache."""
        if not self.head.reads_prompt:
            return self.pooling
        return (
            f"{self.pooling} and prompt"
            if self.backbone.causal
            else f"{self.pooling}, prompt alone"
        )


def load_reward(directory: str | Path, field: str, **options: Any) -> PersonalRewardModel:
    """Load the reward model that a setting names by its run or export, in eval mode.

    Args:
        field: the setting, for messages. options: of `loading.load_export`.

    Raises:
        ValueError: there is no model, or one of another kind.
    """
    found = export_of(directory)
    model = load(found, **options) if (found / CARD).is_file() else None
    if not isinstance(model, PersonalRewardModel):
        cure = f"Train one with model=reward, and set {field}=RUN_DIR"
        raise bad_value(field, str(directory), "the run or export of a reward model", cure)
    return model
