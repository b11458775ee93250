"""Answers that are written together, and people who leave while something is computed for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import Running

from plrhf.backbone.row_options import Sampling
from plrhf.models.adaptation import AdaptedUsers
from plrhf.serving.engine import Answer, Engine
from plrhf.serving.served import ServedModel
from plrhf.serving.store import Judgment, People
from plrhf.serving.user_model import Fit

SEA = Judgment(prompt="Write about the sea.", chosen="Blue.", rejected="Wide.")
PROMPTS = ((5, 6, 7), (8, 9), (5, 6, 7, 10, 11))


@pytest.fixture
def engine(server: Running) -> Engine:
    assert server.service.policy is not None
    return server.service.policy.engine


@pytest.fixture
def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a token take a hundredth of a second."""
    assert engine.batch is not None
    step = engine.batch.step
    monkeypatch.setattr(engine.batch, "step", lambda tokens: (time.sleep(0.01), step(tokens))[1])


def answer(engine: Engine, n: int, n_tokens: int, temperature: float = 1.0) -> Answer:
    user = torch.randn(engine.model.aggregator.user_dim, generator=torch.manual_seed(n))
    sampling = Sampling(temperature=temperature, top_p=0.9, seed=n)
    return Answer(PROMPTS[n % 3], user, sampling=sampling, max_tokens=n_tokens)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_a_text_does_not_depend_on_when_others_join(engine: Engine) -> None:
    texts = []
    for pause in (None, 0.0, 0.005):  # one after the other, all at once, and in between
        answers = [answer(engine, n, 5 + n, temperature=float(n % 4 > 0)) for n in range(7)]
        for one in answers:
            engine.write([one])
            if pause is None:
                one.done.result()
            elif pause > 0:
                time.sleep(pause)
        reasons = [one.done.result() for one in answers]
        texts.append(
            [(one.text, one.n_tokens, why) for one, why in zip(answers, reasons, strict=True)]
        )
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 7


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_a_short_answer_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long, short = answer(engine, 0, 40, 0.0), answer(engine, 1, 2, 0.0)
    engine.write([long])
    until(lambda: long.n_tokens > 2)
    engine.write([short])
    assert engine.compute(lambda: 7) == 7  # between two tokens
    short.done.result(timeout=60)
    assert not long.done.done()
    long.cancelled = True
    long.done.result(timeout=60)


@pytest.mark.usefixtures("slow")
def test_an_answer_ends_when_its_client_leaves(server: Running, engine: Engine) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": "Write."}], "stream": True}
    before = engine.n_written
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body | {"temperature": 0}) as got,
    ):
        lines = got.iter_lines()
        while "content" not in next(lines):
            pass
    until(lambda: engine.n_live == 0)
    assert engine.n_written - before < 40


def test_an_error_reaches_who_asked_and_no_one_else(
    engine: Engine, asked: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.batch is not None
    body: Any = {"model": "policy", "messages": [{"role": "user", "content": "Write."}]}

    def fails(tokens: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.batch, "step", fails)
        lost = answer(engine, 0, 9, 0.0)
        engine.write([lost])
        with pytest.raises(RuntimeError, match="out of memory"):
            lost.done.result(timeout=60)
        with pytest.raises(openai.InternalServerError, match="The server failed"):
            asked.chat.completions.create(**body)
        with pytest.raises(openai.APIError, match="The server failed"):  # after its first words
            list(asked.chat.completions.create(**body, stream=True))
    again = answer(engine, 0, 9, 0.0)
    engine.write([again])
    assert again.done.result(timeout=60) in ("stop", "length")


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_slow_fit_does_not_bring_back_who_was_deleted(tmp_path: Path, comes_back: bool) -> None:
    """Not even to a new person of that name with as many judgments."""
    people = People(f"sqlite:///{tmp_path}/people.db", max_judgments=1000)
    began, may_end = threading.Event(), threading.Event()

    class SlowUsers:
        fingerprint = "f"

        def fit(self, pairs: list[Any]) -> Fit:
            began.set()
            assert may_end.wait(5)
            return Fit(AdaptedUsers(vectors=torch.ones(1, 3)), n_pairs=len(pairs))

    class AtOnce:
        def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

    stand_ins: Any = SlowUsers(), AtOnce()
    served = ServedModel("m", *stand_ins, people)

    def come() -> None:
        people.put("zoe", consent=True)
        people.add("zoe", [SEA])

    come()
    known = people.get("zoe")
    assert known is not None
    thread = threading.Thread(target=served.fit, args=("zoe", known))
    thread.start()
    assert began.wait(5)
    assert people.delete("zoe") is not None
    served.drop("zoe")
    if comes_back:
        come()
    may_end.set()
    thread.join()
    assert people.vector("zoe", "f") is None and len(served.fits) == 0
    assert people.delete("zoe") == ({"judgments": 1, "vectors": 0} if comes_back else None)
