"""Work divided among processes, one a core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_inherited: Callable[[Any], Any]


def n_cores() -> int:
    """Return the number of cores that this process may use; processes that torchrun started share them.

    It is 1 where a process can't be copied as it is: on Windows and macOS, and in a daemon.
    """
    copies = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if not copies:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], n_processes: int
) -> Iterator[Result]:
    """Yield `function` of each item, in the order of the items, computed by copies of this process.

    The copies inherit the function and all that it holds; items and results alone are pickled. With one
    process, nothing is copied.

    Raises:
        Exception: what `function` raises, of the first item for which it does.
        concurrent.futures.process.BrokenProcessPool: a copy was killed, for example for memory.
    """
    if n_processes == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        n_processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(function,),
    ) as pool:
        with _no_threads_of_tokenizers():
            results = pool.map(_call, items)  # copies are made here
        yield from results


@contextmanager
def _no_threads_of_tokenizers() -> Iterator[None]:
    """Processes made inside tokenise by one thread each: the threads of their parent are not copied."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _begin(function: Callable[[Any], Any]) -> None:
    """Keep what the parent process calls; Ctrl-C is the parent's affair."""
    global _inherited
    _inherited = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(item: Any) -> Any:
    """Call the inherited function."""
    return _inherited(item)
