"""Runs of several seeds as one row: hand-worked numbers, who comes next, what is left to the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_report import ORACLE, PERSONAL, VANILLA, make_run, predictions, read_page

from plrhf.data.digests import json_text
from plrhf.reporting import curves as sweeps
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.over_seeds import (
    curves_table,
    over_next,
    over_seeds,
    seeds_frame,
    seeds_note,
    seeds_table,
)
from plrhf.reporting.runs import Run, read_run

WORSE = {"ann": 2, "bob": 1, "cid": 1, "dan": 2}  # 4 of 14 seen


def made(
    folder: Path,
    right: dict[str, int],
    seed: int,
    encoder: str,
    *,
    on_val: dict[str, int] | None = None,
    **settings: Any,
) -> Run:
    """A run of a world of its own: no pair in common with another seed's."""
    table = predictions(right, oracle=ORACLE)
    val = predictions(right if on_val is None else on_val).assign(split="val")
    table = pd.concat([table, val.assign(pair_id="val-" + val["pair_id"])], ignore_index=True)
    table["pair_id"] = f"world-{seed}-" + table["pair_id"]
    name = "-".join([encoder, *map(str, settings.values()), str(seed)])
    of_world = {"world": f"world-{seed}", "test_pairs": f"tests-{seed}"}
    run_dir = make_run(folder / name, table, encoder=encoder, seed=seed, provenance=of_world)
    results = json.loads((run_dir / "results.json").read_text())
    results["config"]["data"]["seed"] = seed
    results["config"]["run_dir"] = str(run_dir)
    for key, value in settings.items():
        part, _, setting = key.partition("_")
        results["config"][part][setting] = value
    (run_dir / "results.json").write_text(json_text(results))
    return read_run(run_dir)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Seeds 10 and 9 of three encoders, lookup right in 9 and 12 of 14."""
    folder = tmp_path / "runs"
    found = []
    for seed, lookup in ((10, ORACLE), (9, PERSONAL)):
        found.append(made(folder, lookup, seed, "lookup"))
        found.append(made(folder, VANILLA, seed, "none"))
        found.append(made(folder, PERSONAL, seed, "cluster"))
    return found


@pytest.mark.slow
def test_seeds_are_pooled_by_hand(runs: list[Run]) -> None:
    lookup, vanilla, cluster = over_seeds(runs)
    assert lookup.settings["seed"] == "9, 10"
    cell = lookup.results.test["seen"]["user"]
    assert cell["accuracy_micro"]["value"] == pytest.approx((9 + 12) / 28)
    assert (cell["n_pairs"], cell["n_users"]) == (28, 6)  # ann of one world is not ann of another
    assert lookup.results.oracle["seen"]["accuracy_micro"]["value"] == pytest.approx(12 / 14)
    frame = seeds_frame([lookup, vanilla, cluster])
    by_role = frame.set_index("run")
    first, other, third = (by_role.loc[run.name] for run in (lookup, vanilla, cluster))
    assert (first["seen_by_seed"], first["unseen_by_seed"]) == ("64.3, 85.7", "33.3, 100.0")
    assert first["seen_difference_micro"] == pytest.approx((21 - 12) / 28)
    assert first["seen_gain_recovered"] == pytest.approx((21 - 12) / (24 - 12))
    assert first["seen_over_next"] == pytest.approx((21 - 18) / 28)  # cluster's 9 + 9
    assert first["seen_over_next_low"] <= 3 / 28 <= first["seen_over_next_high"]
    assert third["seen_over_next"] == pytest.approx((18 - 21) / 28)
    assert other["seen_over_next"] == pytest.approx((12 - 21) / 28)
    assert set(frame["tests"]) == {"seeds 9, 10"}
    assert frame.set_index("role").loc["oracle", "seen_accuracy_micro"] == pytest.approx(12 / 14)


def test_users_of_the_same_rows_stay_the_same(tmp_path: Path) -> None:
    same = [
        read_run(make_run(tmp_path / str(seed), predictions(PERSONAL), encoder="none", seed=seed))
        for seed in (1, 2)
    ]
    (pooled,) = over_seeds([*same, same[0]])  # a repeated seed counts once
    cell = pooled.results.test["seen"]["user"]
    assert (cell["n_pairs"], cell["n_users"]) == (28, 3)


def test_people_without_a_pair_in_common_stay_the_same(tmp_path: Path) -> None:
    """Seeds may divide the same people's pairs so that no test pair is in two of them."""
    same = []
    for seed in (1, 2):
        table = predictions(PERSONAL)
        table["pair_id"] = f"{seed}-" + table["pair_id"]
        same.append(read_run(make_run(tmp_path / str(seed), table, encoder="none", seed=seed)))
    (pooled,) = over_seeds(same)
    cell = pooled.results.test["seen"]["user"]
    assert (cell["n_pairs"], cell["n_users"]) == (28, 3)


