"""Makes the rows of the experiments on real people from the files of the public sources.

python -m plrhf.cli.convert_rows source=polis path=DIR out=polis.jsonl.gz
python -m plrhf.cli.convert_rows source=llmfao path=DIR out=llmfao.jsonl.gz
python -m plrhf.cli.convert_rows source=ukpconvarg1 path=DIR out=ukpconvarg1.jsonl.gz
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Literal

from plrhf.cli.sections import Section, check_writable
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.data.sources.published import PUBLISHED


class ConvertConfig(Section):
    """All settings of the command; conf/convert.yaml explains them."""

    source: Literal["polis", "llmfao", "ukpconvarg1"]
    path: str
    out: str
    debug: bool


def convert_rows(settings: Settings) -> None:
    """Write the rows, and print how many there are."""
    config = ConvertConfig.read(settings, "")
    out = Path(config.out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise bad_value("out", config.out, "a .jsonl or .jsonl.gz file", "Set out=rows.jsonl.gz")
    check_writable("out", str(out.parent))
    splits: Counter[str] = Counter()
    users: set[str] = set()
    opened = gzip.open if out.suffix == ".gz" else open
    with whole_file(out) as part, opened(part, "wt", encoding="utf-8") as file:
        for row in PUBLISHED[config.source](Path(config.path)):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            splits[row["split"]] += 1
            users.add(row["user_id"])
    parts = ", ".join(f"{splits[name]:,} {name}" for name in ("train", "val", "test"))
    print(f"{sum(splits.values()):,} rows of {len(users):,} users ({parts}): {out}")
