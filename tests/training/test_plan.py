"""What a run will need, planned from shapes alone, against what it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import composed, launch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from plrhf.backbone import devices
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.cli.planning import empty_backbone, model_of_shapes, plan_run
from plrhf.core.types import PreferenceBatch
from plrhf.data.features import NO_FEATURES
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.training.plan import GB, Plan

COUNTS = 3 * 8 * (211 + 1)  # of right answers by user, float64

PROMPT, RESPONSE, PAIRS, EVAL_PAIRS, N_USERS = 23, 34, 5, 9, 211
SHAPE = [
    "backbone.tiny={vocab_size:1501,n_layers:3,width:48,n_heads:4,max_positions:128}",
    *("data.max_prompt_tokens=23", "data.max_tokens=57"),
    *("data.batch_size=5", "data.eval_batch_size=9"),
]
LLAMA = (
    "backbone.architecture={model_type:llama,vocab_size:701,hidden_size:48,num_hidden_layers:3,"
    "num_attention_heads:4,num_key_value_heads:2,intermediate_size:112}"
)
SOFT = ["aggregator=soft_prompt", "aggregator.n_tokens=7", "encoder.rank=null"]
MEASURED = {
    "policy": ["model=dpo", *SOFT],
    "policy, after the prompt": ["model=dpo", *SOFT, "aggregator.position=after_prompt"],
    "policy, recomputing": ["model=dpo", *SOFT, "backbone.gradient_checkpointing=true"],
    "policy, llama": ["model=dpo", "aggregator=film", LLAMA],
    "reward": ["model=reward", *SOFT, "backbone.trainable=full"],
    "reward, llama recomputing": [*SOFT, LLAMA, "backbone.gradient_checkpointing=true"],
    "reward, every block": ["aggregator.site=every_block", "encoder=cluster"],
    "reward, frozen": ["backbone.trainable=frozen"],
    "policy, one context in bfloat16": [
        "model=dpo",
        "encoder=none",
        "trainer.precision=bf16-mixed",
    ],
}


def forecast_of(*overrides: str, n_users: int = N_USERS) -> Plan:
    return plan_run(composed(*SHAPE, *overrides), n_users=n_users, schema=NO_FEATURES)


def real_model(settings: dict[str, Any]) -> Any:
    """The model of the settings with weights in it."""
    node = settings["backbone"]
    if node["architecture"] is None:
        language_model = tiny_gptj(**node["tiny"], eos_token_id=0)
    else:
        config = AutoConfig.for_model(**node["architecture"])
        language_model = AutoModelForCausalLM.from_config(config)
    names = ("trainable", "lora", "gradient_checkpointing")
    backbone = Backbone(model=language_model, **{name: node[name] for name in names})
    return model_of_shapes(settings, backbone, n_users=N_USERS, schema=NO_FEATURES)


def real_batch(n_pairs: int) -> PreferenceBatch:
    """Pairs as long as `SHAPE` lets them be."""
    segment = torch.tensor([0] * PROMPT + [1] * RESPONSE + [2] * RESPONSE).expand(n_pairs, -1)
    text = torch.arange(PROMPT + RESPONSE)
    return PreferenceBatch(
        user_id=torch.arange(n_pairs) + 1,
        features=torch.zeros(n_pairs, 0),
        input_ids=torch.randint(700, segment.shape),
        segment=segment,
        position_ids=torch.cat([text, text[PROMPT:]]).expand(n_pairs, -1),
        row=torch.arange(n_pairs),
    )


def peak_of(step: Any) -> int:
    """Most bytes the CPU's allocator held more than at the start while `step` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measured(settings: dict[str, Any]) -> dict[str, float]:
    """Bytes of a second training step and of a batch of evaluation, taken for real."""
    model = real_model(settings)
    half = settings["trainer"]["precision"] == "bf16-mixed"
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    user = [*model.encoder.parameters(), *model.aggregator.parameters()]
    optimizer, _ = model.optim.build(
        backbone=model.backbone.parameters(),
        user=user,
        head=model.head_parameters(),
        total_steps=9,
    )
    batch = real_batch(PAIRS)
    pooled = settings["backbone"]["trainable"] == "frozen"
    if pooled:
        texts = torch.arange(2 * PAIRS).view(-1, 2)
        batch = batch.pooled(torch.randn(2 * PAIRS, model.backbone.hidden_size), texts)
    elif isinstance(model, PersonalDPOPolicy):
        batch.ref_logps = torch.randn(PAIRS, 2)

    def step() -> None:
        with autocast:
            loss = model.training_step(batch, 0)
        optimizer.zero_grad()  # where Lightning does
        loss.backward()
        optimizer.step()

    step()
    found = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)
    states = [one for state in optimizer.state.values() for one in state.values() if one.dim() > 0]
    training = peak_of(step)
    model.eval()
    evaluated = real_batch(EVAL_PAIRS)
    with torch.no_grad(), autocast:
        of_text = model.pooled_trunk if pooled else model.context_margins
        evaluation = peak_of(lambda: of_text(evaluated))
    return {
        "weights": sum(one.nbytes for one in model.parameters()),
        "gradients": found,
        "optimiser": sum(one.nbytes for one in states),
        "training": training,
        "evaluation": evaluation,
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("case", MEASURED)
def test_forecast_is_what_is_measured(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A plan is for a GPU, so what is measured takes the paths of a GPU.
    monkeypatch.setattr(devices, "computes_on_cpu", lambda _: False)
    settings = composed(*SHAPE, *MEASURED[case])
    plan = plan_run(settings, n_users=N_USERS, schema=NO_FEATURES)
    found = measured(settings)
    learned = plan.weights + plan.gradients + plan.optimiser + plan.user_tables
    exact = found["weights"] + found["gradients"] + found["optimiser"] + COUNTS
    assert learned == exact
    # With a frozen trunk a step holds next to nothing.
    assert plan.training == pytest.approx(found["training"], rel=0.15, abs=1e5)
    assert plan.evaluation == pytest.approx(found["evaluation"], rel=0.15)
    worst = exact + max(found["training"], found["evaluation"])
    assert plan.total == pytest.approx(worst, rel=0.15)


@pytest.mark.slow
def test_parameters_of_gpt_j() -> None:
    """All blocks of the paper's model are counted; a step is planned for two of them."""
    of_paper = ["backbone=gptj_6b", "model=dpo", "aggregator=soft_prompt", "encoder=none"]

    def counted(n_blocks: int) -> tuple[int, int]:
        block = 4 * 4096**2 + 2 * 4096 * 16384 + 16384 + 4096 + 2 * 4096
        bare = 2 * 50400 * 4096 + 50400 + n_blocks * block + 2 * 4096
        return bare, n_blocks * 8 * (4 * (4096 + 4096) + 2 * (4096 + 16384))

    whole = list(empty_backbone(composed(*SHAPE, *of_paper)["backbone"]).parameters())
    learned = sum(one.numel() for one in whole if one.requires_grad)
    assert (sum(one.numel() for one in whole) - learned, learned) == counted(28)
    assert counted(28)[0] == 6_050_882_784
    plan = forecast_of(*of_paper, "trainer=gpu", "+backbone.architecture.n_layer=2")
    bare, lora = counted(2)
    assert (plan.parameters, plan.trainable) == (bare + lora, lora)
    assert plan.weights == 2 * bare + 4 * lora  # bfloat16, and adapters in float32
    assert plan.gradients == 4 * lora and plan.optimiser == 8 * lora


ONE_BLOCK = "backbone.tiny.n_layers=1"  # where more of them would be more of the same
SHARDED = [
    ONE_BLOCK,
    *("model=dpo", "encoder.rank=4", "trainer=zero3", "trainer.devices=2", "trainer.num_nodes=2"),
    *("trainer.accumulate_grad_batches=3", "data.batch_size=20", "data.eval_batch_size=36"),
]
TABLE = (N_USERS + 1) * 4  # numbers


@pytest.mark.slow
def test_shares_of_zero_3() -> None:
    plan = forecast_of(*SHARDED)
    every, learned = plan.parameters, plan.trainable
    assert plan.weights == 2 * (every - TABLE) / 4
    assert plan.gradients == 2 * (learned - TABLE) / 4
    assert plan.optimiser == 16 * (learned - TABLE) / 4
    assert plan.user_tables == (2 + 2 + 16) * TABLE / 4 + COUNTS
    assert plan.gathered == 2 * (every + 50_000_000)
    assert plan.host == plan.nvme == 0
    assert plan.communication == pytest.approx(3 / 4 * 3 * (2 * 2 * every + 2 * learned))
    assert plan.pairs == 20 * 3
    on_one = ["trainer=gpu", "trainer.devices=1", "trainer.num_nodes=1"]
    alone = forecast_of(*SHARDED, *on_one, "data.batch_size=5", "data.eval_batch_size=9")
    assert alone.communication == alone.gathered == 0
    assert alone.training > plan.training  # autocast keeps float32 weights cast; ZeRO-3 has none


@pytest.mark.slow
def test_ddp_moves_what_is_learned_alone() -> None:
    of_ddp = [*SHARDED, "trainer=ddp", "trainer.devices=2", "trainer.num_nodes=2"]
    plan = forecast_of(*of_ddp)
    alone = forecast_of(
        *SHARDED,
        *("trainer=gpu", "trainer.devices=1", "trainer.num_nodes=1"),
        *("data.batch_size=5", "data.eval_batch_size=9"),
    )
    assert plan.communication == 2 * 3 / 4 * 4 * plan.trainable  # once a step of three batches
    assert plan.total == alone.total
    assert (plan.pairs, alone.pairs) == (20 * 3, 5 * 3)


@pytest.mark.slow
def test_what_a_gpu_gathers_and_offloads() -> None:
    plan = forecast_of(*SHARDED)
    every, learned = plan.parameters, plan.trainable
    fewer = ["trainer.zero3.live_parameters=60000", "trainer.zero3.bucket_size=11"]
    largest = 1501 * 48, 2 * 48 * 48  # the embedding; of what is learned FiLM's scale and shift
    assert forecast_of(*SHARDED, *fewer).gathered == 2 * (largest[0] + 11 + largest[1])

    learning = "trainer.zero3.offload_optimizer=cpu"
    on_host = forecast_of(*SHARDED, learning)
    assert (on_host.gradients, on_host.optimiser) == (0, 0)
    assert on_host.weights == plan.weights and on_host.gathered == plan.gathered
    assert on_host.user_tables == 2 * TABLE / 4 + COUNTS
    assert on_host.host == (2 + 16) * learned / 4 and on_host.nvme == 0
    assert on_host.total == pytest.approx(plan.total - on_host.host)

    on_disk = [learning, "trainer.zero3.offload_parameters=nvme", "trainer.zero3.nvme_path=disk"]
    everything = forecast_of(*SHARDED, *on_disk)
    assert (everything.weights, everything.user_tables) == (0, COUNTS)
    assert everything.nvme == 2 * every / 4 and everything.host == on_host.host


@pytest.mark.slow
def test_a_hundred_million_users() -> None:
    rank = forecast_of("encoder.rank=4", ONE_BLOCK, n_users=10**8)
    table = 4 * 4 * (10**8 + 1)  # bytes
    counts = 3 * 8 * (10**8 + 1)
    assert rank.user_tables == table * (1 + 1 + 2) + counts
    clusters = ["encoder=cluster", "encoder.n_clusters=12", "trainer=zero3", ONE_BLOCK]
    sharded = forecast_of(*clusters, n_users=10**8)
    assert sharded.user_tables == pytest.approx((10**8 + 1) * 12 * (2 + 2 + 16) / 8 + counts)
    # The table of 1.2e9 numbers is whole on every GPU for a moment, and so is its gradient.
    assert sharded.gathered == 2 * (2 * (10**8 + 1) * 12 + 50_000_000)


@pytest.mark.slow
def test_flex_attention_is_planned_with_a_mask() -> None:
    of_one = "backbone.architecture.num_hidden_layers=1"
    flex, masked = (
        forecast_of("trainer=gpu", SOFT[0], LLAMA, of_one, f"backbone.attention={name}")
        for name in ("flex_attention", "sdpa")
    )
    assert flex == masked


@pytest.mark.slow
def test_bidirectional_encoders_have_two_rows_a_pair() -> None:
    shape = "{model_type:bert,vocab_size:301,hidden_size:32,num_hidden_layers:2,"
    shape += "num_attention_heads:4,intermediate_size:64}"
    plan = forecast_of(f"backbone.architecture={shape}", "backbone.lora.target_modules=all-linear")
    assert plan.training > PAIRS * 2 * (PROMPT + RESPONSE) * 32 * 4


@pytest.mark.slow
def test_what_fits() -> None:
    plan = forecast_of(ONE_BLOCK)
    assert plan.fits(plan.total / 0.9 / GB * 1.001)
    assert not plan.fits(plan.total / 0.9 / GB * 0.999)


@pytest.mark.slow
def test_a_config_is_all_it_reads(tmp_path: Path, capsys: Any) -> None:
    AutoConfig.for_model(
        "gptj",
        vocab_size=300,
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=16,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(tmp_path / "model")
    overrides = ["data=jsonl", "data.path=nowhere.jsonl", "backbone=hf", "plan=true"]
    overrides += [f"backbone.path={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}"]
    launch("train", *overrides, "plan_for.users=1234567", "plan_for.gpu_memory_gb=1e-3")
    out = capsys.readouterr().out
    assert "1,234,567" in out and "does not fit" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_users_of_the_data(capsys: Any) -> None:
    launch("train", *SHAPE, "data.n_users=17", "data.n_unseen_users=2", "plan=true")
    out = capsys.readouterr().out
    assert re.search(r"│ users +│ +17 │", out) is not None
