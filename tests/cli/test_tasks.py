"""eval.py on finished runs: scores again, other rows, texts, win rates, comparisons."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chat_server import completion, serving, shown
from runs import (
    ENVIRONMENT,
    TINY,
    check_evaluation,
    composed,
    evaluation_of,
    launch,
    rows_of_world,
    world,
    world_tokenizer,
    write_rows,
)
from tiny import LORA, language_model, make_model

from plrhf.backbone.model import Backbone
from plrhf.cli.assemble import check_same_world
from plrhf.cli.tasks import find_contests
from plrhf.core.errors import BadValue
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.evaluation.best_of import BestOf, best_of_curve, best_texts, candidate_rewards
from plrhf.evaluation.generations import (
    GeneratedText,
    GenerationOptions,
    read_generations,
    write_generations,
)
from plrhf.evaluation.records import write_settings
from plrhf.models.card import CARD, Card
from plrhf.models.policy import PersonalDPOPolicy


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def policy(policy_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(policy_run, tmp_path / "policy"))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reward_run", "policy_run"])
def test_a_run_scores_the_same_again(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(which)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = contents(copy)
    launch("eval", f"run={copy}")
    after = contents(copy)
    names = ("predictions.parquet", "results.json", "users.json", "report.html")
    assert after.keys() - before.keys() == {f"eval/{name}" for name in names}
    assert {name: after[name] for name in before} == before
    for name in ("predictions.parquet", "users.json"):
        assert after[f"eval/{name}"] == before[name]
    assert evaluation_of(copy / "eval") == evaluation_of(copy)
    commands = [
        json.loads((folder / "results.json").read_text())["provenance"]["command"]
        for folder in (copy, copy / "eval")
    ]
    assert "train.py" in commands[0] and commands[1].endswith(f"eval.py run={copy}")


@pytest.mark.slow
def test_other_rows(reward_run: Path, tmp_path: Path) -> None:
    own_world = rows_of_world(val_pairs_per_user=3, test_pairs_per_user=4)
    rows = [row for row in own_world if row["split"] == "test"]
    assert len(rows) == (5 + 2) * 4
    for row in rows:  # a file of somebody's own, whose split is not ours
        del row["split"]
    rows += [{**row, "user_id": "nobody", "pair_id": f"n{i}"} for i, row in enumerate(rows[:3])]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    launch("eval", f"run={reward_run}", f"out={out}", "data=jsonl", f"data.path={path}")
    results = check_evaluation(out, oracle=False)
    predictions = pd.read_parquet(out / "predictions.parquet")
    assert set(predictions["split"]) == {"test"}
    kinds = predictions.groupby("user_kind")["user_id"].unique()
    assert set(kinds["seen"]) == set(world().user_ids[:5])
    assert set(kinds["unseen"]) == {*world().user_ids[5:], "nobody"}
    assert results["test"]["seen"]["user"]["n_pairs"] == 5 * 4
    assert results["test"]["unseen"]["user"]["n_pairs"] == 2 * 4 + 3
    # Without the rows of training nobody knows which prompts were seen, nor can a probe be fitted.
    assert set(predictions["prompt_kind"]) == {"unknown"}
    assert set(results["cells"].values()) == {None} and results["probes"] == {}
    # Whom the model does not know, it answers as it does the generic user.
    unseen = predictions[predictions["user_kind"] == "unseen"]
    margins = unseen.pivot(index="pair_id", columns="context", values="margin")
    assert (margins["user"] == margins["generic"]).all()
    # The same pair gets the same answer as in the run.
    own = pd.read_parquet(reward_run / "predictions.parquet")
    both = own.merge(predictions, on=["pair_id", "context"])
    assert len(both) == 2 * 7 * 4
    assert both["margin_x"].sub(both["margin_y"]).abs().max() < 1e-6


@pytest.mark.slow
def test_texts_for_many_users(policy: Path, reward_run: Path) -> None:
    asked = ["eval.users=3", "eval.prompts=2", "eval.max_new_tokens=5"]
    best = ["eval.best_of.n=2", f"eval.best_of.reward={reward_run}"]
    asked += [*best, "eval.best_of.writers=[reference,policy]"]
    launch("eval", f"run={policy}", "eval=generate", *asked)
    texts = pd.read_json(policy / "generations.jsonl", lines=True)
    columns = ["prompt", "prompt_id", "user_id", "profile", "user_features", "writer", "response"]
    known = ["score", "style", "taste", "reference_logp", "fingerprint", "digest"]
    assert list(texts.columns) == [*columns, *known]
    counts = texts["writer"].value_counts().to_dict()
    own = ("policy", "best_of_policy", "best_of_reference")
    assert counts == dict.fromkeys((*own, "generic", "reference"), 6)
    users = [world().user_ids[place] for place in (0, 1, 3)]  # 3 of 5, evenly
    assert set(texts["user_id"]) == set(users)
    assert texts["prompt_id"].nunique() == 2
    for text in texts.itertuples():
        assert text.score == pytest.approx(world().true_score(text.user_id, text.response))
        assert text.profile == world().profile(text.user_id)
        assert sum(text.taste[name] * text.style[name] for name in text.taste) == pytest.approx(
            text.score
        )
        assert text.reference_logp < 0
    for_all = texts[~texts["writer"].isin(own)]
    assert (for_all.groupby(["writer", "prompt_id"])["response"].nunique() == 1).all()
    page = (policy / "report.html").read_text()
    assert texts["profile"][0] in page

    launch("eval", f"run={policy}", "eval=generate", "eval.users=[dan-003]", "eval.prompts=1")
    again = pd.read_json(policy / "generations.jsonl", lines=True)
    assert set(again["user_id"]) == {"dan-003"}


class LikesLength:
    """Rewards words for ada, and their absence for everybody else."""

    def score(self, asked: Any) -> torch.Tensor:
        assert all(one["response"].strip() for one in asked)
        assert all(one["user_text"] == f"I am {one['user_id']}." for one in asked)
        words = [len(one["response"].split()) for one in asked]
        signs = [1 if one["user_id"] == "ada" else -1 for one in asked]
        return torch.tensor([n * sign for n, sign in zip(words, signs, strict=True)])


def test_each_user_gets_the_best_text() -> None:
    empty = {"prompt": "p", "chosen": "", "rejected": "", "prompt_id": "", "pair_id": ""}
    ada, ben = (
        Row(**empty, user_id=user, user_text=f"I am {user}.")  # type: ignore[arg-type]
        for user in ("ada", "ben")
    )
    texts = ["two words", "one", " ", "now three words", "one"]
    given = [texts, texts, ["", " "], ["a b", "c d"]]
    rewards = candidate_rewards(LikesLength(), [ada, ben, ada, ben], given)  # type: ignore[arg-type]
    chosen = best_texts(given, rewards)
    # All blank leaves nothing; of equals the first wins.
    assert chosen == ["now three words", "one", "", "a b"]


def test_the_expected_best_of_several_is_that_of_all_choices() -> None:
    """Against each choice of n texts written out; a blank text is the worst of its row."""
    rewards = [[0.5, -1.0, 2.0, 1.0, -np.inf], [3.0, 0.0, -2.0, 1.0, 1.5]]
    scores = [[1.0, 4.0, -2.0, 0.0, 7.0], [0.5, 1.0, 2.0, 3.0, 5.0]]
    points = best_of_curve([*rewards, [-np.inf] * 5], [*scores, [9.0] * 5])
    assert [one.n for one in points] == [1, 2, 4, 5]
    rewards[0][4] = -1.0
    for point in points:
        best = [
            max(choice, key=lambda place: (own[place], place))
            for own in rewards
            for choice in combinations(range(5), point.n)
        ]
        half = len(best) // 2
        rows = [0] * half + [1] * half
        for value, table in ((point.reward, rewards), (point.score, scores)):
            chosen = [table[row][place] for row, place in zip(rows, best, strict=True)]
            assert value == pytest.approx(np.mean(chosen))
        assert point.kl == pytest.approx(np.log(point.n) - (point.n - 1) / point.n)
    assert best_of_curve([[1.0, 2.0]], [[None, 1.0]])[0].score is None


@pytest.mark.slow
@pytest.mark.parametrize("speaking", [True, False])
def test_users_speak_for_themselves(
    speaking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_world()
    for row in rows:
        row["user_text"] = f"I am {row['user_id']}."
    data = PreferenceData(
        source=JsonlSource(path=str(write_rows(tmp_path / "rows.jsonl", rows))),
        seed=0,
        batch_size=7,
        eval_batch_size=7,
        use_user_text=speaking,
    )
    tokenizer = world_tokenizer()
    data.tokenize(tokenizer, layout="packed")
    words = Backbone(model=language_model(vocabulary=len(tokenizer)), lora=LORA)
    policy = make_model(PersonalDPOPolicy, backbone=words)
    policy.card = Card(
        **dict.fromkeys(("model", "encoder", "aggregator", "backbone", "text"), {}),
        users=list(data.splits.users),
        features=data.schema.to_dict(),
        fingerprint="",
    )
    asked: list[int] = []

    def echo(_: Any, tokenizer: Any, prompts: Any, users: Any, **__: Any) -> list[str]:
        asked.append(len(prompts))
        return tokenizer.batch_decode(prompts, skip_special_tokens=True)

    monkeypatch.setattr("plrhf.evaluation.generations.generate", echo)
    monkeypatch.setattr(BestOf, "load_reward", lambda *_: LikesLength())
    best_of = BestOf(n=2, reward="", writers=["reference", "policy"], temperature=1.0)
    shared = {"users": 3, "prompts": 2, "max_new_tokens": 4, "generic": True, "reference": True}
    options = GenerationOptions(**shared, best_of=best_of)
    write_generations(tmp_path / "texts.jsonl", policy, data, options)
    texts = read_generations(tmp_path / "texts.jsonl")
    assert len(texts) == 30 and len({text.user_id for text in texts}) == 3
    for text in texts:
        said = f"I am {text.user_id}."
        assert text.profile == said
        assert text.response == (f"{said}\n" if speaking else "") + f"{text.prompt}\n"
    # Reference and generic user know people by what they say alone.
    once = 6 if speaking else 2
    assert asked == [6, once, once, 2 * once, 2 * 6]
    by_plain_softmax(policy, data, texts[0])
    policy.encoder.personal, asked[:] = False, []
    write_generations(tmp_path / "texts.jsonl", policy, data, GenerationOptions(**shared))
    assert asked == [once, once]  # one text for all, which is the generic user's


def by_plain_softmax(policy: PersonalDPOPolicy, data: PreferenceData, text: GeneratedText) -> None:
    """The log-probability beside a text is that of a plain forward pass of the model without LoRA."""
    row = next(iter(data.splits.test))
    asked = replace(row, prompt=text.prompt, user_text=text.profile, chosen=text.response)
    pair = data.row_tokenizer.pair(asked)
    ids = torch.tensor([[*pair.prompt, *pair.chosen]])
    with torch.no_grad(), policy.backbone.reference():
        logps = policy.backbone.model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    of_tokens = logps.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
    assert text.reference_logp == pytest.approx(float(of_tokens.mean()), abs=1e-4)


@pytest.mark.slow
def test_win_rates(policy: Path, tmp_path: Path, capsys: Any) -> None:
    asked = ["eval=generate", "eval.users=4", "eval.prompts=2", "eval.max_new_tokens=6"]
    launch("eval", f"run={policy}", *asked)
    launch("eval", f"run={policy}", "eval=winrate")
    result = json.loads((policy / "winrate.json").read_text())
    texts = pd.read_json(policy / "generations.jsonl", lines=True)
    scores = texts.pivot(index=["user_id", "prompt_id"], columns="writer", values="score")
    wins = scores["policy"].gt(scores["reference"]) + 0.5 * scores["policy"].eq(scores["reference"])
    assert result["win_rate"]["value"] == wins.mean()
    assert result["ties"] == scores["policy"].eq(scores["reference"]).mean()
    assert (result["n_texts"], result["n_users"]) == (8, 4)
    assert f"win rate of {policy} against reference: {wins.mean():.3f}" in capsys.readouterr().out
    assert "<h2>Win rates</h2>" in (policy / "report.html").read_text()

    other = Path(shutil.copytree(policy, tmp_path / "other"))
    records = [json.loads(line) for line in (other / "generations.jsonl").open()]
    for record in records:
        record["score"] -= 1
    write_rows(other / "generations.jsonl", records)
    launch("eval", f"run={policy}", "eval=winrate", f"eval.against={other}", f"out={tmp_path}")
    result = json.loads((tmp_path / "winrate.json").read_text())
    assert result["win_rate"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert result["against"] == str(other)

    unscored = {name: value for name, value in records[1].items() if name != "score"}
    for texts, said in (
        (records[2:], "expected texts for the same 8 prompts and users (has 6 of them)"),
        # The user of another world, who only goes by the same name.
        ([{**records[0], "profile": "Prefers dull answers."}, *records[1:]], "(has 7 of them)"),
        (
            [records[0], unscored],
            "generations.jsonl:2 score=None is not allowed: expected a value, as the key is missing. "
            "Write generations.jsonl anew.",
        ),
    ):
        write_rows(other / "generations.jsonl", texts)
        with pytest.raises(SystemExit):
            launch("eval", f"run={policy}", "eval=winrate", f"eval.against={other}")
        assert said in capsys.readouterr().err


def test_a_missing_writer_is_asked_for_by_a_setting_that_there_is(policy_run: Path) -> None:
    for writer, cure in (
        ("reference", r"eval\.reference=true"),
        ("best_of_policy", r"eval\.best_of\.n=16 .* eval\.best_of\.writers=\[policy,reference\]"),
    ):
        with pytest.raises(BadValue, match=f"run='.*' .* texts of the writer {writer}.* {cure}"):
            find_contests(policy_run, "reference", writer=writer)


@pytest.mark.slow
def test_a_reward_model_of_another_world_is_refused(tmp_path: Path) -> None:
    names = {"seed=0": None, "seed=1": r"^eval\.judge\.export=.* on the same world"}
    for seed, message in names.items():
        export = tmp_path / seed / "export"
        export.mkdir(parents=True)
        (export / CARD).touch()
        write_settings(export.parent / "config.yaml", composed(*TINY, seed))
        for folder in (export, export.parent):
            refused = pytest.raises(BadValue, match=message) if message else nullcontext()
            with refused:
                check_same_world("eval.judge.export", str(folder), world())


@pytest.fixture
def rival(policy: Path, tmp_path: Path) -> Path:
    """A run whose texts are longer than the policy's, but for the first, which is shorter."""
    other = Path(shutil.copytree(policy, tmp_path / "rival"))
    records = [json.loads(line) for line in (other / "generations.jsonl").open()]
    for run, texts in (
        (policy, ["It is wide."] * 4),
        (other, ["Blue.", *["It is very wide."] * 3]),
    ):
        for record, text in zip(records, texts, strict=True):
            record["response"] = text
        write_rows(run / "generations.jsonl", records)
    return other


