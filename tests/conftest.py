"""What all tests share: one thread, a fixed seed, a tokenizer learned from a few words."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Heavy libraries are imported in the fixtures: the process that shares tests among workers reads this file
# before it starts them, and needs none.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put half of the slow tests first and half in the middle, where the second of two workers begins.

    With `--dist worksteal` each begins with slow tests, and what is left to share at the end is fast.
    """
    mark_all_but_a_sample(items)
    mark_users_of_runs(items)
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    first, second = slow[::2], slow[1::2]
    n_fast = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *fast[:n_fast], *second, *fast[n_fast:]]


def mark_all_but_a_sample(items: list[pytest.Item], size: int = 6) -> None:
    """Mark the cases of a test marked `sampled` slow, but for a few spread evenly over them."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for alike in cases.values():
        kept = {len(alike) * place // size for place in range(size)}
        for place, item in enumerate(alike):
            if place not in kept:
                item.add_marker("slow")


def mark_users_of_runs(items: list[pytest.Item]) -> None:
    """Mark tests slow that need a trained run, as the first of them in a process trains it."""
    for item in items:
        given = getattr(item, "callspec", None)
        named = given.params.values() if given is not None else ()
        names = [*getattr(item, "fixturenames", ()), *named]
        if "reward_run" in names or "policy_run" in names:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def quiet_and_on_one_thread() -> None:
    """No bars, as on the command line; one thread, as a second slows models this small down."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def garbage_is_collected_seldom() -> None:
    """Look for garbage less often, and not among what was imported, which stays: a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 5)  # the last: of whole runs, which hold models


@pytest.fixture(scope="session", autouse=True)
def files_of_settings_are_parsed_once() -> Iterator[None]:
    """Keep what was parsed of a text of settings; each reader gets objects of its own, as always."""
    from unittest.mock import patch

    import yaml
    from omegaconf import OmegaConf
    from omegaconf._utils import get_yaml_loader

    @functools.cache
    def parsed(text: str) -> Any:
        return yaml.load(text, Loader=get_yaml_loader())

    def load(file: Any) -> Any:
        text = file.read() if hasattr(file, "read") else Path(file).read_text(encoding="utf-8")
        return OmegaConf.create({} if parsed(text) is None else parsed(text))

    with patch.object(OmegaConf, "load", load):
        yield


@pytest.fixture(scope="session", autouse=True)
def settings_are_composed_once() -> Iterator[None]:
    """Leave out that Hydra composes a command's settings to read `hydra.mode`, which none of ours sets.

    It composes them again to run the command. Commands in processes of their own do both.
    """
    from unittest.mock import patch

    from hydra._internal.hydra import Hydra

    def no_mode(*_: Any, **__: Any) -> None:
        return None

    with patch.object(Hydra, "get_mode", no_mode):
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures_stay_blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing into figures outside tests/reporting: they take half of a small run."""
    if "reporting" not in request.path.parts:
        from matplotlib.figure import Figure

        from plrhf.reporting import user_map

        monkeypatch.setattr(Figure, "draw", lambda figure, renderer: None)
        monkeypatch.setattr(user_map, "with_hover", lambda made, marks, words: made)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """No code that torch.compile made before is used in the test, and none of its own after it."""
    import torch

    from plrhf.backbone.compiled import _compiled_forward

    torch._dynamo.reset()
    _compiled_forward.cache_clear()
    yield
    _compiled_forward.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-pair tokenizer, 300 tokens, whose only special token ``<|endoftext|>`` is number 0."""
    from plrhf.backbone.tiny import train_tokenizer

    return train_tokenizer(["Write about the sea.", "The sea is blue and wide."], vocab_size=300)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """A BERT-like tokenizer: no end token, but [CLS] and [SEP]."""
    from pair_data import WORDS
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where small runs keep their backbone, so that it is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A finished run of a reward model: lookup, FiLM, LoRA. Not to be changed."""
    import runs

    run_dir = tmp_path_factory.mktemp("reward") / "run"
    runs.launch("train", *runs.TINY, f"cache_dir={cache_dir}", f"run_dir={run_dir}")
    return run_dir


@pytest.fixture(scope="session")
def policy_run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A finished run of a policy: cluster mixture, soft prompt, LoRA. Not to be changed."""
    import runs

    run_dir = tmp_path_factory.mktemp("policy") / "run"
    of_policy = ["model=dpo", "encoder=cluster", "aggregator=soft_prompt", "aggregator.n_tokens=2"]
    of_policy += ["optim.lr=1e-2", "optim.user_lr=1e-1", "trainer.max_epochs=2"]
    runs.launch("train", *runs.TINY, f"cache_dir={cache_dir}", f"run_dir={run_dir}", *of_policy)
    return run_dir
