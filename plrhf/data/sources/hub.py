"""Any preference dataset of the Hugging Face hub, its columns mapped to row fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.rows import SPLITS
from plrhf.data.sources.base import Source
from plrhf.data.sources.columns import ColumnMap
from plrhf.data.sources.formats import Record


class HubSource(Source):
    """Rows of a dataset as the `datasets` library loads it.

    Args:
        path: name on the hub, or a directory of data files as the hub would hold it.
        config: which of the dataset's configurations. revision: branch or commit.
        splits: our name of a split -> the dataset's, e.g. ``{train: train, test: validation}``. Rows
            of other splits are not read. None: rows of all splits, divided as those of a file are.
        columns: row field -> column, see `ColumnMap`.

    Raises:
        ValueError: a field in `columns` or a split in `splits` that rows do not have.
    """

    def __init__(
        self,
        *,
        path: str,
        config: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        for name in {} if splits is None else splits:
            if name not in SPLITS:
                cure = "Name our split first, then the dataset's"
                raise bad_value("data.splits", name, f"one of {', '.join(SPLITS)}", cure)
        self.path, self.config, self.revision = path, config, revision
        self.splits = splits
        self.columns = ColumnMap(columns)

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield records under row field names, placed by split and row number from 1.

        Raises:
            ValueError: the dataset cannot be loaded, or lacks a split or column it must have.
        """
        loaded = self._load()
        for ours, theirs in self._parts(loaded):
            table = loaded[theirs]
            names = table.column_names
            self.columns.check(self.columns.required, names)
            used = self.columns.used(names)
            unread = dict.fromkeys(name for name in names if name not in used)
            for number, record in enumerate(table.select_columns(used), 1):
                row = self.columns.row({**record, **unread})
                if ours is not None:
                    row["split"] = ours
                yield f"{self.path}/{theirs}:{number}", row

    def _load(self) -> Any:
        """Load the dataset; raise a ValueError if that fails."""
        from datasets import load_dataset  # here, since it takes seconds to import
        from datasets.exceptions import DatasetsError

        try:
            return load_dataset(self.path, self.config, revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            cure = (
                f"Check data.path, data.config and data.revision ({' '.join(str(error).split())})"
            )
            allowed = "a dataset that can be loaded from the hub or a directory"
            raise bad_value("data.path", self.path, allowed, cure) from error

    def _parts(self, loaded: Any) -> list[tuple[str | None, str]]:
        """Return pairs of our split (None if rows carry none) and the dataset's split."""
        if self.splits is None:
            return [(None, theirs) for theirs in loaded]
        for ours, theirs in self.splits.items():
            if theirs not in loaded:
                allowed = f"one of the dataset's splits {', '.join(loaded)}"
                raise bad_value(f"data.splits.{ours}", theirs, allowed, "Name one of these")
        return list(self.splits.items())
