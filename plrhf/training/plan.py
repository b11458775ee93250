"""What a training needs, before it is begun: memory a GPU, communication a step, and whether it fits.

One step of the real model is taken on fake tensors, which have shapes and no values: no weights are
read, no memory is taken, and what is counted is what the code does, for whatever model it does it to.
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
from plrhf.core.row_packing import RowPacking, UserSlots
from plrhf.core.types import PreferenceBatch, UserContext
from plrhf.models.base import PersonalModule
from plrhf.models.policy import PersonalDPOPolicy
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
    """What a plan needs to know and no other setting says, ``plan_for``.

    Args:
        gpu_memory_gb: of each GPU, 1e9 bytes.
        users: train users; None: those of the data, which are then read.
    """

    gpu_memory_gb: PositiveFloat = 80.0
    users: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The batches of a training, each pair as long as it may be.

    Args:
        prompt_tokens, response_tokens: of a pair's prompt, and of each of its responses.
        n_features: of a user.
        batch_size, batch_tokens: most pairs and tokens of a train batch, over all GPUs.
        eval_batch_size: pairs of a batch of evaluation, over all GPUs.
        accumulated_batches: whose gradients are summed to one step.
        n_gpus: that share each batch.
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
        """Count the pairs of a train batch, over all GPUs."""
        if self.batch_tokens is None:
            return self.batch_size
        return max(1, min(self.batch_size, self.batch_tokens // self.tokens(two_rows=two_rows)))

    def tokens(self, *, two_rows: bool) -> int:
        """Count the tokens of a pair."""
        return (1 + two_rows) * self.prompt_tokens + 2 * self.response_tokens

    def row_tokens(self, slots: UserSlots) -> int:
        """Count the positions of a packed row whose user vectors are at `slots`."""
        own = slots.n_vectors + 2 * self.response_tokens
        return self.prompt_tokens + (slots.n_contexts or 1) * own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes a GPU holds and receives; `parameters` and `trainable` count numbers, not bytes.

    Attributes:
        weights, gradients, optimiser: of all but the tables of single users.
        user_tables: weights, gradients and optimiser of those, and right answers counted by user.
        gathered: weights and gradients that stage 3 holds whole for a moment.
        training, evaluation: what a step of each holds beyond that.
        host, nvme: of weights, gradients and optimiser, what a GPU has wait outside of it.
        communication: received in one optimiser step.
        checkpoint: of the whole run: what is learned and its moments.
        row_tokens, pairs, n_users: row length with user vectors, pairs a step over all GPUs, users.
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
        """Bytes a GPU needs at the worst moment."""
        kept = self.weights + self.gradients + self.optimiser + self.user_tables
        return kept + self.gathered + max(self.training, self.evaluation)

    def fits(self, gpu_memory_gb: float) -> bool:
        """Whether a GPU of that many 1e9 bytes has room for it, `HEADROOM` kept."""
        return self.total <= (1 - HEADROOM) * gpu_memory_gb * GB


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block and not yet freed, and their peak.

    Args:
        n_response_tokens, n_prompt_tokens: of a batch and of each of its rows. Fake tensors cannot
            know them: the one is what `nonzero` finds, the other what is read off as a number.
    """

    def __init__(self, *, n_response_tokens: int, n_prompt_tokens: int) -> None:
        super().__init__()
        self.n_response_tokens, self.n_prompt_tokens = n_response_tokens, n_prompt_tokens
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.aten.nonzero.default:
            out = args[0].new_empty((self.n_response_tokens, args[0].dim()), dtype=torch.int64)
        elif func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.int64:
            out = self.n_prompt_tokens
        else:
            out = func(*args, **kwargs)
        given = {id(one.untyped_storage()) for one in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given | self._seen:  # else a view, or written in place
                self._seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= n_bytes


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Peaks, in bytes, of what steps hold beyond weights, gradients and optimiser.

    Attributes:
        training, evaluation: of a step of each.
        reached: parameters that the loss reaches; others get no gradient and no optimiser state.
    """

    training: int
    evaluation: int
    reached: list[nn.Parameter]


def plan_training(
    model: PersonalModule, work: Workload, *, precision: str, zero3: Zero3 | None, n_users: int
) -> Plan:
    """Plan what training needs of each GPU.

    Args:
        model: on fake tensors on the CPU, since autocast is not known of the meta device.
        precision: the trainer's.
        zero3: how weights are sharded; None: they are not.
        n_users: train users.
    """
    half = HALF.get(precision)
    if zero3 is not None:
        for one in model.backbone.parameters():
            one.ds_id = 0  # type: ignore[attr-defined]  # DeepSpeed's mark: LoRA goes by it
            if half is not None:  # DeepSpeed casts weights where others autocast
                one.data = one.data.to(half)
    steps = trace(model, work, half=half if zero3 is None else None)
    width = None if zero3 is None or half is None else half.itemsize
    return _total(model, work, steps, zero3=zero3, width=width, n_users=n_users)


def trace(model: PersonalModule, work: Workload, *, half: torch.dtype | None) -> Steps:
    """Take a training step and a batch of evaluation, and measure what they hold.

    Evaluation is that of test pairs, whose reference is not computed beforehand.

    Args:
        model: on fake tensors.
        half: dtype of autocast; None: none.
    """
    cast = torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext()
    n_pairs = work.pairs(two_rows=model.backbone.layout == "two_rows")
    batch = fake_batch(model, work, -(-n_pairs // work.n_gpus), model.user_slots)
    pooled = isinstance(model, PersonalRewardModel) and model.needs_only_pooled
    if pooled:
        texts = torch.arange(2 * len(batch)).view(-1, 2)
        batch = batch.pooled(torch.zeros(2 * len(batch), model.backbone.hidden_size), texts)
    elif isinstance(model, PersonalDPOPolicy):
        batch.ref_logps = torch.zeros(len(batch), 2)
    with tracker_of(batch, work) as tracker:
        with cast:
            loss = model.train().loss(batch)[0].mean()
        forward = tracker.peak  # the gradients of the step before are still there
        loss.backward()
    reached = [one for one in model.parameters() if one.grad is not None]
    model.zero_grad()

    slots = replace(model.user_slots, n_contexts=model.user_slots.n_contexts and 2)
    batch = fake_batch(model, work, -(-work.eval_batch_size // work.n_gpus), slots)
    with tracker_of(batch, work) as evaluation, torch.no_grad(), cast:
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
    """Make a batch of the work's shapes, without values, whose user vectors go to `slots`."""
    together = model.backbone.layout == "packed"
    shape = (n_pairs, work.tokens(two_rows=False))
    if not together:
        shape = (2 * n_pairs, work.prompt_tokens + work.response_tokens)
    packing = None
    if slots.n_contexts is not None:
        n_prompt, n_text = (np.full(shape[0], n) for n in (work.prompt_tokens, shape[1]))
        packing = RowPacking.of_contexts(
            n_prompt, n_text, slots, length=shape[1], together=together
        )
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
    )


