"""Files of torch.save: no flipped bit is used, and what is no file is not waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from plrhf.core.torch_files import DAMAGED, load_checked


def test_no_flipped_bit_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"weight": torch.arange(40.0), "name": "ann"}, path)
    whole, n_found = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = load_checked(path)
        except DAMAGED:
            n_found += 1
            continue
        assert found["weight"].tolist() == list(range(40)) and found["name"] == "ann", place
    assert n_found > 40


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError):
        load_checked(tmp_path / "a.ckpt")
