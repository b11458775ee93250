"""What a training needs, before it is begun: memory a GPU, communication a step, and whether it fits.

One step of the real model is taken on fake tensors, which have shapes and no values: no weights are
read, no memory is taken, and what is counted is what the code does, for whatever model it does it to.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plrhf.backbone.loading import DTYPES, empty_model
from plrhf.backbone.masks import FLEX
from plrhf.backbone.model import Backbone
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.data.features import FeatureSchema
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card
from plrhf.models.loading import build_model
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.zero import Offload, Zero3, build_zero3

GB = 1e9
HEADROOM = 0.1  # of a GPU: CUDA's own share and fragmentation, which no count of tensors sees
HALF = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
FLOAT = 4  # bytes
MASTER_BYTES = (
    16  # float32 copy, two moments, float32 gradient of a parameter; arXiv 1910.02054, 3.1
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is planned for and no other setting says, ``plan_for``.

    Args:
        gpu_memory_gb: of each GPU, 1e9 bytes.
        users: train users, or None for those of the data, which are then read.
    """

    gpu_memory_gb: float = 80.0
    users: int | None = None

    def __post_init__(self) -> None:
        if self.users is not None and self.users < 0:
            allowed = "a whole number from 0"
            raise bad_value("plan_for.users", self.users, allowed, "Set plan_for.users=1000")
        if not self.gpu_memory_gb > 0:
            raise bad_value(
                "plan_for.gpu_memory_gb",
                self.gpu_memory_gb,
                "a number above 0",
                "Set plan_for.gpu_memory_gb=80",
            )


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


class Tally(TorchDispatchMode):
    """Within it the bytes of all tensors made and not yet freed are counted, and their peak.

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


def forecast(settings: Settings, *, n_users: int, schema: FeatureSchema) -> Plan:
    """What training by `settings` needs of each of the GPUs that ``trainer`` names.

    Rows are taken as long as ``data`` lets them be with the longest prompt: prompts of
    max_prompt_tokens, responses that fill max_tokens.

    Args:
        n_users: train users. schema: of their features.
    """
    trainer = settings["trainer"]
    half, zero3 = HALF.get(trainer["precision"]), build_zero3(trainer["zero3"])
    backbone = empty_backbone(settings["backbone"])
    with FakeTensorMode(allow_non_fake_inputs=True):  # on the CPU, where autocast is known
        backbone.to_empty(device="cpu")
        model = model_of_shapes(settings, backbone, n_users=n_users, schema=schema)
        if zero3 is not None:
            for one in model.backbone.parameters():
                one.ds_id = 0  # type: ignore[attr-defined]  # DeepSpeed's mark: LoRA goes by it
                if half is not None:  # DeepSpeed casts weights where others autocast
                    one.data = one.data.to(DTYPES[half])
            half = None
        steps = trace(model, settings["data"], schema.n_features, n_gpus=n_gpus(trainer), half=half)
    return _shared_out(settings, zero3, model, steps, n_users=n_users)


def n_gpus(trainer: Settings) -> int:
    """GPUs of all nodes together."""
    return trainer["devices"] * trainer["num_nodes"]


def empty_backbone(node: Settings) -> Backbone:
    """The backbone of settings ``backbone`` on the meta device: shapes, and no weights read."""
    of_shape = ("path", "architecture", "tiny", "dtype", "attention", "trust_remote_code")
    shape = {name: node[name] for name in of_shape}
    if shape["attention"] == FLEX:  # which fake tensors do not have: with a mask, a little more
        shape["attention"] = "sdpa"
    with torch.device("meta"):
        return Backbone(
            model=empty_model(**shape),
            trainable=node["trainable"],
            lora=node["lora"],
            gradient_checkpointing=node["gradient_checkpointing"],
        )


def model_of_shapes(
    settings: Settings, backbone: Backbone, *, n_users: int, schema: FeatureSchema
) -> PersonalModule:
    """The run's model for that many users, with nothing known of who they are."""
    card = Card(
        model=settings["model"],
        encoder=settings["encoder"],
        aggregator=settings["aggregator"],
        backbone={},
        users=range(n_users),  # type: ignore[arg-type]  # they are only counted
        features=schema.to_dict(),
        text={},
        fingerprint="",
    )
    return build_model(backbone, card)


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


