"""What a GPU makes of training here, in one command: right or wrong, how fast, how much memory.

    python benchmarks/gpu.py --minutes 8 --out gpu.json
    python benchmarks/gpu.py --toy                  # the same code on models of two blocks, as on a CPU

Each section has a share of the minutes. What does not fit is left out, and named; results are written
after each measurement, so that a run that is killed leaves what it has.

* ``device``: what it is, and the fastest of some large products beside its datasheet's peak.
* ``correctness``: losses and gradients of packed rows on the device beside two rows a pair on the CPU,
  for every aggregator and way of attention, in float32 and bfloat16; texts beside those of the CPU.
* ``throughput``: GPT-J 6B and Llama 8B of random weights, P-DPO with LoRA in bfloat16, both contexts, on
  pairs like TL;DR's and like chats': pairs a second, utilisation (operations that a step needs, by the
  datasheet's peak), memory beside what `plan=true` says, and waits for the GPU in a step.
* ``beside_trl``: ours and TRL's DPOTrainer at its best, by turns, on a Llama of 8B's width, 8 blocks deep.
* ``profile``: the ten costliest operations of a step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_workload import (
    SMALL,
    TOY_SHAPE,
    Setting,
    Step,
    datasheet_peak,
    language_model,
    make_backbone,
    make_batch,
    make_pairs,
    make_policy,
    planned,
    step_operations,
    waits_counted,
)
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl_workload import METHODS, word_tokenizer, write_backbone, write_pairs
from turns import matmul_peak, take_turns, workers_of

from plrhf.backbone.model import Backbone
from plrhf.core.types import UserBatch
from plrhf.models.generation import generate
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.training.plan import GB, HEADROOM

BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest |found - expected| / |expected| allowed of all gradients, and of all losses."""
ATTENTION: dict[str, tuple[str | None, ...]] = {
    "gptj": (None,),
    "llama": (None, "sdpa", "flex_attention"),
}
"""Ways of attention of each family; None: the one that a run has by default."""
MEASURED = ("late_soft_prompt", "film_last", "soft_prompt")
"""Aggregators whose speed is measured."""
SHARES = {"correctness": 0.15, "llama_8b": 0.3, "gptj_6b": 0.2, "beside_trl": 0.25, "profile": 0.1}
"""Of the time, for each section in its turn; what one leaves goes to the later ones."""


class TimeIsUp(Exception):
    """Raised where a section has had its share of the time."""


