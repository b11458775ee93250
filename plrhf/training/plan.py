"""Memory and communication of a training, computed without running it.

One step of the real model runs on fake tensors, which have shapes but no values. No weights are read
and no memory is used. Whatever the model does is counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plrhf.backbone.quantization import QuantizedShape
from plrhf.core.checks import NonNegativeInt, PositiveFloat, check_arguments
from plrhf.core.row_index import Extent, RowIndex
from plrhf.core.row_packing import RowPacking, UserSlots
from plrhf.core.types import PreferenceBatch, UserContext
from plrhf.models.base import PersonalModule
from plrhf.models.policy import PersonalPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.zero import Offload, Zero3

GB = 1e9
HEADROOM = 0.1  # of a GPU: CUDA's own share and fragmentation, which no count of tensors sees
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
FLOAT = 4  # bytes
MASTER_BYTES = (
    16  # float32 copy, two moments, float32 gradient of a parameter; arXiv 1910.02054, 3.1
)


@check_arguments("plan_for")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Settings ``plan_for``, which only a plan needs.

    Args:
        gpu_memory_gb: memory of each GPU in units of 1e9 bytes.
        users: number of train users; None: count those of the data, which are then read.
    """

    gpu_memory_gb: PositiveFloat = 80.0
    users: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The batches of a training, in which all pairs have the largest allowed length.

    Args:
        prompt_tokens, response_tokens: of a pair's prompt, and of each of its responses.
        n_features: number of features of a user.
        batch_size, batch_tokens: largest number of pairs and tokens in a train batch over all GPUs.
        eval_batch_size: pairs in an evaluation batch over all GPUs.
        accumulated_batches: batches whose gradients are accumulated for one optimiser step.
        n_gpus: GPUs that share each batch.
    """

    prompt_tokens: int
    response_tokens: int
    n_features: int
    batch_size: int
    batch_tokens: int | None
    eval_batch_size: int
    accumulated_batches: int
    n_gpus: int

    def pairs(self, *, two_rows: bool) -> int:
        """Return the number of pairs in a train batch over all GPUs."""
        if self.batch_tokens is None:
            return self.batch_size
        return max(1, min(self.batch_size, self.batch_tokens // self.tokens(two_rows=two_rows)))

    def tokens(self, *, two_rows: bool) -> int:
        """Return the number of tokens of a pair."""
        return (1 + two_rows) * self.prompt_tokens + 2 * self.response_tokens

    def row_tokens(self, slots: UserSlots) -> int:
        """Return the number of positions of a packed row with user vectors at `slots`."""
        own = slots.n_vectors + 2 * self.response_tokens
        return self.prompt_tokens + (slots.n_contexts or 1) * own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and communication of one GPU in bytes. `parameters` and `trainable` are numbers of weights.

    Attributes:
        weights, gradients, optimiser: of all parameters except tables with a row for each user.
        user_tables: weights, gradients and optimiser state of these tables, and accuracy counts by
            user.
        gathered: weights and gradients that ZeRO stage 3 holds whole temporarily.
        training, evaluation: peak of a step of each, beyond the above.
        host, nvme: weights, gradients and optimiser state that are offloaded there.
        communication: bytes received in one optimiser step.
        checkpoint: size of the checkpoint: learned weights and optimiser moments.
        row_tokens: length of a row with user vectors. pairs: pairs in a step over all GPUs. n_users:
            train users.
    """

    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimiser: float
    user_tables: float
    gathered: float
    training: float
    evaluation: float
    host: float
    nvme: float
    communication: float
    checkpoint: float
    row_tokens: int
    pairs: int
    n_users: int

    @property
    def total(self) -> float:
        """Peak memory of a GPU in bytes."""
        kept = self.weights + self.gradients + self.optimiser + self.user_tables
        return kept + self.gathered + max(self.training, self.evaluation)

    def fits(self, gpu_memory_gb: float) -> bool:
        """Return whether the plan fits into GPUs of this size (1e9 bytes) with `HEADROOM` to spare."""
        return self.total <= (1 - HEADROOM) * gpu_memory_gb * GB


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all live tensors created in this context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        out = func(*args, **kwargs)
        made = (one.untyped_storage() for one in _tensors(out))
        new = {id(one): one for one in made if id(one) not in self._seen}  # others are views
        if len(new) > 0:
            for one in _tensors((args, kwargs)):  # written in place
                new.pop(id(one.untyped_storage()), None)
            for key, storage in new.items():
                self._seen.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, n_bytes: int) -> None:
        """Subtract the bytes of a freed storage."""
        self._seen.discard(key)
        self.live -= n_bytes


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Peak memory of steps in bytes, beyond weights, gradients and optimiser state.

    Attributes:
        training, evaluation: peak of a training step and of an evaluation batch.
        reached: parameters that get a gradient; others have no optimiser state.
    """

    training: int
    evaluation: int
    reached: list[nn.Parameter]


def plan_training(
    model: PersonalModule, work: Workload, *, precision: str, zero3: Zero3 | None, n_users: int
) -> Plan:
    """Plan the memory and communication of a training on each GPU.

    Args:
        model: on fake tensors on the CPU, since autocast does not support the meta device.
        precision: the trainer's.
        zero3: how weights are sharded; None: not at all.
        n_users: number of train users.
    """
    half = HALF.get(precision)
    if zero3 is not None:
        for one in model.backbone.parameters():
            one.ds_id = 0  # type: ignore[attr-defined]  # DeepSpeed's mark: LoRA goes by it
            if half is not None:  # DeepSpeed casts weights where others autocast
                one.data = one.data.to(half)
    steps = trace(model, work, half=half if zero3 is None else None)
    width = None if zero3 is None or half is None else half.itemsize
    return _make_plan(model, work, steps, zero3=zero3, width=width, n_users=n_users)


def trace(model: PersonalModule, work: Workload, *, half: torch.dtype | None) -> Steps:
    """Run a training step and an evaluation batch, and measure their peak memory.

    The evaluation computes the reference, as for test pairs, for which it is not precomputed.

    Args:
        model: on fake tensors.
        half: dtype of autocast; None: no autocast.
    """
    cast = torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext()
    n_pairs = work.pairs(two_rows=model.backbone.layout == "two_rows")
    batch = fake_batch(model, work, -(-n_pairs // work.n_gpus), model.user_slots)
    pooled = isinstance(model, PersonalRewardModel) and model.needs_only_pooled
    if pooled:
        texts = torch.arange(2 * len(batch)).view(-1, 2)
        batch = batch.pooled(torch.zeros(2 * len(batch), model.backbone.hidden_size), texts)
    elif isinstance(model, PersonalPolicy):
        batch.ref_logps = torch.zeros(len(batch), 2)
    with MemoryTracker() as tracker:
        with cast:
            loss = model.train().loss(batch)[0].mean()
        forward = tracker.peak  # the gradients of the step before are still there
        loss.backward()
    reached = [one for one in model.parameters() if one.grad is not None]
    model.zero_grad()

    slots = replace(model.user_slots, n_contexts=model.user_slots.n_contexts and 2)
    batch = fake_batch(model, work, -(-work.eval_batch_size // work.n_gpus), slots)
    with MemoryTracker() as evaluation, torch.no_grad(), cast:
        model.eval()
        model.pooled_trunk(batch) if pooled else model.context_margins(batch)  # type: ignore[operator]
    return Steps(
        training=max(forward, tracker.peak - _bytes(reached)),
        evaluation=evaluation.peak,
        reached=reached,
    )


def fake_batch(
    model: PersonalModule, work: Workload, n_pairs: int, slots: UserSlots
) -> PreferenceBatch:
    """Make a batch of the workload's shapes, without values, with user vectors at `slots`."""
    together = model.backbone.layout == "packed"
    shape = (n_pairs, work.tokens(two_rows=False))
    if not together:
        shape = (2 * n_pairs, work.prompt_tokens + work.response_tokens)
    extent = Extent(work.prompt_tokens - 1, work.prompt_tokens + work.response_tokens)
    places = torch.zeros(2 * n_pairs * work.response_tokens, dtype=torch.int64)
    packing = None
    if slots.n_contexts is not None:
        n_prompt, n_text = (np.full(shape[0], n) for n in (work.prompt_tokens, shape[1]))
        packing = RowPacking.of_lengths(n_prompt, n_text, slots, length=shape[1], together=together)
        packing.extent = extent.shifted_by(slots.n_vectors)
    context = None
    if model.encoder.reads_context:
        n_own = model.encoder.max_pairs
        context = UserContext(
            hidden=torch.zeros(2 * n_pairs * n_own, model.backbone.hidden_size),
            texts=torch.zeros(n_pairs, n_own, 2, dtype=torch.int64),
            present=torch.ones(n_pairs, n_own, dtype=torch.bool),
        )
    return PreferenceBatch(
        context=context,
        user_id=torch.zeros(n_pairs, dtype=torch.int64),
        features=torch.zeros(n_pairs, work.n_features),
        input_ids=torch.zeros(shape, dtype=torch.int64),
        segment=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        row=torch.zeros(n_pairs, dtype=torch.int64),
        packing=packing,
        index=RowIndex(places, places, places, extent),
    )


