"""Reports and comparisons of fabricated runs: hand-worked numbers, escaping, what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from plrhf.data.digests import json_text
from plrhf.evaluation.metrics import summarise
from plrhf.evaluation.results import Results
from plrhf.reporting import comparison, report, tables
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.runs import _part_name, role

# Seen users of 5, 2 and 7 pairs, an unseen one of 3.
OWNERS = ["ann"] * 5 + ["bob"] * 2 + ["cid"] * 7 + ["dan"] * 3
TARGETS = {
    "cluster": "plrhf.encoders.ClusterMixtureEncoder",
    "lookup": "plrhf.encoders.LookupEncoder",
    "none": "plrhf.encoders.NoneEncoder",
    "uniform": "plrhf.encoders.UniformEncoder",
}
SIZES = {"ann": 5, "bob": 2, "cid": 7, "dan": 3}


def predictions(right: dict[str, int], *, oracle: dict[str, int] | None = None) -> pd.DataFrame:
    """A table in which the first ``right[user]`` pairs of each user are correct in user context."""
    generic = {"ann": 3, "bob": 1, "cid": 3, "dan": 1}
    tables = []
    for context, counts in (("user", right), ("generic", generic), ("oracle", oracle)):
        if counts is None:
            continue
        won = np.concatenate([np.arange(SIZES[user]) < counts[user] for user in SIZES])
        margin = np.where(won, 1.5, -0.5)
        table = pd.DataFrame({"user_id": OWNERS, "margin": margin, "correct": won.astype(float)})
        table["pair_id"] = [f"pair-{number}" for number in range(17)]
        table["user_kind"] = np.where(table["user_id"] == "dan", "unseen", "seen")
        tables.append(table.assign(split="test", context=context))
    whole = pd.concat(tables, ignore_index=True)
    whole = whole.assign(prompt_id="prompt-0", prompt_kind="unseen")
    return whole.assign(chosen_tokens=9, rejected_tokens=7)


def make_run(
    run_dir: Path,
    table: pd.DataFrame,
    *,
    encoder: str,
    seed: int = 1,
    shuffled: bool = False,
    provenance: dict[str, Any] | None = None,
    **of_data: Any,
) -> Path:
    run_dir.mkdir(parents=True)
    table.to_parquet(run_dir / "predictions.parquet")
    config = {
        "model": {"_target_": "plrhf.models.reward.PersonalRewardModel", "name": "reward"},
        "encoder": {"name": encoder, "_target_": TARGETS[encoder]},
        "aggregator": {"_target_": "my.module.MyAggregator"},
        "data": {"name": "personas", "shuffle_users": shuffled, **of_data},
        "seed": seed,
    }
    results = {
        "schema": 1,
        "config": config,
        **summarise(table, longer_wins=True, n_resamples=200),
        "data": {"read": 12345, "refused": {"empty_response": 4}, "splits": {"val": {"pairs": 6}}},
        "provenance": None if provenance is None else {**PROVENANCE, **provenance},
    }
    (run_dir / "results.json").write_text(json.dumps(results, allow_nan=False))
    return run_dir


PROVENANCE: dict[str, Any] = {
    **{"command": "python train.py", "versions": {}, "data": {}, "world": None},
    **{"fingerprint": "f", "rows": "r", "test_pairs": "t"},
}
VANILLA = {"ann": 3, "bob": 1, "cid": 2, "dan": 1}  # 6 of 14 seen
PERSONAL = {"ann": 4, "bob": 1, "cid": 4, "dan": 1}  # 9 of 14
ORACLE = {"ann": 5, "bob": 2, "cid": 5, "dan": 3}  # 12 of 14


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder / "lookup", predictions(PERSONAL, oracle=ORACLE), encoder="lookup")
    make_run(folder / "vanilla", predictions(VANILLA, oracle=ORACLE), encoder="none")
    make_run(folder / "other", predictions(PERSONAL, oracle=ORACLE), encoder="lookup", seed=2)
    (folder / "sft").mkdir()
    return folder


class Reader(HTMLParser):
    """Keeps a page's text and checks that its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value is not None]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value is not None]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(path: Path) -> tuple[str, Reader]:
    page = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return page, reader