def trace(
    model: PersonalModule, data: Settings, n_features: int, *, n_gpus: int, half: str | None
) -> Steps:
    """Take a training step and a batch of evaluation, and see what they hold.

    Evaluation is that of test pairs, whose reference is not computed beforehand.

    Args:
        model: on fake tensors. data: settings, of which the lengths and batch sizes are read.
        n_gpus: each takes its share of a batch.
        half: dtype of autocast, None for none.
    """
    cast = torch.autocast("cpu", dtype=DTYPES[half]) if half else contextlib.nullcontext()
    batch = fake_batch(model, data, -(-pairs_of_batch(model, data) // n_gpus), n_features)
    pooled = isinstance(model, PersonalRewardModel) and model.pooled_suffices
    if pooled:
        texts = torch.arange(2 * len(batch)).view(-1, 2)
        batch = batch.pooled(torch.zeros(2 * len(batch), model.backbone.hidden_size), texts)
    elif isinstance(model, PersonalDPOPolicy):
        batch.ref_logps = torch.zeros(len(batch), 2)
    with tally_of(batch, data) as tally:
        with cast:
            loss = model.train().loss(batch)[0].mean()
        forward = tally.peak  # beside which the gradients of the step before are still there
        loss.backward()
    reached = [one for one in model.parameters() if one.grad is not None]
    model.zero_grad()

    batch = fake_batch(model, data, -(-data["eval_batch_size"] // n_gpus), n_features)
    with tally_of(batch, data) as evaluation, torch.no_grad(), cast:
        model.eval()
        model.pooled_trunk(batch) if pooled else model.context_margins(batch)  # type: ignore[operator]
    return Steps(
        training=max(forward, tally.peak - _bytes(reached)),
        evaluation=evaluation.peak,
        reached=reached,
    )


def fake_batch(
    model: PersonalModule, data: Settings, n_pairs: int, n_features: int
) -> PreferenceBatch:
    """A batch of the shapes that `data` allows, without values."""
    prompt, response = _lengths(data)
    shape = (n_pairs, prompt + 2 * response)
    if model.backbone.layout == "two_rows":
        shape = (2 * n_pairs, prompt + response)
    return PreferenceBatch(
        user_id=torch.zeros(n_pairs, dtype=torch.int64),
        features=torch.zeros(n_pairs, n_features),
        input_ids=torch.zeros(shape, dtype=torch.int64),
        segment=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        row=torch.zeros(n_pairs, dtype=torch.int64),
    )


def pairs_of_batch(model: PersonalModule, data: Settings) -> int:
    """Pairs of the longest kind that a train batch holds, of all processes together."""
    if data["batch_tokens"] is None:
        return int(data["batch_size"])
    prompt, response = _lengths(data)
    tokens = prompt + 2 * response if model.backbone.layout == "packed" else 2 * (prompt + response)
    return max(1, min(data["batch_size"], data["batch_tokens"] // tokens))


def tally_of(batch: PreferenceBatch, data: Settings) -> Tally:
    """A tally that knows what the values of a `fake_batch` would say."""
    prompt, response = _lengths(data)
    return Tally(n_response_tokens=len(batch) * 2 * response, n_prompt_tokens=prompt)


def _lengths(data: Settings) -> tuple[int, int]:
    """Tokens of a prompt and of a response."""
    prompt = min(data["max_prompt_tokens"], data["max_tokens"] - 1)
    return prompt, data["max_tokens"] - prompt


def _shared_out(
    settings: Settings, zero3: Zero3 | None, model: PersonalModule, steps: Steps, *, n_users: int
) -> Plan:
    """The plan from a model's parameters and the peaks of its steps."""
    trainer, data = settings["trainer"], settings["data"]
    share = 1.0 if zero3 is None else 1 / n_gpus(trainer)
    every, of_users = list(model.parameters()), {id(p) for p in model.encoder.user_parameters()}
    trainable = [one for one in every if one.requires_grad]
    learned = steps.reached if zero3 is None else trainable
    width = 2 if zero3 is not None and trainer["precision"] in HALF else None

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
    prompt, response = _lengths(data)
    accumulated_batches = trainer["accumulate_grad_batches"]
    if zero3 is not None:  # weights twice, gradients once, for each batch
        received = (2 * _bytes(every, width) + _bytes(learned, width)) * accumulated_batches
    else:  # DDP: gradients are averaged once a step, by a reduce-scatter and an all-gather
        received = 2 * _bytes(learned)
    return Plan(
        parameters=_count(every),
        trainable=_count(trainable),
        **rest,
        user_tables=sum(users.values()) + model.val_accuracy.counts.nbytes,  # exact, so not sharded
        gathered=0 if zero3 is None else _gathered(zero3, every, learned) * (width or FLOAT),
        training=float(steps.training),
        evaluation=steps.evaluation,
        host=away["cpu"],
        nvme=away["nvme"],
        communication=received * (1 - 1 / n_gpus(trainer)),
        checkpoint=3 * (_bytes(learned) if zero3 is None else FLOAT * _count(learned)),
        row_tokens=prompt + 2 * response + model.aggregator.n_positions,
        pairs=pairs_of_batch(model, data) * accumulated_batches,
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


def plan_table(plan: Plan, settings: Settings, machine: Machine) -> Table:
    """The plan for the terminal."""
    node = settings["backbone"]
    own = "tiny" if node["tiny"] is not None else node["path"]
    name = own if node["architecture"] is None else f"{node['name']} (backbone.architecture)"
    trainer = settings["trainer"]
    how = "ZeRO stage 3"
    if trainer["zero3"] is None:
        how = "DDP" if n_gpus(trainer) > 1 else "no shards"
    table = Table(
        title=f"model={settings['model']['name']} on {name}, GPUs: {n_gpus(trainer)}, {how}",
        caption=f"{100 * HEADROOM:.0f}% of a GPU are left to CUDA and fragmentation",
    )
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for row in _facts(plan):
        table.add_row(*row)
    table.add_section()
    for what, n_bytes, note in _memory(plan):
        table.add_row(what, f"{n_bytes / GB:,.2f} GB", note)
    table.add_section()
    fits = "fits" if plan.fits(machine.gpu_memory_gb) else "does not fit"
    table.add_row("memory a GPU", f"{plan.total / GB:,.2f} GB", "the larger of the two steps")
    table.add_row("", fits, f"{machine.gpu_memory_gb:g} GB a GPU")
    for what, n_bytes in (("host memory a GPU", plan.host), ("NVMe a GPU", plan.nvme)):
        if n_bytes > 0:
            table.add_row(what, f"{n_bytes / GB:,.2f} GB", "what is offloaded")
    table.add_row("communication a step", f"{plan.communication / GB:,.2f} GB", "a GPU receives")
    table.add_row(
        "checkpoint", f"{plan.checkpoint / GB:,.2f} GB", "what is learned, and its moments"
    )
    return table


def _facts(plan: Plan) -> list[tuple[str, str, str]]:
    return [
        ("parameters", f"{plan.parameters:,}", "the user model's among them"),
        ("trainable", f"{plan.trainable:,}", ""),
        ("users", f"{plan.n_users:,}", "of train rows"),
        ("pairs a step", f"{plan.pairs:,}", "over all GPUs"),
        ("row", f"{plan.row_tokens:,} tokens", "user vectors | prompt | chosen | rejected"),
    ]


def _memory(plan: Plan) -> list[tuple[str, float, str]]:
    return [
        ("weights", plan.weights, ""),
        ("gradients", plan.gradients, ""),
        ("optimiser", plan.optimiser, ""),
        ("user tables", plan.user_tables, "weights, gradients, optimiser of users"),
        ("gathered", plan.gathered, "weights and gradients not in shards"),
        ("activations, training", plan.training, "of a share of data.batch_size pairs"),
        ("activations, evaluation", plan.evaluation, "of a share of data.eval_batch_size"),
    ]


def _tensors(values: Any) -> Iterable[Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, Tensor))


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)


def _bytes(parameters: list[nn.Parameter], width: int | None = None) -> int:
    """Bytes of parameters of `width` bytes a number, None: of their own."""
    return sum(one.numel() * (one.element_size() if width is None else width) for one in parameters)


def _largest(parameters: list[nn.Parameter]) -> int:
    return max((one.numel() for one in parameters), default=0)
