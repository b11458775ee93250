"""What all tests share: one thread, a fixed seed, a tokenizer learned from a few words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plrhf.backbone import train_tokenizer

torch.set_num_threads(1)  # for models this small a second thread costs more than it brings


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-pair tokenizer, 300 tokens, whose only special token ``<|endoftext|>`` is number 0."""
    return train_tokenizer(["Write about the sea.", "The sea is blue and wide."], vocab_size=300)