def tracker_of(batch: PreferenceBatch, work: Workload) -> MemoryTracker:
    """Make a tracker that knows what the values of a `fake_batch` would say."""
    n_response_tokens = len(batch) * 2 * work.response_tokens
    return MemoryTracker(n_response_tokens=n_response_tokens, n_prompt_tokens=work.prompt_tokens)


def _total(
    model: PersonalModule,
    work: Workload,
    steps: Steps,
    *,
    zero3: Zero3 | None,
    width: int | None,
    n_users: int,
) -> Plan:
    """Make the plan from a model's parameters and the peaks of its steps.

    Args:
        width: bytes of a number of sharded weights; None: those of its own dtype.
    """
    share = 1.0 if zero3 is None else 1 / work.n_gpus
    every, of_users = list(model.parameters()), {id(p) for p in model.encoder.user_parameters()}
    trainable = [one for one in every if one.requires_grad]
    n_uncounted = sum(one.n_uncounted for one in model.modules() if isinstance(one, QuantizedShape))
    learned = steps.reached if zero3 is None else trainable

    def held(*, tables: bool) -> dict[str, float]:
        """Bytes a GPU has of the tables of single users, or of all else."""
        own, taught = (
            [one for one in group if (id(one) in of_users) == tables] for group in (every, learned)
        )
        states = 2 * _bytes(taught) if zero3 is None else MASTER_BYTES * _count(taught)
        parts = {"weights": _bytes(own, width), "gradients": _bytes(taught, width)}
        return {name: share * n for name, n in {**parts, "optimiser": states}.items()}

    rest, users = held(tables=False), held(tables=True)
    away = {"cpu": 0.0, "nvme": 0.0}
    for name, place in ({} if zero3 is None else _places(zero3)).items():
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


def _places(zero3: Zero3) -> dict[str, Offload | None]:
    """Where parts wait that are not at work; None: on the GPU."""
    learning = zero3.offload_optimizer
    return {"weights": zero3.offload_parameters, "gradients": learning, "optimiser": learning}


def _gathered(zero3: Zero3, every: list[nn.Parameter], learned: list[nn.Parameter]) -> int:
    """Numbers that a GPU holds whole: weights at work, and gradients on their way into shards."""
    live = min(_count(every), max(zero3.live_parameters, _largest(every)))
    too_large = _largest(learned) if _largest(learned) > zero3.bucket_size else 0
    return live + zero3.bucket_size + too_large


def _tensors(values: Any) -> Iterable[Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, Tensor))


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)


def _bytes(parameters: list[nn.Parameter], width: int | None = None) -> int:
    """Bytes of parameters of `width` bytes a number, None: of their own."""
    return sum(one.numel() * (one.element_size() if width is None else width) for one in parameters)


def _largest(parameters: list[nn.Parameter]) -> int:
    return max((one.numel() for one in parameters), default=0)
