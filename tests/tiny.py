"""Models small enough to build by the hundred, and pairs of odd, unequal sizes to feed them."""

from __future__ import annotations

import copy
import json
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from plrhf.aggregators import Aggregator, ConcatSoftPrompt, FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.row_index import RowIndex
from plrhf.core.row_packing import NO_USER, RowPacking, UserSlots
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import Layout, TokenPair, packed
from plrhf.encoders import LookupEncoder, NoneEncoder, UserEncoder
from plrhf.models.base import PersonalModule

VOCABULARY, WIDTH, N_LAYERS, N_USERS = 97, 32, 3, 5
USERS = (1, 2, 3, 0, 5, 1, 2)  # of the pairs, in their order
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
AGGREGATORS = ("soft_prompt", "late_soft_prompt", "film_last", "film_every_block")


def language_model(
    kind: str = "gptj", *, vocabulary: int = VOCABULARY, positions: int = 128
) -> PreTrainedModel:
    """A random ``gptj``, ``llama`` or (bidirectional) ``bert``, always the same one."""
    torch.manual_seed(0)
    if kind == "gptj":
        return tiny_gptj(
            vocab_size=vocabulary,
            n_layers=N_LAYERS,
            width=WIDTH,
            n_heads=4,
            max_positions=positions,
            eos_token_id=0,
        )
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
    }
    if kind == "llama":
        own: dict[str, Any] = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, **own))
    return AutoModel.from_config(BertConfig(**shape)).eval()


def make_backbone(kind: str = "gptj", **options: Any) -> Backbone:
    """`language_model` with LoRA that has been somewhere already, or as `options` say.

    A copy of the one that was built first in this process, as building takes two to four times as
    long. The random generator is left as building leaves it.
    """
    backbone, state = _built(kind, json.dumps(options, sort_keys=True))
    torch.set_rng_state(state)
    return copy.deepcopy(backbone)


@cache
def _built(kind: str, options: str) -> tuple[Backbone, Tensor]:
    """A backbone with these options, in JSON, and the state of the random generator after it."""
    settings: dict[str, Any] = {"trainable": "lora", "lora": LORA, **json.loads(options)}
    backbone = Backbone(model=language_model(kind), **settings)
    perturb(backbone, "lora_B")
    return backbone, torch.get_rng_state()


def perturb(module: nn.Module, name: str, *, std: float = 0.1) -> None:
    """Move all weights with `name` in theirs away from their start, zero as a rule."""
    for full_name, parameter in module.named_parameters():
        if name in full_name:
            nn.init.normal_(parameter, std=std)


def make_aggregator(name: str) -> Aggregator:
    """One of `AGGREGATORS`, in which users make a difference."""
    if name.endswith("soft_prompt"):
        position: Any = "after_prompt" if name == "late_soft_prompt" else "before"
        return ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=3, position=position)
    site: Any = name.removeprefix("film_")
    film = FiLM(hidden_size=WIDTH, n_blocks=N_LAYERS, site=site)
    perturb(film, "to_film")
    return film


def make_model(
    kind: type[PersonalModule],
    *,
    backbone: Backbone | None = None,
    aggregator: str | Aggregator = "soft_prompt",
    personal: bool = True,
    **settings: Any,
) -> Any:
    """A `kind` of model with a lookup of rank 2 (or none), the same one for the same arguments."""
    backbone = make_backbone() if backbone is None else backbone
    torch.manual_seed(1)
    if isinstance(aggregator, str):
        aggregator = make_aggregator(aggregator)
    encoder: UserEncoder = NoneEncoder()
    if personal:
        vocabulary = backbone.vocabulary()
        encoder = LookupEncoder(
            n_users=N_USERS, user_dim=aggregator.user_dim, vocabulary=vocabulary, rank=2
        )
        perturb(encoder, "offsets", std=1.0)
        with torch.no_grad():
            encoder.offsets.weight[0] = 0.0
    return kind(
        backbone=backbone,
        encoder=encoder,
        aggregator=aggregator,
        n_users=N_USERS + 1,
        **settings,
    )


def make_pairs(n: int = len(USERS), *, seed: int = 0) -> list[TokenPair]:
    """Pairs of random tokens, prompts of 2-9 and responses of 1-9."""
    draw = random.Random(seed)

    def tokens(shortest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, VOCABULARY) for _ in range(draw.randint(shortest, 9)))

    return [TokenPair(tokens(2), tokens(1), tokens(1)) for _ in range(n)]


def make_batch(
    pairs: list[TokenPair],
    *,
    layout: Layout = packed,
    padding: int = 0,
    users: Any = None,
    slots: UserSlots | None = NO_USER,
) -> PreferenceBatch:
    """The pairs as a batch of `USERS` in turn, with `padding` columns more than it needs.

    Packed rows may stand together, with user vectors at `slots`; None: they stay apart.
    """
    input_ids, segment, position_ids = layout(pairs)
    n_pairs = len(pairs)
    if users is None:
        users = [USERS[place % len(USERS)] for place in range(n_pairs)]

    def padded(values: Tensor, filler: int) -> Tensor:
        return nn.functional.pad(values, (0, padding), value=filler)

    packing = None
    if slots is not None:
        packing = RowPacking.of(padded(segment, -1), slots, together=layout is packed)
    return PreferenceBatch(
        packing=packing,
        index=RowIndex.of(padded(segment, -1)),
        user_id=torch.tensor(users),
        features=torch.zeros(n_pairs, 0),
        input_ids=padded(input_ids, 9),
        segment=padded(segment, -1),
        position_ids=padded(position_ids, 3),
        row=torch.arange(n_pairs),
    )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters that have one, by name."""
    named = module.named_parameters()
    return {name: value.grad for name, value in named if value.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float) -> None:
    """The same names with the same values."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0, msg=name)