def add_optional_files(run_dir: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 1 / (1 + step)} for step in range(9)]
    rows.append({"step": 8, "val/nll": 0.5, "val/accuracy_micro": 0.7})
    pd.DataFrame(rows).to_csv(run_dir / "metrics.csv", index=False)
    (run_dir / "config.yaml").write_text("seed: 1  # </pre><script>")
    generations = [
        {
            "prompt": "On <rain> & sun",
            "prompt_id": "rain",
            "user_id": user,
            "profile": "<b>terse</b>" if user == "u1" else None,
            "user_features": None,
            "writer": "policy",
            "response": f"<script>alert('{user}')</script>",
            "score": 0.256 if user == "u1" else None,
        }
        for user in ("u1", "u2", "u3", "u4")
    ]
    lines = "\n".join(json.dumps(row) for row in generations)
    (run_dir / "generations.jsonl").write_text(lines)


@pytest.mark.slow
def test_report_shows_numbers_and_escapes_text(runs: Path) -> None:
    add_optional_files(runs / "lookup")
    path = report.write_report(runs / "lookup")
    assert path == runs / "lookup" / "report.html"
    page, reader = read_page(path)
    assert "64.3" in reader.text  # 9 / 14, percent
    assert "85.7" in reader.text  # oracle, 12 / 14
    assert "Seen users: 3, with 14 pairs" in reader.text
    assert "12,345" in reader.text
    assert "empty response" in reader.text
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;u1&#39;)" in page
    assert "u4" not in reader.text  # three users side by side
    assert "score 0.26" in reader.text
    assert {"val/nll", "train/loss", "val/accuracy_micro"} <= set(reader.text)
    assert "With only 3 and 1 users these intervals are too narrow." in page


@pytest.mark.slow
def test_page_is_self_contained_and_follows_the_theme(runs: Path) -> None:
    add_optional_files(runs / "lookup")
    page, reader = read_page(report.write_report(runs / "lookup"))
    assert re.search(r"https?:|<link|<img|@import|src=", page) is None
    assert page.count("<svg") == 6  # two curves, bars of seen and unseen, dots, reliability
    assert len(set(reader.ids)) == len(reader.ids)
    inline = set(re.findall(r"#[0-9a-f]{6}\b", page[page.index("<body") :]))
    assert inline == set(), "a figure's colour does not follow the page"


@pytest.mark.slow
def test_report_needs_two_files_only(tmp_path: Path) -> None:
    table = predictions(PERSONAL)
    run_dir = make_run(tmp_path / "run", table[table["user_kind"] == "seen"], encoder="lookup")
    _, reader = read_page(report.write_report(run_dir))
    assert "Learning curves" not in reader.text
    assert "Accuracy, unseen users" not in reader.text
    assert "oracle" not in reader.text


