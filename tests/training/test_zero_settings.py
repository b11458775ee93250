"""Settings of `trainer=zero3`: that they reach DeepSpeed, and run; and processes others have started."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from runs import ENVIRONMENT, ROOT, TINY, check_run, command, composed, launch, save_model
from safetensors.torch import load_file

from plrhf.cli.planning import plan_run
from plrhf.core.errors import BadValue
from plrhf.data.features import NO_FEATURES
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.processes import launched_processes
from plrhf.training.trainer import build_trainer
from plrhf.training.zero import Zero3, build_zero3

SMALL = [*TINY, "data.n_users=3", "data.batch_size=14", "trainer.max_steps=3"]
SMALL += ["data.max_prompt_tokens=40", "data.max_tokens=110", "samples.prompts=1"]
SMALL += ["trainer.log_every_n_steps=1", "backbone.lora.r=2", "backbone.lora.dropout=0"]
ON_TWO = ["trainer=zero3_cpu", "trainer.zero3.persistent_below=0"]


def trainer_of(tmp_path: Path, **settings: Any) -> Trainer:
    return build_trainer(
        run_dir=tmp_path, loggers=[], has_val=True, max_epochs=1, accelerator="cpu", **settings
    )


def test_settings_reach_deepspeed(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    node = composed(
        *("trainer=zero3_cpu", "trainer.zero3.offload_optimizer=cpu", "trainer.devices=1"),
        *("trainer.zero3.offload_parameters=cpu", "trainer.zero3.bucket_size=7000"),
        *("trainer.zero3.live_parameters=11000", "trainer.zero3.persistent_below=13"),
        *("trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.25"),
        "trainer.precision=bf16-mixed",
    )["trainer"]
    del node["name"]
    node["zero3"] = build_zero3(node["zero3"])
    strategy: Any = build_trainer(run_dir=tmp_path, loggers=[], has_val=True, **node).strategy
    strategy._init_config_if_needed()
    read = DeepSpeedConfig(strategy.config)  # as DeepSpeed itself understands it
    zero = read.zero_config
    assert zero.stage == 3 and read.bfloat16_config.enabled
    assert zero.offload_optimizer.device == zero.offload_param.device == "cpu"
    assert not zero.offload_optimizer.pin_memory  # which is for copies to a GPU
    assert zero.reduce_bucket_size == zero.prefetch_bucket_size == 7000
    assert (zero.max_live_parameters, zero.param_persistence_threshold) == (11000, 13)
    assert (read.gradient_accumulation_steps, read.gradient_clipping) == (3, 0.25)


def test_nothing_is_offloaded_unless_asked_for() -> None:
    settings = Zero3(**composed("trainer=zero3")["trainer"]["zero3"])
    assert settings == Zero3()
    found = settings.optimization(on_cpu=False)
    assert "offload_optimizer" not in found and "offload_param" not in found
    assert found["overlap_comm"]
    asked = Zero3(offload_optimizer="cpu").optimization(on_cpu=False)
    assert asked["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    on_disk = Zero3(offload_parameters="nvme", nvme_path="disk").optimization(on_cpu=True)
    assert on_disk["offload_param"] == {"device": "nvme", "pin_memory": False, "nvme_path": "disk"}


def test_nvme_needs_what_deepspeed_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = SimpleNamespace(is_compatible=lambda verbose: False)
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder", lambda: lacking)
    with pytest.raises(BadValue) as error:
        trainer_of(tmp_path, zero3=Zero3(offload_optimizer="nvme", nvme_path=str(tmp_path)))
    assert str(error.value) == (
        "trainer.zero3='nvme' is not allowed: expected offloading to cpu, as DeepSpeed finds no libaio "
        "and compiler here. Install libaio-dev, or offload to cpu."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bucket_size": 0},
            "trainer.zero3.bucket_size=0 is not allowed: expected a whole number from 1. "
            "Set trainer.zero3.bucket_size=50000000.",
        ),
        (
            {"live_parameters": -1},
            "trainer.zero3.live_parameters=-1 is not allowed: expected a whole number from 0. "
            "Set trainer.zero3.live_parameters=1000000000.",
        ),
        (
            {"offload_parameters": "nvme"},
            "trainer.zero3.nvme_path=None is not allowed: expected a directory where something is "
            "offloaded to nvme. Set trainer.zero3.nvme_path=DIR.",
        ),
        (
            {"offload_optimizer": "disk"},
            "trainer.zero3.offload_optimizer='disk' is not allowed: expected cpu or nvme or null. "
            "Set trainer.zero3.offload_optimizer=cpu.",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadValue) as error:
        build_zero3(settings)
    assert str(error.value) == message


def of_torchrun(rank: int, world_size: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size}
    return {"TORCHELASTIC_RUN_ID": "1", **{name: str(value) for name, value in names.items()}}


def of_slurm(rank: int, world_size: int) -> dict[str, str]:
    names = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NNODES": 1, "JOB_ID": 1}
    names |= {"NTASKS": world_size, "NTASKS_PER_NODE": world_size}
    place = {"SLURM_JOB_NAME": "train", "MASTER_ADDR": "127.0.0.1"}
    return place | {f"SLURM_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("variables", "environment"),
    [(of_torchrun, TorchElasticEnvironment), (of_slurm, SLURMEnvironment)],
)
def test_processes_that_others_start(
    variables: Any, environment: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # a trainer sets it for good
    for name, value in variables(1, 3).items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tmp_path, devices=3, zero3=Zero3())
    assert isinstance(trainer.strategy.cluster_environment, environment)  # type: ignore[attr-defined]
    assert trainer.strategy.cluster_environment.creates_processes_externally  # type: ignore[attr-defined]
    assert (trainer.global_rank, trainer.world_size) == (1, 3)
    with (
        pytest.raises(BadValue) as error,
        launched_processes(trainer_of(tmp_path, devices=2, zero3=Zero3())),
    ):
        pass
    assert str(error.value).startswith(
        "trainer.devices=2 is not allowed: expected with trainer.num_nodes=1 the processes a node that "
        "were started. Set both to what was started (You set `devices=2`"
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


TRAIN_COUNTING = """
import runpy
import deepspeed
from plrhf.cli import run

