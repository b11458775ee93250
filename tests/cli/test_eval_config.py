"""eval.py does with each setting what it says, or refuses it: none is taken and ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from runs import TINY, launch, rows_of_world, world, write_rows

from plrhf.cli.config import RunConfig
from plrhf.core.errors import BadValue
from plrhf.data.digests import json_text
from plrhf.models.adaptation import adapt
from plrhf.models.enrolment import enrol, forget
from plrhf.models.reward import PersonalRewardModel

ROWS = ["data=jsonl", "data.path=ROWS"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "a run beside runs": (
        ["eval=compare", "runs=x", "out=x", "run=RUN"],
        "expected null for eval=compare. Leave run out.",
    ),
    "rows for a comparison": (
        ["eval=compare", "runs=x", "out=x", *ROWS],
        "data='jsonl' is not allowed: expected null for eval=compare. Leave data out.",
    ),
    "rows for a judge": (["eval=winrate", "run=RUN", *ROWS], "Leave data out."),
    "runs for one run": (
        ["run=RUN", "runs=x"],
        "runs='x' is not allowed: expected null for eval=s",
    ),
    "seed of nothing": (
        ["run=RUN", "seed=3"],
        "seed=3 is not allowed: expected null for eval=score",
    ),
    "a length": (
        ["run=RUN", *ROWS, "data.max_tokens=64"],
        "data.max_tokens=64 is not allowed: expected left to the run, whose texts are made one way. ",
    ),
    "user texts": (["run=RUN", *ROWS, "data.use_user_text=true"], "Leave data.use_user_text out."),
    "shuffled users": (
        ["run=RUN", *ROWS, "data.shuffle_users=true"],
        "data.shuffle_users=True is not allowed: expected left out, as all rows of data= are test r",
    ),
    "unseen users": (["run=RUN", *ROWS, "data.unseen_fraction=0.5"], "data.unseen_fraction=0.5 is"),
    "a minimum": (["run=RUN", *ROWS, "data.min_pairs_per_user=9"], "data.min_pairs_per_user=9 is"),
    "a fraction": (["run=RUN", *ROWS, "data.test_fraction=0.5"], "Leave data.test_fraction out."),
    "a directory": (
        ["run=RUN", "out=/dev/null/out"],
        "out='/dev/null/out' is not allowed: expected",
    ),
}


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "source": ({"data": {"_target_": "evil.Rows"}}, "data._target_='evil.Rows'"),
    "encoder": ({"encoder": {"_target_": "evil.Rows"}}, "encoder._target_='evil.Rows'"),
    "anything else": (
        {"trainer": {"zero3": {"_target_": "evil.Rows"}}},
        "trainer.zero3._target_='evil.Rows'",
    ),
    "in a list": ({"samples": {"users": [{"_target_": "evil.Rows"}]}}, "samples.users._target_"),
    "a repository": (
        {"backbone": {"trust_remote_code": True}},
        "backbone.trust_remote_code=True",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOREIGN)
def test_a_run_from_elsewhere_runs_no_code_of_its_own(
    case: str, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = FOREIGN[case]
    settings = yaml.safe_load((reward_run / "config.yaml").read_text())
    for part, values in change.items():
        settings[part] |= values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadValue) as error:
        RunConfig.of_run(tmp_path)
    assert str(error.value).startswith(f"{message}") and "trust_components=true" in str(error.value)
    if case == "source":
        with pytest.raises(SystemExit, match="was imported"):
            RunConfig.of_run(tmp_path, trust_components=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_have_no_effect_is_refused(
    case: str, reward_run: Path, tmp_path: Path, capsys: Any
) -> None:
    overrides, message = REFUSED[case]
    path = write_rows(tmp_path / "rows.jsonl", rows_of_world())
    names = {"RUN": str(reward_run), "ROWS": str(path)}
    given = [one.replace("RUN", names["RUN"]).replace("ROWS", names["ROWS"]) for one in overrides]
    with pytest.raises(SystemExit) as stop:
        launch("eval", *given)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_seed_decides_what_is_drawn(policy_run: Path, tmp_path: Path) -> None:
    asked = [f"run={policy_run}", "eval=generate", "eval.users=2", "eval.prompts=2"]
    asked += ["eval.max_new_tokens=12", "eval.temperature=1.0", "eval.reference=false"]

    def texts(name: str, *seed: str) -> list[str]:
        launch("eval", *asked, f"out={tmp_path / name}", *seed)
        lines = (tmp_path / name / "generations.jsonl").read_text().splitlines()
        return [json.loads(line)["response"] for line in lines]

    one = texts("one", "seed=1")
    assert one == texts("again", "seed=1") != texts("other", "seed=2")
    assert texts("run", "seed=0") == texts("default")  # the run's own seed


@pytest.mark.slow
def test_a_run_is_evaluated_after_its_export_forgot_and_enrolled(
    reward_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    before = json.loads((run / "results.json").read_text())["test"]
    export = run / "export"
    stranger = world().user_ids[5]  # of the test rows alone
    enrol(export, stranger, adapt(PersonalRewardModel.from_pretrained(export), []))
    for user in ("ben-001", "dan-003"):
        forget(export, user)
    launch("eval", f"run={run}")
    out = capsys.readouterr().out
    assert (
        "users changed since training: 2 forgotten, 1 enrolled; results are of those known now"
        in out
    )
    after = json.loads((run / "eval/results.json").read_text())["test"]
    assert after["seen"]["user"]["n_users"] == before["seen"]["user"]["n_users"] - 2 + 1
    assert after["unseen"]["user"]["n_users"] == before["unseen"]["user"]["n_users"] + 2 - 1
    predictions = pd.read_parquet(run / "eval/predictions.parquet")
    kinds = predictions.groupby("user_id")["user_kind"].unique().map(list).to_dict()
    assert kinds["ben-001"] == kinds["dan-003"] == ["unseen"] and kinds[stranger] == ["seen"]
    n_pairs = before["seen"]["generic"]["n_pairs"] + before["unseen"]["generic"]["n_pairs"]
    assert after["seen"]["user"]["n_pairs"] + after["unseen"]["user"]["n_pairs"] == n_pairs


@pytest.mark.slow
def test_other_rows_under_the_name_of_the_runs_own_are_refused(
    tmp_path: Path, cache_dir: Path, capsys: Any
) -> None:
    rows = rows_of_world(val_pairs_per_user=3, test_pairs_per_user=4)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    small = [one for one in TINY if not one.startswith("data.")]
    run = f"{tmp_path / 'run'}"
    launch(
        "train",
        *small,
        "data=jsonl",
        f"data.path={path}",
        f"run_dir={run}",
        f"cache_dir={cache_dir}",
    )
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_rows(path, turned)  # the same users
    with pytest.raises(SystemExit):
        launch("eval", f"run={run}")
    err = capsys.readouterr().err
    assert err.startswith("error: data='5 users, rows ") and "Restore the file that the run" in err


@pytest.mark.slow
def test_other_rows_are_judged_by_the_runs_own_length_rule(
    reward_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    rows = [row for row in rows_of_world() if row["split"] == "test"]
    for row in rows:  # the shorter response always wins
        row["chosen"], row["rejected"] = "It is blue.", "It is blue and wide and calm and deep."
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = {}
    for rule in ("shorter", "longer"):
        results["controls"]["length_only"]["rule"] = f"the {rule} response wins"
        (run / "results.json").write_text(json_text(results))
        out = tmp_path / rule
        launch("eval", f"run={run}", "data=jsonl", f"data.path={path}", f"out={out}")
        other = json.loads((out / "results.json").read_text())
        control = other["controls"]["length_only"]
        assert control["rule"] == f"the {rule} response wins"
        found[rule] = control["seen"]["accuracy_micro"]["value"]
        assert other["provenance"]["data"]["source"]["path"] == str(path)
        assert "eval" in other["provenance"]["command"]
        assert other["provenance"]["rows"] != results["provenance"]["rows"]
        assert other["config"] == results["config"]
    assert found == {"shorter": 1.0, "longer": 0.0}
