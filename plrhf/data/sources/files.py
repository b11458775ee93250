"""Finding the files of a dataset, and reading them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plrhf.core.errors import bad_value
from plrhf.data.sources.formats import Record, json_records, parquet_rows, undamaged

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class HubFiles:
    """The files of a hub repository that hold a dataset.

    Args:
        name: repository, e.g. ``openai/summarize_from_feedback``.
        patterns: names of the files, e.g. ``survey.jsonl`` or ``comparisons/*``.
        revision: branch or commit; None: the main branch.
    """

    name: str
    patterns: tuple[str, ...]
    revision: str | None = None

    def download(self) -> Path:
        """Download the files, unless the hub's client has them already, and return their directory.

        Raises:
            ValueError: the files cannot be downloaded.
        """
        from huggingface_hub import snapshot_download  # here, since local copies need no network

        try:
            directory = snapshot_download(
                self.name,
                repo_type="dataset",
                revision=self.revision,
                allow_patterns=list(self.patterns),
            )
        except (OSError, ValueError) as error:
            cure = f"Set data.path to a local copy ({' '.join(str(error).split())})"
            raise bad_value("data.path", self.name, "a dataset the hub hands out", cure) from error
        return Path(directory)


def data_files(
    path: str | Sequence[str], *, hub: HubFiles | None = None, within: str | None = None
) -> list[Path]:
    """Return the data files that a setting ``data.path`` stands for.

    Args:
        path: a file, a directory (all data files below it, sorted by name), a list of these, or the
            name of `hub`.
        within: if a directory has a folder of this name, only the files in that folder are taken.

    Raises:
        ValueError: nothing is there, or no file of `ENDINGS`.
    """
    places = [path] if isinstance(path, str) else list(path)
    files: list[Path] = []
    for place in places:
        root = Path(place)
        if hub is not None and place == hub.name and not root.exists():
            root = hub.download()
        if root.is_dir():
            folder = root / within if within is not None and (root / within).is_dir() else root
            files += sorted(one for one in folder.rglob("*") if is_data(one) and one.is_file())
        elif root.is_file() and is_data(root):
            files.append(root)
        else:
            allowed = f"a directory or file ({', '.join(ENDINGS)})"
            allowed += "" if hub is None else f", or {hub.name} of the hub"
            cure = "Check the spelling and the directory you start from"
            raise bad_value("data.path", place, allowed, cure)
    if len(files) == 0:
        cure = "Check that it is the directory of the dataset's files"
        raise bad_value("data.path", path, f"files ending in {' '.join(ENDINGS)}", cure)
    return files


def is_data(path: Path) -> bool:
    """Whether `read_files` can read a file with this ending."""
    return path.name.lower().endswith(ENDINGS)


def files_by_stem(files: Sequence[Path], wanted: Collection[str]) -> dict[str, Path]:
    """Find the files whose names up to the first dot are wanted.

    Raises:
        ValueError: two files have the same wanted name.
    """
    found: dict[str, Path] = {}
    for file in files:
        stem = file.name.partition(".")[0]
        if stem in wanted and stem in found:
            cure = "Remove one, or set data.path to the directory that holds the right ones alone"
            allowed = f"one file for {stem}, not {found[stem]} and {file}"
            raise bad_value("data.path", str(file.parent), allowed, cure)
        found[stem] = file
    return found


def read_files(paths: Iterable[Path]) -> Iterator[tuple[str, Record]]:
    """Yield each record of the files with its place, ``file:line`` or ``file:row``.

    Raises:
        ValueError: a file is damaged.
    """
    for path in paths:
        is_parquet = path.name.lower().endswith(".parquet")
        read: Callable[[Path], Iterator[tuple[int, Record]]]
        read = parquet_rows if is_parquet else json_records
        with undamaged(path):
            for number, record in read(path):
                yield f"{path}:{number}", record
