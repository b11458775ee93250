"""Measures a server of two runs: throughput and wrong answers under load, and what kills lose.

    python benchmarks/serving.py load POLICY_RUN REWARD_RUN --people 64 --minutes 10
    python benchmarks/serving.py kills POLICY_RUN REWARD_RUN --kills 20

`load`: each person has a vector of their own, far from all others, so that the text written for them is
theirs alone. Each answer is compared with that text, which is computed beforehand by the model itself.
`kills`: people judge pairs while the server is killed at random moments and started again. Every judgment
that was acknowledged must be in the database at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import numpy as np
import torch

from plrhf.models.base import PersonalModule
from plrhf.models.generation import left_padded, write_batch
from plrhf.models.inference import load
from plrhf.serving.store import Judgment, People
from plrhf.serving.user_model import UserModel

PROMPTS = ("Write a note about the harbour.", "Tell me about the garden.", "Describe the old mill.")
N_TOKENS = 32


class Server:
    """A server in a process of its own, with its people in a database in `folder`."""

    def __init__(self, policy: str, reward: str, folder: Path) -> None:
        self.log = folder / "server.log"
        words = [f"run={policy}", f"reward={reward}", f"database=sqlite:///{folder}/people.db"]
        words += ["port=0", "device=cpu", "batch_size=64"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "plrhf.serving", *words],
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
        self.url = line.split()[-1]

    def end(self, how: int) -> None:
        self.process.send_signal(how)
        self.process.wait()


def mark(folder: Path, users: UserModel, names: Sequence[str]) -> torch.Tensor:
    """Give each person a vector of their own, [n, user_dim], stored as if it were fitted."""
    people = People(f"sqlite:///{folder}/people.db")
    vectors = torch.randn(len(names), users.model.aggregator.user_dim)
    vectors *= 3 * users.map.vectors.std() if users.map is not None else 1.0
    for name, vector in zip(names, vectors, strict=True):
        people.put(name, consent=True)
        people.add(name, [Judgment(prompt="Write.", chosen="Yes.", rejected="No.")])
        known, stored = people.get(name), vector.numpy().astype("<f4").tobytes()
        assert known is not None
        people.save_vector(name, users.fingerprint, known.revision, stored)
    people.close()
    return vectors


@torch.no_grad()
def offline(model: PersonalModule, ids: Sequence[int], vectors: torch.Tensor) -> list[str]:
    """Write one greedy text for each vector, in one batch."""
    input_ids, mask = left_padded([ids] * len(vectors))
    tokens = write_batch(
        model, model.tokenizer, input_ids, mask, vectors, max_new_tokens=N_TOKENS, temperature=0.0
    )
    return [str(text) for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def load_test(given: argparse.Namespace, folder: Path) -> None:
    model = load(given.policy)
    users = UserModel(model)
    names = [f"person-{n}" for n in range(given.people)]
    vectors = mark(folder, users, names)
    expected, started = {}, time.perf_counter()
    for prompt in PROMPTS:
        for name, text in zip(names, offline(model, users.prompt(prompt), vectors), strict=True):
            expected[name, prompt] = text
    alone = len(expected) / (time.perf_counter() - started)
    server = Server(given.policy, given.reward, folder)
    seconds: list[float] = []
    wrong, errors = [], []
    end = time.monotonic() + 60 * given.minutes

    def visit(name: str) -> None:
        draw = random.Random(name)
        with httpx2.Client(base_url=server.url, timeout=300) as client:
            while time.monotonic() < end:
                prompt, start = draw.choice(PROMPTS), time.perf_counter()
                body = {
                    "model": Path(given.policy).name,
                    "messages": [{"role": "user", "content": prompt}],
                    "user": name,
                    "temperature": 0,
                    "max_tokens": N_TOKENS,
                }
                answer = client.post("/v1/chat/completions", json=body)
                seconds.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    errors.append(answer.text)
                elif answer.json()["choices"][0]["message"]["content"] != expected[name, prompt]:
                    wrong.append(name)

    threads = [threading.Thread(target=visit, args=(name,)) for name in names]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(seconds) / (time.monotonic() - began)
    server.end(signal.SIGTERM)
    distinct = len({expected[name, PROMPTS[0]] for name in names})
    print(f"{len(seconds)} answers for {given.people} people ({distinct} distinct texts)")
    print(f"errors {len(errors)}, answers of another person {len(wrong)}")
    print(f"answers a second {rate:.1f}, offline {alone:.1f}, ratio {rate / alone:.2f}")
    half, most = np.quantile(seconds, [0.5, 0.95])
    print(f"seconds to answer: median {half:.2f}, p95 {most:.2f}")


def kill_test(given: argparse.Namespace, folder: Path) -> None:
    names = [f"person-{n}" for n in range(8)]
    acknowledged: list[tuple[str, int, str]] = []
    lock = threading.Lock()
    draw = random.Random(given.seed)
    for kill in range(given.kills):
        server = Server(given.policy, given.reward, folder)
        stop = threading.Event()

        def judge(
            name: str, url: str = server.url, stop: threading.Event = stop, n: int = kill
        ) -> None:
            with httpx2.Client(base_url=url, timeout=30) as client:
                count = 0
                while not stop.is_set():
                    count += 1
                    text = f"{name} {n} {count}"
                    pair = {"prompt": "Write.", "chosen": text, "rejected": "No."}
                    try:
                        client.put(f"/v1/users/{name}", json={"consent": True})
                        answer = client.post(f"/v1/users/{name}/pairs", json={"pairs": [pair]})
                    except httpx2.TransportError:
                        return
                    if answer.status_code == 200:
                        with lock:
                            acknowledged.append((name, answer.json()["ids"][0], text))

        threads = [threading.Thread(target=judge, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.2, 4.0))
        server.end(signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()
    people = People(f"sqlite:///{folder}/people.db")
    stored = {}
    for name in names:
        known = people.get(name)
        for one in known.judgments if known is not None else []:
            stored[name, one.id] = one.chosen
    lost = [one for one in acknowledged if stored.get(one[:2]) != one[2]]
    print(f"{given.kills} kills: {len(acknowledged)} judgments acknowledged, {len(stored)} stored")
    print(f"acknowledged and lost: {len(lost)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "kills"))
    parser.add_argument("policy")
    parser.add_argument("reward")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        (load_test if given.what == "load" else kill_test)(given, Path(folder))


if __name__ == "__main__":
    main()
