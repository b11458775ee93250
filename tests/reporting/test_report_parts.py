"""What a report says beyond its headline: user map, clusters, words, new users, curves; in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tracemalloc
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from test_report import (
    ORACLE,
    PERSONAL,
    VANILLA,
    add_optional_files,
    make_run,
    predictions,
    read_page,
)

from plrhf.core.stats import Outcomes
from plrhf.data.digests import json_text
from plrhf.evaluation.few_shot import FewShotCurve
from plrhf.evaluation.judges import JudgedRun
from plrhf.evaluation.users import LearnedUsers
from plrhf.reporting import curves as sweeps
from plrhf.reporting import report
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.drawing import drawing, panel, with_hover
from plrhf.reporting.figures import bars
from plrhf.reporting.runs import Run, read_run
from plrhf.reporting.tables import (
    console,
    few_shot_closing_table,
    few_shot_table,
    grid_table,
    key_table,
    winrate_table,
)
from plrhf.reporting.user_map import cluster_table, groups_of, map_note, token_table

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def person(name: str, group: str | None, weights: list[float], at: tuple[float, float]) -> Any:
    kind = "unseen" if name == "dan" else "seen"
    profile = "<b>terse</b> & calm" if name == "ann" else None
    who = {"user_id": name, "user_kind": kind, "profile": profile, "group": group}
    return {**who, "at": list(at), "weights": weights}


LEARNED: dict[str, Any] = {
    "schema": 1,
    "n_users": 4,
    "explained": [0.75, 0.125],
    "generic": {"at": [0, 0], "weights": [0.25, 0.75]},
    "users": [
        person("ann", "type 1", [0.9, 0.1], (1.0, 2.0)),
        person("bob", "type 0", [0.2, 0.8], (-1.0, 0.5)),
        person("cid", "type 1", [0.6, 0.4], (0.5, -1.0)),
        person("dan", "type 0", [0.3, 0.7], (-0.5, -1.5)),
    ],
    "nearest_tokens": [
        {"owner": "generic user", "vectors": [[[" the", 0.312], ["<b>", 0.2], ["\n", 0.1]]] * 3},
        {"owner": "cluster 0", "vectors": [[["a", 0.5], [" sea", 0.4], ["x", 0.3]]] * 3},
    ],
}


def constant(value: float) -> list[dict[str, Any]]:
    return [{"value": value, "ci95": [value - 0.05, value + 0.05]}] * 3


ADAPTED: dict[str, Any] = {
    "schema": 1,
    "shots": [0, 4, 16],
    "curves": {
        "adapted": [{"value": v, "ci95": [v - 0.05, v + 0.05]} for v in (0.5, 0.625, 0.75)],
        "pooled": constant(0.5),
        "generic": constant(0.5),
        "oracle": constant(0.875),
    },
    "gain_recovered": {"adapted": [{"value": v, "ci95": None} for v in (0, 1 / 3, 2 / 3)]},
    "n_users": 7,
    "n_draws": 3,
}
JUDGED: dict[str, Any] = {
    "run": "runs/policy",
    "against": "runs/<vanilla>",
    "judge": {
        "_target_": "plrhf.evaluation.chat_judge.ChatJudge",
        "name": "chat",
        "model": "small-1",
    },
    "win_rate": {"value": 0.625, "ci95": [0.5, 0.75]},
    "win_rate_macro": {"value": 0.6, "ci95": None},
    "ties": 0.125,
    "n_texts": 1234,
    "n_users": 7,
    "n_unanswered": 3,
    "per_user": {},
    "first_position_wins": 0.55,
    "answers": {"questions": 2474, "refused": 1, "unparseable": 4},
    "cost": None,
}
PROBES: dict[str, Any] = {
    "overlap": {"train_val": {"pairs": 1234, "prompt": 5}, "train_test": {"pairs": 9, "prompt": 0}},
    "length_only": {"accuracy": {"value": 0.625, "ci95": [0.5, 0.75]}, "n_pairs": 9},
    "warnings": ["length_only: 0.625 [0.500, 0.750] on val <above chance>"],
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run that has every file a report can show."""
    run_dir = make_run(tmp_path / "run", predictions(PERSONAL, oracle=ORACLE), encoder="cluster")
    add_optional_files(run_dir)
    (run_dir / "users.json").write_text(json.dumps(LEARNED))
    (run_dir / "adapt.json").write_text(json.dumps(ADAPTED))
    (run_dir / "winrate.json").write_text(json.dumps(JUDGED))
    results = json.loads((run_dir / "results.json").read_text())
    results |= {
        "probes": PROBES,
        "run": {"command": "python train.py a=<1>", "versions": {"x": "2.0"}},
    }
    (run_dir / "results.json").write_text(json_text(results))
    return run_dir


