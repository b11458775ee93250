"""DeepSpeed ZeRO stage 3 as a Lightning strategy; deepspeed is imported only when it is used.

Lightning's own strategy runs on GPUs only, and its checkpoints can be read only by the same number of
processes. FSDP2 cannot offload to NVMe, and would need its own loading, export and gathering.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from plrhf.backbone.sharding import first_of_shard, gathered
from plrhf.core.checks import NonNegativeInt, PositiveInt, check_arguments
from plrhf.core.components import build
from plrhf.core.errors import bad_value

Offload = Literal["cpu", "nvme"]


@check_arguments("trainer.zero3")
@dataclass(frozen=True, kw_only=True)
class Zero3:
    """Settings of ZeRO stage 3, ``trainer.zero3``.

    Args:
        offload_optimizer: where gradients and optimiser state are kept and updated; None: on the
            device.
        offload_parameters: where shards of the weights are kept; None: on the device.
        nvme_path: directory for what is offloaded to ``nvme``.
        bucket_size: numbers communicated at once: a larger one is faster and takes more memory.
        live_parameters: largest number of weights kept gathered: a smaller one takes less memory, and
            weights are gathered more often.
        persistent_below: parameters with fewer numbers than this are not sharded.

    Raises:
        ValueError: a number out of range, or a missing nvme_path.
    """

    offload_optimizer: Offload | None = None
    offload_parameters: Offload | None = None
    nvme_path: str | None = None
    bucket_size: PositiveInt = 50_000_000
    live_parameters: NonNegativeInt = 1_000_000_000
    persistent_below: NonNegativeInt = 100_000

    def __post_init__(self) -> None:
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise bad_value(
                "trainer.zero3.nvme_path",
                None,
                "a directory where something is offloaded to nvme",
                "Set trainer.zero3.nvme_path=DIR",
            )

    def optimization(self, *, on_cpu: bool) -> dict[str, Any]:
        """Return DeepSpeed's settings ``zero_optimization``."""
        chosen: dict[str, Any] = {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": not on_cpu,
            "reduce_bucket_size": self.bucket_size,
            "stage3_prefetch_bucket_size": self.bucket_size,
            "stage3_max_live_parameters": self.live_parameters,
            "stage3_param_persistence_threshold": self.persistent_below,
        }
        for name, device in (
            ("offload_optimizer", self.offload_optimizer),
            ("offload_param", self.offload_parameters),
        ):
            if device is not None:
                chosen[name] = {"device": device, "pin_memory": not on_cpu}
                if device == "nvme":
                    chosen[name]["nvme_path"] = self.nvme_path
        return chosen


def build_zero3(settings: dict[str, Any] | None) -> Zero3 | None:
    """Build `Zero3` from the settings ``trainer.zero3``; None if they are None."""
    target = f"{Zero3.__module__}.{Zero3.__qualname__}"
    return None if settings is None else build({"_target_": target, **settings}, "trainer.zero3")


