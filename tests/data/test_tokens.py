"""Rows and tokens in files: what comes back is what went in, and is made only once."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plrhf.core.errors import BadValue
from plrhf.data import store, text_encoder, tokens
from plrhf.data import tokenizer as tokenizer_module
from plrhf.data.rows import ROW_FIELDS, Row, Rows
from plrhf.data.tokenizer import RowTokenizer
from plrhf.data.tokens import TokenFile, load_or_tokenize

WORDS = ["write", "about", "the", "sea", "is", "blue", "wide", "and", "calm"]
N_ROWS = 32 * store.BLOCK + 7  # many blocks


def row(number: int, **more: Any) -> Row:
    user = f"u{number % 5}"
    return Row(
        prompt=f"{WORDS[number % 9]} {number}",
        chosen=" ".join(WORDS[: 1 + number % 7]),
        rejected=f"no {number % 11}",
        user_id=user,
        prompt_id=f"p{number}",
        pair_id=f"x{number}",
        **{"user_text": f"I am {user}", "user_features": {"age": float(number % 5)}, **more},
    )


@pytest.fixture(scope="module")
def many() -> list[Row]:
    return [row(number) for number in range(N_ROWS)]


def test_rows_come_back_as_they_were(many: list[Row]) -> None:
    chat = ({"role": "user", "content": 'Say "hé"'}, {"role": "assistant", "content": ""})
    full = replace(row(3), prompt=chat)
    bare = replace(row(4), user_text=None, user_features=None, split="val", chosen_id="c")
    rows = Rows.from_rows(iter([full, bare, *many]))
    assert list(rows) == [full, bare, *many] and rows == [full, bare, *many]
    assert rows != [bare, full, *many] and rows != [full]
    assert (rows[0], rows[1], rows[-1]) == (full, bare, many[-1])
    assert rows[4090:4105:3] == [full, bare, *many][4090:4105:3]
    assert len(rows.people) == 6  # five of `many`, of whom `full` is one, and `bare`
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert list(Rows.from_rows([])) == [] and Rows.from_rows([]).distinct_people() == []


def test_rows_at_places_in_any_order(many: list[Row]) -> None:
    rows = Rows.from_rows(many)
    places = [4100, 3, 4, 5, 3, 4098, 0]
    part = rows.select(np.array(places))
    assert part == [many[place] for place in places]
    assert list(part.texts("pair_id")) == [f"x{place}" for place in places]
    assert [person.user_id for person in part.distinct_people()] == ["u0", "u3", "u4"]
    assert part.select(np.array([5, 1])) == [many[4098], many[3]]
    others = part.with_people(rows.person[:7])
    assert [one.user_id for one in others] == [f"u{number % 5}" for number in range(7)]
    assert [one.user_features for one in others] == [{"age": float(n % 5)} for n in range(7)]
    assert [one.chosen for one in others] == [one.chosen for one in part]


def test_a_part_of_rows_is_pickled_without_the_others(many: list[Row]) -> None:
    part = Rows.from_rows(many).select(np.array([2, 9]))
    held = pickle.dumps(part)
    assert pickle.loads(held) == [many[2], many[9]]
    assert b"p2" in held and b"p9" in held and b"p3" not in held


def test_rows_on_disk_are_those_in_memory(many: list[Row], monkeypatch: Any) -> None:
    in_memory = Rows.from_rows(many)
    monkeypatch.setattr(store, "IN_MEMORY", 1000)
    on_disk = Rows.from_rows(many)
    assert on_disk._file._file._rolled and not in_memory._file._file._rolled
    assert on_disk == in_memory
    assert on_disk.digest(with_people=True) == in_memory.digest(with_people=True)


def test_the_digest_tells_rows_apart(many: list[Row]) -> None:
    def digests(rows: Rows) -> tuple[str, str]:
        return rows.digest(with_people=False), rows.digest(with_people=True)

    rows = Rows.from_rows(many[:9])
    plain, with_text = digests(rows)
    assert digests(Rows.from_rows(many[:9])) == (plain, with_text)
    changed = [
        Rows.from_rows([replace(many[0], rejected="other"), *many[1:9]]),
        rows.select(np.arange(8)),
        rows.select(np.arange(9)[::-1]),
        Rows.from_rows([*many[1:9], many[0]]),
    ]
    assert all(one != plain and two != with_text for one, two in map(digests, changed))
    same_texts, other_people = digests(rows.with_people(rows.person[::-1].copy()))
    assert same_texts == plain and other_people != with_text


CHANGES = {
    "prompt": ({"role": "user", "content": "write 3"},),
    "chosen": "another",
    "rejected": "another",
    "user_id": "another",
    "prompt_id": "another",
    "pair_id": "another",
    "user_text": None,
    "user_features": {"age": 3.5},
    "split": "val",
    "chosen_id": "another",
    "rejected_id": "another",
    "verdict": "tie",
    "weight": 0.5,
    "strength": 2.0,
    "group_id": "another",
    "conversation_id": "another",
    "rating_level": 3,
}


@pytest.mark.parametrize("name", ROW_FIELDS)
def test_every_field_of_a_row_is_in_the_content_hash(name: str, many: list[Row]) -> None:
    changed = [*many[:3], replace(many[3], **{name: CHANGES[name]}), *many[4:9]]
    assert Rows.from_rows(changed).content_hash() != Rows.from_rows(many[:9]).content_hash()


def test_the_content_hash_is_of_the_rows_alone(many: list[Row]) -> None:
    whole = Rows.from_rows(many)
    some = [5, 6, 4099, 4100, 7, 0]
    part = whole.select(np.array(some))
    assert part.content_hash() == Rows.from_rows([many[index] for index in some]).content_hash()
    assert (
        part.content_hash()
        != Rows.from_rows([many[index] for index in sorted(some)]).content_hash()
    )
    assert whole.content_hash() == whole.select(np.arange(N_ROWS)).content_hash()
    assert Rows.from_rows(many[:-1]).content_hash() != whole.content_hash()
    swapped = part.with_people(part.person[::-1].copy())
    assert (
        swapped.content_hash()
        == Rows.from_rows(list(swapped)).content_hash()
        != part.content_hash()
    )
    assert Rows.from_rows([]).content_hash() == whole.select(np.arange(0)).content_hash()


def test_the_content_hash_knows_where_texts_end(many: list[Row]) -> None:
    ends = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    hashes = {
        Rows.from_rows([replace(many[0], chosen_id=one, rejected_id=two)]).content_hash()
        for one, two in [*ends, (None, "abc")]
    }
    assert len(hashes) == 5
    moved = {
        Rows.from_rows([replace(many[0], chosen=one), replace(many[1], chosen=two)]).content_hash()
        for one, two in ends
    }
    assert len(moved) == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system lists no threads")
def test_reading_rows_starts_no_thread() -> None:
    """One of Arrow's that still holds a Python file at exit ends the process with SIGABRT, now and then."""
    code = (
        "import os; from plrhf.data.rows import Row, Rows; before = len(os.listdir('/proc/self/task')); "
        "rows = Rows.from_rows([Row('a', 'b', 'c', 'u', 'p', 'q')]); rows.content_hash(); rows[0]; "
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0"]


@pytest.mark.slow
def test_the_content_hash_is_the_same_in_every_process(many: list[Row]) -> None:
    code = (
        "from plrhf.data.rows import Row, Rows; print(Rows.from_rows([Row('a', 'b', 'c', 'u', 'p', 'q', "
        "user_features={'x': 1.0, 'y': 'z'})]).content_hash())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    features = {"y": "z", "x": 1.0}  # their order means nothing
    here = Row("a", "b", "c", "u", "p", "q", user_features=features)
    assert out.stdout.strip() == Rows.from_rows([here]).content_hash()


class Counting:
    """An encoder that counts the texts it is given."""

    def __init__(self, encoder: Any) -> None:
        self.of, self.asked = encoder, 0

    def encode(self, texts: list[str]) -> Any:
        self.asked += len(texts)
        return self.of.encode(texts)


def row_tokenizer(tokenizer: Any, **changes: Any) -> RowTokenizer:
    return RowTokenizer(tokenizer, **{"max_prompt_tokens": 9, "max_tokens": 80, **changes})


def one_by_one(rows: list[Row], tokenizer: Any) -> list[Any]:
    """The naive twin: every text by itself."""
    encoder = row_tokenizer(tokenizer)
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in map(encoder.pair, rows)]


def parts(pairs: Any) -> list[Any]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [True, False])
def test_tokens_are_those_of_texts_one_by_one(
    on_disk: bool, many: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [replace(many[0], prompt="the sea is wide " * 9), *many]
    cache_dir = tmp_path / "cache" if on_disk else None
    pairs = load_or_tokenize(Rows.from_rows(rows), row_tokenizer(tokenizer), cache_dir=cache_dir)
    expected = one_by_one(rows, tokenizer)
    assert parts(pairs) == expected
    assert pairs.cut[0] and pairs.cut.sum() == sum(
        len(tokenizer(one.prompt + "\n")["input_ids"]) > 8 for one in rows
    )
    assert pairs.lengths.tolist() == [[len(ids) for ids in one] for one in expected]
    places = np.array([4101, 2, 2, 4099])
    assert parts(pairs.select(places)) == [expected[place] for place in places]
    assert parts(pairs.select(places)[1:3]) == [expected[2], expected[2]]
    assert pairs.select(places).lengths.tolist() == pairs.lengths[places].tolist()
    assert pickle.loads(pickle.dumps(pairs.select(places))) == pairs.select(places)


def whole_file(rows: Rows, made: RowTokenizer, folder: Path) -> bytes:
    load_or_tokenize(rows, made, cache_dir=folder)
    (path,) = folder.iterdir()
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rows_on_disk", [True, False])
def test_several_processes_write_the_same_file(
    rows_on_disk: bool,
    many: list[Row],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rows_on_disk:  # where all processes share the file and its position
        monkeypatch.setattr(store, "IN_MEMORY", 1000)
    rows = Rows.from_rows([*many, *many, *many])
    alone = whole_file(rows, row_tokenizer(tokenizer), tmp_path / "alone")
    monkeypatch.setattr(tokens, "PARALLEL_FROM", 0)
    monkeypatch.setattr(tokens, "n_cores", lambda: 2)
    here = row_tokenizer(tokenizer)
    monkeypatch.setattr(here, "tokens", in_another_process(here.tokens))
    assert whole_file(rows, here, tmp_path / "several") == alone
    # Without truncation the first row that is too long is named, as by one process.
    strict = row_tokenizer(tokenizer, on_long_prompt="error", max_prompt_tokens=30)
    long = replace(many[0], prompt="the sea is wide " * 9, pair_id="long")
    with pytest.raises(BadValue, match=r"prompt='\d+ tokens \(pair long\)'.*truncate"):
        load_or_tokenize(Rows.from_rows([*many, long, *many]), strict, cache_dir=None)


def in_another_process(tokenise: Any) -> Any:
    here = os.getpid()

    def checked(rows: list[Row]) -> Any:
        assert os.getpid() != here
        return tokenise(rows)

    return checked


def test_no_rows_have_no_tokens(tokenizer: Any, tmp_path: Path) -> None:
    pairs = load_or_tokenize(Rows.from_rows([]), row_tokenizer(tokenizer), cache_dir=tmp_path)
    assert len(pairs) == 0 and pairs.lengths.shape == (0, 3)


def test_tokens_are_made_once_and_again_where_something_changed(
    many: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    rows = Rows.from_rows(many[:13])

    def asked(rows: Rows, other: Any = tokenizer, **changes: Any) -> int:
        counted: Any = row_tokenizer(other, **changes)
        counted.encoder = Counting(counted.encoder)
        load_or_tokenize(rows, counted, cache_dir=tmp_path)
        return int(counted.encoder.asked)

    assert asked(rows) > 13
    assert asked(rows) == asked(Rows.from_rows(many[:13])) == 0
    assert asked(rows, max_tokens=5) == 0  # which decides what fits, not what a text's tokens are
    assert asked(rows.with_people(rows.person[::-1].copy())) == 0  # texts alone matter
    respelt = copy.deepcopy(tokenizer)
    respelt.add_tokens(["sea"])
    assert asked(rows, respelt) > 13
    assert asked(rows.select(np.arange(12))) > 12
    for change in (
        {"max_prompt_tokens": 8},
        {"separator": " "},
        {"use_user_text": True},
        {"on_long_prompt": "error", "max_prompt_tokens": 50},
    ):
        assert asked(rows, **change) > 13, change
        assert asked(rows, **change) == 0, change
    assert asked(rows.with_people(rows.person[::-1].copy()), use_user_text=True) > 13
    assert not list(tmp_path.glob("*.part"))


def test_the_digest_of_a_tokenizer_knows_all_that_decides_tokens(
    tokenizer: Any, monkeypatch: Any
) -> None:
    def other_class(kind: Any) -> Any:
        other = copy.deepcopy(tokenizer)
        other.__class__ = type("Other", (kind,), {})
        return other

    def changed(**state: Any) -> Any:
        other = copy.deepcopy(tokenizer)
        other.init_kwargs.update(state)
        return other

    plain = row_tokenizer(tokenizer).digest()
    assert plain == row_tokenizer(copy.deepcopy(tokenizer)).digest()
    assert plain == row_tokenizer(changed(name_or_path="elsewhere")).digest()
    digests = [
        plain,
        row_tokenizer(other_class(type(tokenizer))).digest(),
        row_tokenizer(changed(split_special_tokens=True)).digest(),
    ]
    template = copy.deepcopy(tokenizer)
    template.chat_template = "{{ messages }}"
    digests.append(row_tokenizer(template).digest())
    monkeypatch.setattr(tokenizer_module, "TOKENISATION", tokenizer_module.TOKENISATION + 1)
    digests.append(row_tokenizer(tokenizer).digest())
    monkeypatch.undo()
    for library in ("tokenizers", "transformers"):
        monkeypatch.setattr(
            text_encoder,
            "version",
            lambda name, other=library: "0.0" if name == other else version(name),
        )
        digests.append(row_tokenizer(tokenizer).digest())
        monkeypatch.undo()
    assert None not in digests and len(set(digests)) == len(digests) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda bits: bits[:-9],
        lambda bits: b"",
        lambda bits: b"x" * 99,
        lambda bits: bits[:-9] + bytes([bits[-9] ^ 1]) + bits[-8:],
    ],
)
def test_a_damaged_file_is_made_anew(
    damage: Any, many: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    rows = Rows.from_rows(many[:13])
    expected = parts(load_or_tokenize(rows, row_tokenizer(tokenizer), cache_dir=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert parts(load_or_tokenize(rows, row_tokenizer(tokenizer), cache_dir=tmp_path)) == expected


def test_tokens_that_are_damaged_later_stop_the_run_and_are_made_anew_by_the_next(
    many: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    rows = Rows.from_rows(many)
    expected = one_by_one(many, tokenizer)
    pairs = load_or_tokenize(rows, row_tokenizer(tokenizer), cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    with path.open("r+b") as file:  # in the first block, in place
        file.write(bytes([path.read_bytes()[0] ^ 1]))
    assert parts(pairs[-9:]) == expected[-9:]
    with pytest.raises(BadValue, match="tokens-.*Repeat the command"):
        pairs[0]
    assert list(tmp_path.iterdir()) == []
    assert parts(load_or_tokenize(rows, row_tokenizer(tokenizer), cache_dir=tmp_path)) == expected


@pytest.mark.slow
def test_ids_take_no_more_bytes_than_they_need(
    many: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    large_tokenizer = copy.deepcopy(tokenizer)
    large_tokenizer.add_tokens([f"<{number}>" for number in range(2**16)])
    small, large = (
        load_or_tokenize(Rows.from_rows(many[:13]), row_tokenizer(kind), cache_dir=None)
        for kind in (tokenizer, large_tokenizer)
    )
    assert isinstance(small, TokenFile) and small == large
    assert (small._ids[:].dtype, large._ids[:].dtype) == (np.uint16, np.int32)


def test_texts_that_come_again_are_kept_only_so_long(
    many: list[Row], tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("plrhf.data.tokenizer.MOST_TEXTS", 50)
    encoder = row_tokenizer(tokenizer)
    _, pairs = encoder(many)
    assert parts(pairs) == one_by_one(many, tokenizer)
    assert len(encoder._ids) < 50 + 3 * 7 + 1  # the second block's alone
