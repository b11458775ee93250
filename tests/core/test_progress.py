"""What long work says of itself, with and without a terminal."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from plrhf.core.progress import Progress, with_progress


class Screen(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("plrhf.core.progress.LINE_EVERY", 0.0)
    work = with_progress("abc", "reading", total=3)
    assert next(work) == "a" and capsys.readouterr().out == ""
    assert next(work) == "b"
    assert capsys.readouterr().out.startswith("reading: 1 of 3 (33%), about 00:00 left")
    assert list(work) == ["c"]
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "reading: 3 of 3 (100%), about 00:00 left" and len(out) == 2
    assert list(with_progress(iter(range(2)), "rows")) == [0, 1]
    assert capsys.readouterr().out == "rows: 1 done\nrows: 2 done\n"


def test_the_time_left_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 parts 40 had been done before; 20 more took 30 seconds, so 40 take 60."""
    progress = Progress("training", total=100, initial=40)
    progress.n = 60
    progress.start_t = 1000.0
    monkeypatch.setattr(progress, "_time", lambda: 1030.0)
    assert progress.line() == "training: 60 of 100 (60%), about 01:00 left"


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert list(with_progress(range(5), "reading", total=5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert list(with_progress(range(5), "reading", total=5)) == [0, 1, 2, 3, 4]
    assert screen.getvalue() == ""


def test_a_bar_on_a_terminal_goes_when_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plrhf.core.progress.SILENT", 0.0)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    work = with_progress(range(2), "reading", total=2)
    list(work)
    shown = screen.getvalue().split("\r")
    assert any(one.startswith("reading: ") and "0/2" in one for one in shown)
    assert shown[-1].strip() == "" and shown[-2].strip() == ""
