"""Damaged files: fuzzed rows, and single flipped bits in every kind of file that is read.

    FAULTS=full python -m pytest tests/faults -s

prints what was tried: this, and what the other modules of this folder try. Without FAULTS=full it is less.
"""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_rows import bombs, fuzz, fuzz_forms
from sizes import size
from torch import Tensor

from plrhf.core.errors import BadValue
from plrhf.data.cache_files import BLOCK_BYTES, cache_file, cached
from plrhf.evaluation.generations import read_generations
from plrhf.evaluation.records import read_record, read_settings
from plrhf.evaluation.results import read_metrics, read_results
from plrhf.evaluation.users import LearnedUsers
from plrhf.models.card import read_card
from plrhf.models.export import check_files
from plrhf.reporting.runs import read_run
from plrhf.training.checkpoints import read_checkpoint

FLIPS = size(8, 25)
"""Bits that are flipped in each file."""


@pytest.mark.slow
def test_no_row_is_lost_and_no_file_crashes(tmp_path: Path) -> None:
    found = fuzz(tmp_path, size(300, 3_000), seed=7)
    print(f"\nrows: {found}")
    assert found.faults == []
    assert found.used > 2_000 and sum(found.refused.values()) > 200  # it does damage rows
    assert found.read == found.used + sum(found.refused.values())


@pytest.mark.slow
def test_no_record_of_any_form_crashes(tmp_path: Path) -> None:
    found = fuzz_forms(tmp_path, size(400, 3_000), seed=2)
    print(f"\nforms: {found}")
    assert found.faults == []
    assert sum(found.refused.values()) > 100


@pytest.mark.slow
def test_bombs_take_little_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = bombs(tmp_path, n_mib=size(20, 2_000))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\nbombs: {found}; {more:,.0f} MiB more")
    assert found.faults == [] and more < 500


def files_read(run: Path) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """Each file of a run, and what reads it; of an export, what compares it with its digest."""
    export = run / "export"
    yield run / "config.yaml", lambda: read_settings(run / "config.yaml")
    yield run / "results.json", lambda: read_results(run).model_dump()
    yield run / "predictions.parquet", lambda: read_run(run).predictions.to_dict()
    yield run / "metrics.csv", lambda: str(read_metrics(run))
    yield run / "users.json", lambda: read_record(run / "users.json", LearnedUsers).model_dump()
    yield run / "checkpoints/last.ckpt", lambda: read_checkpoint(run / "checkpoints/last.ckpt")
    texts = run / "generations.jsonl"
    if texts.is_file():
        yield texts, lambda: [one.model_dump() for one in read_generations(texts)]
    yield export / "plrhf.json", lambda: vars(read_card(export))
    for path in sorted(export.rglob("*")):
        if path.is_file() and path.name not in ("plrhf.json", "README.md"):
            yield path, lambda: check_files(export, read_card(export))


def plain(value: Any) -> Any:
    """The value with lists for tensors."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def outcome(read: Callable[[], Any]) -> str | None:
    """What was read, as text; None if it was refused in one line."""
    try:
        return repr(plain(read()))
    except BadValue as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reward_run", "policy_run"])
def test_no_flipped_bit_is_used_silently(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run, draw = tmp_path / "run", random.Random(3)
    shutil.copytree(request.getfixturevalue(which), run)
    silent, n_refused = [], 0
    for path, read in files_read(run):
        whole, before = path.read_bytes(), outcome(read)
        assert before is not None, path
        for _ in range(FLIPS):
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            after = outcome(read)
            n_refused += after is None
            by_digest = path.parent.name in ("export", "backbone") and path.name != "plrhf.json"
            if after is not None and (by_digest or after != before):
                silent.append(f"{path.name}, bit {bit} of byte {place}")
        path.write_bytes(whole)
    n_files = len(list(files_read(run)))
    print(f"\n{n_files * FLIPS} bits in {n_files} files of {which}; used silently: {len(silent)}")
    assert silent == []
    assert n_refused > 8 * FLIPS


def test_a_flipped_bit_in_a_cache_is_found(tmp_path: Path) -> None:
    draw = random.Random(5)
    for _ in range(FLIPS):
        with cache_file(tmp_path, "tokens") as file:
            file.add("ids", np.frombuffer(draw.randbytes(2 * BLOCK_BYTES), np.uint8))
        (path,) = tmp_path.iterdir()
        flipped = bytearray(path.read_bytes())
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert cached(tmp_path, "tokens", lambda one: one["ids"][:]) == []
        assert list(tmp_path.iterdir()) == []
