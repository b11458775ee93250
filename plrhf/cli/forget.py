"""Removes a person from a run: vector, pairs, texts and id, in every file; says what cannot be removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plrhf.cli.assemble import print_lines
from plrhf.cli.forget_caches import forget_in_caches, replies_elsewhere
from plrhf.cli.sections import Section
from plrhf.core.components import Settings
from plrhf.core.errors import BadValue, bad_value
from plrhf.data.digests import check_digest, json_text
from plrhf.evaluation.records import read_settings, write_settings, write_text
from plrhf.evaluation.results import (
    PREDICTIONS,
    RESULTS,
    read_predictions,
    read_results,
    write_evaluation,
)
from plrhf.models.card import CARD, read_card
from plrhf.models.enrolment import forget as forget_in_export
from plrhf.models.export import remove_leftovers
from plrhf.referee.page import write_leaderboard
from plrhf.referee.store import Store
from plrhf.reporting.report import write_report

LOGGERS = ("tensorboard", "wandb", "mlruns")
"""Folders in which loggers keep copies of reports and settings."""

CANNOT_BE_REMOVED = (
    "weights that all users share were learned from their pairs too, and the words of a tiny backbone's "
    "tokenizer: train again with data.without_users=FILE, a file with their id",
    "aggregate results (results.json, metrics.csv, the referee's numbers) still count them",
    "copies elsewhere: the rows that were trained on, loggers, other runs and exports, what other runs and "
    "rows left in caches, backups",
)
"""What remains after a person has been forgotten."""


class ForgetConfig(Section):
    """All settings of the command; conf/forget.yaml explains them."""

    run: str
    user: str
    cache_dir: str | None
    referee: str | None
    trust_components: bool
    debug: bool


def forget(settings: Settings) -> None:
    """Remove the person, and print a receipt."""
    config = ForgetConfig.read(settings, "")
    run = Path(config.run)
    if not (run / "export" / CARD).is_file():
        raise bad_value(
            "run", config.run, "the directory of a run with an export", "Check its name"
        )
    removed: list[str] = []
    if config.cache_dir is not None:  # first, as the run says which rows it read
        removed += forget_in_caches(
            run,
            config.user,
            Path(config.cache_dir),
            trust_components=config.trust_components,
        )
    elsewhere = replies_elsewhere(run, None if config.cache_dir is None else Path(config.cache_dir))
    removed += forget_in_run(run, config.user)
    if config.referee is not None:
        removed += forget_in_referee(Path(config.referee), config.user)
    if len(removed) == 0:
        raise bad_value("user", config.user, f"a user of {config.run}", "Check the id")
    print_lines(f"removed: {one}" for one in removed)
    print_lines(f"cannot be removed: {one}" for one in CANNOT_BE_REMOVED)
    if config.cache_dir is None:
        print_lines(["not looked at: caches, whose tokens can be read as text; give cache_dir=DIR"])
    if config.referee is None:
        print_lines(
            ["not looked at: comparisons by eval=referee; give referee=DIR if there are any"]
        )
    print_lines(
        f"not looked at: a judge's replies in {one}; give its folder as cache_dir"
        for one in elsewhere
    )
    print_lines(
        f"WARNING: {path} still holds {config.user!r}" for path in files_with(run, config.user)
    )


def forget_in_run(run: Path, user: str) -> Iterator[str]:
    """Remove a person from every file of a run; yield a line for each removal.

    Reports are written anew. Checkpoints are deleted, as they hold vectors of all users, and so are
    folders of loggers; the export stays usable, but the run can no longer be resumed.
    """
    remove_leftovers(run / "export")
    is_known = user in read_card(run / "export").places
    if is_known:
        forget_in_export(run / "export", user)
        yield "id and vector in export/"
    changed: set[Path] = set()
    for path in _files(run, ".json", ".jsonl"):
        n_removed = _without_records(path, user)
        if n_removed > 0:
            changed.add(path.parent)
            yield f"{n_removed:,} records in {path.relative_to(run)}"
    for path in sorted(run.rglob(PREDICTIONS)):
        if path.is_symlink():
            continue
        n_rows = _without_predictions(path, user)
        if n_rows is None:
            yield f"{path.relative_to(run)}, as it is not the one that {RESULTS} was written with"
        elif n_rows > 0:
            changed.add(path.parent)
            yield f"{n_rows:,} rows in {path.relative_to(run)}"
    for path in sorted(run.rglob("config.yaml")):
        settings, n_removed = _pruned(read_settings(path), user)
        if n_removed > 0:
            write_settings(path, settings)
            changed.add(path.parent)
            yield f"the id in {path.relative_to(run)}"
    for path in _files(run, ".txt"):
        n_removed = _without_lines(path, user)
        if n_removed > 0:
            yield f"{n_removed:,} lines of {path.relative_to(run)}"
    if is_known or len(changed) > 0:
        yield from _delete_whole(run)
    for folder in sorted(changed):
        if (folder / "report.html").is_file() and (folder / RESULTS).is_file():
            write_report(folder)
            yield f"what {(folder / 'report.html').relative_to(run)} showed of them: it is written anew"


def forget_in_referee(out: Path, user: str) -> Iterator[str]:
    """Remove a person from the margins of a comparison; yield a line for each method, rows and seed.

    Its tables and its page are written anew.

    Raises:
        ValueError: the folder holds no comparison.
    """
    if not (out / "jobs").is_dir():
        cure = "Give the out of eval=referee"
        raise bad_value("referee", str(out), "the directory of a comparison", cure)
    store = Store(out)
    found = list(store.forget(user))
    yield from (f"{n:,} margins in {path.relative_to(out)}" for path, n in found)
    if len(found) > 0:
        write_leaderboard(out, store)


def _without_predictions(path: Path, user: str) -> int | None:
    """Remove a user from predictions.parquet and count the rows; delete a file that does not fit: None."""
    try:
        results = read_results(path.parent)
        table = read_predictions(path.parent, results)
    except (BadValue, FileNotFoundError):
        path.unlink()
        return None
    kept = table[table["user_id"] != user]
    if len(kept) < len(table):
        write_evaluation(path.parent, results, kept)
    return len(table) - len(kept)


def _files(run: Path, *suffixes: str) -> list[Path]:
    """Return the files of a run with these suffixes, but not those of its export or of loggers."""
    aside = [run / name for name in ("export", *LOGGERS)]
    return [
        path
        for path in sorted(run.rglob("*"))
        if path.suffix in suffixes
        and path.is_file()
        and not path.is_symlink()
        and not any(one in path.parents for one in aside)
    ]


def _delete_whole(run: Path) -> Iterator[str]:
    """Delete what cannot be cleaned of one person: checkpoints, folders of loggers, halves of files."""
    found = [(path, "a whole checkpoint") for path in sorted(run.rglob("*.ckpt"))]
    found += [(run / name, "all that a logger kept here") for name in LOGGERS]
    for suffix in ("part", "old"):  # of a command that was killed while it wrote
        found += [(path, "half a file") for path in sorted(run.rglob(f"*.{suffix}"))]
    for path, what in found:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:  # not there, or in a folder that is gone
            continue
        yield f"{path.relative_to(run)}, {what}"


def _without_lines(path: Path, user: str) -> int:
    """Remove the lines of a log that name a user; count them."""
    named = re.compile(rf"(?<![\w-]){re.escape(user)}(?![\w-])")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if named.search(line) is None]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))
    return len(lines) - len(kept)


def _without_records(path: Path, user: str) -> int:
    """Remove the records of a user from a JSON file, or from one with a record a line; count them."""
    texts = (
        path.read_text("utf-8", "replace").split("\n")
        if path.suffix == ".jsonl"
        else [path.read_text("utf-8", "replace")]
    )
    kept, n_removed = [], 0
    for text in texts:
        if not text.strip():
            continue
        value = _parsed(path, text)
        if _is_of(value, user):
            n_removed += 1
            continue
        value, n_below = _pruned(value, user)
        n_removed += n_below
        indent = None if path.suffix == ".jsonl" else 2
        if n_below > 0:
            text = json_text(value, indent=indent)
        kept.append(text)
    if n_removed > 0:
        write_text(path, "".join(f"{text.rstrip()}\n" for text in kept))
    return n_removed


def _parsed(path: Path, text: str) -> Any:
    """Parse JSON of a file.

    Raises:
        ValueError: it is damaged, and so cannot be searched for a person.
    """
    cure = f"Remove {path.name}, which may hold the person, and forget again"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_value(str(path), "damaged", f"JSON ({error})", cure) from error
    if isinstance(value, dict):
        check_digest(str(path), value, cure)
    return value


def _is_of(value: Any, user: str) -> bool:
    """Whether a JSON object is about a user."""
    return isinstance(value, dict) and value.get("user_id") == user


def _pruned(value: Any, user: str, key: str = "") -> tuple[Any, int]:
    """Return a value without a user's objects, entries of ``per_user``, and id in lists called ``users``.

    Returns:
        The value, and how many objects and ids were removed.
    """
    if isinstance(value, list):
        kept = [one for one in value if not (_is_of(one, user) or (key == "users" and one == user))]
        below = [_pruned(one, user) for one in kept]
        return [one for one, _ in below], len(value) - len(kept) + sum(n for _, n in below)
    if isinstance(value, dict):
        others = {n: one for n, one in value.items() if not (key == "per_user" and n == user)}
        found = {name: _pruned(one, user, name) for name, one in others.items()}
        n_removed = len(value) - len(others) + sum(n for _, n in found.values())
        return {name: one for name, (one, _) in found.items()}, n_removed
    return value, 0


def files_with(run: Path, user: str) -> list[Path]:
    """Return the files of a run whose bytes contain an id; for texts and uncompressed files only."""
    wanted = user.encode()
    return [
        path for path in sorted(run.rglob("*")) if path.is_file() and wanted in path.read_bytes()
    ]