@pytest.mark.slow
def test_win_rates_by_an_endpoint(
    policy: Path, rival: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(body: dict[str, Any], _: int) -> Any:
        first, second = shown(body)
        return completion("A" if len(first) < len(second) else "B")

    monkeypatch.setenv("A_KEY", "sk-secret")
    out = tmp_path / "out"
    with serving(shorter) as server:
        asked = [f"run={policy}", "eval=winrate", "eval/judge=chat", f"eval.against={rival}"]
        asked += [f"out={out}", f"eval.judge.cache={out / 'replies.jsonl'}"]
        asked += [f"eval.judge.url={server.url}", "eval.judge.model=m", "eval.judge.input_price=2"]
        launch("eval", *asked, "eval.judge.key_variable=A_KEY", "eval.judge.output_price=0.5")
    assert {one["Authorization"] for one in server.headers} == {"Bearer sk-secret"}
    assert len(server.bodies) == 2 * 4  # 2 users, 2 prompts
    profile = world().profile(world().user_ids[0])
    assert any(profile in body["messages"][-1]["content"] for body in server.bodies)
    result = json.loads((out / "winrate.json").read_text())
    assert result["win_rate"]["value"] == 0.75
    users = {name: one["n_texts"] for name, one in result["per_user"].items()}
    assert users == {world().user_ids[0]: 2, world().user_ids[2]: 2}
    assert (result["first_position_wins"], result["n_unanswered"]) == (0.5, 0)
    assert result["cost"]["price"] == pytest.approx(8 * (100 * 2 + 2 * 0.5) / 1e6)
    assert (result["judge"]["model"], result["against"]) == ("m", str(rival))
    assert (
        "judge: 8 questions, 0 answered before; 800 + 16 tokens, price 0.0016; prefers the first "
        "text 0.500; 0 refused, 0 unparseable\n"
    ) in capsys.readouterr().out
    assert not any(b"sk-secret" in content for content in contents(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("users", ["own", "held_out"])
def test_win_rates_by_a_reward_model(
    users: str, policy: Path, rival: Path, reward_run: Path, capsys: Any
) -> None:
    export = reward_run / "export"
    asked = ["eval=winrate", "eval/judge=reward", f"eval.judge.export={export}"]
    asked += [f"eval.against={rival}", f"eval.judge.users={users}"]
    launch("eval", f"run={policy}", *asked)
    result = json.loads((policy / "winrate.json").read_text())
    assert (result["judge"]["users"], result["n_texts"], result["n_users"]) == (users, 4, 2)
    assert result["cost"] is result["first_position_wins"] is None
    # The other way round whoever won has lost.
    launch("eval", f"run={rival}", *asked[:3], f"eval.against={policy}", asked[4])
    turned = json.loads((rival / "winrate.json").read_text())
    assert turned["win_rate"]["value"] == 1 - result["win_rate"]["value"]
    assert "judge:" not in capsys.readouterr().out

    with pytest.raises(SystemExit):
        launch("eval", f"run={policy}", *asked[:2], asked[3], f"eval.judge.export={policy}/export")
    said = capsys.readouterr().err
    assert (
        said.startswith("error: eval.judge.export=") and "run or export of a reward model" in said
    )


@pytest.mark.slow
def test_what_is_known_of_users_goes_with_their_texts(tmp_path: Path, cache_dir: Path) -> None:
    rows = rows_of_world(features=True, n_users=3, n_unseen_users=0)
    for row in rows:
        row["user_text"] = f"I am {row['user_id']}."
    path = write_rows(tmp_path / "rows.jsonl", rows)
    small = [*(one for one in TINY if not one.startswith("data.")), "data.max_prompt_tokens=64"]
    small += [f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    launch("train", *small, "model=dpo", "data=jsonl", f"data.path={path}", "encoder=features")
    texts = read_generations(tmp_path / "run/generations.jsonl")
    assert [one.writer for one in texts] == ["policy"] * 4
    for one in texts:
        assert one.profile == f"I am {one.user_id}." and one.score is None
        assert one.user_features == {"age": 20 + len(one.user_id), "sea": "north"}


@pytest.mark.slow
def test_comparison(reward_run: Path, policy_run: Path, tmp_path: Path, capsys: Any) -> None:
    for name, run in (("one", reward_run), ("two", policy_run)):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "runs/unfinished").mkdir()
    launch("eval", "eval=compare", f"runs={tmp_path}/runs/*", f"out={tmp_path / 'out'}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("comparison.csv", "comparison.md", "comparison.tex", "report.html")
    }
    frame = pd.read_csv(tmp_path / "out/comparison.csv")
    assert {"one", "two"} <= set(frame["run"])
    out = capsys.readouterr().out
    assert "note: nothing is compared with a baseline" in out
    assert f"{tmp_path}/runs/unfinished" in out.replace("\n", "")
    for run, name in ((reward_run, "one"), (policy_run, "two")):
        value = json.loads((run / "results.json").read_text())["test"]["seen"]["user"]
        row = frame[(frame["run"] == name)].iloc[0]
        assert value["accuracy_micro"]["value"] in row.to_numpy()
    assert set(frame["role"].dropna()) == {"personal", "oracle", "length"}
    assert frame["baseline"].isna().all()  # neither run is vanilla
    chosen = f"eval.baseline={tmp_path}/runs/one"
    launch("eval", "eval=compare", chosen, f"runs={tmp_path}/runs/*", f"out={tmp_path / 'out'}")
    frame = pd.read_csv(tmp_path / "out/comparison.csv").set_index("run")
    assert frame["baseline"].dropna().to_dict() == {"two": "one"}
    assert 0 < frame.loc["two", "seen_p_value"] <= frame.loc["two", "seen_p_holm"] <= 1


# A training that is refused, what it has imported of what it was not asked for, and an evaluation.
IN_TURN = """
import sys
from plrhf.cli import commands

script, *words = sys.argv
place = words.index("then")
sys.argv = [script, *words[:place]]
try:
    commands.train()
except SystemExit as stop:
    print("status:", stop.code)
import plrhf.cli.run, plrhf.cli.tasks
unasked = {"trl", "sklearn", "tensorboard", "wandb", "datasets", "deepspeed", "tensorflow"}
print("unasked:", *(unasked & sys.modules.keys()))
print("then", file=sys.stderr)
sys.argv = [script, *words[place + 1:]]
commands.evaluate()
"""


@pytest.mark.slow
def test_a_process_of_its_own(reward_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in_turn.py").write_text(IN_TURN)
    refused = ["model.alpha=7", f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    asked = [*refused, "then", f"run={reward_run}", f"out={tmp_path / 'out'}"]
    line = [sys.executable, str(tmp_path / "in_turn.py"), *asked]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    of_training, of_evaluation = done.stderr.split("then\n")
    assert of_training.startswith("error: ") and of_training.count("\n") == 1
    assert done.stdout.startswith("status: 2\nunasked:\n")
    assert not (tmp_path / "run" / "0").exists() and not (tmp_path / "cache").exists()
    assert done.returncode == 0 and of_evaluation == ""
    assert done.stdout.endswith(f"report: {tmp_path / 'out/report.html'}\n")
    assert evaluation_of(tmp_path / "out") == evaluation_of(reward_run)
