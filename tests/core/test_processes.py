"""Work divided among processes: the results of one process, errors too."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from plrhf.core.processes import map_in_processes, n_cores


@pytest.mark.parametrize("n_processes", [1, 2])
def test_results_come_in_the_order_of_the_items(n_processes: int) -> None:
    seen = []
    factor = [7]  # held by the function alone, which can't be pickled
    for one in map_in_processes(lambda n: (factor[0] * n, os.getpid()), range(40), n_processes):
        seen.append(one)
    assert [value for value, _ in seen] == [7 * n for n in range(40)]
    others = {process for _, process in seen} - {os.getpid()}
    assert len(others) == 0 if n_processes == 1 else 1 <= len(others) <= 2


@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_error_of_an_item_is_raised(n_processes: int) -> None:
    results = map_in_processes(lambda n: 1 // (3 - n), range(40), n_processes)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_killed_process_is_known() -> None:
    with pytest.raises(BrokenProcessPool):
        list(map_in_processes(lambda n: os.kill(os.getpid(), 9), range(4), 2))


@pytest.mark.slow
def test_the_setting_of_tokenizers_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TOKENIZERS_PARALLELISM"
    for before in ("true", None):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        assert list(map_in_processes(lambda _: os.environ[name], range(2), 2)) == ["false"] * 2
        assert os.environ.get(name) == before


def test_processes_that_torchrun_started_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert n_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert n_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert n_cores() == 1
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert n_cores() == 1
