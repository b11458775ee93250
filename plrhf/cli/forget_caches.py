"""Removes a person from caches: tokens of rows, values of texts, and replies of chat endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from plrhf.backbone.loading import load_tokenizer
from plrhf.cli.assemble import print_lines
from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.core.errors import BadValue, bad_value
from plrhf.data.in_context import row_tokenizer
from plrhf.data.rows import Rows
from plrhf.data.text_value_cache import remove_texts, text_keys
from plrhf.data.text_values import ResponseTexts
from plrhf.data.tokenizer import RowTokenizer
from plrhf.data.tokens import load_or_tokenize, token_stem
from plrhf.evaluation.chat_endpoint import remove_replies
from plrhf.evaluation.judges import JudgedRun
from plrhf.evaluation.records import read_record
from plrhf.models.card import read_card


def forget_in_caches(
    run: Path, user: str, cache_dir: Path, *, trust_components: bool
) -> Iterator[str]:
    """Remove a person from the caches of a run; yield a line for each removal, and print what stays.

    Values of texts are removed of this person alone, but for texts that others of the rows judged too.
    """
    yield from _forget_replies(cache_dir, user)
    try:
        rows, tokenizer = _rows_of(run, user, trust_components=trust_components)
    except BadValue as error:
        stays = f"remove tokens-* and texts-* in {cache_dir}, which are made anew when needed"
        print_lines([f"not removed: tokens and values of texts ({error}); {stays}"])
        return
    if any(cache_dir.glob("texts-*")):  # else rows need not be tokenised to find their texts
        keys = _own_text_keys(rows, tokenizer, user, cache_dir)
        for path, n_removed in remove_texts(cache_dir, keys):
            yield f"values of {n_removed:,} texts that nobody else judged, in {path}"
    stem = token_stem(rows, tokenizer)
    for path in cache_dir.glob(f"{stem}-*") if stem is not None else ():
        path.unlink()
        yield f"tokens of all {len(rows):,} rows of the run in {path}: they are made anew when needed"


def replies_elsewhere(run: Path, cache_dir: Path | None) -> list[str]:
    """Return the files of replies that the run's judges wrote to and `forget_in_caches` does not read."""
    read = set() if cache_dir is None else {path.resolve() for path in cache_dir.glob("*.jsonl")}
    judges = [read_record(path, JudgedRun).judge for path in sorted(run.rglob("winrate.json"))]
    found = {str(judge["cache"]) for judge in judges if "cache" in judge}
    return sorted(one for one in found if Path(one).is_file() and Path(one).resolve() not in read)


def _forget_replies(cache_dir: Path, user: str) -> Iterator[str]:
    """Remove what chat endpoints said of a person from the files of replies in a cache."""
    for path in sorted(cache_dir.glob("*.jsonl")):
        if path.is_symlink():
            continue
        n_removed, n_unnamed = remove_replies(path, user)
        if n_removed > 0:
            yield f"{n_removed:,} replies in {path}"
        if n_unnamed > 0:
            why = "written before replies noted of whom they are; remove the file, to ask all again"
            print_lines([f"not removed: {n_unnamed:,} replies in {path}, {why}"])


def _rows_of(run: Path, user: str, *, trust_components: bool) -> tuple[Rows, RowTokenizer]:
    """Return the rows whose tokens a run's cache holds, and their tokenizer.

    Raises:
        ValueError: they cannot be found any more.
    """
    trained = RunConfig.of_run(run, trust_components=trust_components)
    data = build_data(trained.data)
    rows = data.rows.select(data.splits.counted)
    options = read_card(run / "export").text
    if "context_pairs" in options:
        cure = "The tokens of such runs also hold pairs in front of prompts"
        raise bad_value("data.context_pairs", options["context_pairs"], "none", cure)
    if user not in {one.user_id for one in rows.distinct_people()}:
        cure = "Forget first, and then take their rows away"
        raise bad_value("user", user, "a user of the rows, by which a cache is searched", cure)
    return rows, row_tokenizer(load_tokenizer(str(run / "export")), options)


def _own_text_keys(
    rows: Rows, tokenizer: RowTokenizer, user: str, cache_dir: Path
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the keys of the texts that are in this person's rows and in nobody else's."""
    numbers = [n for n, one in enumerate(rows.people) if one.user_id == user]
    is_own = np.isin(rows.person, numbers).repeat(2)
    tokens = load_or_tokenize(rows, tokenizer, cache_dir=cache_dir)
    keys = text_keys(ResponseTexts(tokens, np.arange(2 * len(rows))))
    return np.setdiff1d(keys[is_own], keys[~is_own])
