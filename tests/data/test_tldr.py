"""TL;DR comparisons: the paper's selection, users, splits and synthetic tastes, and odd rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, check_run, launch
from upstream import comparison, many_comparisons, write_comparisons, write_lines

from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Row
from plrhf.data.sources.tldr import TldrSource


def read(path: Path | list[str], **settings: Any) -> tuple[list[Row], ReadReport]:
    place = path if isinstance(path, list) else str(path)
    source = TldrSource(path=place, **{"n_seen": 2, "val_fraction": 0.0, **settings})
    return read_rows(source.records())


def test_prompt_and_choice_as_in_the_paper(tmp_path: Path) -> None:
    records = [comparison("ann", choice=1), comparison("ann", choice=0, split="valid1")]
    rows, report = read(write_lines(tmp_path / "batch3.json", records))
    assert rows[0].prompt == "SUBREDDIT: r/pets\nTITLE: Cat\nPOST: My cat hides.\nTL;DR:"
    assert [(row.chosen, row.rejected) for row in rows] == [
        (" Short.", " A long summary."),
        (" A long summary.", " Short."),
    ]
    assert [(row.user_id, row.split) for row in rows] == [("ann", "train"), ("ann", "test")]
    assert (report.read, report.refused) == (2, {})


def test_only_supervised_policies(tmp_path: Path) -> None:
    kept = [("sup4", "sup2"), ("sup_6b", "sup4_6b_t.7")]
    left_out = [("sup4_ppo_rm4", "sup4"), ("ref", "sup4"), ("sup4", "pretrain_cnn_sup")]
    records = [comparison("ann", policies=one) for one in (*kept, *left_out)]
    path = write_lines(tmp_path / "batch3.json", records)
    rows, report = read(path)
    assert len(rows) == 2
    assert report.refused == {"policy not of the paper's selection": 3}
    # What the protocol leaves out is no reason to stop.
    strict, _ = read_rows(TldrSource(path=str(path)).records(), on_bad_row="error")
    assert strict == rows


def test_seen_users_are_those_with_most_train_rows(tmp_path: Path) -> None:
    rows, report = read(write_comparisons(tmp_path, many_comparisons()))
    train = [row.user_id for row in rows if row.split == "train"]
    assert (train.count("ann"), train.count("bob"), len(train)) == (9, 7, 16)
    assert sorted({row.user_id for row in rows if row.split == "test"}) == [
        *("ann", "bob", "cid", "dot")
    ]
    assert report.refused == {"unseen user outside test": 5 + 2}
    assert report.read == len(rows) + 7 == 23 + 12


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "no worker": (comparison(None), "missing field"),
    "worker is a number": ({**comparison("ann"), "worker": 7}, "field that is not text"),
    "tie": (comparison("ann", (" Same.", " Same. ")), "chosen equal to rejected"),
    "empty post": (comparison("ann", post="  "), "empty prompt"),
    "no post": (comparison("ann", post=None), "empty prompt"),
    "list for a post": (comparison("ann", post=["My"]), "field that is not text"),
    "list for a text": (comparison("ann", (" A.", [" B."])), "field that is not text"),
    "empty text": (comparison("ann", (" A.", " ")), "empty response"),
    "no choice": (comparison("ann", choice=None), "record unlike the dataset's"),
    "choice of three": (comparison("ann", choice=2), "record unlike the dataset's"),
    "one summary": (
        {**comparison("ann"), "summaries": [{"text": "A", "policy": "sup1"}]},
        "record unlike the dataset's",
    ),
    "other split": (comparison("ann", split="valid3"), "unknown split"),
    "axis evals": ({"info": {}, "summary": {}}, "record unlike the dataset's"),
    "list for an object": ([1], "not a JSON object"),  # type: ignore[dict-item]
    "half a character": (comparison("ann", post="\ud800 cat"), "bad UTF-8"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("choices", ["real", "length"])
def test_odd_rows_are_refused_by_reason(name: str, choices: str, tmp_path: Path) -> None:
    record, reason = ODD[name]
    path = write_lines(tmp_path / "batch3.json", [comparison("ann"), record])
    rows, report = read(path, choices=choices)
    if choices == "length" and "choice" in name:
        assert len(rows) == 2  # nobody asks for it
        return
    assert (len(rows), report.read) == (1, 2)
    assert report.refused == {reason: 1}
    assert f"{path}:2: " in report.examples[reason]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    records = many_comparisons()
    expected, _ = read(write_lines(tmp_path / "lines/comparisons/batch3.json", records))
    assert len(expected) == 16 + 12
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(records))
    parts = [write_lines(tmp_path / f"part{n}.jsonl", records[n::2]) for n in range(2)]
    (tmp_path / "lines/axis_evals").mkdir()
    (tmp_path / "lines/axis_evals/other.json").write_text("{}")
    for path in (
        write_comparisons(tmp_path / "hub", records),
        tmp_path / "hub/comparisons",
        tmp_path / "lines",
        whole,
        [str(part) for part in parts],
    ):
        rows, report = read(path)
        assert {row.pair_id for row in rows} == {row.pair_id for row in expected}
        assert report.refused == {"unseen user outside test": 7}


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_comparisons(tmp_path, many_comparisons())
    calls: list[Any] = []

    def download(*names: str, **options: Any) -> str:
        calls.append((names, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    rows, _ = read(["openai/summarize_from_feedback"])
    assert len(rows) == 28
    options = {"repo_type": "dataset", "revision": "refs/convert/parquet"}
    assert calls == [
        (
            ("openai/summarize_from_feedback",),
            {**options, "allow_patterns": ["comparisons/*"]},
        )
    ]

    def offline(*names: str, **options: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError) as caught:
        read(["openai/summarize_from_feedback"])
    assert str(caught.value) == (
        "data.path='openai/summarize_from_feedback' is not allowed: expected a dataset the hub "
        "hands out. Set data.path to a local copy (no network)."
    )


def test_val_is_drawn_by_post_from_train_rows(tmp_path: Path) -> None:
    records = [
        comparison("ann", (f" Text {n}.", " Other."), post=f"Post {n % 40}.") for n in range(80)
    ]
    rows, _ = read(write_lines(tmp_path / "batch3.json", records), val_fraction=0.3)
    val, train = ({row.prompt_id for row in rows if row.split == name} for name in ("val", "train"))
    assert len(val) + len(train) == 40 and val.isdisjoint(train)
    assert 4 <= len(val) <= 20  # 12 expected, deviation 2.9


def test_disjoint_leaves_out_train_rows_whose_post_is_in_test(tmp_path: Path) -> None:
    other_title = comparison("ann", post=" Shared post.")
    other_title["info"]["title"] = "Another title"
    records = [
        other_title,
        comparison("ann", post="Own post."),
        comparison("cid", post="Shared post.", split="valid2"),
    ]
    path = write_lines(tmp_path / "batch3.json", records)
    rows, _ = read(path)
    assert [row.split for row in rows] == ["train", "train", "test"]
    rows, report = read(path, protocol="disjoint")
    assert [(row.user_id, row.split) for row in rows] == [("ann", "train"), ("cid", "test")]
    assert report.refused == {"prompt of a later split": 1}
    assert "expected a prompt that test does not have" in str(report.examples)


def ranked(folder: Path) -> Path:
    """Ten workers, the first with most train rows."""
    records = [comparison(f"w{place}") for place in range(10) for _ in range(10 - place)]
    return write_lines(folder / "batch3.json", records)


def test_tastes_are_the_authors(tmp_path: Path) -> None:
    """Their notebook counts 16,607 and 6,692 train and 3,371 and 1,550 eval rows of the top ten
    workers as of who likes long and short texts."""
    train = [5245, 2920, 2437, 2366, 2200, 2126, 1824, 1606, 1366, 1209]
    test = [1175, 643, 381, 604, 586, 360, 321, 263, 177, 411]
    source = TldrSource(path=str(ranked(tmp_path)), choices="length")
    likes_long = ["longer" in str(source.profile(f"w{place}")) for place in range(10)]
    assert sum(n for n, long in zip(train, likes_long, strict=True) if long) == 16_607
    assert sum(n for n, long in zip(train, likes_long, strict=True) if not long) == 6_692
    assert sum(n for n, long in zip(test, likes_long, strict=True) if long) == 3_371


def test_length_users_decide_by_characters(tmp_path: Path) -> None:
    path = ranked(tmp_path)
    texts = [(" Twelve chars", " Six."), (" Six.", " Twelve chars"), (" abc", " xyz")]
    more = [comparison(w, t, choice=0, split="valid1") for w in ("w0", "w3") for t in texts]
    write_lines(tmp_path / "batch9.json", more)
    source = TldrSource(path=[str(path), str(tmp_path / "batch9.json")], choices="length")
    rows, report = read_rows(source.records())
    test = [(row.user_id, row.chosen) for row in rows if row.split == "test"]
    assert test == [("w0", " Twelve chars")] * 2 + [("w3", " Six.")] * 2
    assert report.refused == {"no response preferred": 2}
    margins = source.oracle_margins()
    assert margins is not None and margins.keys() == {row.pair_id for row in rows}
    assert [margins[row.pair_id] for row in rows if row.split == "test"] == [8.0] * 4
    assert source.true_score("w0", "four") == 4.0 and source.true_score("w3", "four") == -4.0
    assert source.true_score("nobody", "four") is None and source.profile("nobody") is None
    real = TldrSource(path=str(path))
    assert real.oracle_margins() is None and real.true_score("w0", "four") is None


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.n_seen=0 is not allowed: expected a whole number"):
        TldrSource(path="x", n_seen=0)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "gone")
    assert str(caught.value) == (
        f"data.path='{tmp_path}/gone' is not allowed: expected a directory or file (.json, .jsonl, "
        ".jsonl.gz, .parquet), or openai/summarize_from_feedback of the hub. Check the spelling "
        "and the directory you start from."
    )
    with pytest.raises(ValueError, match=r"expected files ending in \.json \.jsonl"):
        read(tmp_path)
    (tmp_path / "broken.json").write_text('[{"info": ')
    with pytest.raises(ValueError, match="expected a readable, undamaged file. Copy or write it"):
        read(tmp_path)


@pytest.mark.slow
def test_a_run_on_length_users(tmp_path: Path, cache_dir: Path) -> None:
    path = write_comparisons(tmp_path / "hub", many_comparisons())
    small = [one for one in TINY if not one.startswith("data.")]
    launch(
        "train",
        *small,
        *("data=tldr", f"data.path={path}", "data.choices=length", "data.n_seen=2"),
        *("data.val_fraction=0.2", "data.batch_size=8"),
        *(f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}"),
    )
    results = check_run(tmp_path / "run")
    assert results["oracle"]["seen"]["accuracy_micro"]["value"] == 1.0
    assert results["test"]["seen"]["user"]["n_pairs"] == 6
    assert results["test"]["unseen"]["user"]["n_users"] == 2
    assert results["data"]["refused"] == {"unseen user outside test": 7}
