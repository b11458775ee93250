"""Whole files and folders: what dead writers left is removed, and no link is written through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plrhf.core import files
from plrhf.core.files import (
    check_new,
    open_to_append,
    remove_abandoned_parts,
    temporary_folder,
    whole_file,
)


def test_a_folder_that_a_killed_writer_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"tiny.{'0' * 32}.part"
    left.mkdir()
    (left / "model").write_text("half")
    with temporary_folder(tmp_path, "tiny") as part:
        (part / "model").write_text("half")
        assert left.is_dir()  # as if its writer had just begun
        monkeypatch.setattr(files, "ABANDONED_AFTER", -1.0)
        remove_abandoned_parts(tmp_path)
        assert part.is_dir() and not left.exists()  # this writer is alive
    assert list(tmp_path.iterdir()) == []
    with temporary_folder(tmp_path, "tiny") as part:
        os.rename(part, tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny"]


def test_no_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r"link='a symbolic link' is not allowed"):
        open_to_append(link, mode="a")
    abandoned = tmp_path / f"a.{'0' * 32}.part"
    abandoned.symlink_to(target)
    with whole_file(link) as part:
        part.write_text("new")
    assert target.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()


def test_a_new_folder_is_one_without_anything_in_it(tmp_path: Path) -> None:
    check_new("out", tmp_path / "none")
    check_new("out", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for wrong in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"^out=.* a folder that is empty or not there"):
            check_new("out", wrong)
