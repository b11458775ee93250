"""Twenty-nine rows of four users, and data modules over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plrhf.data.module import PreferenceData
from plrhf.data.sources.base import Source

SENTENCE = "write about the sea is blue wide and calm boats sail far away home ."
WORDS = SENTENCE.split()


def record(number: int, user: str, split: str, **more: Any) -> dict[str, Any]:
    """A row whose texts differ in length with its number."""
    return {
        "prompt": " ".join(WORDS[: 3 + number % 4]),
        "chosen": " ".join(WORDS[number % 5 : number % 5 + 1 + number % 7]),
        "rejected": " ".join(WORDS[7 : 9 + number % 3]) + " .",
        "user_id": user,
        "pair_id": f"{split}{number}",
        "split": split,
        **more,
    }


FEATURES = {"cat": {"age": 20, "sea": "north"}, "ann": {"age": 40, "sea": "north"}, "bob": {}}
RECORDS = [
    *(record(i, ("cat", "ann", "bob")[i % 3], "train") for i in range(17)),
    *(record(i, ("cat", "ann")[i % 2], "val") for i in range(5)),
    *(record(i, ("zoe", "bob", "ann")[i % 3], "test") for i in range(7)),
]
for one in RECORDS:
    one["user_features"] = FEATURES.get(one["user_id"], {"age": 30, "sea": "west"})


class ListSource(Source):
    def __init__(self, *, records: Any = RECORDS) -> None:
        self.rows = records

    def records(self) -> Iterator[Any]:
        return ((f"list:{number}", one) for number, one in enumerate(self.rows, 1))


def make_data(tokenizer: Any, *, records: Any = RECORDS, causal: bool = True, **more: Any) -> Any:
    settings = {"seed": 3, "batch_size": 4, "eval_batch_size": 3, **more}
    data = PreferenceData(source=ListSource(records=records), **settings)
    data.tokenize(tokenizer, layout="packed" if causal else "two_rows")
    return data


def served(loader: Any) -> list[list[int]]:
    return [batch.row.tolist() for batch in loader]
