"""The first screen of a page: sentences by hand from fabricated runs, and links to their reports."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from test_report import ORACLE, PERSONAL, SIZES, VANILLA, make_run, predictions

from plrhf.reporting import report
from plrhf.reporting.comparison import comparison_frame
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.runs import read_run
from plrhf.reporting.summary import MOST_BARS, _shown, comparison_lead, run_lead


@pytest.mark.parametrize(
    ("right", "says"),
    [
        # 14 of 14 seen pairs; 7 without the user. Of each user some are gained.
        (SIZES, r"Knowing who chose gains \+50\.0 points \[\+[\d.]+, \+[\d.]+\] for 3 seen users"),
        # 9 of 14. Of bob's pairs none is gained, so the interval begins at 0.
        (PERSONAL, r"Knowing who chose shows no gain for 3 seen users, \+14\.3 points \[\+0\.0, "),
        # 0 of 14.
        (dict.fromkeys(SIZES, 0), r"Knowing who chose loses -50\.0 points \["),
    ],
)
def test_whether_and_for_whom_a_run_personalises(
    tmp_path: Path, right: dict[str, int], says: str
) -> None:
    run = read_run(make_run(tmp_path / "run", predictions(right, oracle=ORACLE), encoder="lookup"))
    first, second, third = run_lead(run).sentences
    assert re.match(says, first)
    unseen = 100 * (right["dan"] - 1) / 3
    assert first.endswith(f"{unseen:+z.1f} points for 1 unseen user, too few for an interval.")
    accuracies = re.findall(r"([a-z ]+) ([\d.]+)%", second)
    seen = 100 * (right["ann"] + right["bob"] + right["cid"]) / 14
    assert accuracies == [
        (" user context", f"{seen:.1f}"),
        (" generic context", "50.0"),
        (" oracle", "85.7"),
        (" length only", "100.0"),
    ]
    assert "of seed 1;" in third and "data.shuffle_users=true" in third


@pytest.mark.slow
def test_a_control_says_what_it_is_for(tmp_path: Path) -> None:
    vanilla = make_run(tmp_path / "vanilla", predictions(VANILLA), encoder="none")
    shuffled = make_run(tmp_path / "s", predictions(VANILLA), encoder="lookup", shuffled=True)
    assert run_lead(read_run(vanilla)).sentences[0].startswith("This run knows nothing of users")
    page = report.write_report(shuffled).read_text()
    assert "<p>This run had its user ids shuffled" in page


@pytest.mark.slow
def test_a_comparison_says_what_the_best_on_val_gains_beside_its_controls(tmp_path: Path) -> None:
    for name, right, encoder in (("a", PERSONAL, "cluster"), ("b", SIZES, "lookup")):
        table = predictions(right, oracle=ORACLE)
        chosen = table[table["context"] == "user"].assign(split="val")
        make_run(tmp_path / name, pd.concat([table, chosen]), encoder=encoder)
    make_run(tmp_path / "vanilla", predictions(VANILLA, oracle=ORACLE), encoder="none")
    make_run(tmp_path / "mixed", predictions(VANILLA), encoder="lookup", shuffled=True)
    runs = [read_run(tmp_path / name) for name in ("a", "b", "vanilla", "mixed")]
    first, second, third = comparison_lead(runs, comparison_frame(runs)).sentences
    # 14 of 14 seen pairs over 6 of 14; 3 of 3 unseen over 1 of 3.
    says = r"Over vanilla, b, on val the best of 2 personal runs, gains \+57\.1 points \[\S+ \S+\] for "
    assert re.match(says + r"3 seen users, p [=<]", first)
    assert first.endswith("; it changes +66.7 points for 1 unseen user, too few for an interval.")
    assert "mixed (shuffled) +0.0 points [+0.0, +0.0], length alone 100.0% [" in second
    assert second.endswith("; no run here has encoder=uniform.")
    # Three runs are paired; the one unseen user has no p.
    assert third.endswith("of seed 1; p is adjusted for 3 differences (Holm).")


def test_without_a_vanilla_run_no_gain_is_told(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", predictions(PERSONAL), encoder="lookup"))
    sentences = comparison_lead([run], comparison_frame([run])).sentences
    assert "no gain can be told" in sentences[0] and "encoder=none" in sentences[1]


@pytest.mark.slow
def test_worlds_are_counted(tmp_path: Path) -> None:
    for world, right in (("x", SIZES), ("y", VANILLA)):
        for encoder, counts in (("lookup", right), ("none", VANILLA)):
            table = predictions(counts)
            table["pair_id"] += world
            make_run(tmp_path / f"{world}-{encoder}", table, encoder=encoder)
    made = compare(str(tmp_path / "?-*"), tmp_path / "out")
    sentences = comparison_lead(made.runs, made.frame).sentences
    assert sentences[0].startswith("On 2 sets of test pairs, 1 of 2 personal runs gain for seen")


@pytest.mark.slow
def test_the_picture_has_room_for_the_best_its_baseline_and_the_controls(tmp_path: Path) -> None:
    for number in range(MOST_BARS):
        make_run(tmp_path / f"lookup-{number}", predictions(PERSONAL), encoder="lookup")
    make_run(tmp_path / "vanilla", predictions(VANILLA, oracle=ORACLE), encoder="none")
    make_run(tmp_path / "z", predictions(VANILLA), encoder="lookup", shuffled=True)
    made = compare(str(tmp_path / "*-*"), tmp_path / "out")
    runs = [*made.runs, read_run(tmp_path / "vanilla"), read_run(tmp_path / "z")]
    shown = _shown(comparison_frame(runs), [made.runs[3]])["run"].tolist()
    assert shown[:4] == ["lookup-3", "vanilla", "z", "length only"]
    assert len(shown) == MOST_BARS


@pytest.mark.slow
def test_a_comparison_links_the_reports_of_its_runs(tmp_path: Path) -> None:
    for name in ("a b#c", "vanilla"):
        folder = make_run(tmp_path / "runs" / name, predictions(PERSONAL), encoder="lookup")
        if name != "vanilla":
            report.write_report(folder)
    compare(str(tmp_path / "runs" / "*"), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    # Its rows of seen and of unseen users, and how it was made.
    assert page.count('<a href="../runs/a%20b%23c/report.html">a b#c</a>') == 3
    assert page.count("href=") - page.count('href="#') == 3
    # And they link back, also written anew, as long as the comparison is there.
    of_run = tmp_path / "runs" / "a b#c" / "report.html"
    back = '<a href="../../out/report.html">out</a>'
    assert of_run.read_text().count(back) == 1
    compare(str(tmp_path / "runs" / "*"), tmp_path / "<out>")
    assert report.write_report(of_run.parent).read_text().count(back) == 1
    (tmp_path / "out" / "report.html").unlink()
    again = report.write_report(of_run.parent).read_text()
    assert back not in again and '../../%3Cout%3E/report.html">&lt;out&gt;</a>' in again