class Report:
    """What has been found so far, on disk after every measurement."""

    def __init__(self, out: Path | None, minutes: float) -> None:
        self.out, self.end = out, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {}
        self.left = sum(SHARES.values())  # of the shares of sections not begun

    def set(self, section: str, facts: dict[str, Any]) -> None:
        """Write down the facts of a section."""
        self.found[section] = facts
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=2) + "\n")

    def add(self, section: str, what: str, **measured: Any) -> None:
        """Add a row to a section's table."""
        rows = self.found.get(section, [])
        self.set(section, [*rows, {"what": what, **measured}])  # type: ignore[arg-type]

    def leave_out(self, what: str, why: str) -> None:
        """Note what was not measured."""
        print(f"left out: {what}: {why}", flush=True)
        self.add("left_out", what, why=why)

    def section(self, name: str, measure: Callable[[], None]) -> None:
        """Measure until the section's share of the time that is left is over."""
        seconds = (self.end - time.monotonic()) * SHARES[name] / self.left
        self.left -= SHARES[name]
        if seconds <= 0:
            self.leave_out(name, "no time is left")
            return

        def stop(*_: Any) -> None:
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            measure()
        except TimeIsUp:
            self.leave_out(f"the rest of {name}", f"its {seconds:.0f} s are over")
        except Exception as error:  # the other sections are worth having
            self.leave_out(f"the rest of {name}", f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            _free()


def _free() -> None:
    """Give back the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_facts(setting: Setting) -> dict[str, Any]:
    """What the device is, and which libraries there are."""
    facts: dict[str, Any] = {"device": str(setting.device), "toy": setting.toy}
    for name in ("torch", "transformers", "peft", "lightning", "trl", "triton", "liger-kernel"):
        facts[name] = _version(name)
    if setting.device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory_gb": properties.total_memory / GB}
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["datasheet_peak"] = datasheet_peak(properties.name)
    peak = 1e12 if setting.toy else matmul_peak("bfloat16")  # a product of a toy's CPU says nothing
    return {**facts, "matmul_peak": peak}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def correctness(setting: Setting, report: Report) -> None:
    """Packed rows on the device beside two rows a pair on the CPU, and texts."""
    for family, ways in ATTENTION.items():
        for aggregator in setting.aggregators:
            torch.manual_seed(0)
            model = language_model(SMALL[family], dtype=torch.float32, attention="eager")
            twin = make_policy(make_backbone(model, dropout=0.0), aggregator)
            for weight in (one for name, one in twin.named_parameters() if "lora_B" in name):
                torch.nn.init.normal_(weight, std=0.1)
            pairs = make_pairs(TOY_SHAPE, 7, 211, unequal=True)
            expected = _losses_and_gradients(twin, pairs, torch.device("cpu"), "float32", rows=2)
            for attention in ways:
                for dtype in BOUNDS:
                    if attention == "flex_attention" and setting.device.type != "cuda":
                        continue  # which torch can't train by there
                    policy = copy.deepcopy(twin)
                    if family == "llama":
                        policy.backbone.bare.set_attn_implementation(attention or "sdpa")
                    policy.backbone.block_masks = attention is None
                    found = _losses_and_gradients(policy, pairs, setting.device, dtype, rows=1)
                    apart = {name: _relative(found[name], expected[name]) for name in expected}
                    what = f"{family}, {aggregator}, {attention or 'default'}, {dtype}"
                    right = max(apart.values()) <= BOUNDS[dtype]
                    report.add("correctness", what, **apart, right=right)
            report.add("correctness", f"{family}, {aggregator}, texts", right=_texts(twin, setting))


def _losses_and_gradients(
    model: PersonalDPOPolicy, pairs: Any, device: torch.device, dtype: str, *, rows: int
) -> dict[str, Tensor]:
    """Losses of the pairs and all gradients of their mean, in float64 on the CPU."""
    model = model.to(device)
    before, layout = model.backbone.layout, "packed" if rows == 1 else "two_rows"
    model.backbone.layout = layout  # type: ignore[assignment]
    batch = move_data_to_device(make_batch(pairs, model.user_slots, layout=layout), device)  # type: ignore[arg-type]
    model.zero_grad()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        losses = model.loss(batch)[0]
    losses.mean().backward()
    model.backbone.layout = before
    named = sorted((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    gradients = torch.cat([one.flatten() for _, one in named])
    return {"losses": losses.detach().double().cpu(), "gradients": gradients.double().cpu()}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _texts(model: PersonalDPOPolicy, setting: Setting) -> bool:
    """Whether the likeliest texts are those that the CPU writes."""
    tokenizer = word_tokenizer(211)
    prompts = [[5, 7, 9], [11, 3], [5, 7, 9], [2, 4, 6, 8]]
    users = UserBatch(user_id=torch.tensor([1, 2, 0, 3]), features=torch.zeros(4, 0))
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
    texts = [
        generate(copy.deepcopy(model).to(device), tokenizer, prompts, users, **how)
        for device in (torch.device("cpu"), setting.device)
    ]
    return texts[0] == texts[1]


def pairs_that_fit(
    setting: Setting, name: str, aggregator: str, shape: Any, memory: float
) -> tuple[int, float, bool]:
    """The most pairs a step in a GPU's memory by the plan, its bytes, and whether blocks are recomputed."""
    n_planned = 2 if setting.toy else 4
    for recompute in (False, True):
        plan = planned(
            setting.architecture(name), aggregator, shape, n_planned, recompute=recompute
        )
        kept = plan.total - max(plan.training, plan.evaluation)
        a_pair = plan.training / n_planned
        n_pairs = min(64, int(((1 - HEADROOM) * memory - kept) / a_pair))
        if n_pairs >= n_planned or recompute:
            break
    n_pairs = n_planned if setting.toy else max(1, n_pairs)
    return n_pairs, kept + n_pairs * a_pair, recompute


def throughput(setting: Setting, report: Report, facts: dict[str, Any], name: str) -> None:
    """Steps of a large model: speed, memory, waits."""
    peak = facts.get("datasheet_peak") or facts["matmul_peak"]
    memory = facts.get("memory_gb", 2.0) * GB
    backbone = random_backbone(setting, name)
    aggregators = MEASURED[:1] if setting.toy else MEASURED
    for (shape_name, shape), aggregator in product(setting.shapes.items(), aggregators):
        n_pairs, plan, recompute = pairs_that_fit(setting, name, aggregator, shape, memory)
        one: dict[str, Any] = {"pairs": n_pairs, "recompute": recompute, "planned_gb": plan / GB}
        backbone.bare.gradient_checkpointing_disable()
        if recompute:
            backbone.bare.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            one |= measured(made_step(setting, backbone, aggregator, shape, n_pairs), setting)
        except torch.OutOfMemoryError as error:
            one["failed"] = str(error)[:200]
        _free()
        if "seconds" in one:
            one["pairs_a_second"] = n_pairs / one["seconds"]
            operations = step_operations(setting.architecture(name), aggregator, shape, n_pairs)
            one["utilisation"] = operations / one["seconds"] / peak
        report.add("throughput", f"{name}, {shape_name}, {aggregator}", **one)


def random_backbone(setting: Setting, name: str) -> Backbone:
    """A model of random weights in bfloat16, made on the device, with LoRA."""
    torch.manual_seed(0)
    with setting.device:
        model = language_model(setting.architecture(name), dtype=torch.bfloat16)
    return make_backbone(model)


def made_step(
    setting: Setting, backbone: Backbone, aggregator: str, shape: Any, n_pairs: int
) -> Step:
    """A step of a policy on a backbone."""
    pairs = make_pairs(shape, n_pairs, backbone.vocabulary_size, unequal=False)
    return Step(make_policy(backbone, aggregator), pairs, setting.device)


def measured(step: Step, setting: Setting) -> dict[str, Any]:
    """Seconds of a step, by masks too where it is by blocks, peak of memory, and waits for the device."""
    found: dict[str, Any] = {"seconds": median_seconds(step, setting)}
    if setting.device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / GB
    with waits_counted(setting) as waits:
        step()
    found["waits"] = dict(waits)
    backbone = step.model.backbone
    with step.autocast():
        in_blocks = backbone._attends_in_blocks(setting.device)
    if in_blocks:
        backbone.block_masks = False
        found["seconds_by_masks"] = median_seconds(step, setting)
        backbone.block_masks = True
    return found


def median_seconds(step: Step, setting: Setting) -> float:
    """Median seconds of some steps, after some to warm up."""
    for _ in range(1 if setting.toy else 2):
        step()
    setting.synchronize()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 if setting.toy else 5):
        began = time.perf_counter()
        step()
        setting.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def beside_trl(setting: Setting, report: Report) -> None:
    """Ours and TRL's trainers by turns, each in a process of its own."""
    if setting.toy or find_spec("trl") is None:
        why = "a toy" if setting.toy else "TRL is not installed"
        report.leave_out("beside_trl", why)
        return
    names = ["dpo ours, bfloat16", "dpo ours, late soft prompt, bfloat16", "dpo TRL, best"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "backbone")
        write_backbone(folder, layers=8, width=4096, vocabulary=32_000, family="llama")
        for shape in setting.shapes:
            pairs = Path(scratch, f"{shape}.jsonl")
            write_pairs(pairs, shape=shape, vocabulary=32_000)
            scripts = {name: METHODS[name].script for name in names}
            with workers_of(scripts, folder, pairs) as workers:
                turns = take_turns(workers, steps=5, n_turns=3)
            seconds = {
                name: statistics.median(turn["seconds"] / turn["steps"] for turn in of_name)
                for name, of_name in turns.items()
            }
            times = {f"TRL by {name}": seconds[names[-1]] / seconds[name] for name in names[:-1]}
            report.add("beside_trl", shape, seconds=seconds, times=times)


