"""What one model knows about people, without a server around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plrhf
from plrhf.serving.user_model import UserModel

POOL = [
    {
        "prompt": f"Write note {n}.",
        "chosen": "Back at six.",
        "rejected": "I shall return " + "so " * n,
    }
    for n in range(4)
]
OWN = {"prompt": "Write.", "chosen": "It is done.", "rejected": "Done."}


@pytest.mark.slow
def test_texts_of_the_pool_are_read_once(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fits are those of a model that reads each pair anew; the trunk runs for other texts only."""
    model = plrhf.load(runs[1])
    users, naive = UserModel(model, POOL), UserModel(model)
    read, reads = model.pooled_trunk, []
    monkeypatch.setattr(model, "pooled_trunk", lambda batch: reads.append(1) or read(batch))
    for pairs, n_reads in ((POOL[1:], 0), ([OWN, POOL[2]], 1)):
        found = users.fit(pairs)
        assert len(reads) == n_reads and found.n_pairs == len(pairs)
        expected = naive.fit(pairs).users
        torch.testing.assert_close(found.users.vectors, expected.vectors, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.users.shares, expected.shares, atol=1e-5, rtol=1e-4)
        assert (found.users.vectors[0] - users.generic).abs().max() > 1e-4
        reads.clear()


@pytest.mark.slow
def test_long_texts_are_read_as_far_as_those_of_training(runs: tuple[Path, Path]) -> None:
    """A text may be too long that a model wrote itself, as it is more tokens when it is read."""
    users = UserModel(plrhf.load(runs[1]))
    most = users.row_tokenizer().max_tokens
    long = OWN | {"chosen": OWN["chosen"] + " so" * 2 * most}
    users.check(long)
    found = users.fit([long])
    longer = long | {"chosen": long["chosen"] + " no" * most}
    assert found.n_pairs == 1
    torch.testing.assert_close(found.users.vectors, users.fit([longer]).users.vectors)
    assert (found.users.vectors - users.fit([OWN]).users.vectors).abs().max() > 1e-4
    alike = {"prompt": "Write.", "chosen": longer["chosen"], "rejected": long["chosen"]}
    users.check(alike)
    assert users.fit([alike]).n_pairs == 0
    assert torch.equal(users.fit([alike]).users.vectors[0], users.generic)
