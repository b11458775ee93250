"""Groups of responses that a policy samples for users, their rewards, and the rows to learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.backbone.row_options import Sampling, row_options
from plrhf.core.errors import bad_value
from plrhf.core.row_packing import NO_USER
from plrhf.core.shrinkage import hashed
from plrhf.core.types import CHOSEN, PROMPT, PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.packing import LAYOUTS, TokenPair
from plrhf.data.rows import Row
from plrhf.data.tokenizer import Tokenizer
from plrhf.models.generation import batches_by_length, left_padded, text_ends, write_batch
from plrhf.models.pair_batches import row_tokenizer_of

if TYPE_CHECKING:
    from plrhf.models.policy import PersonalPolicy
    from plrhf.models.reward import PersonalRewardModel

Ids = tuple[int, ...]


@dataclass
class Rollouts:
    """G responses to each of B prompts in each of C contexts, as rows that a policy learns from.

    Two responses of a group stand in one row, as chosen and rejected ones do, so a group has P =
    ceil(G / 2) pairs and there are n = C * B * P, context by context. If G is odd, the second response
    of a group's last pair is empty.
    """

    asked: PreferenceBatch  # the B prompts and users
    pairs: PreferenceBatch  # the n pairs of responses, in R rows of L tokens
    rewards: Tensor  # [C, B, G] float32
    advantages: Tensor  # [n, 2] float32
    ref_logps: Tensor  # [R, L] float32, log-probability of each token under the reference, in nats
    old_logps: Tensor | None = (
        None  # the same under the policy that sampled; None: not computed yet
    )

    def of_tokens(self, values: Tensor) -> Tensor:
        """Spread a value of each response, [n, 2], over its tokens, [R, L]."""
        segment = self.pairs.segment
        of_rows = values.repeat(len(segment) // len(self.pairs), 1)  # [R, 2]
        return torch.where(segment == CHOSEN, of_rows[:, :1], of_rows[:, 1:])

    def by_group(self, values: Tensor) -> Tensor:
        """Put a value of each response, [n, 2], into the order of `rewards`, [C, B, G]."""
        n_contexts, n_asked, size = self.rewards.shape
        return values.reshape(n_contexts, n_asked, -1)[..., :size]


def prompts_of(batch: PreferenceBatch) -> list[Ids]:
    """Return the prompts of a batch's B pairs as token ids."""
    first = zip(batch.input_ids[: len(batch)], batch.segment[: len(batch)], strict=True)
    return [tuple(ids[part == PROMPT].tolist()) for ids, part in first]


@torch.no_grad()
def sample_responses(
    policy: PersonalPolicy,
    tokenizer: Tokenizer,
    prompts: Sequence[Ids],
    user: Tensor,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[Ids]:
    """Sample a response to each of N prompts from the policy itself.

    A response depends on its own seed and on no other row, so that any number of processes, and batches of
    any size, sample alike.

    Args:
        policy: in eval mode. user: each prompt's user vector, [N, user_dim].
        seeds: of each response, N.
        batch_size: responses that are written at once.

    Returns:
        N responses as token ids, with their end token unless they were cut at `max_new_tokens`.
    """
    ends = frozenset(text_ends(policy.backbone, tokenizer))
    unpadded = policy.backbone.layout == "two_rows"
    of_rows = [Sampling(temperature=1.0, top_p=1.0, seed=seed) for seed in seeds]
    found: dict[int, Ids] = {}
    for places in batches_by_length(prompts, batch_size=batch_size, unpadded=unpadded):
        input_ids, mask = left_padded([prompts[place] for place in places])
        tokens = write_batch(
            policy,
            tokenizer,
            input_ids.to(user.device),
            mask.to(user.device),
            user[places],
            max_new_tokens=max_new_tokens,
            of_rows=row_options([of_rows[place] for place in places], None, user.device),
        )
        found.update(zip(places, (_until_end(row, ends) for row in tokens.tolist()), strict=True))
    return [found[place] for place in range(len(prompts))]


def seeds_of(
    batch: PreferenceBatch, n_contexts: int, size: int, *, seed: int, step: int
) -> list[int]:
    """Return a seed for each of `size` responses to a batch's pairs in each context, [C * B * size].

    They depend on seed, step and the pairs' places in their split alone.
    """
    number = torch.arange(n_contexts)[:, None, None] * size + torch.arange(size)
    state = torch.tensor(seed)
    for one in (step, batch.row.cpu()[:, None], number):
        state = hashed(state, one)
    return state.flatten().tolist()


def _until_end(tokens: list[int], ends: frozenset[int]) -> Ids:
    """Return the tokens up to the first end token, which is included."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: last + 1])


def pairs_of_groups(
    policy: PersonalPolicy, prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]
) -> PreferenceBatch:
    """Make the rows of the responses to each prompt, two in a pair, on the policy's device."""
    pairs = [
        TokenPair(prompt, group[first], group[first + 1] if first + 1 < len(group) else ())
        for prompt, group in zip(prompts, groups, strict=True)
        for first in range(0, len(group), 2)
    ]
    dataset = PairDataset.from_tokens(pairs, layout=LAYOUTS[policy.backbone.layout])
    dataset.user_slots = policy.aggregator.user_slots(1) if policy.has_user_vectors else NO_USER
    return move_data_to_device(dataset.batch(range(len(pairs))), policy.device)


def requests(
    rows: Sequence[Row], known: Sequence[bool], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what a reward model is asked for each context and row, without the responses.

    Args:
        rows: B rows. known: whether each row's user is one of the train users; others are asked as the
            generic user. names: the contexts, "user", "generic" or both.
    """
    asked = []
    for name in names:
        for row, is_known in zip(rows, known, strict=True):
            one: dict[str, Any] = {"prompt": row.prompt, "user_text": row.user_text}
            if name == "user":
                one["user_features"] = row.user_features
            if name == "user" and is_known:
                one["user_id"] = row.user_id
            asked.append(one)
    return asked


def check_reward_room(
    reward: PersonalRewardModel, rows: Sequence[Row], max_new_tokens: int
) -> None:
    """Raise a ValueError if a reward model could not read sampled responses to these rows' prompts.

    Args:
        rows: those with the longest prompts. max_new_tokens: of a response, without its end token.
    """
    row_tokenizer = row_tokenizer_of(reward)
    longest = max((len(row_tokenizer.prompt(row)) for row in rows), default=0)
    room = row_tokenizer.max_tokens - longest - 1
    if max_new_tokens > room:
        raise bad_value(
            "model.max_new_tokens",
            max_new_tokens,
            f"at most {room}, as the reward model reads {row_tokenizer.max_tokens} tokens, of which a "
            f"prompt takes {longest}",
            f"Set model.max_new_tokens={max(1, room)}, or train model.reward with a larger data.max_tokens",
        )


def group_rewards(
    reward: PersonalRewardModel,
    asked: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> Tensor:
    """Compute the rewards of N groups of G texts, each group for its user, [N, G] float32.

    A blank text, which no reward model has seen, counts as the worst of its group.
    """
    spoken = torch.tensor([[text.strip() != "" for text in group] for group in groups])
    scored = [
        {**one, "response": text}
        for one, group in zip(asked, groups, strict=True)
        for text in group
        if text.strip() != ""
    ]
    rewards = torch.full(spoken.shape, torch.inf)
    if len(scored) > 0:
        rewards[spoken] = reward.score(scored, batch_size=batch_size).float().cpu()
    worst = rewards.amin(dim=1, keepdim=True)
    return torch.where(spoken, rewards, worst.masked_fill(worst.isinf(), 0.0))