@pytest.mark.slow
def test_a_missing_seed_leaves_the_others_paired(tmp_path: Path) -> None:
    runs = [made(tmp_path, right, 1, "lookup") for right in (PERSONAL,)]
    runs += [made(tmp_path, ORACLE, 2, "lookup"), made(tmp_path, WORSE, 3, "lookup")]
    runs += [made(tmp_path, VANILLA, seed, "none") for seed in (1, 3)]
    frame = seeds_frame(over_seeds(runs)).set_index("role")
    row = frame.loc["personal"]
    assert row["seen_n_pairs"] == 3 * 14  # of all its seeds
    assert row["seen_accuracy_micro"] == pytest.approx((9 + 12 + 4) / 42)
    assert row["seen_difference_micro"] == pytest.approx((9 + 4 - 6 - 6) / 28)  # of seeds 1 and 3
    note = seeds_note(frame)
    assert "lookup-1 and 2 more and none-1 and 1 more are not compared in seed 2." in note
    assert frame["tests"].nunique() == 1


@pytest.mark.slow
def test_the_next_best_is_chosen_on_val(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, PERSONAL, 1, "lookup"),  # 9 of 14 on test
        made(tmp_path, ORACLE, 1, "cluster", on_val=WORSE),  # best on test, worst on val
        made(tmp_path, VANILLA, 1, "uniform", on_val=ORACLE),  # 6 of 14, best on val
    ]
    found = over_next(runs[0], runs, "seen")
    assert found["value"] == pytest.approx((9 - 6) / 14)
    no_val = read_run(make_run(tmp_path / "bare", predictions(PERSONAL), encoder="cluster"))
    assert over_next(no_val, [no_val], "seen")["value"] is None


def test_length_goes_by_each_seed_s_own_rule(tmp_path: Path) -> None:
    one, other = (made(tmp_path, PERSONAL, seed, "none") for seed in (1, 2))
    results = json.loads((other.path / "results.json").read_text())
    results["controls"]["length_only"]["rule"] = "the shorter response wins"
    (other.path / "results.json").write_text(json_text(results))
    (pooled,) = over_seeds([one, read_run(other.path)])
    control = pooled.results.controls["length_only"]
    # Chosen responses are the longer ones: right by the rule of seed 1, wrong by that of seed 2.
    assert control["seen"]["accuracy_micro"]["value"] == 0.5
    assert control["rule"] == "the longer response wins, the shorter response wins"