@pytest.mark.slow
def test_report_of_thousands_of_users_stays_small(tmp_path: Path) -> None:
    n_rows = 3001 * 3
    table = pd.DataFrame({"user_id": np.arange(n_rows) // 3, "pair_id": np.arange(n_rows)})
    margin = np.sin(np.arange(n_rows))
    table = table.assign(margin=margin, correct=0.5 * (np.sign(margin) + 1), split="test")
    table = table.assign(user_kind="seen", context="user", prompt_kind="unseen")
    table = table.assign(prompt_id=table["pair_id"], chosen_tokens=3, rejected_tokens=4)
    path = report.write_report(make_run(tmp_path / "run", table, encoder="none"))
    assert path.stat().st_size < 400_000


def test_report_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a directory that holds results\.json\. Let its tr"
    ):
        report.write_report(tmp_path)


@pytest.mark.slow
def test_comparison_by_hand(runs: Path, tmp_path: Path) -> None:
    frame = compare(str(runs / "*"), tmp_path / "out").frame.set_index("run")
    assert list(frame.index) == ["lookup", "other", "vanilla", "oracle", "length only"]
    lookup, vanilla = frame.loc["lookup"], frame.loc["vanilla"]
    assert lookup["seen_accuracy_micro"] == pytest.approx(9 / 14)
    assert (lookup["role"], vanilla["role"]) == ("personal", "vanilla")
    assert lookup["baseline"] == "vanilla"
    assert lookup["seen_difference_micro"] == pytest.approx(3 / 14)
    assert lookup["seen_difference_macro"] == pytest.approx((1 / 5 + 0 + 2 / 7) / 3)
    assert lookup["seen_gain_recovered"] == pytest.approx(3 / 6)
    assert lookup["seen_gain_recovered_low"] <= 3 / 6 <= lookup["seen_gain_recovered_high"]
    assert lookup["unseen_difference_micro"] == 0
    assert pd.isna(vanilla["seen_difference_micro"])
    assert frame["seen_difference_micro"].isna()["other"]  # no vanilla run of seed 2
    assert frame.loc["oracle", "seen_accuracy_micro"] == pytest.approx(12 / 14)
    assert frame.loc["length only", "seen_accuracy_micro"] == 1


@pytest.mark.slow
def test_comparison_files(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    frame = compare([runs / "vanilla", runs / "lookup", runs / "sft"], out).frame
    read_back = pd.read_csv(out / "comparison.csv", keep_default_na=False, na_values=[""])
    assert read_back["run"].tolist() == frame["run"].tolist()
    assert read_back["seen_accuracy_micro"].to_numpy() == pytest.approx(
        frame["seen_accuracy_micro"].to_numpy()
    )
    words = (out / "comparison.md").read_text()
    assert re.search(r"\| lookup \| personal \| lookup \| 64\.3 \[.*\| \+21\.4 \[", words)
    assert f"Skipped, as without results.json: {runs / 'sft'}." in words
    page, reader = read_page(out / "report.html")
    assert "+21.4" in reader.text
    assert page.count("<svg") == 1


@pytest.mark.slow
def test_runs_on_other_pairs_are_not_paired(runs: Path, tmp_path: Path) -> None:
    table = predictions(PERSONAL)
    table["pair_id"] = table["pair_id"] + "-b"
    make_run(runs / "elsewhere", table, encoder="lookup")
    frame = compare(str(runs / "*"), tmp_path / "out").frame.set_index("run")
    assert frame["seen_difference_micro"].isna()["elsewhere"]
    assert frame.loc["lookup", "seen_difference_micro"] == pytest.approx(3 / 14)
    assert "length only (elsewhere)" in frame.index
    assert "oracle (elsewhere)" not in frame.index


@pytest.mark.slow
def test_controls_are_recognised_from_settings(runs: Path, tmp_path: Path) -> None:
    wrong = {"ann": 2, "bob": 1, "cid": 2, "dan": 1}
    make_run(runs / "best", predictions(PERSONAL), encoder="lookup", shuffled=True)
    make_run(runs / "same", predictions(wrong), encoder="uniform")
    make_run(runs / "bare", predictions(VANILLA, oracle=ORACLE), encoder="none", shuffled=True)
    make_run(runs / "told", predictions(PERSONAL), encoder="none", use_user_text=True)
    frame = compare(str(runs / "*"), tmp_path / "out").frame.set_index("run")
    assert frame["role"].to_dict() == {
        "bare": "shuffled",
        "best": "shuffled",
        "lookup": "personal",
        "other": "personal",
        "same": "uniform",
        "told": "personal",
        "vanilla": "vanilla",
        "oracle": "oracle",
        "length only": "length",
    }
    in_text = {
        "data": {"use_user_text": True},
        "encoder": {"_target_": "plrhf.encoders.NoneEncoder"},
    }
    assert role(in_text) == "personal" and role({**in_text, "data": {}}) == "vanilla"
    assert role({**in_text, "data": {"use_user_features": True}}) == "personal"
    # Shuffling makes other data for a baseline in no other way.
    baselines = frame["baseline"].dropna().to_dict()
    assert baselines == dict.fromkeys(("bare", "best", "lookup", "same", "told"), "vanilla")
    assert frame["others"]["told"] == "data.use_user_text=true" and frame["others"]["lookup"] == ""
    assert re.search(r"\| best \| shuffled \|", (tmp_path / "out/comparison.md").read_text())
    page, _ = read_page(report.write_report(runs / "best"))
    assert "user context, ids shuffled" in page


@pytest.mark.slow
def test_tests_and_price_of_the_comparison(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "third", predictions(ORACLE), encoder="lookup")
    frame = compare(str(runs / "*"), tmp_path / "out").frame.set_index("run")
    lookup = frame.loc["lookup"]
    gaps = np.array([1 / 5, 0, 2 / 7])
    assert lookup["seen_effect_size"] == pytest.approx(gaps.mean() / gaps.std(ddof=1))
    # In the generic context 7 of 14 are right, of the vanilla run's 6; margins are 1.5 or -0.5.
    gain = np.log1p(np.exp(-1.5)) - np.log1p(np.exp(0.5))
    assert lookup["seen_price_nll"] == pytest.approx(gain / 14)
    # p of four differences: two runs, two kinds of users, the unseen one alone and so without p.
    p_values = frame["seen_p_value"].dropna()
    assert set(p_values.index) == {"lookup", "third"}
    assert frame["unseen_p_value"].isna().all() and frame["unseen_p_holm"].isna().all()
    low, high = sorted(p_values)
    adjusted = frame["seen_p_holm"].dropna()
    assert sorted(adjusted) == pytest.approx(sorted([min(1, 2 * low), max(2 * low, high)]))
    assert frame.loc["lookup", "seen_user_unseen_prompt_n_pairs"] == 14
    assert frame.loc["lookup", "seen_user_unseen_prompt_accuracy_micro"] == pytest.approx(9 / 14)
    assert frame.loc["lookup", "seen_user_seen_prompt_n_pairs"] == 0


@pytest.mark.slow
def test_any_run_can_be_the_baseline(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    frame = compare(str(runs / "*"), out, baseline=runs / "lookup").frame.set_index("run")
    assert frame["baseline"].dropna().to_dict() == {"other": "lookup", "vanilla": "lookup"}
    assert frame.loc["vanilla", "seen_difference_micro"] == pytest.approx(-3 / 14)
    elsewhere = predictions(PERSONAL)
    elsewhere["pair_id"] = elsewhere["pair_id"] + "-b"
    make_run(runs / "elsewhere", elsewhere, encoder="lookup")
    with pytest.raises(ValueError, match="elsewhere has other test pairs"):
        compare(str(runs / "*"), out, baseline=runs / "lookup")


@pytest.mark.slow
def test_a_baseline_of_the_same_ids_and_other_texts_is_refused(tmp_path: Path) -> None:
    table = predictions(PERSONAL, oracle=ORACLE)
    for name, world in (("one", "a"), ("two", "b")):
        of_world = {"test_pairs": world, "world": world}
        make_run(tmp_path / "runs" / name, table, encoder="none", provenance=of_world)
    with pytest.raises(ValueError) as caught:
        compare([tmp_path / "runs/two"], tmp_path / "out", baseline=tmp_path / "runs/one")
    assert str(caught.value).startswith(f"eval.baseline='{tmp_path}/runs/one'"[:70])
    assert "has pairs of the same ids with other texts" in str(caught.value)
    # Side by side each has the oracle of its own world.
    frame = compare(str(tmp_path / "runs/*"), tmp_path / "out").frame
    assert frame["run"].tolist()[2:] == [
        *("oracle (one)", "length only (one)", "oracle (two)", "length only (two)")
    ]


@pytest.mark.slow
def test_what_another_model_left_is_named_and_not_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", predictions(PERSONAL), encoder="lookup", provenance={})
    add_optional_files(run_dir)  # texts of no fingerprint, though the run has one
    _, reader = read_page(report.write_report(run_dir))
    assert "Generations" not in reader.text
    assert "Files of another model" in reader.text
    lines = (run_dir / "generations.jsonl").read_text().split("\n")
    own = [json_text({**json.loads(line), "fingerprint": "f"}) for line in lines]
    (run_dir / "generations.jsonl").write_text("".join(own))
    _, reader = read_page(report.write_report(run_dir))
    assert "Generations" in reader.text and "Files of another model" not in reader.text


@pytest.mark.slow
def test_names_are_text_in_every_file(tmp_path: Path) -> None:
    names = ("=1+1 <b>\x1b[31m", "*5pt", "[5pt]\u202e", "a;@b")
    odd = [make_run(tmp_path / one, predictions(PERSONAL), encoder="lookup") for one in names]
    (tmp_path / "[x](y:z) *\n\\input").mkdir()
    frame = compare([*odd, tmp_path / "[x](y:z) *\n\\input"], tmp_path / "out").frame
    for name in ("comparison.tex", "comparison.md", "comparison.csv"):
        text = (tmp_path / "out" / name).read_text()
        assert "\x1b" not in text and "\u202e" not in text, name
    page = (tmp_path / "out/report.html").read_text()
    assert "\x1b" not in page and "\u202e" not in page and r"\u202e" in page
    tex = (tmp_path / "out/comparison.tex").read_text()
    assert "\n{}*5pt &" in tex and "\n{}[5pt]" in tex and "\n\\input" not in tex
    markdown = (tmp_path / "out/comparison.md").read_text()
    assert r"[x]\(y:z) \*" in markdown
    assert r"=1+1 \textless{}b\textgreater{}" in tex
    assert "&lt;b>" in markdown
    csv = (tmp_path / "out/comparison.csv").read_text()
    assert "\n'=1+1" in csv and "\na;'@b," in csv
    console = Console(width=150, record=True, file=StringIO())
    console.print(comparison.comparison_table(frame.assign(data="[/]")))  # no markup of rich
    assert "\x1b[31m" not in console.export_text()


@pytest.mark.slow
def test_the_nearest_vanilla_run_is_the_baseline(runs: Path, tmp_path: Path) -> None:
    for name in ("a-vanilla", "z-vanilla", "lookup"):
        make = make_run(tmp_path / name, predictions(VANILLA), encoder="none")
        results = json.loads((make / "results.json").read_text())
        results["config"]["aggregator"] = {"name": "film", "site": "last"}
        if name == "a-vanilla":
            results["config"]["aggregator"]["site"] = "every_block"
        if name == "lookup":
            results["config"]["encoder"] = {"name": "lookup", "_target_": TARGETS["lookup"]}
        (make / "results.json").write_text(json_text(results))
    paths = [tmp_path / name for name in ("a-vanilla", "lookup", "z-vanilla")]
    frame = compare(paths, tmp_path / "out").frame.set_index("run")
    assert frame.loc["lookup", "baseline"] == "z-vanilla"
    other_data = json.loads((paths[2] / "results.json").read_text())
    other_data["config"]["data"]["pairs_per_user"] = 7
    (paths[2] / "results.json").write_text(json_text(other_data))
    frame = compare(paths, tmp_path / "out").frame.set_index("run")
    assert frame.loc["lookup", "baseline"] == "a-vanilla"


@pytest.mark.slow
def test_rows_say_by_which_setting_they_differ(tmp_path: Path) -> None:
    for rank in (2, 4):
        run_dir = make_run(tmp_path / f"runs/{rank}", predictions(PERSONAL), encoder="lookup")
        results = json.loads((run_dir / "results.json").read_text())
        results["config"]["encoder"]["rank"] = rank
        (run_dir / "results.json").write_text(json_text(results))
    made = compare(str(tmp_path / "runs" / "**"), tmp_path / "out")
    assert made.frame["others"].tolist()[:2] == ["encoder.rank=2", "encoder.rank=4"]
    words = (tmp_path / "out/comparison.md").read_text()
    assert "| 2 | personal | encoder.rank=2 |" in words and made.skipped == []
    # A sweep's directory beside a single run stands for its jobs.
    single = make_run(tmp_path / "single", predictions(VANILLA), encoder="none")
    both = compare([single, tmp_path / "runs"], tmp_path / "out")
    assert [run.name for run in both.runs] == ["2", "4", "single"]


@pytest.mark.slow
def test_another_model_is_not_told_apart_by_all_its_settings(tmp_path: Path) -> None:
    for name, alone in (("reward", "pooling"), ("dpo", "beta")):
        run_dir = make_run(tmp_path / f"runs/{name}", predictions(PERSONAL), encoder="lookup")
        results = json.loads((run_dir / "results.json").read_text())
        results["config"]["model"] = {"name": name, alone: 1}
        (run_dir / "results.json").write_text(json_text(results))
    frame = compare(str(tmp_path / "runs/*"), tmp_path / "out").frame
    shown = frame.set_index("run").loc[["reward", "dpo"], ["model", "others"]]
    assert shown.to_numpy().tolist() == [["reward", ""], ["dpo", ""]]


@pytest.mark.slow
def test_latex_table(runs: Path, tmp_path: Path) -> None:
    make_run(runs / "50%_off & on", predictions(PERSONAL), encoder="lookup")
    compare(str(runs / "*"), tmp_path / "out")
    text = (tmp_path / "out/comparison.tex").read_text()
    assert text.count(r"\begin{tabular}{llll") == 2 == text.count(r"\bottomrule")
    assert r"50\%\_off \& on & personal & lookup" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1


@pytest.mark.slow
def test_seen_prompts_are_shown_apart(tmp_path: Path) -> None:
    table = predictions(PERSONAL)
    table["prompt_kind"] = np.where(table["pair_id"].isin(["pair-0", "pair-4"]), "seen", "unseen")
    both = make_run(tmp_path / "both", table, encoder="lookup")
    _, reader = read_page(report.write_report(both))
    assert "user context, seen prompts" in reader.text
    assert "50.0" in reader.text  # ann's first pair right, her fifth wrong
    whole = make_run(tmp_path / "all", table.assign(prompt_kind="seen"), encoder="lookup")
    _, reader = read_page(report.write_report(whole))
    assert "Seen users: 3, with 14 pairs on seen prompts" in reader.text
    assert "user context, seen prompts" not in reader.text


@pytest.mark.slow
def test_run_names_are_text_and_tell_runs_apart(runs: Path, tmp_path: Path) -> None:
    odd = make_run(tmp_path / "a" / "$x|<i>[red]", predictions(PERSONAL), encoder="lookup")
    twins = [make_run(tmp_path / at / "0", predictions(VANILLA), encoder="none") for at in "bc"]
    frame = compare([odd, *twins], tmp_path / "out").frame
    assert frame["run"].tolist()[:3] == ["a/$x|<i>[red]", "b/0", "c/0"]
    page, reader = read_page(tmp_path / "out" / "report.html")
    assert "<i>" not in page
    # Rows of seen and unseen users, the figure, and where it was made.
    assert reader.text.count("a/$x|<i>[red]") == 4
    assert r"| a/$x\|&lt;i>[red] |" in (tmp_path / "out" / "comparison.md").read_text()
    console = Console(width=120, record=True, file=StringIO())
    console.print(comparison.comparison_table(frame))
    assert "a/$x|<i>[red]" in console.export_text()


@pytest.mark.parametrize("found", ["nothing", "only sft"])
def test_glob_without_results_is_refused(runs: Path, tmp_path: Path, found: str) -> None:
    pattern = str(runs / ("nowhere*" if found == "nothing" else "sft"))
    expected = re.escape(f"runs='{pattern}'"[:60])
    with pytest.raises(ValueError, match=expected + ".* expected a glob of run directories"):
        compare(pattern, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_closing_table_fits_a_terminal(runs: Path) -> None:
    results = Results.model_validate_json((runs / "lookup" / "results.json").read_bytes())
    console = Console(width=100, record=True, file=StringIO())
    console.print(tables.closing_table(results))
    text = console.export_text()
    assert re.search(r"user context +64\.3 ", text)
    assert re.search(r"oracle +85\.7 ", text)
    assert max(len(line.rstrip()) for line in text.splitlines()) < 100


@pytest.mark.parametrize("width", [38, 60, 80, 200])
def test_no_number_is_cut_in_a_narrow_terminal(width: int) -> None:
    numbers = [f"{n}{n}.{n}" for n in range(1, 9)]
    rows = [[tables.Cell("a name longer than any terminal " * 3), tables.Cell("film")]]
    rows[0] += [tables.Cell(number, f"[{number}, {number}]") for number in numbers]
    heads = ["run", "aggregator", *(f"mean of users {number}" for number in numbers)]
    table = tables.Table(heads, [("Seen users, seeds 0, 1, 2", rows)], (0, 1))
    console = Console(width=width, record=True, file=StringIO())
    console.print(tables.rich_table(table, title="Results", without=[heads[-1]]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for number in numbers[:-1]:
        assert text.count(f"[{number}, {number}]") == 1 and text.count(number) == 4
    assert numbers[-1] not in text
    assert text.count("film") == text.count("aggregator") == text.count("Results") >= 80 // width


def test_a_part_from_elsewhere_goes_by_its_class() -> None:
    own = {"encoder": {"name": "none", "_target_": "my.parts.Directions"}}
    assert _part_name(own, "encoder") == "Directions"
    assert (
        _part_name({"encoder": {"name": "none", "_target_": TARGETS["none"]}}, "encoder") == "none"
    )
    assert _part_name({"seed": 3}, "seed") == "3" and _part_name({}, "data") == "none"
