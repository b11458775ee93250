"""Rows of the public sets of people's judgments, from small files in the sources' own formats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from runs import composed

from plrhf.cli.convert_rows import convert_rows
from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource

PAIR = """<?xml version="1.0"?>
<list>
  <annotatedArgumentPair>
    <id>arg1_arg2</id>
    <arg1><author>x</author><stance>Pro-Tea</stance><text>Tea is &amp; was.</text><id>arg1</id></arg1>
    <arg2><author>y</author><stance>Pro-Tea</stance><text>Tea!</text><id>arg2</id></arg2>
    <debateMetaData><title>Tea</title><description>Hot or not?</description></debateMetaData>
    <mTurkAssignments>
      <mTurkAssignment><turkID>A1</turkID><value>a2</value><reason>r</reason></mTurkAssignment>
      <mTurkAssignment><turkID>A2</turkID><value>equal</value></mTurkAssignment>
      <mTurkAssignment><turkID>A3</turkID><value>a1</value></mTurkAssignment>
    </mTurkAssignments>
  </annotatedArgumentPair>
</list>
"""


def converted(source: str, path: Path, out: Path) -> list[Any]:
    convert_rows(composed(f"source={source}", f"path={path}", f"out={out}", config="convert"))
    rows, report = read_rows(JsonlSource(path=str(out)).records())
    assert report.refused == {}
    return list(rows)


def test_ukpconvarg1(tmp_path: Path) -> None:
    folder = tmp_path / "xml"
    folder.mkdir()
    for name in ("ban-tea_pro", "is-porn-wrong-_no", "tv-is-better-than-books_tv"):
        (folder / f"{name}.xml").write_text(PAIR)
    rows = converted("ukpconvarg1", folder, tmp_path / "rows.jsonl.gz")
    prompt = "Tea. Hot or not?\nStance: Pro Tea\nWrite a convincing argument."
    assert {row.prompt for row in rows} == {prompt}
    assert [(row.user_id, row.chosen, row.rejected) for row in rows[:2]] == [
        ("A1", "Tea!", "Tea is & was."),
        ("A3", "Tea is & was.", "Tea!"),
    ]
    assert Counter(row.split for row in rows) == {"train": 2, "val": 2, "test": 2}
    with pytest.raises(ValueError, match=r"^path=.*UKPConvArg1-full-XML"):
        converted("ukpconvarg1", tmp_path, tmp_path / "rows.jsonl")


def test_llmfao(tmp_path: Path) -> None:
    (tmp_path / "crowd-comparisons.csv").write_text(
        "id,prompt,model_x,model_y,worker,winner,left,right\n"
        "0,8,97,98,58,tie,Air,Weaver\n0,8,97,98,59,right,Air,Weaver\n"
        "0,8,97,98,60,left,Air,Weaver\n1,8,97,99,60,left,Air,Mute\n"
    )
    (tmp_path / "pairs-crowd.jsonl").write_text(
        '{"id":0,"prompt":8,"text":"A haiku.","type":"reflexion","slug":"k8s","note":null,'
        '"model_x":97,"result_x":"\\nOne\\n","model_y":98,"result_y":"Two"}\n'
        '{"id":1,"prompt":8,"text":"A haiku.","model_x":97,"result_x":"One","model_y":99,"result_y":""}\n'
    )
    rows = converted("llmfao", tmp_path, tmp_path / "rows.jsonl")
    assert [(row.user_id, row.chosen, row.rejected_id) for row in rows] == [
        ("w59", "Two", "97"),
        ("w60", "One", "98"),
    ]
    assert rows[0].prompt == "A haiku." and rows[0].prompt_id == "p8"
    assert rows[0].split == rows[1].split


@pytest.mark.slow
def test_polis(tmp_path: Path) -> None:
    n_statements, n_voters = 60, 30
    header = "timestamp,datetime,comment-id,author-id,agrees,disagrees,moderated,comment-body"
    comments = [
        f'1,Wed,{n},0,1,1,{-1 if n == 7 else 1},"Statement, {n}"' for n in range(n_statements)
    ]
    (tmp_path / "comments.csv").write_text("\n".join([header, *comments]) + "\n")
    names = ",".join(map(str, range(n_statements)))
    lines = [f"participant,group-id,n-comments,n-votes,n-agree,n-disagree,{names}"]
    for voter in range(n_voters):
        votes = [("1", "-1", "0", "")[(voter + 3 * n) % 4] for n in range(n_statements)]
        lines.append(f"{voter},,0,0,0,0,{','.join(votes)}")
    (tmp_path / "participants-votes.csv").write_text("\n".join(lines) + "\n")
    rows = converted("polis", tmp_path, tmp_path / "rows.jsonl")
    votes_of: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        assert row.chosen == f"Statement, {row.chosen_id}" and row.chosen_id and row.rejected_id
        user = int(row.user_id)
        assert (user + 3 * int(row.chosen_id)) % 4 == 0 and (
            user + 3 * int(row.rejected_id)
        ) % 4 == 1
        assert "7" not in (row.chosen_id, row.rejected_id)
        for statement in (row.chosen_id, row.rejected_id):
            votes_of.setdefault((row.user_id, statement), set()).add(str(row.split))
    assert all(len(splits) == 1 for splits in votes_of.values())  # a vote is in one split
    per_user = Counter((row.user_id, row.split) for row in rows)
    assert max(count for (_, split), count in per_user.items() if split == "train") == 60
    assert max(count for (_, split), count in per_user.items() if split == "test") <= 30
    with pytest.raises(ValueError, match=r"^path=.*comments.csv"):
        converted("polis", tmp_path / "nowhere", tmp_path / "rows.jsonl")
