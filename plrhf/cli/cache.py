"""Lists, verifies and prunes a cache of tokens, values of texts, and tiny backbones.

    plrhf cache list
    plrhf cache prune max_gb=20

All that is removed is made anew when a run needs it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from plrhf.cli.assemble import print_lines
from plrhf.cli.sections import Section
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.files import is_part, remove_abandoned_parts
from plrhf.data.cache_files import is_whole
from plrhf.data.digests import is_intact

KINDS = {
    "tokens": "tokens of rows",
    "texts": "values of texts (references, features)",
    "tiny_gptj": "tiny backbones",
}
GB = 10**9


class CacheConfig(Section):
    """All settings of the commands; conf/cache.yaml explains them."""

    cache_dir: str
    action: Literal["list", "verify", "prune"]
    max_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    debug: bool


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache, which is kept or removed as a whole.

    Attributes:
        kind: key of `KINDS`. size: bytes. used: when it was last read or written, in seconds since 1970,
            as far as the file system notes it.
    """

    path: Path
    kind: str
    size: int
    used: float

    def is_whole(self) -> bool:
        """Whether all its files have the content that they were written with."""
        if self.kind == "tiny_gptj":
            return is_intact(self.path)
        return all(map(is_whole, _files(self.path)))

    def remove(self) -> None:
        """Delete it, unless another process has; what a run is just writing into its folder stays."""
        for one in _files(self.path):
            one.unlink(missing_ok=True)
        if self.path.is_dir():
            with contextlib.suppress(OSError):  # not empty
                self.path.rmdir()


def entries(cache_dir: Path) -> list[Entry]:
    """Return what a cache holds, what was used longest ago first.

    Links, files of others, and files that a run is just writing are passed over.
    """
    found = []
    for path in cache_dir.iterdir():
        kind = path.name.rpartition("-")[0].partition("-")[0]
        if kind in KINDS and not path.is_symlink() and not is_part(path):
            stats = [one.stat() for one in _files(path)]
            used = max((max(one.st_atime, one.st_mtime) for one in stats), default=0.0)
            found.append(Entry(path, kind, sum(one.st_size for one in stats), used))
    return sorted(found, key=lambda one: (one.used, one.path.name))


def _files(path: Path) -> list[Path]:
    """Return the files of an entry: itself, or those in its folder that are not half written."""
    if not path.is_dir():
        return [path]
    return sorted(one for one in path.rglob("*") if one.is_file() and not is_part(one))


def cache(settings: Settings) -> None:
    """Run ``plrhf cache list``, ``verify`` or ``prune``."""
    config = CacheConfig.read(settings, "")
    folder = Path(config.cache_dir)
    if config.max_gb is not None and config.action != "prune":
        allowed, cure = f"null for cache {config.action}", "Write cache prune"
        raise bad_value("max_gb", config.max_gb, allowed, cure)
    if not folder.is_dir():
        cure = "Give the cache_dir of your runs"
        raise bad_value("cache_dir", config.cache_dir, "a directory", cure)
    if config.action == "list":
        print_lines(listed(entries(folder)))
    elif config.action == "verify":
        print_lines(verified(entries(folder)))
    elif config.max_gb is None:
        raise bad_value("max_gb", None, "the size that may be left, in GB", "Give max_gb=20")
    else:
        remove_abandoned_parts(folder)
        print_lines(pruned(entries(folder), config.max_gb * GB))


def listed(found: list[Entry]) -> Iterator[str]:
    """Yield a line for each kind of entry, and one for all."""
    by_kind: dict[str, list[Entry]] = defaultdict(list)
    for one in found:
        by_kind[one.kind].append(one)
    for kind, of_kind in sorted(by_kind.items()):
        days = (time.time() - of_kind[0].used) / 86_400
        size = sum(one.size for one in of_kind)
        yield f"{_size(size)} in {len(of_kind):,} of {KINDS[kind]}, one unused for {days:.0f} days"
    yield f"{_size(sum(one.size for one in found))} in all"


def verified(found: list[Entry]) -> Iterator[str]:
    """Remove damaged entries; yield a line for each, and one for all."""
    n_damaged = 0
    for one in found:
        if not one.is_whole():
            n_damaged += 1
            one.remove()
            yield f"damaged, and removed: {one.path}"
    yield f"{len(found) - n_damaged:,} of {len(found):,} entries are whole"


def pruned(found: list[Entry], limit: float) -> Iterator[str]:
    """Remove what was used longest ago until `limit` bytes are left; yield a line for each."""
    left = sum(one.size for one in found)
    for one in found:
        if left <= limit:
            break
        one.remove()
        left -= one.size
        yield f"removed: {one.path}, {_size(one.size)}"
    yield f"{_size(left)} left"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{n_bytes / 10**6:.1f} MB"
