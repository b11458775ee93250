"""One server for all tests of this folder, as it takes a second to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from served import Running, save_runs, serving


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def server(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("people")
    # What an untrained model writes is more tokens when it is read, of which the models allow 128.
    words = ("pool=9", "max_body=5000", "max_tokens=40")
    with serving(runs[0], folder, *words, reward=runs[1]) as running:
        yield running


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def asked(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
