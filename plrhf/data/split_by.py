"""Draws the split of rows that carry none: by prompt, response, pair, or within each user's judgments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import bad_value
from plrhf.data.rows import SPLITS, Rows

TRAIN, VAL, TEST = range(len(SPLITS))
NO_SPLIT = -1
Codes = NDArray[np.int8]
"""Index in `SPLITS` of each row's split, or `NO_SPLIT`."""

SplitBy = Literal["prompt", "conversation", "response", "pair", "user"]

NEED_PROMPTS = {
    "conversation_id": ("prompt", "conversation"),
    "group_id": ("prompt", "conversation"),
    "rating_level": ("prompt", "conversation", "response"),
}
"""What rows with these fields may be divided by: else train would tell what test asks."""


def uniform_hash(key: str, *, salt: str, seed: int) -> float:
    """Hash a key to a uniformly distributed number in [0, 1), the same in every process.

    Unlike a draw from a random generator, it does not change when other keys are added or removed.

    Args:
        salt: purpose of the number. Numbers with different salts are independent.
    """
    text = f"[{json.dumps(salt)}, {seed}, {json.dumps(key)}]"
    digest = blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: more could round up to 1.0


def draw_splits(
    rows: Rows, by: SplitBy, *, seed: int, val_fraction: float, test_fraction: float
) -> Codes:
    """Draw the split of each row, [N] int8, so that the stated share of rows is expected in each.

    Args:
        by: what no two splits have in common.
            ``prompt``: no prompt is in two splits, nor a conversation. A row whose prompt, as an opening
            that many conversations have, is in a later split too gets none, which is `NO_SPLIT`.
            ``conversation``: no conversation is in two splits. Prompts may be shared.
            ``response``: each test pair has a response that is in no train or val pair, and each val
            pair one that is in no train pair. Prompts are shared.
            ``pair``: no two responses that were compared in one split are compared in another, also
            not by another user. Prompts and responses are shared.
            ``user``: the pairs of each user are divided, so that every user with some of them has
            train, val and test pairs. Only a user's own repeated judgment stays in one split.
    """
    for name, allowed in NEED_PROMPTS.items():
        if by not in allowed and any(one is not None for one in rows.texts(name)):
            said = f"{' or '.join(allowed)} where rows have a {name}, and tell of one another"
            raise bad_value("data.split_by", by, said, "Set data.split_by=prompt")
    draw = {
        "prompt": _by_prompt,
        "conversation": _by_conversation,
        "response": _by_response,
        "pair": _by_pair,
        "user": _by_user,
    }[by]
    return draw(rows, seed, val_fraction, test_fraction)


def _by_prompt(rows: Rows, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    codes = _by_conversation(rows, seed, val_fraction, test_fraction)
    if all(one is None for one in rows.texts("conversation_id")):
        return codes
    last: dict[str | None, int] = {}  # train < val < test
    for prompt, code in zip(rows.texts("prompt_id"), codes.tolist(), strict=True):
        last[prompt] = max(last.get(prompt, TRAIN), code)
    drawn = zip(rows.texts("prompt_id"), codes.tolist(), strict=True)
    return _codes(code if last[prompt] == code else NO_SPLIT for prompt, code in drawn)


def _by_conversation(rows: Rows, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    """Draw conversations, and the prompts of rows outside any."""

    def keys() -> Iterator[str]:
        ids = zip(rows.texts("conversation_id"), rows.texts("prompt_id"), strict=True)
        return (str(prompt if one is None else one) for one, prompt in ids)

    return _draw_each(keys, "prompt", seed, val_fraction, test_fraction)


def _by_pair(rows: Rows, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    return _draw_each(lambda: _pair_keys(rows), "compared pair", seed, val_fraction, test_fraction)


def _by_response(rows: Rows, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    """Draw responses, and give a pair the later of its responses' splits.

    A pair is outside test if both its responses are, hence the square roots.
    """
    seen_in_test = (1 - test_fraction) ** 0.5
    seen_in_train = (1 - test_fraction - val_fraction) ** 0.5
    of_text = _drawn("response", seed, seen_in_test - seen_in_train, 1 - seen_in_test)
    pairs = zip(rows.texts("chosen"), rows.texts("rejected"), strict=True)
    return _codes(max(of_text(str(one)), of_text(str(other))) for one, other in pairs)


def _by_user(rows: Rows, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    """Order the distinct pairs of each user by a hash, and cut the order at the fractions."""
    own: dict[str, dict[str, float]] = {}  # user -> pair -> its place, at first its hash
    users = (rows.people[number].user_id for number in rows.person)
    keys = list(zip(users, _pair_keys(rows), strict=True))
    for user, pair in keys:
        own.setdefault(user, {})[pair] = uniform_hash(f"{user} {pair}", salt="own pair", seed=seed)
    for pairs in own.values():
        for rank, pair in enumerate(sorted(pairs, key=pairs.__getitem__)):
            pairs[pair] = (rank + 0.5) / len(pairs)
    return _codes(_code(own[user][pair], val_fraction, test_fraction) for user, pair in keys)


def _pair_keys(rows: Rows) -> Iterator[str]:
    """Yield a key of each row's prompt and its two responses, whichever of them was chosen."""
    texts = (rows.texts(name) for name in ("prompt_id", "chosen", "rejected"))
    for prompt, chosen, rejected in zip(*texts, strict=True):
        yield json.dumps([prompt, *sorted([str(chosen), str(rejected)])])


def _draw_each(
    keys: Callable[[], Iterator[str]],
    salt: str,
    seed: int,
    val_fraction: float,
    test_fraction: float,
) -> Codes:
    """Draw the split of each row's key by its hash.

    Where that happens to leave a split without any of few keys, the keys are divided in the order of their
    hashes, and each split has one of them at least.

    Args:
        keys: gives the keys of the rows, in their order.
    """
    codes = _codes(map(_drawn(salt, seed, val_fraction, test_fraction), keys()))
    shares = (1 - val_fraction - test_fraction, val_fraction, test_fraction)  # as in `SPLITS`
    if all(share <= 0 or (codes == split).any() for split, share in enumerate(shares)):
        return codes
    order = sorted(set(keys()), key=lambda key: uniform_hash(key, salt=salt, seed=seed))
    if len(order) < sum(share > 0 for share in shares):
        return codes
    n_test, n_val = (
        max(round(share * len(order)), int(share > 0)) for share in (test_fraction, val_fraction)
    )
    n_test = min(n_test, len(order) - n_val - 1)
    split = {
        key: TEST if place < n_test else VAL if place < n_test + n_val else TRAIN
        for place, key in enumerate(order)
    }
    return _codes(split[key] for key in keys())


def _drawn(salt: str, seed: int, val_fraction: float, test_fraction: float) -> Callable[[str], int]:
    """Return a function that draws the split of a key by its hash."""

    @lru_cache(maxsize=2**16)
    def draw(key: str) -> int:
        return _code(uniform_hash(key, salt=salt, seed=seed), val_fraction, test_fraction)

    return draw


def _code(place: float, val_fraction: float, test_fraction: float) -> int:
    """Return the split at a place in [0, 1): first test, then val, then train."""
    if place < test_fraction:
        return TEST
    return VAL if place < test_fraction + val_fraction else TRAIN


def _codes(codes: Iterable[int]) -> Codes:
    return np.fromiter(codes, np.int8)
