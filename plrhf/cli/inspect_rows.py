"""Says what is in a file of judgments, how it is read, and what training would leave out.

    plrhf data inspect FILE [backbone.path=DIR]

Nothing is trained or written.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from plrhf.cli.commands import quoted
from plrhf.cli.rows import build_data
from plrhf.cli.sections import DataConfig, Section, Seed
from plrhf.core.components import Settings
from plrhf.core.errors import printable
from plrhf.data.module import PreferenceData
from plrhf.data.rows import SPLITS, Row, Rows
from plrhf.evaluation.probes import probe

SHOWN = 300  # characters of a text
FEW_PAIRS = 10  # a user
DIVIDED = {
    "prompt": "no two have a prompt in common",
    "conversation": "no two have a conversation in common",
    "response": "each test pair has a response that train has not, and may have one that it has",
    "pair": "no two have a pair of responses in common",
    "user": "no two have a pair of one user in common",
}
"""What `data.split_by` keeps apart; see `split_by.draw_splits`."""
PLAIN = re.compile(r"[\w./-]+")  # paths that a setting takes without quotes


class Tokens(Section):
    """Settings ``backbone``: the model in whose tokens lengths are counted."""

    path: str | None
    chat_template: Literal["plain"] | None


class InspectConfig(Section):
    """All settings of the command; conf/inspect.yaml explains them."""

    data: DataConfig
    backbone: Tokens
    seed: Seed
    debug: bool


def inspect_rows(settings: Settings) -> None:
    """Read and split the rows, and print what they are."""
    config = InspectConfig.read(settings, "")
    data = build_data(config.data)
    _show([f"records: {data.report.read:,}, rows: {len(data.rows):,}"])
    _show(data.report.lines())
    _show(row_lines(data.rows[0]))
    _show(people_lines(data.rows))
    _show(length_lines(data.rows))
    of_encoder = False
    if config.backbone.path is not None:
        from plrhf.backbone.loading import check_path, is_encoder, load_tokenizer  # slow to import

        check_path(config.backbone.path)
        tokenizer = load_tokenizer(
            config.backbone.path, chat_template=config.backbone.chat_template
        )
        data.tokenize(tokenizer, layout="packed", max_positions=tokenizer.model_max_length)
        _show(token_lines(data))
        of_encoder = is_encoder(config.backbone.path)
    _show(split_lines(data, config.data))
    _show(f"warning: {one}" for one in probe(data.splits).get("warnings", []))
    _show(next_lines(config.data, config.backbone, of_encoder=of_encoder))


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def row_lines(row: Row) -> Iterator[str]:
    """Yield the first row as it is read."""
    yield "first row:"
    for name in ("prompt", "chosen", "rejected", "user_id", "user_text", "user_features", "split"):
        value = getattr(row, name)
        if value is not None:
            text = printable(json.dumps(value, ensure_ascii=False, default=dict))
            yield f"  {name}: {text if len(text) <= SHOWN else text[:SHOWN] + '...'}"


def people_lines(rows: Rows) -> Iterator[str]:
    """Yield how many users, pairs a user, prompts and texts there are."""
    users = Counter(rows.people[number].user_id for number in rows.person)
    yield f"users: {len(users):,}; pairs a user: {_spread(users.values())}"
    few = sum(count < FEW_PAIRS for count in users.values())
    if few > 0:
        yield f"  {few:,} of them have fewer than {FEW_PAIRS} pairs"
    yield from alike_lines(users)
    if len(users) == 1:
        yield "  one user alone: nothing personal can be learned from others"
    prompts = Counter(rows.texts("prompt_id"))
    yield f"prompts: {len(prompts):,}; pairs a prompt: {_spread(list(prompts.values()))}"
    texts = {hash(text) for name in ("chosen", "rejected") for text in rows.texts(name)}
    yield f"distinct responses: {len(texts):,} in {2 * len(rows):,}"
    features = {name for one in rows.people for name in one.user_features or {}}
    if len(features) > 0:
        yield f"user features: {', '.join(sorted(features))}"


def alike_lines(users: Iterable[str]) -> Iterator[str]:
    """Yield how many ids differ in case, spaces or Unicode form alone, which may be of one person."""
    alike: dict[str, list[str]] = defaultdict(list)
    for one in users:
        plain = unicodedata.normalize("NFKC", one).casefold()
        alike["".join(char for char in plain if char.isprintable() and not char.isspace())].append(
            one
        )
    groups = [sorted(ids) for ids in alike.values() if len(ids) > 1]
    if len(groups) > 0:
        shown = ", ".join(map(ascii, groups[0][:4]))
        n_ids = sum(map(len, groups))
        yield f"  {n_ids:,} ids differ in case, spaces or Unicode form alone, but count as users: {shown}"


def length_lines(rows: Rows) -> Iterator[str]:
    """Yield the lengths of responses in characters, and how often the longer one is chosen."""
    chosen, rejected = (
        np.array([len(str(text)) for text in rows.texts(name)]) for name in ("chosen", "rejected")
    )
    yield f"characters a response: {_spread([*chosen, *rejected])}"
    differ = chosen != rejected
    if differ.any():
        longer = float((chosen > rejected)[differ].mean())
        yield f"the longer response is chosen in {longer:.0%} of pairs"


def token_lines(data: PreferenceData) -> Iterator[str]:
    """Yield the lengths in tokens, and which rows are too long for the settings."""
    lengths = np.concatenate([one.pairs.lengths for one in data.datasets.values()])  # type: ignore[attr-defined]
    for name, column in zip(("prompt", "chosen", "rejected"), lengths.T, strict=True):
        yield f"tokens, {name}: {_spread(column)}"
    yield from data.tokenizing_notes()


def split_lines(data: PreferenceData, config: DataConfig) -> Iterator[str]:
    """Yield how the rows are divided and why, and what is left out."""
    how = "those that the rows carry"
    if None in data.rows.texts("split"):
        how = f"drawn by data.split_by={config.split_by}: {DIVIDED[config.split_by]}"
    yield f"splits: {how}"
    for name in SPLITS:
        rows: Sequence[Row] = getattr(data.splits, name)
        users = {row.user_id for row in rows}
        prompts = {row.prompt_id for row in rows}
        yield f"  {name}: pairs: {len(rows):,}, users: {len(users):,}, prompts: {len(prompts):,}"
    unseen = data.unseen_users()
    if len(unseen) > 0:
        yield f"  {len(unseen):,} test users are in no train pair"
    for reason, count in data.splits.dropped.items():
        yield f"  left out: {count:,} pairs, {reason}"


def next_lines(config: DataConfig, backbone: Tokens, *, of_encoder: bool) -> Iterator[str]:
    """Yield the command that trains on these rows, and what to add for another model.

    Args:
        of_encoder: whether the backbone is a sentence encoder.
    """
    settings = {"data": "jsonl", "data.path": config.source.get("path")}
    if backbone.path is None:
        settings = {"experiment": "quickstart", **settings}
    for name, column in (config.source.get("columns") or {}).items():
        settings[f"data.columns.{name}"] = column
    if config.split_by != "prompt":
        settings["data.split_by"] = config.split_by
    if of_encoder:
        del settings["data"]
        settings = {"experiment": "frozen_features", **settings, "backbone.path": backbone.path}
    elif backbone.path is not None:
        settings |= {"backbone": "hf", "backbone.path": backbone.path}
    if backbone.chat_template is not None:
        settings["backbone.chat_template"] = backbone.chat_template
    words = (f"{name}={_as_setting(str(value))}" for name, value in settings.items())
    yield f"next: plrhf train {' '.join(map(shlex.quote, words))}"
    if backbone.path is None:
        yield "  trains a tiny GPT-J on a laptop; for a model of yours add backbone=hf backbone.path=DIR"


def _as_setting(value: str) -> str:
    """Return a setting's value with the quotes that Hydra wants."""
    return value if PLAIN.fullmatch(value) else quoted(value)


def _spread(values: Iterable[int]) -> str:
    """Return smallest, median and largest of some whole numbers."""
    least, middle, most = np.quantile(np.array(list(values)), [0, 0.5, 1])
    return f"{least:,.0f} to {most:,.0f}, median {middle:,.0f}"
