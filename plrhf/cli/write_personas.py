"""Writes rows whose `user_text` describes each person, as a language model read their train pairs.

    plrhf personas data.path=rows.jsonl endpoint.url=URL endpoint.model=NAME out=with_personas.jsonl

`data.use_user_text=true` then trains on them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from plrhf.cli.assemble import print_lines
from plrhf.cli.rows import build_data
from plrhf.cli.sections import DataConfig, Section, Seed, check_writable
from plrhf.core.checks import PositiveInt
from plrhf.core.components import Settings, build
from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.data.module import PreferenceData
from plrhf.data.rows import ROW_FIELDS, SPLITS, Row, choices_of
from plrhf.evaluation.personas import Persona, PersonaWriter


class PersonasConfig(Section):
    """All settings of the command; conf/personas.yaml explains them."""

    data: DataConfig
    endpoint: dict[str, Any]  # ``_target_`` and arguments
    out: str
    hypotheses: PositiveInt
    shown: PositiveInt
    held_out: PositiveInt
    max_tokens: PositiveInt
    seed: Seed
    debug: bool


def write_personas(settings: Settings) -> None:
    """Describe each person, write the rows with these texts, and print what was found and its cost."""
    config = PersonasConfig.read(settings, "")
    out = Path(config.out)
    if out.suffix != ".jsonl":
        raise bad_value("out", config.out, "a .jsonl file", "Set out=with_personas.jsonl")
    check_writable("out", str(out.parent))
    data = build_data(config.data)
    print_lines(data.report.lines())
    writer: PersonaWriter = build(config.endpoint, "endpoint", kind=PersonaWriter)
    personas = writer.write(
        _train_choices(data),
        n_hypotheses=config.hypotheses,
        shown=config.shown,
        held_out=config.held_out,
        max_tokens=config.max_tokens,
        seed=config.seed,
    )
    texts = {one.user_id: one.text for one in personas if one.text is not None}
    with whole_file(out) as part, part.open("w", encoding="utf-8") as file:
        for split in SPLITS:
            for row in getattr(data.splits, split):
                described = replace(row, user_text=texts.get(row.user_id), split=split)
                file.write(json.dumps(_record(described), ensure_ascii=False) + "\n")
    print_lines(_summary(personas, writer.cost(), len(data.splits.users)))
    print_lines([f"next: python train.py data=jsonl data.path={out} data.use_user_text=true"])


def _train_choices(data: PreferenceData) -> dict[str, list[Row]]:
    """Return the choices of each seen user in train."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in choices_of(data.splits.train):
        found[row.user_id].append(row)
    return dict(found)


def _record(row: Row) -> dict[str, Any]:
    """Return the fields of a row that have a value."""
    fields = {name: getattr(row, name) for name in ROW_FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def _summary(personas: Sequence[Persona], cost: dict[str, Any], n_users: int) -> Iterator[str]:
    """Yield how many descriptions were kept, what they predict, and what they cost."""
    kept = [one for one in personas if one.text is not None]
    yield f"described: {len(kept):,} of {n_users:,} users; others have no user_text"
    if len(kept) > 0:
        right, nobody = (fmean(getattr(one, of) for one in kept) for of in ("accuracy", "baseline"))
        yield (
            f"their held-out train choices: {right:.1%} predicted, {nobody:.1%} without description "
            "(each is the best of several on these choices, so that new ones are predicted less well)"
        )
    price = "not known" if cost["price"] is None else f"{cost['price']:.4f}"
    yield (
        f"endpoint: {cost['questions']:,} questions, {cost['from_cache']:,} answered before; "
        f"{cost['input_tokens']} + {cost['output_tokens']} tokens, price {price}"
    )