now, most, gather, save_export = 0, 0, deepspeed.zero.GatheredParameters, run.save_export


class Counted(gather):
    def __enter__(self):
        global now, most
        now += sum(one.ds_numel for one in self.params)
        most = max(now, most)
        super().__enter__()

    def __exit__(self, *error):
        global now
        now -= sum(one.ds_numel for one in self.params)
        super().__exit__(*error)


def counting(directory, model, *others):
    deepspeed.zero.GatheredParameters = Counted
    save_export(directory, model, *others)
    deepspeed.zero.GatheredParameters = gather
    zero = model.trainer.strategy.model.optimizer
    flat = zero.fp32_partitioned_groups_flat  # each with its moments; gradients come for a step
    (bucket,) = zero.ipg_buckets.values()
    shards = sum(one.ds_tensor.nbytes for one in model.parameters())
    held = shards + zero.grad_partitions_flat_buffer.nbytes + 4 * sum(one.nbytes for one in flat)
    print("gathered:", most, "held:", held, "bucket:", bucket.buffer.nbytes)


run.save_export = counting
runpy.run_path("train.py", run_name="__main__")
"""


def outputs_of(*started: tuple[list[str], dict[str, str]]) -> list[str]:
    """Run command lines side by side, each with variables of its own; what each has printed."""
    processes = [
        subprocess.Popen(
            line,
            env=ENVIRONMENT | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line, variables in started
    ]
    said = [one.communicate() for one in processes]
    assert [one.returncode for one in processes] == [0] * len(processes), said
    return [out for out, _ in said]


@pytest.mark.long
@pytest.mark.slow
def test_torchrun_starts_a_run(tmp_path: Path) -> None:
    """Also: what is exported is gathered, and no weight of the language model beside it."""
    run = tmp_path / "run"
    model = f"backbone.path={save_model(tmp_path / 'model')}"
    overrides = [*SMALL, *ON_TWO, f"run_dir={run}", model]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    (tmp_path / "counting.py").write_text(TRAIN_COUNTING)
    line = [*start, str(tmp_path / "counting.py"), *overrides]
    (out,) = outputs_of((line, {"DS_ACCELERATOR": "cpu"}))
    assert out.count("report: ") == 1
    check_run(run)
    assert_checkpoint_is_as_forecast(run, overrides)
    (found,) = set(re.findall(r"gathered: .*", out))  # the same of both processes
    gathered, held, bucket = (int(n) for n in re.findall(r"\d+", found))
    files = ("adapter_model.safetensors", "user_encoder.safetensors")
    sizes = [sum(one.numel() for one in load_file(run / "export" / f).values()) for f in files]
    assert gathered == max(sizes)
    PersonalRewardModel.from_pretrained(run / "export")
    plan = plan_run(composed(*overrides), n_users=3, schema=NO_FEATURES)
    tables = plan.user_tables - 3 * 8 * (3 + 1)  # less the counts of right answers by user
    planned = plan.weights + plan.gradients + plan.optimiser + tables
    assert planned == pytest.approx(held, rel=0.01)
    assert plan.gathered == plan.parameters * 4 + bucket


def assert_checkpoint_is_as_forecast(run: Path, overrides: list[str]) -> None:
    """Its tensors: what is learned, in full precision, and the two moments of each number."""
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    moments = content["optimizer_states"][0]["state"].values()
    kept = sum(one.nbytes for state in moments for one in state.values() if one.dim() > 0)
    plan = plan_run(composed(*overrides), n_users=3, schema=NO_FEATURES)
    assert kept == plan.checkpoint * 2 / 3
    learned = [v for name, v in content["state_dict"].items() if "accuracy" not in name]
    assert {one.dtype for one in learned} == {torch.float32}
    assert sum(one.nbytes for one in learned) == plan.checkpoint / 3


OFFLOAD = ["trainer.zero3.offload_optimizer=cpu", "trainer.zero3.offload_parameters=cpu"]
HALF = ["trainer.precision=bf16-mixed", "backbone.dtype=bfloat16"]
RECOMPUTING = ["model=dpo", "aggregator=soft_prompt", "aggregator.n_tokens=2", "encoder.rank=null"]
RECOMPUTING += ["backbone.gradient_checkpointing=true", "backbone.lora.target_modules=all-linear"]


@pytest.mark.long
def test_what_is_offloaded_learns_and_goes_on_all_the_same(tmp_path: Path) -> None:
    """On one process first, and on two to the end."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SMALL, *RECOMPUTING, f"backbone.path={save_model(tmp_path / 'model')}"]
    settings.append("trainer.max_epochs=2")  # a run that stops at its last step has ended its epoch
    launch("train", *settings, f"run_dir={one}")
    for also in (["trainer.max_steps=2", "trainer.devices=1"], ["ckpt=last"]):
        line = command("train", *settings, *ON_TWO, *OFFLOAD, f"run_dir={two}", *also)
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "WARNING" not in done.stdout
    curves = [pd.read_csv(run / "metrics.csv")["train/loss"].dropna() for run in (one, two)]
    assert len(curves[0]) == 3
    assert list(curves[1]) == pytest.approx(list(curves[0]), abs=1e-6)


