"""Tables of results, for pages, Markdown, LaTeX and the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import rich.box
import rich.table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from plrhf.core.bootstrap import Estimate
from plrhf.core.errors import printable
from plrhf.evaluation.abstention import SHARES
from plrhf.evaluation.few_shot import CALIBRATED, FewShotCurve
from plrhf.evaluation.judges import JudgedRun
from plrhf.evaluation.metrics import PROMPT_KINDS, USER_KINDS, UserKind
from plrhf.evaluation.results import Measures, Results
from plrhf.reporting.runs import SHUFFLED, role

FORMULA = re.compile(r"(^|(?<=;))(?=[=@\t\r＝＠]|[+＋－-](?!\d*\.?\d+$))")
"""Where a spreadsheet would begin a formula: in a cell, also where it takes semicolons for separators."""
LATEX = {
    **{one: rf"\{one}" for one in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
FEW_USERS = 10  # below it, intervals over users are too narrow
WIDEST_TEXT = 24  # characters; a longer text in the terminal is wrapped where room is scarce
BETWEEN = 2  # characters between columns


class Cell(NamedTuple):
    """A formatted value.

    Attributes:
        interval: formatted, too; empty if it has none. link: where a page links it to; empty: nowhere.
    """

    value: str
    interval: str = ""
    link: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """A table whose rows stand in named groups."""

    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    texts: Sequence[int] = (0,)  # indices of the columns that hold text, which are left-aligned


def closing_table(results: Results) -> TerminalTable:
    """Return the test results for the terminal at the end of a run."""
    return rich_table(
        headline(results), title="Test results, 95% intervals over users", without=["ECE"]
    )


def rich_table(table: Table, *, title: str, without: Sequence[str]) -> TerminalTable:
    """Return the table for the terminal, without the columns of these names."""
    kept = [at for at, column in enumerate(table.columns) if column not in without]
    return TerminalTable(table, title, kept)


@dataclass(frozen=True)
class TerminalTable:
    """A table as the terminal shows it, with intervals under values.

    Where its columns do not fit side by side, it is printed in several parts. Each part begins with
    the text columns. Numbers are never cut; text is wrapped.
    """

    table: Table
    title: str
    columns: Sequence[int]  # indices of the columns that are shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._parts(options.max_width)):
            yield self._part(columns, self.title if number == 0 else f"{self.title} (continued)")

    def _parts(self, width: int) -> list[list[int]]:
        """Divide the columns into parts that fit into this many characters."""
        texts = [at for at in self.columns if at in self.table.texts]
        room = width - 1 - sum(min(self._width(at), WIDEST_TEXT) + BETWEEN for at in texts)
        parts: list[list[int]] = [[]]
        left = room
        for at in self.columns:
            if at not in texts:
                needed = self._width(at) + BETWEEN
                if needed > left and len(parts[-1]) > 0:
                    parts.append([])
                    left = room
                parts[-1].append(at)
                left -= needed
        return [[*texts, *numbers] for numbers in parts]

    def _width(self, at: int) -> int:
        """Return how many characters wide a column must be so that nothing of it is cut."""
        cells = [row[at] for _, rows in self.table.groups for row in rows]
        lines = [line for cell in cells for line in (cell.value, cell.interval)]
        return max(map(len, [*lines, *self.table.columns[at].split()]), default=1)

    def _part(self, columns: Sequence[int], title: str) -> rich.table.Table:
        """Return some of the columns as one table of rich."""
        shown = rich.table.Table(
            title=Text(printable(title)),
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for at in columns:
            heading = self.table.columns[at]
            if at in self.table.texts:
                longest = max(map(len, heading.split()), default=1)
                shown.add_column(heading, overflow="fold", min_width=longest)
            else:
                shown.add_column(heading, justify="right", width=self._width(at))
        for name, rows in self.table.groups:
            if len(rows) > 0 and name != "":
                shown.add_section()
                shown.add_row(Text(printable(name), style="bold"))
            for row in rows:
                lines = [[printable(row[at].value), row[at].interval] for at in columns]
                shown.add_row(*(Text("\n".join(filter(None, one))) for one in lines))
        return shown


def csv_text(frame: pd.DataFrame) -> str:
    """Return the frame as CSV. Text that a spreadsheet would run as a formula is quoted."""

    def plain(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return FORMULA.sub("'", printable(value))

    return frame.map(plain).to_csv(index=False)


def markdown_text(text: str) -> str:
    """Escape what Markdown or HTML would interpret in a text."""
    escaped = re.sub(r"([\\|`*])", r"\\\1", printable(text)).replace("](", r"]\(")
    return escaped.replace("<", "&lt;")


def latex_text(text: str) -> str:
    """Escape what LaTeX would interpret in a text, for any font encoding."""
    escaped = "".join(LATEX.get(one, one) for one in printable(text))
    # Behind the end of the row before, these would be its arguments.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def markdown(table: Table, note: str, *, title: str = "Comparison of runs") -> str:
    """Return the table as Markdown below the note, with a heading for each group."""
    paragraphs = [markdown_text(one) for one in note.split("\n\n")]
    lines = [f"# {markdown_text(title)}", "", "\n\n".join(paragraphs)]
    for name, rows in table.groups:
        if len(rows) > 0:
            rule = ["---" if at in table.texts else "---:" for at in range(len(table.columns))]
            cells = [[markdown_text(str(cell)) for cell in row] for row in rows]
            body = [f"| {' | '.join(row)} |" for row in (table.columns, rule, *cells)]
            lines += ["", f"## {markdown_text(name)}", "", *body]
    return "\n".join(lines) + "\n"


def latex(table: Table, note: str) -> str:
    """Return a booktabs tabular for each group, below the note as a comment."""
    align = "".join("l" if at in table.texts else "r" for at in range(len(table.columns)))
    parts = [f"% {printable(line)}" for line in note.split("\n") if line]
    for name, rows in table.groups:
        if len(rows) > 0:
            cells = pd.DataFrame([[latex_text(str(cell)) for cell in row] for row in rows])
            cells.columns = pd.Index([latex_text(column) for column in table.columns])
            tabular = cells.to_latex(index=False, escape=False, column_format=align)
            parts += ["", f"% {printable(name)}", tabular.rstrip()]
    return "\n".join(parts) + "\n"


def estimate_cell(estimate: Estimate, number: str, *, scale: float = 1.0) -> Cell:
    """Format an estimate and its interval, with the format ``number``, such as ``.3f``."""
    if estimate["value"] is None:
        return Cell("–")
    interval = ""
    if estimate["ci95"] is not None:
        low, high = (format(scale * end, number) for end in estimate["ci95"])
        interval = f"[{low}, {high}]"
    return Cell(format(scale * estimate["value"], number), interval)


def percent(estimate: Estimate) -> Cell:
    """Format a share as per cent."""
    return estimate_cell(estimate, ".1f", scale=100)


def points(estimate: Estimate) -> Cell:
    """Format a difference of shares as percentage points, with its sign."""
    return estimate_cell(estimate, "+z.1f", scale=100)


def headline_rows(results: Results, kind: UserKind) -> list[tuple[str, Measures]]:
    """Return the main results of one kind of user by name: contexts, oracle, length rule."""
    rule = results.controls["length_only"]
    shuffled = role(results.config) == SHUFFLED
    rows = [
        (
            "user context, ids shuffled" if shuffled else "user context",
            results.test[kind]["user"],
        ),
        ("generic context", results.test[kind]["generic"]),
        ("length only", rule[kind]),
    ]
    if results.oracle is not None:
        rows.insert(2, ("oracle", results.oracle[kind]))
    return rows


def headline(results: Results) -> Table:
    """Return the table of test results, in a group for each kind of user."""
    groups = []
    for kind in USER_KINDS:
        rows = headline_rows(results, kind)
        size = rows[0][1]
        by_prompt = [
            (f"user context, {prompts} prompts", cell["user"])
            for prompts in PROMPT_KINDS
            if (cell := results.cells[f"{kind}_user_{prompts}_prompt"]) is not None
        ]
        shown = [
            [
                Cell(name),
                percent(cell["accuracy_micro"]),
                percent(cell["accuracy_macro"]),
                percent(cell["accuracy_worst10"]),
                estimate_cell(cell["nll"], ".3f"),
                estimate_cell(cell["ece"], ".3f"),
            ]
            for name, cell in (*rows, *(by_prompt if len(by_prompt) > 1 else ()))
            if cell["n_pairs"] > 0
        ]
        title = f"{kind.capitalize()} users: {size['n_users']:,}, with {size['n_pairs']:,} pairs"
        if len(by_prompt) == 1 and results.cells[f"{kind}_user_seen_prompt"] is not None:
            title += " on seen prompts"
        groups.append((title, shown))
    columns = ["", "accuracy, %", "mean of users, %", "worst tenth, %", "nll, nats", "ECE"]
    return Table(columns, groups)


def interval_note(results: Results) -> str:
    """Explain the intervals and columns of `headline`, and warn if there are few users."""
    cells = [results.test[kind]["user"] for kind in USER_KINDS]
    few = [cell["n_users"] for cell in cells if 0 < cell["n_users"] < FEW_USERS]
    note = (
        "In brackets: 95% intervals from a bootstrap over users with all their pairs. They cover "
        "the choice of users, not that of prompts or seeds. "
        "Accuracy is over pairs, ties one half; the worst tenth is of users. "
        f"Length only: {results.controls['length_only']['rule']}."
    )
    return note + (
        f" With only {' and '.join(map(str, few))} users these intervals are too narrow."
        if few
        else ""
    )


def few_shot_table(adapted: FewShotCurve) -> Table:
    """Return the curves of adapt.json as a table, one row for each number of pairs."""
    curves = {name: curve for name, curve in adapted.curves.items() if curve is not None}
    over = adapted.over_generic  # paired, so with narrower intervals than the curves
    recovered = adapted.gain_recovered or {}
    sizes = {
        f"{what}, {who}": of_who[who]
        for what, of_who in (("nll", adapted.nll), ("ECE", adapted.ece))
        for who in CALIBRATED
        if who in of_who
    }
    rows = [
        [
            Cell(f"{shots}"),
            *(percent(curve[place]) for curve in curves.values()),
            *(points(curve[place]) for curve in over.values()),
            *(estimate_cell(curve[place], "z.2f") for curve in recovered.values()),
            *(estimate_cell(curve[place], ".3f") for curve in sizes.values()),
            *(percent(one[SHARES.index(0.5)]) for one in adapted.abstention[place : place + 1]),
        ]
        for place, shots in enumerate(adapted.shots)
    ]
    heads = [
        *(f"{name}, %" for name in curves),
        *(f"{name} over generic, points" for name in over),
        *(f"gain, {name}" for name in recovered),
        *sizes,
        *(["surest half, %"] if adapted.abstention else []),
    ]
    return Table(["pairs given", *heads], [("", rows)])


def few_shot_closing_table(adapted: FewShotCurve) -> TerminalTable:
    """Return the curves of adapt.json for the terminal at the end of eval=adapt.

    The gain is shown as a share of the oracle's gain, or in points if there is no oracle.
    """
    title = f"Accuracy of {adapted.n_users} {adapted.users} users, {adapted.n_draws} draws"
    table = few_shot_table(adapted)
    without = [name for name in table.columns if "over generic" in name]
    return rich_table(table, title=title, without=without if adapted.gain_recovered else ())


def winrate_table(judged: Sequence[tuple[str, JudgedRun]]) -> Table:
    """Return a table with one row for each run (by name) and its winrate.json."""
    rows = []
    for name, result in judged:
        first, judge = result.first_position_wins, result.judge
        who = judge["_target_"].rpartition(".")[2] + (
            f" {judge['model']}" if "model" in judge else ""
        )
        rows.append(
            [
                Cell(
                    name
                    if result.writer == "policy"
                    else f"{name}, {result.writer.replace('_', ' ')}"
                ),
                Cell(result.against),
                Cell(who),
                percent(result.win_rate),
                percent(result.win_rate_macro),
                Cell(f"{100 * result.ties:.1f}"),
                *(Cell(f"{n:,}") for n in (result.n_texts, result.n_users, result.n_unanswered)),
                Cell("–" if first is None else f"{100 * first:.1f}"),
            ]
        )
    columns = ["run", "against", "judge", "win rate, %", "mean of users, %", "ties, %"]
    columns += ["texts", "users", "unanswered", "first text wins, %"]
    return Table(columns, [("", rows)], (0, 1, 2))


def grid_table(tree: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return nested mappings as a table, one row for each outer key, one column for each inner key."""
    columns = next(iter(tree.values())).keys()
    rows = [
        [Cell(_words(name)), *(_shown(inner[column]) for column in columns)]
        for name, inner in tree.items()
    ]
    return Table(["", *map(_words, columns)], [("", rows)])


