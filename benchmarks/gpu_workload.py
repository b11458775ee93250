"""What `gpu.py` measures: peaks of GPUs, models of random weights, pairs as batches, steps, waits."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl_workload import DROPOUT, LORA, N_TOKENS, N_USERS, SHAPES, TARGETS, Shape

from plrhf.aggregators import Aggregator, ConcatSoftPrompt, FiLM
from plrhf.backbone.loading import empty_model
from plrhf.backbone.model import Backbone
from plrhf.core.row_index import RowIndex
from plrhf.core.row_packing import RowPacking, UserSlots
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import LAYOUTS, LayoutName, TokenPair
from plrhf.encoders import LookupEncoder
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.training.plan import Plan, Workload, plan_training

PEAKS = {
    **{"B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12},
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12},
    **{"L40S": 362e12, "A6000": 155e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12},
    **{"L4": 121e12, "4090": 165e12, "3090": 71e12},
}
"""Operations a second of dense bfloat16 products by the makers' datasheets; the first name that fits."""

MODELS: dict[str, dict[str, Any]] = {
    "gptj_6b": {"model_type": "gptj"},
    "llama_8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
SMALL: dict[str, dict[str, Any]] = {  # of both families, for `correctness` and for toys
    "gptj": {
        **{"model_type": "gptj", "vocab_size": 211, "n_positions": 256, "n_embd": 64},
        **{"n_layer": 2, "n_head": 2, "rotary_dim": 16, "bos_token_id": 0, "eos_token_id": 0},
    },
    "llama": {
        **{"model_type": "llama", "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0},
    },
}
TOY_SHAPE = Shape(n_prompt=14, n_response=5)
AGGREGATORS = ("film_last", "film_every_block", "soft_prompt", "late_soft_prompt")


@dataclass(frozen=True)
class Setting:
    """What is measured on: the device, and whether everything is made small.

    Attributes:
        toy: models of two blocks, pairs of a few tokens.
    """

    device: torch.device
    toy: bool

    @property
    def shapes(self) -> dict[str, Shape]:
        """Pairs' lengths by name."""
        names = ("tldr",) if self.toy else ("tldr", "chat")
        return {name: (TOY_SHAPE if self.toy else SHAPES[name]) for name in names}

    @property
    def aggregators(self) -> tuple[str, ...]:
        """Those of `AGGREGATORS` that are measured."""
        return AGGREGATORS[-1:] if self.toy else AGGREGATORS

    def architecture(self, name: str) -> dict[str, Any]:
        """The shape of a model of `MODELS`, or of its family's small one."""
        return SMALL[name.partition("_")[0]] if self.toy else MODELS[name]

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def datasheet_peak(name: str) -> float | None:
    """Operations a second of a GPU by its datasheet; None for one that is not in the table."""
    return next((peak for model, peak in PEAKS.items() if model in name), None)


def language_model(
    architecture: dict[str, Any], *, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """A model of random weights, on the device that torch makes tensors on."""
    config = AutoConfig.for_model(**architecture)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def make_aggregator(name: str, backbone: Backbone, *, n_tokens: int) -> Aggregator:
    """One of `AGGREGATORS` for a backbone."""
    width = backbone.hidden_size
    if name.endswith("soft_prompt"):
        position: Any = "after_prompt" if name == "late_soft_prompt" else "before"
        return ConcatSoftPrompt(hidden_size=width, n_tokens=n_tokens, position=position)
    site: Any = name.removeprefix("film_")
    film = FiLM(hidden_size=width, n_blocks=len(backbone.blocks), site=site)
    nn.init.normal_(film.to_film.weight, std=0.05)
    return film


def make_backbone(
    model: PreTrainedModel, *, dropout: float = DROPOUT, recompute: bool = False
) -> Backbone:
    """A language model with LoRA on all linear layers."""
    lora = {**LORA, "dropout": dropout, "target_modules": TARGETS}
    return Backbone(model=model, lora=lora, gradient_checkpointing=recompute)


def make_policy(backbone: Backbone, aggregator: str) -> PersonalDPOPolicy:
    """P-DPO with a lookup of rank 4."""
    acts = make_aggregator(aggregator, backbone, n_tokens=N_TOKENS)
    encoder = LookupEncoder(
        n_users=N_USERS,
        user_dim=acts.user_dim,
        vocabulary=backbone.vocabulary(),
        rank=4,
        init="normal",
    )
    nn.init.normal_(encoder.offsets.weight, std=0.05)
    return PersonalDPOPolicy(
        backbone=backbone, encoder=encoder, aggregator=acts, n_users=N_USERS + 1, optim=Optim()
    )


def make_pairs(shape: Shape, n_pairs: int, vocabulary: int, *, unequal: bool) -> list[TokenPair]:
    """Pairs of random tokens of the shape's lengths, or of lengths between half of them and them."""
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        length = draw.randint(max(1, length // 2), length) if unequal else length
        return tuple(draw.randrange(1, vocabulary) for _ in range(length))

    return [
        TokenPair(tokens(shape.n_prompt), tokens(shape.n_response), tokens(shape.n_response))
        for _ in range(n_pairs)
    ]


def make_batch(
    pairs: list[TokenPair], slots: UserSlots, *, layout: LayoutName = "packed"
) -> PreferenceBatch:
    """The pairs as the loader makes a batch of them, users in turn."""
    input_ids, segment, position_ids = LAYOUTS[layout](pairs)
    n_pairs = len(pairs)
    return PreferenceBatch(
        user_id=torch.arange(n_pairs) % N_USERS + 1,
        features=torch.zeros(n_pairs, 0),
        input_ids=input_ids,
        segment=segment,
        position_ids=position_ids,
        row=torch.arange(n_pairs),
        packing=RowPacking.of(segment, slots, together=layout == "packed"),
        index=RowIndex.of(segment),
    )


class Step:
    """Training steps of a policy on one batch, in bfloat16 as `trainer=gpu` takes them."""

    def __init__(
        self, model: PersonalDPOPolicy, pairs: list[TokenPair], device: torch.device
    ) -> None:
        self.model, self.device = model.to(device).train(), device
        batch = make_batch(pairs, model.user_slots, layout=model.backbone.layout)
        self.batch = move_data_to_device(batch, device)
        with self.autocast():
            self.batch.ref_logps = model.reference_logps(self.batch)
        parts: Any = model.trainable_parts()
        self.optimizer, _ = model.optim.build(**parts, total_steps=1000)
        self.learned = [one for part in parts.values() for one in part if one.requires_grad]

    def autocast(self) -> Any:
        """The context of the trainer's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def __call__(self) -> Tensor:
        with self.autocast():
            loss, _ = self.model.training_loss(self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def planned(
    architecture: dict[str, Any], aggregator: str, shape: Shape, n_pairs: int, *, recompute: bool
) -> Plan:
    """What `plan=true` says of such steps."""
    with torch.device("meta"):
        empty = empty_model(path=None, architecture=architecture, dtype="bfloat16")
        backbone = make_backbone(empty, recompute=recompute)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to_empty(device="cpu")
        model = make_policy(backbone, aggregator)
        work = Workload(
            prompt_tokens=shape.n_prompt,
            response_tokens=shape.n_response,
            n_features=0,
            batch_size=n_pairs,
            batch_tokens=None,
            eval_batch_size=1,
            accumulated_batches=1,
            n_gpus=1,
        )
        return plan_training(model, work, precision="bf16-mixed", zero3=None, n_users=N_USERS)


def step_operations(
    architecture: dict[str, Any], aggregator: str, shape: Shape, n_pairs: int
) -> float:
    """Operations that a step of LoRA needs: twice those of the forward pass of what is read.

    Of a frozen weight there is a product forward, and one for the gradient of its input. Attention has
    two products forward and four back. What is computed twice, to spare memory, is not counted.
    """
    with torch.device("meta"):
        model = language_model(architecture, dtype=torch.bfloat16)
    config = model.config
    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, nn.Linear) and one is not head]
    in_blocks = sum(one.weight.numel() for one in linear)
    n_prompt, n_response = shape.n_prompt, shape.n_response
    n_contexts = 1 if aggregator == "film_last" else 2
    vectors = N_TOKENS if aggregator.endswith("soft_prompt") else 0
    times = n_contexts  # that a prompt is read
    if aggregator == "late_soft_prompt":
        times, own = 1, vectors + 2 * n_response
    else:
        n_prompt, own = n_prompt + vectors, 2 * n_response
    positions = times * n_prompt + n_contexts * own
    seen = times * n_prompt**2 / 2  # by each position, itself and those before it
    seen += n_contexts * own * (n_prompt + n_response / 2)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 12 * seen * width * config.num_hidden_layers
    logits = 4 * 2 * 2 * n_response * head.weight.numel()  # in both contexts
    return n_pairs * (4 * in_blocks * positions + attention + logits)


class WaitCounter(TorchDispatchMode):
    """Counts operations for which a program waits for a GPU: those whose result it has to know.

    Attributes:
        found: how often each was called.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in self.WAITS or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits_counted(setting: Setting) -> Iterator[Counter[str]]:
    """Count within it how often the program waits for the device, by what it waits for.

    On a GPU torch's sync debug mode tells; elsewhere the operations are counted that would wait.
    """
    found: Counter[str] = Counter()
    if setting.device.type != "cuda":
        with WaitCounter() as counter:
            yield found
        found.update(counter.found)
        return
    setting.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in said:
        if "synchroniz" in str(one.message):
            found[f"{one.filename.rpartition('site-packages/')[2]}:{one.lineno}"] += 1
