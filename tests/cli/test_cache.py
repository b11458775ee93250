"""The commands on a cache: what it holds, what is damaged, what was used longest ago."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plrhf.cli import commands
from plrhf.cli.cache import entries
from plrhf.data.cache_files import cache_file, is_whole
from plrhf.data.digests import DIGESTS, is_intact, seal_folder


def make_cache(folder: Path) -> dict[str, Path]:
    """Two token files, values of texts, a tiny backbone; each used a day after the one before."""
    for stem, size in (("tokens-a", 1_000_000), ("tokens-b", 2_000_000)):
        with cache_file(folder, stem) as file:
            file.add("ids", np.zeros(size, np.uint8))
    with cache_file(folder / "texts-c", "values") as file:
        file.add("values", np.zeros(3_000_000, np.uint8))
    (folder / "tiny_gptj-d").mkdir()
    (folder / "tiny_gptj-d" / "model.safetensors").write_bytes(b"weights" * 100)
    seal_folder(folder / "tiny_gptj-d")
    (folder / "notes.txt").write_text("of the user's own")
    (folder / "tokens-link").symlink_to(folder / "notes.txt")
    found = {}
    for day, name in enumerate(("tokens-a", "tokens-b", "texts-c", "tiny_gptj-d")):
        (found[name],) = (one for one in folder.glob(f"{name}*") if not one.is_symlink())
        for path in (one for one in (found[name], *found[name].rglob("*")) if one.is_file()):
            os.utime(path, (1e9 + day * 86_400, 1e9 + day * 86_400))
    return found


def run(capsys: Any, action: str, *settings: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plrhf"])
        commands.run(f"cache {action}", settings)
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_what_a_cache_holds(tmp_path: Path, capsys: Any) -> None:
    make_cache(tmp_path)
    assert [one.path.name[:8] for one in entries(tmp_path)] == [
        "tokens-a",
        "tokens-b",
        "texts-c",
        "tiny_gpt",
    ]
    lines = run(capsys, "list", f"cache_dir={tmp_path}")
    assert lines[1].startswith("0.0 MB in 1 of tiny backbones")
    assert lines[2].startswith("3.0 MB in 2 of tokens of rows, one unused for ")
    assert lines[-1] == "6.0 MB in all"


@pytest.mark.slow
def test_what_is_damaged_is_removed(tmp_path: Path, capsys: Any) -> None:
    found = make_cache(tmp_path)
    assert run(capsys, "verify", f"cache_dir={tmp_path}") == ["4 of 4 entries are whole"]
    for name in ("tokens-b", "tiny_gptj-d"):
        path = found[name] if found[name].is_file() else found[name] / "model.safetensors"
        path.write_bytes(b"\x01" + path.read_bytes()[1:])
    lines = run(capsys, "verify", f"cache_dir={tmp_path}")
    assert lines[-1] == "2 of 4 entries are whole"
    assert not found["tokens-b"].exists() and not found["tiny_gptj-d"].exists()
    assert found["tokens-a"].exists() and (tmp_path / "notes.txt").exists()


@pytest.mark.slow
def test_what_was_used_longest_ago_goes_first(tmp_path: Path, capsys: Any) -> None:
    found = make_cache(tmp_path)
    lines = run(capsys, "prune", f"cache_dir={tmp_path}", "max_gb=0.0035")
    assert lines == [
        f"removed: {found['tokens-a']}, 1.0 MB",
        f"removed: {found['tokens-b']}, 2.0 MB",
        "3.0 MB left",
    ]
    assert found["texts-c"].exists() and found["tiny_gptj-d"].exists()
    run(capsys, "prune", f"cache_dir={tmp_path}", "max_gb=0")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["notes.txt", "tokens-link"]


@pytest.mark.slow
def test_what_a_run_is_writing_stays(tmp_path: Path, capsys: Any) -> None:
    for place, stem in (("", "tokens-a"), ("texts-c", "values")):
        cache = tmp_path / stem
        make_cache(cache)
        with cache_file(cache / place, stem) as file:
            file.add("half", np.zeros(5))
            assert run(capsys, "verify", f"cache_dir={cache}") == ["4 of 4 entries are whole"]
            run(capsys, "prune", f"cache_dir={cache}", "max_gb=0")
            file.add("other", np.ones(5))
        (path,) = (cache / place).glob(f"{stem}-*")
        assert is_whole(path)


@pytest.mark.slow
def test_prune_needs_a_size(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(capsys, "prune", f"cache_dir={tmp_path}")
    assert (
        "max_gb=None is not allowed: expected the size that may be left" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        run(capsys, "list", f"cache_dir={tmp_path}", "max_gb=3")
    assert "max_gb=3.0 is not allowed: expected null for cache list" in capsys.readouterr().err


def test_a_folder_is_intact_as_it_was_sealed(tmp_path: Path) -> None:
    folder = make_cache(tmp_path)["tiny_gptj-d"]
    assert is_intact(folder)
    for change in (
        lambda: (folder / "more.json").write_text("{}"),
        lambda: (folder / "model.safetensors").unlink(),
        lambda: (folder / DIGESTS).write_text("{}"),
        lambda: (folder / DIGESTS).unlink(),
    ):
        before = shutil.copytree(folder, tmp_path / "kept", dirs_exist_ok=True)
        change()
        assert not is_intact(folder)
        shutil.rmtree(folder)
        shutil.move(before, folder)
        assert is_intact(folder)