@pytest.mark.slow
def test_every_section_is_there_and_text_is_escaped(whole: Path) -> None:
    page, reader = read_page(report.write_report(whole))
    titles = re.findall(r"<h2>(.*)</h2>", page)
    assert titles == [
        *("Test results", "Accuracy by user", "User model", "Soft prompts in words", "New users"),
        *("Generations", "Win rates", "Learning curves", "Data", "Leak probes"),
        *("Overlap of splits", "How it was made"),
    ]
    assert re.findall(r'<a href="#([\w-]+)"', page) == re.findall(r'<section id="([\w-]+)"', page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert re.search(r"https?:|<link|<img|<script|@import|src=", page) is None
    assert "<b>terse" not in page and "ann\ntype 1\n&lt;b&gt;terse&lt;/b&gt; &amp; calm" in page
    assert "cluster 0 weighs 0.90" in page and "accuracy 80% of 5 pairs" in page  # of ann
    assert "a=&lt;1&gt;" in page and "&lt;above chance&gt;" in page
    assert page.count("<svg") == 9  # 6 as ever, user map, weights, few-shot curves


@pytest.mark.slow
def test_marks_of_the_map_say_who_they_are(whole: Path) -> None:
    report.write_report(whole)
    page = (whole / "report.html").read_text()
    marks = re.findall(r"<use [^>]*><title>(\w+)\n(type \d)", page)
    # By group, then seen before unseen.
    assert marks == [("bob", "type 0"), ("dan", "type 0"), ("ann", "type 1"), ("cid", "type 1")]


def test_a_map_of_equal_vectors_says_so_and_does_not_magnify_them() -> None:
    """A hundred-thousandth apart: an axis that fits it would show people where there is rounding."""
    places = [[0.00001, 0.0], [-0.00001, 0.00002], [0.0, 0.0]]
    users = [{**LEARNED["users"][0], "at": one} for one in places[:2]]
    generic = {**LEARNED["generic"], "at": places[2]}
    learned = LearnedUsers(**{**LEARNED, "users": users, "generic": generic})
    assert map_note(learned) == (
        "All vectors are nearly the same, at most 2e-05 from their mean: there is nothing to see."
    )
    assert map_note(LearnedUsers(**LEARNED)) is None


def test_hover_needs_a_word_for_each_mark() -> None:
    figure, axes = panel()
    axes.scatter([1, 2, 3], [1, 2, 3], gid="dots")
    made = drawing(figure, "Three")
    svg = with_hover(made, "dots", ["one", "<two>", "three"]).svg
    assert re.findall(r"<title>(.*?)</title>", svg) == ["one", "&lt;two&gt;", "three"]
    assert "&lt;path" not in svg
    with pytest.raises(RuntimeError, match="3 marks drawn for 2 words"):
        with_hover(made, "dots", ["one", "two"])
    with pytest.raises(RuntimeError, match="no marks lines"):
        with_hover(made, "lines", [])
    assert isinstance(figure, Figure)


def test_cluster_table_by_hand() -> None:
    table = cluster_table(LearnedUsers(**LEARNED))
    assert list(table.columns)[1:] == [
        *("generic user's weight", "mean weight", "users led by it", "type 0", "type 1")
    ]
    rows = [[cell.value for cell in row] for row in table.groups[0][1]]
    assert rows[0] == ["cluster 0", "0.250", "0.500", "2", "0", "2"]
    assert rows[1] == ["cluster 1", "0.750", "0.500", "2", "2", "0"]


def test_colours_follow_what_is_known() -> None:
    users = [{**user, "group": None} for user in LEARNED["users"]]
    assert groups_of(users) == ["cluster 0", "cluster 1", "cluster 0", "cluster 1"]
    assert groups_of([{**user, "weights": None} for user in users]) == ["users"] * 4
    # Of ten groups the seven largest keep a colour each, and the eighth is for the others.
    many = [{**users[0], "group": f"g{n}"} for n in range(10) for _ in range(10 - n)]
    assert set(groups_of(many)) == {*(f"g{n}" for n in range(7)), "other"}


def test_tokens_are_quoted() -> None:
    table = token_table(LearnedUsers(**LEARNED))
    assert list(table.columns) == ["", "generic user", "cluster 0"]
    first = table.groups[0][1][0]
    assert [cell.value for cell in first] == ["vector 1", '" the" 0.31', '"a" 0.50']
    assert first[1].interval == r'then "<b>", "\n"'


def test_few_shot_table_by_hand() -> None:
    table = few_shot_table(FewShotCurve(**ADAPTED))
    assert list(table.columns) == [
        *("pairs given", "adapted, %", "pooled, %", "generic, %", "oracle, %", "gain, adapted")
    ]
    rows = table.groups[0][1]
    assert [str(cell) for cell in rows[1]][:2] == ["4", "62.5 [57.5, 67.5]"]
    assert [row[-1].value for row in rows] == ["0.00", "0.33", "0.67"]
    paired = {"adapted": constant(0.125)}
    with_paired = few_shot_table(FewShotCurve(**{**ADAPTED, "over_generic": paired}))
    assert with_paired.columns[5] == "adapted over generic, points"
    assert str(with_paired.groups[0][1][0][5]) == "+12.5 [+7.5, +17.5]"
    sizes = {"nll": {"adapted": constant(0.5), "oracle": constant(0.25)}, "ece": {}}
    with_nll = few_shot_table(FewShotCurve(**{**ADAPTED, **sizes}))
    assert [*with_nll.columns][6:] == ["nll, adapted"]
    assert str(with_nll.groups[0][1][0][6]) == "0.500 [0.450, 0.550]"
    # Human data have no oracle, and no gain to recover.
    people = {**ADAPTED, "curves": {**ADAPTED["curves"], "oracle": None}, "gain_recovered": None}
    assert len(few_shot_table(FewShotCurve(**people)).columns) == 4


@pytest.mark.slow
def test_win_rates_by_hand(whole: Path, tmp_path: Path) -> None:
    by_scores = {
        **JUDGED,
        "judge": {"_target_": "my_judge.Mine", "name": "preferences"},
        "first_position_wins": None,
    }
    (row,), (other,) = (
        winrate_table([(name, JudgedRun(**result))]).groups[0][1]
        for name, result in (("policy", JUDGED), ("other", by_scores))
    )
    assert [str(cell) for cell in row] == [
        *("policy", "runs/<vanilla>", "ChatJudge small-1", "62.5 [50.0, 75.0]", "60.0", "12.5"),
        *("1,234", "7", "3", "55.0"),
    ]
    assert [cell.value for cell in other][2] == "Mine" and other[-1].value == "–"
    make_run(tmp_path / "vanilla", predictions(VANILLA), encoder="none")
    compare([whole, tmp_path / "vanilla"], tmp_path / "out")
    page, reader = read_page(tmp_path / "out" / "report.html")
    assert "Win rates" in reader.text and page.count("runs/&lt;vanilla&gt;") == 1


def test_probes_show_counts_and_estimates() -> None:
    grid = grid_table(PROBES["overlap"])
    assert list(grid.columns) == ["", "pairs", "prompt"]
    rows = [[cell.value for cell in row] for row in grid.groups[0][1]]
    assert rows == [["train val", "1,234", "5"], ["train test", "9", "0"]]
    table = key_table({"length_only": PROBES["length_only"]}, "found")
    assert table is not None
    shown = {name: {row[0].value: str(row[1]) for row in rows} for name, rows in table.groups}
    assert shown == {
        "length only": {"accuracy": "0.625 [0.500, 0.750]", "n pairs": "9"},
    }


def sweep_run(folder: Path, *, alpha: float, seed: int, encoder: str = "lookup") -> Run:
    counts = {0.0: VANILLA, 0.5: PERSONAL, 1.0: ORACLE}[alpha]
    run_dir = make_run(
        folder / f"{encoder}-{alpha}-{seed}", predictions(counts), encoder=encoder, seed=seed
    )
    results = json.loads((run_dir / "results.json").read_text())
    results["config"]["model"]["alpha"] = alpha
    results["config"]["data"]["seed"] = seed  # follows the run's, and is no axis
    results["config"]["run_dir"] = str(run_dir)
    (run_dir / "results.json").write_text(json_text(results))
    return read_run(run_dir)


@pytest.mark.slow
def test_curves_join_runs_that_differ_in_one_number(tmp_path: Path) -> None:
    runs = [sweep_run(tmp_path, alpha=alpha, seed=seed) for alpha in (0.5, 0.0) for seed in (1, 2)]
    runs.append(sweep_run(tmp_path, alpha=1.0, seed=1))
    runs.append(sweep_run(tmp_path, alpha=0.5, seed=1, encoder="cluster"))  # alone of its kind
    found = sweeps.curves(runs)
    assert list(found) == ["model.alpha"]
    (family,) = found["model.alpha"]
    assert [value for value, _ in family.runs] == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert {run.settings["encoder"] for _, run in family.runs} == {"lookup"}
    runs.append(sweep_run(tmp_path, alpha=1.0, seed=2, encoder="cluster"))
    names = [family.name for family in sweeps.curves(runs)["model.alpha"]]
    assert sorted(names) == ["cluster", "lookup"]


@pytest.mark.slow
def test_alpha_curve_is_in_the_comparison(tmp_path: Path) -> None:
    for alpha in (0.0, 0.5, 1.0):
        for seed in (1, 2):
            sweep_run(tmp_path / "runs", alpha=alpha, seed=seed)
    compare(str(tmp_path / "runs" / "*"), tmp_path / "out")
    page, reader = read_page(tmp_path / "out" / "report.html")
    assert "Curves over settings" in reader.text
    assert {"Seen users by model.alpha", "Unseen users by model.alpha"} <= set(reader.text)
    assert page.count("<svg") == 3  # bars over seeds, and two curves


@pytest.mark.slow
def test_notebooks_show_what_the_page_shows(whole: Path) -> None:
    section = report.user_model_section(read_run(whole))
    assert section is not None
    html = section._repr_html_()
    assert html.count("<svg") == 2 and "cluster 1" in html and "<body" not in html


@pytest.mark.slow
def test_a_map_of_a_thousand_users_stays_small(whole: Path) -> None:
    weights = [0.1] * 10
    users = [
        {**person(f"user-{n}", f"g{n % 13}", weights, (n / 7, n % 7)), "profile": "x" * 100}
        for n in range(1000)
    ]
    generic = {"at": [0, 0], "weights": weights}
    learned = {**LEARNED, "users": users, "generic": generic, "n_users": 123_456}
    (whole / "users.json").write_text(json.dumps(learned))
    path = report.write_report(whole)
    assert path.stat().st_size < 1_500_000
    assert "1,000 of 123,456 train users. Point" in path.read_text()


def browser_log(page: Path, *flags: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    call = [*command, profile, *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert "<body" in done.stdout, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_report_opens_without_a_console_error(whole: Path, tmp_path: Path) -> None:
    page = report.write_report(whole)
    assert browser_log(page) == ""
    assert page.stat().st_size < 5_000_000
    # The same page asking for something from outside itself is caught, so the silence means something.
    planted = tmp_path / "planted.html"
    planted.write_text(page.read_text().replace("<h1>", '<img src="pixel.png"><h1>'))
    assert "pixel.png" in browser_log(planted)


def test_one_long_id_does_not_widen_all_others() -> None:
    ids = np.array([*(f"p{n}" for n in range(5_000)), "x" * 10_000], dtype=object)
    found = Outcomes(ids, ids, np.ones(len(ids)), np.ones(len(ids)))
    run: Any = Run(Path("run"), "run", SimpleNamespace(provenance=None), pd.DataFrame())  # type: ignore[arg-type]
    run._outcomes.update({("seen", "user"): found, ("unseen", "user"): found})
    tracemalloc.start()
    assert len(set(run.test_key)) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # 5,001 ids of 10,000 characters would take 200 MB


def test_few_shot_curves_in_a_narrow_terminal() -> None:
    for gain in (None, ADAPTED["gain_recovered"]):
        console = Console(width=60, record=True, file=StringIO())
        adapted = FewShotCurve(**{**ADAPTED, "gain_recovered": gain})
        console.print(few_shot_closing_table(adapted))
        text = console.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= 60
        assert f"{adapted.n_users} unseen users, {adapted.n_draws} draws" in text
        assert ("over generic" in " ".join(text.split())) == (
            gain is None and adapted.over_generic != {}
        )


def test_many_users_are_drawn_by_groups() -> None:
    few = np.array([0.0, 50.0, 100.0])
    assert bars(few) is few
    many = np.sort(np.random.default_rng(0).uniform(0, 100, 2_001))
    drawn = bars(many)
    assert len(drawn) == 1_000 and (np.diff(drawn) >= 0).all()
    assert drawn[0] == pytest.approx(many[:3].mean()) and drawn[-1] == pytest.approx(
        many[-2:].mean()
    )


@pytest.mark.parametrize(("terminals", "width"), [({0, 1, 2}, 72), ({0, 2}, 72), (set(), 110)])
def test_the_console_is_as_wide_as_the_terminal_through_a_pipe_too(
    terminals: set[int], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(stream: int) -> os.terminal_size:
        if stream not in terminals:
            raise OSError("not a terminal")
        return os.terminal_size((72, 24))

    monkeypatch.setattr(os, "isatty", lambda stream: stream in terminals)
    monkeypatch.setattr(os, "get_terminal_size", size)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == width