@pytest.mark.long
@pytest.mark.slow
def test_slurm_starts_a_run_offloading_in_half_precision_and_recomputing(tmp_path: Path) -> None:
    """SLURM's variables stand in for SLURM: Lightning knows no more of it."""
    run = tmp_path / "run"
    backbone = f"backbone.path={save_model(tmp_path / 'model', 'llama')}"
    overrides = [*SMALL, *RECOMPUTING, backbone, *ON_TWO, *OFFLOAD, *HALF]
    line = command("train", *overrides, f"run_dir={run}")
    port = {"MASTER_PORT": str(free_port())}
    said = outputs_of(*((line, port | of_slurm(rank, 2)) for rank in (0, 1)))
    assert "".join(said).count("report: ") == 1 and "WARNING" not in "".join(said)
    check_run(run, generations=True)
    assert_checkpoint_is_as_forecast(run, overrides)


COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if "train.py" in line and not line.endswith("\\")  # that one trains a model of the hub
]
ONE_BLOCK = {"gptj": "n_layer", "llama": "num_hidden_layers"}
N_STARTED = {
    "torchrun": r"torchrun --nnodes=(\d+) --nproc_per_node=(\d+) ",
    "srun": r"srun --nodes=(\d+) --ntasks-per-node=(\d+) ",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_scaling(line: str) -> None:
    """They compose, start as many processes as the trainer has, and can be planned."""
    words = shlex.split(line)
    overrides = words[words.index("train.py") + 1 :]
    trainer = composed(*overrides)["trainer"]
    if words[0] in N_STARTED:
        found = re.match(N_STARTED[words[0]], line)
        assert found is not None
        assert [int(n) for n in found.groups()] == [trainer["num_nodes"], trainer["devices"]]
    kind = composed(*overrides)["backbone"]["architecture"]["model_type"]
    settings = composed(*overrides, f"+backbone.architecture.{ONE_BLOCK[kind]}=1")
    plan = plan_run(settings, n_users=10, schema=NO_FEATURES)
    assert plan.pairs == 32 or "experiment=" not in line


def test_commands_of_scaling_are_found() -> None:
    experiments = ("tldr_gptj_6b", "psoups_tulu_7b", "prism_llama3_8b")
    for name in experiments:
        assert any(f"experiment={name}" in line for line in COMMANDS)
    assert {line.split()[0] for line in COMMANDS} == {"python", "torchrun", "srun"}
    assert len(COMMANDS) >= 6


@pytest.mark.slow
def test_a_checkpoint_of_gpt_j_is_small() -> None:
    """LoRA of rank 8 on six layers of 28 blocks, and users' vectors, thrice in float32."""
    few = [
        plan_run(
            composed("experiment=tldr_gptj_6b", f"+backbone.architecture.n_layer={n_blocks}"),
            n_users=10,
            schema=NO_FEATURES,
        ).checkpoint
        for n_blocks in (1, 2)
    ]
    whole = few[0] + 27 * (few[1] - few[0])
    lora = 28 * 8 * (4 * (4096 + 4096) + 2 * (4096 + 16384))
    of_users = (10 + 1) * 10 * 4096
    assert whole == 12 * (lora + 10 * 4096 + of_users)
    assert whole - 12 * of_users < 200e6