def key_table(tree: Mapping[str, Any], heading: str) -> Table | None:
    """Return a nested mapping as a table of keys and values, grouped by outer key; None if empty."""
    plain, groups = [], []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows = [[Cell(name), shown] for name, shown in _flat(value)]
            groups.append((_words(key), rows))
        else:
            plain.append([Cell(_words(key)), _shown(value)])
    groups = [("", plain)] * (len(plain) > 0) + [group for group in groups if len(group[1]) > 0]
    texts = (0, 1) if heading == "value" else (0,)
    return Table(["", heading], groups, texts) if len(groups) > 0 else None


def _flat(tree: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Return all values of a nested mapping with the names of their keys, joined."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value.keys() != Estimate.__annotations__.keys():
            rows += [(f"{_words(key)} · {name}", shown) for name, shown in _flat(value)]
        else:
            rows.append((_words(key), _shown(value)))
    return rows


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> Cell:
    """Format any value: an estimate with its interval, a whole number with thousands separators."""
    if isinstance(value, Mapping):
        return estimate_cell(value, ".3f")  # type: ignore[arg-type]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return Cell(f"{value:,}" if whole else str(value))


def console() -> Console:
    """Return a console as wide as the terminal, through a pipe too; without one, as wide as a table."""
    on_terminal = any(os.isatty(stream) for stream in (0, 1, 2))  # of which Rich takes the width
    return Console() if on_terminal else Console(width=max(110, Console().width))
