"""Files of the cache: whole or not there, found damaged, and nothing half left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plrhf.core import files
from plrhf.core.files import remove_abandoned_parts, whole_file
from plrhf.data import cache_files, store
from plrhf.data.cache_files import (
    BLOCK_BYTES,
    CachedArrays,
    DamagedFile,
    cache_file,
    cached,
    is_whole,
)
from plrhf.data.store import TextTable

FULL = Path("/dev/full")  # on which every write ends as on a full disk


def by_python(path: Path) -> None:
    path.write_bytes(b"some")


def by_arrow(path: Path) -> None:
    with arrow.OSFile(str(path), "wb") as file:
        file.write(b"some")


def by_words(path: Path) -> None:
    """As libraries in Rust do: the system's words, but neither its number nor its class."""
    try:
        path.write_bytes(b"some")
    except OSError as error:
        words = f"I/O error: {error.strerror} (os error {error.errno})"
    raise RuntimeError(words)


IDS = np.arange(3 * BLOCK_BYTES, dtype=np.uint16)  # of 6 blocks
TABLE = np.arange(33, dtype=np.int32).reshape(11, 3)


def write(folder: Path, stem: str = "one") -> Path:
    """Write three arrays, the first one in parts."""
    with cache_file(folder, stem) as file:
        for start in range(0, len(IDS), 9_999):
            file.add("ids", IDS[start : start + 9_999])
        file.add("table", TABLE)
        file.add("empty", np.empty((0, 2)))
    (path,) = folder.glob(f"{stem}-*.arrays")
    return path


def read_all(file: CachedArrays) -> Any:
    return [file[name][:] for name in ("ids", "table", "empty")]


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    with cache_file(folder, "one") as file:
        file.add("whole", np.arange(5))
        assert cached(folder, "one", read_all) == []
    (path,) = folder.iterdir()
    (found,) = cached(folder, "one", lambda one: one["whole"][:])
    assert found.tolist() == [0, 1, 2, 3, 4] and is_whole(path)
    with cache_file(folder, "one") as file:  # the same again stays one file
        file.add("whole", np.arange(5))
    assert list(folder.iterdir()) == [path]
    assert cached(folder, "on", read_all) == []


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    write(tmp_path)
    ((ids, table, empty),) = cached(tmp_path, "one", read_all)
    assert (ids == IDS).all() and (table == TABLE).all() and empty.shape == (0, 2)
    assert (ids.dtype, table.dtype, empty.dtype) == (IDS.dtype, TABLE.dtype, np.dtype("float64"))
    (file,) = cached(tmp_path, "one", lambda one: one)
    assert file["ids"][5:5].shape == (0,) and file["ids"][9_990:10_010].tolist() == [
        *range(9_990, 10_010)
    ]
    assert file["table"][np.array([10, 2, 2])].tolist() == TABLE[[10, 2, 2]].tolist()
    assert file["empty"][np.array([], np.int64)].shape == (0, 2)


def test_each_block_is_hashed_once_and_only_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed = write(tmp_path), []
    digest_of = cache_files.blake2b

    def counted(content: Any = b"", **how: Any) -> Any:
        hashed.append(len(content))
        return digest_of(content, **how)

    monkeypatch.setattr(cache_files, "blake2b", counted)
    file = CachedArrays(path)
    assert hashed == [path.stat().st_size - IDS.nbytes - TABLE.nbytes]  # what follows the arrays
    assert hashed.pop() < 300
    per_block = BLOCK_BYTES // 2
    for rows, n_blocks in [
        (slice(0, 3), 1),
        (slice(0, per_block), 0),
        (slice(per_block - 1, per_block + 1), 1),
        (np.array([5 * per_block, 4, 5 * per_block + 9]), 1),
        (slice(0, None), 3),
        (np.arange(len(IDS)), 0),
    ]:
        file["ids"][rows]
        assert hashed == [BLOCK_BYTES] * n_blocks, rows
        hashed.clear()
    file["table"][:]
    assert hashed == [TABLE.nbytes]