@pytest.mark.slow
def test_the_table_ranks_encoders_and_says_what_varies(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    more = [made(folder, WORSE, seed, "lookup", encoder_init=2.5) for seed in (9, 10)]
    extra = [made(folder, WORSE, seed, "lookup", encoder_init="x") for seed in (9, 10)]
    table = seeds_table(seeds_frame(over_seeds([*runs, *more, *extra])))
    assert list(table.columns)[:3] == ["role", "encoder", "others"]
    title, rows = table.groups[0]
    assert title == "Seen users, seeds 9, 10"
    shown = [[cell.value for cell in row[:4]] for row in rows]
    assert shown == [
        ["personal", "lookup", "", "75.0"],
        ["personal", "cluster", "", "64.3"],
        ["vanilla", "none", "", "42.9"],
        ["personal", "lookup", "encoder.init=2.5", "28.6"],
        ["personal", "lookup", "encoder.init=x", "28.6"],
        ["length", "", "", "100.0"],
        ["oracle", "", "", "85.7"],
    ]


@pytest.mark.slow
def test_a_page_of_a_sweep_shows_methods_first(runs: list[Run], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for seed in (9, 10):
        made(folder, WORSE, seed, "lookup", model_alpha=0.25)
    made_of = compare(str(folder / "*"), tmp_path / "out")
    assert len(made_of.frame) == 8 + 2 * 2  # each run, then oracle and length rule of each world
    _, reader = read_page(tmp_path / "out/report.html")
    text = reader.text
    assert text.index("Test results over seeds") < text.index("Single runs")
    assert "24 rows" in text  # of single runs, seen and unseen users
    assert made_of.over_seeds is not None
    saved = pd.read_csv(tmp_path / "out/over_seeds.csv")
    assert saved["run"].notna().all() and (tmp_path / "out/over_seeds.tex").is_file()
    assert "| personal | lookup |" in (tmp_path / "out/over_seeds.md").read_text()


@pytest.mark.slow
def test_every_value_of_a_setting_is_a_labelled_row_and_a_point_of_its_curve(
    tmp_path: Path,
) -> None:
    runs = [made(tmp_path, VANILLA, seed, "none", model_alpha=0.5) for seed in (1, 2)]
    for alpha, right in ((0.0, WORSE), (0.5, PERSONAL), (1.0, ORACLE)):
        runs += [made(tmp_path, right, seed, "lookup", model_alpha=alpha) for seed in (1, 2)]
    pooled = over_seeds(runs)
    # Each alpha is a row of its own, labelled, beside the one vanilla run.
    frame = seeds_frame(pooled)
    labels = frame.loc[frame["role"] == "personal", "others"].tolist()
    assert labels == ["model.alpha=0.0", "model.alpha=0.5", "model.alpha=1.0"]
    differences = frame.loc[frame["role"] == "personal", "seen_difference_micro"]
    assert differences.tolist() == pytest.approx([(n - 6) / 14 for n in (4, 9, 12)])
    table = curves_table(pooled)
    assert table is not None
    ((setting, rows),) = table.groups
    assert setting == "model.alpha"
    shown = [[cell.value for cell in row] for row in rows]
    # Without the user: 7 of 14 in `predictions`.
    assert shown == [
        ["user context", "0", "28.6", "50.0", "66.7", "–"],
        ["user context", "0.5", "64.3", "50.0", "33.3", "–"],
        ["user context", "1", "85.7", "50.0", "100.0", "–"],
    ]
    assert curves_table(pooled[:1]) is None


@pytest.mark.slow
def test_the_next_best_of_a_curve_is_at_the_same_value(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, right, 1, encoder, model_alpha=alpha)
        for encoder, alpha, right in (
            ("lookup", 0.0, WORSE),  # 4 of 14
            ("lookup", 1.0, ORACLE),  # 12
            ("cluster", 0.0, PERSONAL),  # 9
            ("cluster", 1.0, VANILLA),  # 6
        )
    ]
    table = curves_table(runs)
    assert table is not None
    shown = {(row[0].value, row[1].value): row[-1].value for row in table.groups[0][1]}
    gaps = {("lookup", "0"): -5, ("lookup", "1"): 6, ("cluster", "0"): 5, ("cluster", "1"): -6}
    assert shown == {key: f"{100 * gap / 14:+.1f}" for key, gap in gaps.items()}


@pytest.mark.slow
def test_families_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, PERSONAL, 1, "lookup", data_kind=kind, model_alpha=alpha)
        for kind in ("clusters", "individual")
        for alpha in (0.0, 1.0)
    ]
    names = [family.name for family in sweeps.curves(runs)["model.alpha"]]
    assert names == ["data.kind=clusters", "data.kind=individual"]
