"""What a user gets wrong is answered in one line: field, value, what is allowed, cure; status 2."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from runs import ENVIRONMENT, TINY, command, launch, rows_of_world, save_model, write_rows

TRAIN: dict[str, tuple[list[str], str]] = {
    "unknown key": (
        ["model.alhpa=1"],
        "model.alhpa='1' is not allowed: expected one of the keys _target_, alpha, centring, head, "
        "inner, loss, name, noise, pooling, rating_scale, reduce, start, target_margin, ties. "
        "Write model.alpha.",
    ),
    "unknown key among others that need a group": (
        ["model=dpo", "model.beta=1", "model.betta=2"],
        "model.betta='2' is not allowed: expected one of the keys _target_, alpha, beta, "
        "first_order, inner, label_smoothing, loss, name, reduce, ties. Write model.beta.",
    ),
    "unknown section": (
        ["modl.alpha=1"],
        "modl.alpha='1' is not allowed: expected * Write model.alpha.",
    ),
    "unknown key, insisted on": (["+modell=1"], "modell=1 is not allowed: expected * Write model."),
    "insisted on below": (
        ["+encoder.slope=1"],
        "encoder.slope=1 is not allowed: expected one of the keys init, offset_scale, rank, shrinkage, "
        "sparse. *",
    ),
    "unknown choice": (
        ["encoder=lockup"],
        "encoder='lockup' is not allowed: expected one of cluster, context, ensemble, "
        "features, hybrid, lookup, none, odd, pair_tokens, uniform. Choose with encoder=NAME.",
    ),
    "group without its source": (["data=base"], "data._target_=None is not allowed: *"),
    "no value": (
        ["data=jsonl"],
        "data.path=None is not allowed: expected a value, as there is no default. "
        "Set data.path=VALUE.",
    ),
    "no backbone": (
        ["backbone=hf"],
        "backbone.path=None is not allowed: expected a directory or hub name. "
        "Set backbone.path=DIR.",
    ),
    "sparse tables under ZeRO": (
        ["trainer=zero3_cpu", "encoder=lookup", "encoder.sparse=true"],
        "encoder.sparse=True is not allowed: expected false with several processes or trainer.zero3, "
        "whose gradients are dense. Set encoder.sparse=false.",
    ),
    "compiled blocks under ZeRO": (
        ["trainer=zero3_cpu", "backbone.compiled=true"],
        "backbone.compiled=True is not allowed: expected false under trainer.zero3, which gathers "
        "weights layer by layer. Set backbone.compiled=false.",
    ),
    "sampled responses under ZeRO": (
        ["trainer=zero3_cpu", "model=grpo"],
        "model='grpo' is not allowed: expected another under trainer.zero3, which shards weights. "
        "Set trainer.zero3=null.",
    ),
    "a plan of sampled responses": (
        ["model=grpo", "plan=true"],
        "plan=True is not allowed: expected false for model=grpo. Plan model=reward or model=dpo.",
    ),
    "FlexAttention on a CPU": (
        ["backbone.attention=flex_attention"],
        "backbone.attention='flex_attention' is not allowed: expected null, eager or sdpa with "
        "trainer.accelerator=cpu. Set backbone.attention=null, or trainer=gpu.",
    ),
    "another precision under ZeRO": (
        ["trainer=zero3_cpu", "backbone.dtype=bfloat16"],
        "backbone.dtype='bfloat16' is not allowed: expected float32 under trainer.zero3 with "
        "trainer.precision=32-true. Set backbone.dtype=float32.",
    ),
    "list without -m": (
        ["seed=0,1"],
        "seed='0,1' is not allowed: expected one value. Add -m to run with each of them, or write "
        "seed=[0,1] for a list.",
    ),
    "unreadable": (
        ["model.alpha=[1"],
        "model.alpha='[1' is not allowed: expected a number, text, *",
    ),
    "type": (["optim.lr=fast"], "optim.lr='fast' is not allowed: expected a number*"),
    "type of a seed": (["seed=1.5"], "seed=1.5 is not allowed: expected a whole number*"),
    "type in lora": (["backbone.lora.r=big"], "backbone.lora.r='big' is not allowed: expected a *"),
    "type of a choice": (
        ["model.pooling=max"],
        "model.pooling='max' is not allowed: expected last or mean. *",
    ),
    "type in samples": (
        ["samples.users=ann"],
        "samples.users='ann' is not allowed: expected a whole number or a list*",
    ),
    "range of alpha": (
        ["model.alpha=7"],
        "model.alpha=7 is not allowed: expected a number from 0 to 1. Set model.alpha=0.5.",
    ),
    "range of a rate": (
        ["optim.lr=-1"],
        "optim.lr=-1 is not allowed: expected a number above 0. *",
    ),
    "range of steps": (
        ["trainer.max_steps=0"],
        "trainer.max_steps=0 is not allowed: expected -1 or a whole number from 1. *",
    ),
    "no end": (
        ["trainer.max_epochs=null"],
        "trainer.max_steps=-1 is not allowed: expected a number of steps, or trainer.max_epochs. *",
    ),
    "range of clipping": (
        ["trainer.gradient_clip_val=0"],
        "trainer.gradient_clip_val=0 is not allowed: expected a number above 0 or null. *",
    ),
    "range of a fraction": (
        ["data.unseen_fraction=1"],
        "data.unseen_fraction=1 is not allowed: expected a number from 0 and below 1. *",
    ),
    "range in sft": (
        ["backbone.sft.lr=0"],
        "backbone.sft.lr=0 is not allowed: expected a number above 0. Set backbone.sft.lr=1.0.",
    ),
    "range in tiny": (["backbone.tiny.n_heads=0"], "backbone.tiny.n_heads=0 is not allowed: *"),
    "key below nothing": (
        ["backbone=hf", "backbone.tiny.width=32"],
        "backbone.tiny.width='32' is not allowed: expected no key below backbone.tiny. *",
    ),
    "range in samples": (
        ["samples.temperature=-1"],
        "samples.temperature=-1.0 is not allowed: expected a number from 0. *",
    ),
    "range of a part": (
        ["encoder.rank=0"],
        "encoder.rank=0 is not allowed: expected a whole number from 1 or null. *",
    ),
    "seed": (
        ["seed=-1"],
        "seed=-1 is not allowed: expected a whole number from 0 to 4294967295. Set seed=0.",
    ),
    "metric": (["trainer.monitor=val/auc"], "trainer.monitor='val/auc' is not allowed: expected *"),
    "metric of another model": (
        ["model=sft", "trainer.monitor=val/nll"],
        "trainer.monitor='val/nll' is not allowed: expected val/loss, as model=sft has no accuracy. *",
    ),
    "metric that is not known": (
        ["trainer.monitor=val/true_preference"],
        "trainer.monitor='val/true_preference' is not allowed: expected *needs model=grpo *",
    ),
    "patience without val": (
        ["data.val_pairs_per_user=0", "trainer.patience=3"],
        "trainer.patience=3 is not allowed: expected null without val pairs. *",
    ),
    "no features": (
        ["encoder=features"],
        "encoder='features' is not allowed: expected rows with *",
    ),
    "no such class": (
        ["encoder._target_=my.Encoder"],
        "encoder._target_='my.Encoder' is not allowed: expected the dotted path of an importable *",
    ),
    "no encoder": (
        ["encoder._target_=shutil.rmtree"],
        "encoder._target_='shutil.rmtree' is not allowed: expected the dotted path of a subclass *",
    ),
    "no file": (
        ["data=jsonl", "data.path=gone.jsonl"],
        "data.path='gone.jsonl' is not allowed: expected an existing file. "
        "Check the spelling and the directory you start from.",
    ),
    "no model": (
        ["backbone.path=./gone"],
        "backbone.path='./gone' is not allowed: expected a model's directory (with config.json) or "
        "a hub name. Give the directory that save_pretrained wrote.",
    ),
    "long prompt": (
        ["data.on_long_prompt=error", "data.max_prompt_tokens=3"],
        "prompt='* tokens (pair *)' is not allowed: expected at most data.max_prompt_tokens=3. *",
    ),
    "more new tokens than positions": (
        ["model=dpo", "samples.max_new_tokens=1024"],
        "samples.max_new_tokens=1024 is not allowed: expected at most *",
    ),
    "unknown user": (
        ["model=dpo", "samples.users=[bob]"],
        "samples.users='bob' is not allowed: expected one of the 5 users the model was trained on *",
    ),
    "nothing to go on from": (
        ["ckpt=last"],
        "ckpt='last' is not allowed: expected a run that left *",
    ),
    "another checkpoint": (["ckpt=best"], "ckpt='best' is not allowed: expected last or null*"),
    "plan for nothing": (
        ["plan_for.users=-1"],
        "plan_for.users=-1 is not allowed: expected a whole number from 0 or null. *",
    ),
    "memory of nothing": (["plan_for.gpu_memory_gb=0"], "plan_for.gpu_memory_gb=0 is not *"),
    "plan of another model": (["plan=true", "model=sft"], "plan=True is not allowed: expected *"),
    "unknown architecture": (
        ["plan=true", "backbone.architecture={model_type:gptk}"],
        "backbone.architecture={'model_type': 'gptk'} is not allowed: expected a shape: *",
    ),
    "not a directory": (["run_dir=/dev/null/run"], "run_dir='/dev/null/run' is not allowed: *"),
}


def error_line(capsys: Any, entry: str, *overrides: str) -> str:
    """What the user sees; all else about the error must be as it should."""
    with pytest.raises(SystemExit) as exit_:
        launch(entry, *overrides)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("error: ").removesuffix("\n")


def assert_matches(line: str, expected: str) -> None:
    """`expected`, in which * stands for anything."""
    place = 0
    for number, part in enumerate(expected.split("*")):
        found = line.find(part, place)
        assert found == 0 if number == 0 else found >= 0, line
        place = found + len(part)
    assert expected.endswith("*") or place == len(line), line


@pytest.mark.sampled
@pytest.mark.parametrize("case", TRAIN)
def test_train(case: str, tmp_path: Path, cache_dir: Path, capsys: Any) -> None:
    overrides, expected = TRAIN[case]
    tiny = [] if any(one.startswith(("data=", "backbone=")) for one in overrides) else TINY
    own = [f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}"]
    assert_matches(error_line(capsys, "train", *tiny, *own, *overrides), expected)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


@pytest.mark.slow
def test_what_is_refused_costs_no_backbone(tmp_path: Path, capsys: Any) -> None:
    refused = ["model.alpha=7", "encoder.rank=0", "optim.lr=0", "trainer.patience=0"]
    refused += ["backbone.lora.r=0", "aggregator.site=first"]
    for override in refused:
        error_line(capsys, "train", *TINY, f"cache_dir={tmp_path / 'cache'}", override)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_backbones_that_do_not_fit(tmp_path: Path, capsys: Any) -> None:
    rows = [f"data.path={write_rows(tmp_path / 'rows.jsonl', rows_of_world())}", "data=jsonl"]
    rows += ["backbone=hf", f"run_dir={tmp_path / 'run'}", "data.max_tokens=99"]
    padless = save_model(tmp_path / "padless", pad_token=False)
    line = error_line(capsys, "train", *rows, f"backbone.path={padless}")
    assert line == (
        f"backbone.pad_token=None is not allowed: expected a token of the vocabulary, as {padless} "
        "has no pad token of its own. Set backbone.pad_token='<|endoftext|>'."
    )
    path = f"backbone.path={padless}"
    line = error_line(capsys, "train", *rows, path, "backbone.pad_token=PAD")
    assert_matches(line, "backbone.pad_token='PAD' is not allowed: expected a token of the *")
    encoder = save_model(tmp_path / "encoder", "bert")
    for model in ("dpo", "sft"):
        line = error_line(capsys, "train", *rows, f"backbone.path={encoder}", f"model={model}")
        assert_matches(line, "backbone.path='bert' is not allowed: expected a causal language mod*")
    late = ["aggregator=soft_prompt", "aggregator.position=after_prompt", "encoder.init=normal"]
    line = error_line(capsys, "train", *rows, f"backbone.path={encoder}", "model=reward", *late)
    assert_matches(
        line, "aggregator.position='after_prompt' is not allowed: expected before with *"
    )
    chats = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows_of_world()
    ]
    rows[0] = f"data.path={write_rows(tmp_path / 'chats.jsonl', chats)}"
    line = error_line(capsys, "train", *rows, path, "backbone.pad_token='<|endoftext|>'")
    assert_matches(
        line, "prompt='messages' is not allowed: expected text, as this tokenizer has no *"
    )


EVAL: dict[str, tuple[list[str], str]] = {
    "no run": ([], "run=None is not allowed: expected the directory of a finished run. *"),
    "not a run": (["run=/"], "run='/' is not allowed: expected the directory of a finished run. *"),
    "unknown task": (
        ["eval=scores"],
        "eval='scores' is not allowed: expected one of adapt, compare, generate, referee, score, "
        "winrate. *",
    ),
    "no runs": (
        ["eval=compare", "out=x"],
        "runs=None is not allowed: expected a glob of run directories. "
        "Write eval=compare runs='DIR/*' out=DIR.",
    ),
    "no out": (["eval=compare", "runs=x"], "out=None is not allowed: expected a directory. *"),
    "best of nothing": (
        ["eval=generate", "eval.best_of.temperature=0.5"],
        "eval.best_of.temperature=0.5 is not allowed: expected left out without n. *",
    ),
    "best of nobody's": (
        ["eval=generate", "eval.best_of.n=2", "eval.best_of.reward=x", "eval.best_of.writers=[]"],
        "eval.best_of.writers=[] is not allowed: expected reference, policy or both. *",
    ),
    "no such runs": (
        ["eval=compare", "runs=gone/*", "out=x"],
        "runs='gone/*' is not allowed: expected a glob of run directories, at least one of which *",
    ),
}


@pytest.mark.parametrize("case", EVAL)
def test_eval(case: str, capsys: Any) -> None:
    overrides, expected = EVAL[case]
    assert_matches(error_line(capsys, "eval", *overrides), expected)


OF_RUN: dict[str, tuple[list[str], str]] = {
    "unknown user": (
        ["eval=generate", "eval.users=[bob]"],
        "eval.users='bob' is not allowed: expected one of the 5 users the model was trained on "
        "(ada-000, ben-001, cleo-002, dan-003, eva-004). Name one of them, *",
    ),
    "range": (
        ["eval=generate", "eval.prompts=0"],
        "eval.prompts=0 is not allowed: expected a who*",
    ),
    "key": (["eval=generate", "eval.user=1"], "eval.user='1' is not allowed: * Write eval.users."),
    "no texts": (
        ["eval=winrate", "eval.against=/"],
        "eval.against='/' is not allowed: expected a run with generations.jsonl. *",
    ),
    "judge by a dot": (
        ["eval=winrate", "eval.judge=chat"],
        "eval.judge='chat' is not allowed: expected a judge's settings. Choose one with "
        "eval/judge=NAME.",
    ),
    "no such judge": (
        ["eval=winrate", "eval/judge=oracle"],
        "eval/judge='oracle' is not allowed: expected one of chat, preferences, reward. Choose "
        "with eval/judge=NAME.",
    ),
    "no endpoint": (
        ["eval=winrate", "eval/judge=chat"],
        "eval.judge.url=None is not allowed: expected a value, as there is no default. Set "
        "eval.judge.url=VALUE.",
    ),
    "no file": (
        ["data=jsonl", "data.path=gone.csv"],
        "data.path='gone.csv' is not allowed: expected an existing file. *",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_RUN)
def test_eval_of_a_run(case: str, policy_run: Path, capsys: Any) -> None:
    overrides, expected = OF_RUN[case]
    before = {path: path.stat().st_mtime_ns for path in policy_run.rglob("*")}
    assert_matches(error_line(capsys, "eval", f"run={policy_run}", *overrides), expected)
    assert {path: path.stat().st_mtime_ns for path in policy_run.rglob("*")} == before


@pytest.mark.slow
def test_texts_are_of_policies(reward_run: Path, capsys: Any) -> None:
    line = error_line(capsys, "eval", f"run={reward_run}", "eval=generate")
    assert_matches(line, "run='*' is not allowed: expected a run of model=dpo or grpo. *")


@pytest.mark.slow
def test_debug_gives_a_traceback(capsys: Any) -> None:
    for overrides in (["model.alpha=7"], ["modl.alpha=7"], ["data=jsonl"]):
        with pytest.raises(Exception) as error:
            launch("train", *overrides, "debug=true")
        assert not isinstance(error.value, SystemExit)


@pytest.mark.slow
def test_a_sweep_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A training of its own is in tests/cli/test_tasks.py."""
    places = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    asked = command("train", "-m", "encoder=none,lockup", *places)
    done = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "run" / "0").exists() and not (tmp_path / "cache").exists()
