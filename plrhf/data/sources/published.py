"""Makes rows of three public sets of people's judgments, from their files as they are published.

The rows can be read by ``data=jsonl``. All three are CC BY 4.0; users' ids are those of the sources.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from plrhf.core.errors import bad_value
from plrhf.data.split_by import uniform_hash

Rows = Iterator[dict[str, Any]]

POLIS_PROMPT = "Write one statement for the people of this conversation to agree or disagree with."
POLIS_SHARES = {"test": 0.25, "val": 0.1, "train": 0.65}  # of a user's votes
POLIS_MOST_PAIRS = {"train": 60, "val": 10, "test": 30}  # of a user
LLMFAO_SHARES = {"test": 0.22, "val": 0.13, "train": 0.65}  # of pairs of answers
UKP_DEBATES = {
    "val": ("india-has-the-potential", "is-porn-wrong"),
    "test": ("christianity-or-atheism", "if-your-spouse-committed", "tv-is-better-than-books"),
}
"""How the debates begin that are not in train, by file name."""


def polis(directory: Path) -> Rows:
    """Make rows of a conversation of github.com/compdemocracy/openData, from two of its files.

    Each user's votes are divided by a hash. Of two statements of one split, the one that the user agrees
    with is chosen and one that they disagree with rejected, at most `POLIS_MOST_PAIRS` times.

    Args:
        directory: of ``comments.csv`` and ``participants-votes.csv``.
    """
    texts = {
        one["comment-id"]: one["comment-body"].strip()
        for one in _table(directory / "comments.csv")
        if one["moderated"] == "1"
    }
    for voter in _table(directory / "participants-votes.csv"):
        user = voter["participant"]
        votes: dict[tuple[str, str], list[str]] = defaultdict(list)
        for statement in texts:
            if voter.get(statement) in ("1", "-1"):
                split = _drawn(f"{user} {statement}", "vote", POLIS_SHARES)
                votes[split, voter[statement]].append(statement)
        for split, most in POLIS_MOST_PAIRS.items():
            pairs = [*product(votes[split, "1"], votes[split, "-1"])]
            pairs.sort(key=lambda pair: uniform_hash(f"{user} {pair}", salt="pair", seed=0))
            for agreed, disagreed in pairs[:most]:
                yield {
                    "prompt": POLIS_PROMPT,
                    "chosen": texts[agreed],
                    "rejected": texts[disagreed],
                    "user_id": user,
                    "chosen_id": agreed,
                    "rejected_id": disagreed,
                    "split": split,
                }


def llmfao(directory: Path) -> Rows:
    """Make rows of github.com/dustalov/llmfao: crowd workers choosing the better of two answers.

    Ties, and pairs with an empty answer, are left out. A pair is in one split, whoever judged it.

    Args:
        directory: of ``crowd-comparisons.csv`` and ``pairs-crowd.jsonl``.
    """
    with _opened(directory / "pairs-crowd.jsonl") as file:
        pairs = {str(one["id"]): one for one in map(json.loads, file)}
    for judged in _table(directory / "crowd-comparisons.csv"):
        if judged["winner"] == "tie":
            continue
        pair = pairs[judged["id"]]
        sides = ("x", "y") if judged["winner"] == "left" else ("y", "x")
        chosen, rejected = (pair[f"result_{side}"].strip() for side in sides)
        if chosen == "" or rejected == "":
            continue
        chosen_id, rejected_id = (str(pair[f"model_{side}"]) for side in sides)
        yield {
            "prompt": pair["text"],
            "chosen": chosen,
            "rejected": rejected,
            "user_id": f"w{judged['worker']}",
            "prompt_id": f"p{pair['prompt']}",
            "chosen_id": chosen_id,
            "rejected_id": rejected_id,
            "split": _drawn(judged["id"], "pair of answers", LLMFAO_SHARES),
        }


def ukpconvarg1(directory: Path) -> Rows:
    """Make rows of UKPConvArg1: crowd workers choosing the more convincing of two arguments.

    Pairs that a worker found equal are left out. A debate is in one split.

    Args:
        directory: ``data/UKPConvArg1-full-XML`` of github.com/UKPLab/acl2016-convincing-arguments.
    """
    files = sorted(directory.glob("*.xml"))
    if len(files) == 0:
        cure = "Give the folder of its XML files"
        raise bad_value("path", str(directory), "a folder of UKPConvArg1-full-XML", cure)
    for file in files:
        split = next(
            (name for name, begins in UKP_DEBATES.items() if file.name.startswith(begins)), "train"
        )
        for _, pair in ElementTree.iterparse(file):
            if pair.tag != "annotatedArgumentPair":
                continue
            texts = {f"a{n}": _said(pair, f"arg{n}/text") for n in (1, 2)}
            title, about = (
                _said(pair, f"debateMetaData/{name}") for name in ("title", "description")
            )
            stance = _said(pair, "arg1/stance").replace("-", " ")
            for one in pair.iterfind("mTurkAssignments/mTurkAssignment"):
                value = _said(one, "value")
                if value in texts:
                    yield {
                        "prompt": f"{title}. {about}\nStance: {stance}\nWrite a convincing argument.",
                        "chosen": texts[value],
                        "rejected": texts["a2" if value == "a1" else "a1"],
                        "user_id": _said(one, "turkID"),
                        "split": split,
                    }
            pair.clear()


PUBLISHED: dict[str, Callable[[Path], Rows]] = {
    "polis": polis,
    "llmfao": llmfao,
    "ukpconvarg1": ukpconvarg1,
}


def _drawn(key: str, salt: str, shares: dict[str, float]) -> str:
    """Draw a split by a hash, with these probabilities."""
    place = uniform_hash(key, salt=salt, seed=0)
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return split


def _said(element: ElementTree.Element, path: str) -> str:
    """Return the text below an XML element."""
    return (element.findtext(path) or "").strip()


def _opened(path: Path) -> Any:
    """Open a text file of a source.

    Raises:
        ValueError: it is missing.
    """
    if not path.is_file():
        cure = "Give the folder in which the source publishes it"
        raise bad_value("path", str(path), "a file of the source", cure)
    return path.open(encoding="utf-8", newline="")


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of a CSV file by column name."""
    with _opened(path) as file:
        yield from csv.DictReader(file)