def _make_plan(
    model: PersonalModule,
    work: Workload,
    steps: Steps,
    *,
    zero3: Zero3 | None,
    width: int | None,
    n_users: int,
) -> Plan:
    """Compute the plan from the model's parameters and the peaks of its steps.

    Args:
        width: bytes of one number of sharded weights; None: of their own dtype.
    """
    share = 1.0 if zero3 is None else 1 / work.n_gpus
    every, of_users = list(model.parameters()), {id(p) for p in model.encoder.user_parameters()}
    trainable = [one for one in every if one.requires_grad]
    n_uncounted = sum(one.n_uncounted for one in model.modules() if isinstance(one, QuantizedShape))
    learned = steps.reached if zero3 is None else trainable

    def held(*, tables: bool) -> dict[str, float]:
        """Return the bytes on a GPU of the tables with a row for each user, or of all other parameters."""
        own, taught = (
            [one for one in group if (id(one) in of_users) == tables] for group in (every, learned)
        )
        states = 2 * _bytes(taught) if zero3 is None else MASTER_BYTES * _count(taught)
        parts = {"weights": _bytes(own, width), "gradients": _bytes(taught, width)}
        return {name: share * n for name, n in {**parts, "optimiser": states}.items()}

    rest, users = held(tables=False), held(tables=True)
    away = {"cpu": 0.0, "nvme": 0.0}
    for name, place in ({} if zero3 is None else _offload_targets(zero3)).items():
        if place is not None:
            away[place] += rest[name] + users[name]
            rest[name] = users[name] = 0.0
    if zero3 is not None:  # weights twice, gradients once, for each batch
        received = (2 * _bytes(every, width) + _bytes(learned, width)) * work.accumulated_batches
    else:  # DDP: gradients are averaged once a step, by a reduce-scatter and an all-gather
        received = 2 * _bytes(learned)
    return Plan(
        parameters=_count(every) + n_uncounted,
        trainable=_count(trainable),
        **rest,
        user_tables=sum(users.values()) + model.val_accuracy.counts.nbytes,  # exact, so not sharded
        gathered=0 if zero3 is None else _gathered(zero3, every, learned) * (width or FLOAT),
        training=float(steps.training),
        evaluation=steps.evaluation,
        host=away["cpu"],
        nvme=away["nvme"],
        communication=received * (1 - 1 / work.n_gpus),
        checkpoint=3 * (_bytes(learned) if zero3 is None else FLOAT * _count(learned)),
        row_tokens=work.row_tokens(model.user_slots),
        pairs=work.pairs(two_rows=model.backbone.layout == "two_rows") * work.accumulated_batches,
        n_users=n_users,
    )


def _offload_targets(zero3: Zero3) -> dict[str, Offload | None]:
    """Return where weights, gradients and optimiser state are offloaded to; None: they stay on the GPU."""
    learning = zero3.offload_optimizer
    return {"weights": zero3.offload_parameters, "gradients": learning, "optimiser": learning}


def _gathered(zero3: Zero3, every: list[nn.Parameter], learned: list[nn.Parameter]) -> int:
    """Return how many numbers a GPU holds whole: weights in use, and gradients before they are sharded."""
    live = min(_count(every), max(zero3.live_parameters, _largest(every)))
    too_large = _largest(learned) if _largest(learned) > zero3.bucket_size else 0
    return live + zero3.bucket_size + too_large


def _tensors(values: Any) -> Iterable[Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, Tensor))


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)


def _bytes(parameters: list[nn.Parameter], width: int | None = None) -> int:
    """Return the bytes of parameters with `width` bytes a number; None: of their own dtypes."""
    return sum(one.numel() * (one.element_size() if width is None else width) for one in parameters)


def _largest(parameters: list[nn.Parameter]) -> int:
    return max((one.numel() for one in parameters), default=0)
