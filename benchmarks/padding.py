"""How much of a batch is padding: at random, with rows put together, and with pairs of like length.

    python benchmarks/padding.py ROWS.jsonl.gz ... --tokenizer DIR

The shares are of an epoch's train batches, `prompt | chosen | rejected` in a row, and nothing is
trained. Beside the files given stands TL;DR as
method.md describes it, by drawn lengths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from plrhf.backbone.loading import load_tokenizer
from plrhf.core.row_packing import first_fit_decreasing
from plrhf.data.module import PreferenceData
from plrhf.data.samplers import PairSampler
from plrhf.data.sources.jsonl import JsonlSource


def of_file(path: Path, tokenizer: str) -> NDArray[np.int64]:
    """Tokens of the train pairs' rows, [N, 1]."""
    source = JsonlSource(path=str(path))
    data = PreferenceData(source=source, seed=0, batch_size=1, eval_batch_size=1)
    data.tokenize(load_tokenizer(tokenizer), layout="packed")
    return data.datasets["train"].row_lengths()


def like_tldr(n_pairs: int = 60_000) -> NDArray[np.int64]:
    """Prompts of 350 tokens and summaries of 35, give or take a third, [N, 1]."""
    draw = np.random.default_rng(0)
    prompt = draw.normal(350, 115, n_pairs).clip(50, 550)
    responses = draw.normal(35, 12, (2, n_pairs)).clip(8, 90)
    return (prompt + responses.sum(axis=0)).astype(np.int64)[:, None]


def put_together(batches: PairSampler) -> float:
    """Share of padding in what the trunk reads of the first epoch, where it puts short rows together."""
    n_read = n_text = 0
    for places, *_ in batches:
        lengths = batches.lengths[places, 0].tolist()
        n_read += len(first_fit_decreasing(lengths, max(lengths))) * max(lengths)
        n_text += sum(lengths)
    return 1 - n_text / n_read


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32])
    args = parser.parse_args()
    lengths = {path.name: of_file(path, args.tokenizer) for path in args.files}
    lengths["like TL;DR"] = like_tldr()
    columns = ("rows", "train pairs", "tokens a pair", "pairs a batch", "at random", "put together")
    table = Table(*columns, "by length")
    for name, of_pairs in lengths.items():
        mean, longest = float(of_pairs.mean()), int(of_pairs.max())
        for size in args.pairs:
            at_random = PairSampler(of_pairs, batch_size=size, seed=0)
            by_length = PairSampler(
                of_pairs, batch_size=10**6, batch_tokens=round(size * mean), seed=0
            )
            found = (at_random.padding(), put_together(at_random), by_length.padding())
            shares = (f"{100 * one:.1f}%" for one in found if one is not None)
            spread = f"{mean:.0f} (at most {longest})"
            table.add_row(name, f"{len(of_pairs):,}", spread, str(size), *shares)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