def flip(path: Path, place: int) -> None:
    """Flip a bit of a file, also of one that is mapped already."""
    with path.open("r+b") as file:
        file.seek(place // 8)
        (byte,) = file.read(1)
        file.seek(place // 8)
        file.write(bytes([byte ^ 1 << place % 8]))


N_BITS = 8 * (IDS.nbytes + TABLE.nbytes)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_file_with_a_flipped_bit_is_not_read(data: Any) -> None:
    """A bit of the arrays, or of what follows them, which is small."""
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name))
        end = st.integers(N_BITS, 8 * path.stat().st_size - 1)
        flip(path, data.draw(st.one_of(st.integers(0, N_BITS - 1), end)))
        assert cached(Path(name), "one", read_all) == [] and not path.exists()


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 8 * IDS.nbytes - 1))
def test_a_bit_that_flips_later_stops_the_reading_of_its_block_alone(place: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name))
        file = CachedArrays(path)
        flip(path, place)
        block = place // 8 // BLOCK_BYTES
        before, after = block * BLOCK_BYTES // 2, (block + 1) * BLOCK_BYTES // 2
        assert (file["ids"][:before] == IDS[:before]).all()
        assert (file["ids"][after:] == IDS[after:]).all() and (file["table"][:] == TABLE).all()
        for rows in (slice(place // 16, None), np.array([0, place // 16])):
            with pytest.raises(DamagedFile, match="one-.*='damaged' is not .* Repeat the command"):
                file["ids"][rows]
        assert not path.exists() and cached(Path(name), "one", read_all) == []


@pytest.mark.parametrize(
    "change", [lambda bits: bits[:-1], lambda bits: bits + b"x", lambda bits: b""]
)
def test_a_file_of_another_size_is_not_opened(
    change: Callable[[bytes], bytes], tmp_path: Path, capsys: Any
) -> None:
    path = write(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert cached(tmp_path, "one", lambda one: one) == [] and not path.exists()
    assert capsys.readouterr().out == f"damaged and removed, to be made anew: {path}\n"
    path = write(tmp_path).rename(tmp_path / f"one-{0:032}.arrays")  # of other content, by its name
    assert not is_whole(path) and not path.exists()


def test_files_of_other_versions_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"one-{0:032}.arrow"
    other.write_bytes(b"of another form")
    assert cached(tmp_path, "one", lambda one: one) == [] and other.exists()
    write(tmp_path)
    assert len(cached(tmp_path, "one", lambda one: one)) == 1 and other.exists()


@pytest.mark.parametrize("write", [by_python, by_arrow, by_words])
def test_a_full_disk_is_one_clear_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, cache_file(tmp_path, "one") as file:
        file.add("half", TABLE)
        write(FULL)
    assert str(caught.value) == (
        f"cache_dir={str(tmp_path)!r}"[:86] + " is not allowed: expected a disk that is not full. "
        "Free some space, or set cache_dir to a directory on a larger disk."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_of_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SpooledTemporaryFile", lambda **_: FULL.open("wb", buffering=0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"^TMPDIR=.* a disk that is not full\. .*set TMPDIR"):
        TextTable(("one",), iter([[("text",)]]))


@pytest.mark.parametrize("error", [KeyError("a"), KeyboardInterrupt(), OSError(5, "broken")])
def test_other_errors_stay_and_leave_no_half_file(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, cache_file(tmp_path, "one") as file:
        file.add("half", TABLE)
        raise error
    assert caught.value is error and list(tmp_path.iterdir()) == []


def test_half_files_of_dead_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
import numpy as np
from plrhf.data.cache_files import cache_file
with cache_file(Path({str(tmp_path)!r}), "dead") as file:
    file.add("half", np.ones(9))
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (dead,) = tmp_path.iterdir()
    fresh = dead.with_name(dead.name.replace("dead", "fresh"))
    written = dead.with_name(dead.name.replace("dead", "written"))
    foreign = tmp_path / "their.part"
    for path in (fresh, written, foreign):
        path.write_bytes(b"half")
    long_ago = dead.stat().st_mtime - files.ABANDONED_AFTER - 1
    for path in (dead, written, foreign):
        os.utime(path, (long_ago, long_ago))
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a writer holds it
        remove_abandoned_parts(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, written, foreign}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.symlink_to(tmp_path / "elsewhere")
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("first, and long")
        other.write_text("second")
    assert path.read_text() == "first, and long" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), whole_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "first, and long" and list(tmp_path.iterdir()) == [path]
