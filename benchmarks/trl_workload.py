"""What the steps beside TRL's are taken on: shapes of pairs, ways to train, a backbone, rows."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

N_USERS, N_TOKENS = 8, 10
LORA = {"r": 8, "alpha": 16}
DROPOUT = 0.05
"""Of the authors' LoRA, and of every experiment of 6B to 8B here."""
TARGETS = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of prompt and response (end token among them), pairs in all and a step, steps a turn."""

    n_prompt: int
    n_response: int
    n_pairs: int = 24
    batch: int = 4
    steps: int = 2


SHAPES = {
    "tldr": Shape(n_prompt=350, n_response=35),
    "chat": Shape(n_prompt=100, n_response=200),
    # TRL's attention takes 3 GiB a pair here, on the authors' recipe.
    "long": Shape(n_prompt=1500, n_response=200, n_pairs=6, batch=1, steps=1),
}
if torch.cuda.is_available():  # which as few pairs would leave idle
    SHAPES = {
        name: replace(one, n_pairs=4 * one.n_pairs, batch=4 * one.batch)
        for name, one in SHAPES.items()
    }


@dataclass(frozen=True)
class Method:
    """One way to train: its model, whose trainer, its dtype and dropout, what it does with rows."""

    name: str
    model: str  # dpo, reward
    trainer: str  # plrhf, trl
    dtype: Literal["float32", "bfloat16"] = "float32"
    aggregator: str = "film"
    rows_a_pair: int = 1
    online_reference: bool = False
    dropout: float = DROPOUT  # of LoRA
    at_best: bool = False  # TRL with what is fast on a GPU; of use there alone

    @property
    def script(self) -> Path:
        """The script that trains by it."""
        return Path(__file__).with_name(f"{self.trainer}_worker.py")


WITHOUT_DROPOUT = ", no dropout"
METHODS = {
    one.name: one
    for one in (
        Method("dpo ours", "dpo", "plrhf"),
        Method("dpo ours" + WITHOUT_DROPOUT, "dpo", "plrhf", dropout=0.0),
        Method("dpo ours, bfloat16", "dpo", "plrhf", dtype="bfloat16"),
        Method("dpo ours, soft prompt", "dpo", "plrhf", aggregator="soft_prompt"),
        Method("dpo ours, late soft prompt", "dpo", "plrhf", aggregator="late_soft_prompt"),
        Method("dpo TRL, authors' recipe", "dpo", "trl", rows_a_pair=2, online_reference=True),
        Method(
            "dpo TRL, authors' recipe" + WITHOUT_DROPOUT,
            "dpo",
            "trl",
            rows_a_pair=2,
            online_reference=True,
            dropout=0.0,
        ),
        Method("dpo TRL, reference beforehand", "dpo", "trl", rows_a_pair=2),
        Method("dpo TRL, reference beforehand, vanilla", "dpo", "trl"),
        Method(
            "dpo ours, late soft prompt, bfloat16",
            "dpo",
            "plrhf",
            dtype="bfloat16",
            aggregator="late_soft_prompt",
        ),
        Method("dpo TRL, best", "dpo", "trl", dtype="bfloat16", rows_a_pair=2, at_best=True),
        Method("reward ours", "reward", "plrhf"),
        Method("reward ours" + WITHOUT_DROPOUT, "reward", "plrhf", dropout=0.0),
        Method("reward ours, bfloat16", "reward", "plrhf", dtype="bfloat16"),
        Method("reward ours, soft prompt", "reward", "plrhf", aggregator="soft_prompt"),
        Method("reward ours, late soft prompt", "reward", "plrhf", aggregator="late_soft_prompt"),
        Method("reward TRL", "reward", "trl", rows_a_pair=2),
        Method("reward TRL" + WITHOUT_DROPOUT, "reward", "trl", rows_a_pair=2, dropout=0.0),
        Method("reward TRL, vanilla", "reward", "trl"),
    )
}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word: w1, w2, ..."""
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **end)


def write_backbone(
    folder: Path, *, layers: int, width: int, vocabulary: int, family: str = "gptj"
) -> None:
    """A GPT-J or ``llama`` of random weights, on a GPU in bfloat16, with a tokenizer of words."""
    word_tokenizer(vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape: dict[str, Any] = {
        "n_positions": 2048,
        "n_embd": width,
        "n_layer": layers,
        "n_head": max(1, width // 64),
        "rotary_dim": min(64, width),
    }
    if family == "llama":
        shape = {
            "max_position_embeddings": 2048,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 64),
        }
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **shape, **ends)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)


def write_pairs(path: Path, *, shape: str, vocabulary: int) -> None:
    """Pairs of the shape's lengths: rows of random words, users in turn."""
    draw = random.Random(0)
    n_prompt, n_response = SHAPES[shape].n_prompt, SHAPES[shape].n_response
    n_pairs = SHAPES[shape].n_pairs

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1, vocabulary)}" for _ in range(count))

    rows = [
        {
            "prompt": words(n_prompt),
            "chosen": words(n_response - 1),  # and the end token
            "rejected": words(n_response - 1),
            "user_id": f"user {i % N_USERS}",
            "split": "train" if i < n_pairs else "test",
        }
        for i in range(n_pairs + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
