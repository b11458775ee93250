"""Generates text for many users in one batch: each row has its own user vectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.backbone.decoding import end_tokens, write_tokens
from plrhf.backbone.model import Backbone
from plrhf.core.errors import bad_value
from plrhf.core.progress import with_progress
from plrhf.core.types import UserBatch
from plrhf.data.chat import end_of_turn
from plrhf.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


@torch.no_grad()
def generate(
    model: PersonalModule,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    users: UserBatch | None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int | None = None,
) -> list[str]:
    """Generate one response for each prompt and its user, with a key-value cache.

    A response ends with the tokenizer's end token or one of the model's generation_config.

    Args:
        prompts: N prompts as token ids, start token included, none empty.
        users: N users, one for each prompt, index 0 for the generic user; None: the reference model
            generates, without adapters and users.
        max_new_tokens: maximum length of a response, at least 1. batch_size: rows generated at once.
        temperature: 0 is greedy decoding; above 0 samples.
        top_p: probability mass of nucleus sampling, in (0, 1].
        seed: of sampling; torch's global generator is restored afterwards. None: use the global
            generator.

    Returns:
        N responses without special tokens.
    """
    check_options(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    check_room(model, prompts, max_new_tokens=max_new_tokens)
    was_training = model.training
    model.eval()
    written: dict[int, str] = {}
    device = next(model.backbone.parameters()).device
    start = 0
    unpadded = model.backbone.layout == "two_rows"  # a state or a bias by index would see padding
    batches = batches_by_length(prompts, batch_size=batch_size, unpadded=unpadded)
    for places in with_progress(batches, "writing texts"):
        at = torch.tensor(places)
        input_ids, mask = left_padded([prompts[place] for place in places])
        of_users = None
        if users is not None:
            of_users = UserBatch(user_id=users.user_id[at], features=users.features[at])
        with model.autocast(), seeded(None if seed is None else seed + start, device):
            tokens = _generate_batch(
                model,
                tokenizer,
                input_ids.to(device),
                mask.to(device),
                of_users,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
            )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        written.update(zip(places, texts, strict=True))
        start += len(places)
    model.train(was_training)
    return [written[place] for place in range(len(prompts))]


def check_options(
    *, max_new_tokens: int, temperature: float, top_p: float, field: str = "eval"
) -> None:
    """Raise a ValueError unless these are valid options of `generate`.

    Args:
        field: the section of the settings that holds them, for messages; empty for none.
    """
    for name, value, good, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "a whole number from 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a number from 0"),
        ("top_p", top_p, 0 < top_p <= 1, "a number above 0, at most 1"),
    ):
        if not good:
            dotted = _dotted(field, name)
            raise bad_value(dotted, value, allowed, f"Set {dotted}=1")


def _dotted(field: str, name: str) -> str:
    """Return the full name of a setting in a section, which may be empty."""
    return f"{field}.{name}" if field else name


def check_room(
    model: PersonalModule | Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    field: str = "eval",
) -> None:
    """Raise a ValueError if prompts and new tokens exceed the model's number of positions.

    Args:
        field: the section of the settings that holds `max_new_tokens`, for messages; empty for none.
    """
    room = model.max_positions
    longest = max((len(prompt) for prompt in prompts), default=0)
    if room is not None and longest + max_new_tokens > room:
        dotted = _dotted(field, "max_new_tokens")
        raise bad_value(
            dotted,
            max_new_tokens,
            f"at most {room - longest}, as a prompt takes {longest} of {room} positions",
            f"Set a smaller {dotted} or data.max_prompt_tokens",
        )


def _generate_batch(
    model: PersonalModule,
    tokenizer: Tokenizer,
    input_ids: Tensor,
    mask: Tensor,
    users: UserBatch | None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Tensor:
    """Generate one batch: new tokens [N, up to max_new_tokens], with padding after the end token."""
    if users is None:
        writer: Any = model.backbone.reference()
        user = torch.empty(len(input_ids), 0, device=input_ids.device)
    else:
        writer = contextlib.nullcontext()
        with torch.autocast(input_ids.device.type, enabled=False):
            user, _ = model.encode(move_data_to_device(users, input_ids.device))
        user = user.to(input_ids.device)
    with writer:
        return write_batch(
            model,
            tokenizer,
            input_ids,
            mask,
            user,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )


def write_batch(
    model: PersonalModule,
    tokenizer: Tokenizer,
    input_ids: Tensor,
    mask: Tensor,
    user: Tensor,
    *,
    max_new_tokens: int,
    **how: Any,
) -> Tensor:
    """Generate one batch for given user vectors, [N, up to max_new_tokens], padded after the end token.

    Args:
        input_ids, mask: [N, L] int64, left-padded prompts on the model's device.
        user: [N, user_dim], or [N, 0] for no user model. how: further options of `write_tokens`.
    """
    n_read = model.aggregator.n_positions + input_ids.shape[1]
    cache = model.backbone.cache(n_read + max_new_tokens)
    if model.aggregator.shares_prompts and cache is not None:
        model.backbone.prefill(cache, input_ids, mask)
    with model.aggregator.decoding(model.backbone, input_ids, mask, user) as inputs:
        return write_tokens(
            model.backbone,
            inputs,
            cache,
            ends=text_ends(model.backbone, tokenizer),
            padding=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            **how,
        )


def text_ends(backbone: Backbone, tokenizer: Tokenizer) -> list[int]:
    """Return all tokens that end a text: the model's, the tokenizer's, and the end of a chat turn."""
    ends = end_tokens(backbone, tokenizer.eos_token_id)
    turn_end = end_of_turn(tokenizer)
    return ends if turn_end is None or turn_end in ends else [*ends, turn_end]


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the random generators in this context, and restore them afterwards; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def batches_by_length(
    prompts: Sequence[Sequence[int]], *, batch_size: int, unpadded: bool
) -> list[list[int]]:
    """Group prompts (by index) into batches of similar length, so that there is little padding.

    Args:
        unpadded: put only prompts of equal length into a batch.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        last = batches[-1] if len(batches) > 0 else []
        fits = 0 < len(last) < batch_size
        if fits and (not unpadded or len(prompts[last[0]]) == len(prompts[place])):
            last.append(place)
        else:
            batches.append([place])
    return batches


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, so that all end together: ids and mask, [N, L] int64."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