def stage3(
    zero3: Zero3,
    *,
    on_cpu: bool,
    accumulate_grad_batches: int,
    gradient_clip_val: float | None,
) -> Stage3:
    """Build the strategy that shards weights, gradients and optimiser over all processes.

    Args:
        on_cpu: the processes run on CPUs and communicate by gloo.
        accumulate_grad_batches, gradient_clip_val: of the trainer.

    Raises:
        ValueError: DeepSpeed is not installed, or cannot use NVMe although it is asked to.
    """
    if find_spec("deepspeed") is None:
        raise bad_value(
            "trainer.zero3",
            "deepspeed",
            "null, as DeepSpeed is not installed",
            "Install plrhf[zero], or set trainer=gpu",
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a GPU that is there
    if "nvme" in (zero3.offload_optimizer, zero3.offload_parameters):
        _check_nvme()
    config = {
        "zero_optimization": zero3.optimization(on_cpu=on_cpu),
        "zero_allow_untested_optimizer": True,  # torch's AdamW, whose state one process can read
        "zero_force_ds_cpu_optimizer": False,  # offloaded too: DeepSpeed's own has to be compiled
        "train_micro_batch_size_per_gpu": 1,  # used in DeepSpeed's own logs alone
        "gradient_accumulation_steps": accumulate_grad_batches,
        "gradient_clipping": 0.0 if gradient_clip_val is None else gradient_clip_val,
    }
    return Stage3(config=config, on_cpu=on_cpu)


def _check_nvme() -> None:
    """Raise a ValueError if DeepSpeed cannot compile its NVMe library."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise bad_value(
            "trainer.zero3",
            "nvme",
            "offloading to cpu, as DeepSpeed finds no libaio and compiler here",
            "Install libaio-dev, or offload to cpu",
        )


class Stage3(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with checkpoints like those of one process, and for CPUs too.

    A checkpoint has the learned weights, and the optimiser state in torch's own form, so any number of
    processes can resume from it. Rank 0 writes it, tensor by tensor.

    Args:
        config: DeepSpeed's. on_cpu: see `stage3`.
    """

    def __init__(self, *, config: dict[str, Any], on_cpu: bool) -> None:
        super().__init__(config=config)
        self.on_cpu = on_cpu
        self.learned: list[Any] = []  # in the order of the optimiser's groups
        self.group_sizes: list[int] = []

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        if self.on_cpu:
            assert self.parallel_devices is not None
            places = range(len(self.parallel_devices))
            self.parallel_devices = [torch.device("cpu", place) for place in places]
            import deepspeed

            # A compiled extension: a run killed while it builds leaves a lock all later ones wait for.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            DDPStrategy.setup_environment(self)  # past DeepSpeedStrategy's check for CUDA
        else:
            super().setup_environment()

    def _format_batch_size_and_grad_accum_config(self) -> None:
        """The config says it all from the start: models are built before a trainer has one."""

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard parameters when they are created in this context; their values are loaded later."""
        import deepspeed

        class Unfilled(deepspeed.zero.Init):
            def _zero_init_param(self, param: Any) -> None:
                """As DeepSpeed, but without sending rank 0's values, which are none, to all others."""
                self._convert_to_deepspeed_param(param)
                param.partition()

        self._init_config_if_needed()
        with Unfilled(config_dict_or_path=self.config, remote_device=self.remote_device):
            yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> Any:
        """Remember the learned parameters before DeepSpeed replaces them by shards."""
        groups = optimizer.param_groups  # DeepSpeed is about to put flat shards in their place
        self.learned = [one for group in groups for one in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather learned parameters on rank 0, whole and in float32; all processes return the buffers."""
        from deepspeed.utils import safe_get_full_fp32_param

        assert self.lightning_module is not None
        module = self.lightning_module
        every = dict(module.named_parameters(remove_duplicate=False))  # a tied one by each name
        state = {name: one for name, one in module.state_dict().items() if name not in every}
        parameter: Any
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter)
                if self.is_global_zero:
                    state[name] = value.view(parameter.ds_shape).cpu()
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        assert self.lightning_module is not None
        state = checkpoint["state_dict"]
        named = dict(self.lightning_module.named_parameters())  # a tied weight by its first name
        for name, value in state.items():
            if name not in named:
                continue
            with gathered([named[name]], write=True):
                if self.is_global_zero:
                    named[name].data.copy_(value)
            safe_set_local_fp32_param(named[name], self._own_shard(named[name], value.float()))
        buffers = dict(self.lightning_module.named_buffers())
        for name, value in state.items():
            if name in buffers:
                buffers[name].copy_(value)

    def _own_shard(self, parameter: Any, whole: Tensor) -> Tensor:
        """Take this process's shard of a parameter's value, zeros at its end where the last one is padded.

        DeepSpeed's own setters of whole values fail where processes do not divide the numbers.
        """
        size, first = parameter.ds_tensor.numel(), first_of_shard(parameter)
        shard = torch.zeros(size, device=self.root_device)
        own = whole.flatten()[first : first + size]
        shard[: len(own)] = own
        return shard

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Gather the optimiser's state on rank 0, in the form of a single process's optimiser."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = optimizer.optimizer
        kept: dict[str, Any] = next((one for one in inner.state.values() if len(one) > 0), {})
        state: dict[int, dict[str, Any]] = {}
        for place, parameter in enumerate(self.learned if len(kept) > 0 else ()):
            state[place] = {}
            for name, value in kept.items():
                if name != "step":
                    value = safe_get_full_optimizer_state(parameter, name)
                    value = value.view(parameter.ds_shape)
                if self.is_global_zero:
                    state[place][name] = value.cpu().clone()
        groups, first = [], 0
        for group, size in zip(inner.param_groups, self.group_sizes, strict=True):
            settings = {name: value for name, value in group.items() if name != "params"}
            groups.append({**settings, "params": list(range(first, first + size))})
            first += size
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        saved = checkpoint["optimizer_states"][0]
        optimizer: Any = self.optimizers[0]
        inner = optimizer.optimizer
        kept: dict[str, Any] = next(iter(saved["state"].values()), {})
        for flat in optimizer.fp32_partitioned_groups_flat if len(kept) > 0 else ():
            inner.state[flat] = {
                name: value.clone() if name == "step" else torch.zeros_like(flat)
                for name, value in kept.items()
            }
        for place, values in saved["state"].items():
            for name, value in values.items():
                if name != "step":
                    shard = self._own_shard(self.learned[place], value)
                    safe_set_local_optimizer_state(self.learned[place], shard, name)
        for group, settings in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in settings.items() if k != "params"})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)
