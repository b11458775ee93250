"""The processes of a run: how they start and end, and which shard of a batch each gets."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.data.dataset import RankShard
from plrhf.training.zero import Stage3

STARTED_BY = "PLRHF_STARTED_BY"  # environment variable: id of the process that started this one


@contextlib.contextmanager
def launched_processes(trainer: Trainer) -> Iterator[None]:
    """Start and connect the trainer's other processes; they end if this context raises an error.

    They start before the model is built, so that it can be built in shards. torchrun and SLURM have
    already started them. If this process fails, the processes that it started would wait forever, so
    they are killed.

    Raises:
        ValueError: torchrun or SLURM started another number of processes than the trainer has.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        yield
        return
    _check_started(trainer)
    if trainer.local_rank == 0:
        os.environ[STARTED_BY] = str(os.getpid())  # read by the processes that are about to start
    elif STARTED_BY in os.environ:
        starter = int(os.environ[STARTED_BY])
        threading.Thread(target=exit_with_parent, args=(starter,), daemon=True).start()
    try:
        launcher.launch(trainer.strategy.setup_environment)
        yield
    except BaseException:
        launcher.kill(signal.SIGKILL)
        raise


def exit_with_parent(parent: int) -> None:
    """End this process when its parent is gone, since a killed parent cannot end its children."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _check_started(trainer: Trainer) -> None:
    """Raise a ValueError if torchrun or SLURM started another number of processes than the trainer has."""
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    try:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    except ValueError as error:
        raise bad_value(
            "trainer.devices",
            trainer.num_devices,
            f"with trainer.num_nodes={trainer.num_nodes} the processes a node that were started",
            f"Set both to what was started ({' '.join(str(error).split())})",
        ) from error


def rank_shard_of(trainer: Trainer) -> RankShard:
    """Return the trainer's shard of each batch, with functions to sum and broadcast over ranks."""
    strategy = trainer.strategy

    def total(values: Tensor) -> Tensor:
        summed: Any = strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
        return summed.cpu()

    return RankShard(
        trainer.global_rank,
        trainer.world_size,
        total,
        strategy.broadcast,
        trainer.accumulate_grad_batches,
    )


def sharding_context(trainer: Trainer) -> Any:
    """Return the context that shards a model while it is built; None if the trainer does not shard."""
    strategy = trainer.strategy
    return strategy.model_sharded_context if isinstance(strategy, Stage3) else None


def gather_objects(own: Any) -> list[Any]:
    """Collect an object from each process, in the order of ranks."""
    if not torch.distributed.is_initialized():
        return [own]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found