def profile(setting: Setting, report: Report) -> None:
    """The ten operations that cost a step the most."""
    shape = setting.shapes["tldr"]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    backbone = random_backbone(setting, "llama_8b")
    step = made_step(setting, backbone, "late_soft_prompt", shape, 2 if setting.toy else 4)
    step()
    with torch.profiler.profile(activities=kinds) as taken:
        step()
        setting.synchronize()

    def cost(one: Any) -> float:
        on_gpu = getattr(one, "self_device_time_total", 0)
        return float(on_gpu if setting.device.type == "cuda" else one.self_cpu_time_total)

    events = sorted(taken.key_averages(), key=cost, reverse=True)
    total = sum(cost(one) for one in events)
    for one in events[:10]:
        share = cost(one) / total
        report.add("profile", one.key[:80], share=share, calls=one.count, ms=cost(one) / 1e3)


def show(found: dict[str, Any]) -> None:
    """A table for each section."""
    console = Console(width=120)
    for section in ("device", "correctness", "throughput", "beside_trl", "profile", "left_out"):
        rows = found.get(section)
        if not rows:
            continue
        rows = (
            [{"what": name, "": value} for name, value in rows.items()]
            if isinstance(rows, dict)
            else rows
        )
        names = list(dict.fromkeys(name for row in rows for name in row if name != "left_out"))
        table = Table(*names, title=section)
        for row in rows:
            table.add_row(*(_shown(row.get(name)) for name in names))
        console.print(table)
    wrong = [one["what"] for one in found.get("correctness", []) if not one["right"]]
    print(f"wrong: {'; '.join(wrong)}" if wrong else "all that was checked is right")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def main() -> None:
    """Measure what the time allows, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true", help="small models; always so on a CPU")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    setting = Setting(torch.device("cuda" if has_gpu else "cpu"), args.toy or not has_gpu)
    report = Report(args.out, args.minutes)
    facts = device_facts(setting)
    report.set("device", facts)
    report.section("correctness", lambda: correctness(setting, report))
    for name in ("llama_8b", "gptj_6b"):
        report.section(name, partial(throughput, setting, report, facts, name))
    report.section("beside_trl", lambda: beside_trl(setting, report))
    report.section("profile", lambda: profile(setting, report))
    show(report.found)
    if args.out is not None:
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
