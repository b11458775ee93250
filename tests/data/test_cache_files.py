"""Files of the cache: whole or not there, found damaged, and nothing half left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pytest

from plrhf.core import files
from plrhf.core.files import remove_abandoned_parts, whole_file
from plrhf.data import store
from plrhf.data.cache_files import cache_file, intact_files
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


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    with cache_file(folder, "one", ".bin") as part:
        part.write_bytes(b"whole")
        assert intact_files(folder, "one", ".bin") == []
    (path,) = intact_files(folder, "one", ".bin")
    assert path.read_bytes() == b"whole" and list(folder.iterdir()) == [path]
    with cache_file(folder, "one", ".bin") as part:  # the same again stays one file
        part.write_bytes(b"whole")
    assert list(folder.iterdir()) == [path]
    assert intact_files(folder, "on", ".bin") == intact_files(folder, "one", ".txt") == []


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    for place in range(40):
        with cache_file(tmp_path, "one", ".bin") as part:
            part.write_bytes(b"whole")
        (path,) = intact_files(tmp_path, "one", ".bin")
        bits = bytearray(path.read_bytes())
        bits[place // 8] ^= 1 << place % 8
        path.write_bytes(bits)
        assert intact_files(tmp_path, "one", ".bin") == [] and not path.exists()


@pytest.mark.parametrize("write", [by_python, by_arrow, by_words])
def test_a_full_disk_is_one_clear_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, cache_file(tmp_path, "one", ".bin") as part:
        part.write_bytes(b"half")
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
    with pytest.raises(type(error)) as caught, cache_file(tmp_path, "one", ".bin") as part:
        part.write_bytes(b"half")
        raise error
    assert caught.value is error and list(tmp_path.iterdir()) == []


def test_half_files_of_dead_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from plrhf.data.cache_files import cache_file
with cache_file(Path({str(tmp_path)!r}), "dead", ".bin") as part:
    part.write_bytes(b"half")
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
