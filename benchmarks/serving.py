"""Measures a server of two runs: throughput and wrong answers under load, latency, and what kills lose.

    python benchmarks/serving.py load POLICY_RUN REWARD_RUN --people 64 --minutes 10
    python benchmarks/serving.py latency POLICY_RUN REWARD_RUN --people 8
    python benchmarks/serving.py kills POLICY_RUN REWARD_RUN --kills 200

`load`: each person has a vector of their own, far from all others, so that the text written for them is
theirs alone. Each answer is compared with that text, which the model itself writes in batches as large as
the server's, before and after. The ratio of both rates is printed, and the CPU time of an answer, which
depends less on what else the machine does.
`latency`: people answer ten pairs each, from an answer to the next pair. `kills`: people judge pairs; after
a few judgments, at a random moment, the server is killed and started again. Every judgment that was
acknowledged must be in the database at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from plrhf.cli import commands, serve
from plrhf.models.base import PersonalModule
from plrhf.models.generation import left_padded, write_batch
from plrhf.models.inference import load
from plrhf.serving.store import Judgment, People
from plrhf.serving.user_model import UserModel

PROMPTS = ("Write a note about the harbour.", "Tell me about the garden.", "Describe the old mill.")
N_TOKENS = 64  # as eval=generate has it
BATCH_SIZE = 64
OFFLINE_TIMES = 2  # that all texts are written before the server runs, and again after it


class Asked(NamedTuple):
    """A prompt of a person, by their number."""

    person: int
    prompt: str


class Reply(NamedTuple):
    """What the server answers."""

    status: int
    body: Any


class Server:
    """A server in a process of its own, with its people in a database in `folder`."""

    def __init__(self, policy: str, reward: str, folder: Path, *, forked: bool = False) -> None:
        self.log = folder / "server.log"
        words = [f"run={policy}", f"reward={reward}", f"database=sqlite:///{folder}/people.db"]
        words += ["port=0", "device=cpu", f"batch_size={BATCH_SIZE}"]
        reader, writer = os.pipe()
        if forked:  # has all imports and the models, which take most of a start, and reads no pool
            words.append("pool=0")
            self.process: Any = multiprocessing.get_context("fork").Process(
                target=serve_forked, args=(words, writer, self.log)
            )
            self.process.start()
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "plrhf.serving", *words],
                stdout=writer,
                stderr=self.log.open("a"),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.close(writer)
        with os.fdopen(reader) as said:
            line = said.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
        self.url = line.split()[-1]

    def cpu_seconds(self) -> float:
        """CPU time of all threads so far, as Linux counts it."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, how: int) -> None:
        os.kill(self.process.pid, how)
        wait = getattr(self.process, "wait", None) or self.process.join
        wait()


def serve_forked(words: list[str], writer: int, log: Path) -> None:
    """Serve in a forked process until it is killed; its output goes to a pipe and a file."""
    os.dup2(writer, sys.stdout.fileno())
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), sys.stderr.fileno())
    commands.run("serve", words, shown="plrhf serve")


def mark(folder: Path, users: UserModel, names: Sequence[str]) -> torch.Tensor:
    """Give each person a vector of their own, [n, user_dim], stored as if it were fitted."""
    people = People(f"sqlite:///{folder}/people.db", max_judgments=1000)
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
def offline(model: PersonalModule, asked: Sequence[Asked], vectors: torch.Tensor) -> list[str]:
    """Write one greedy text for each prompt and its person, in one batch as eval=generate does."""
    users = UserModel(model)
    input_ids, mask = left_padded([users.prompt(one.prompt) for one in asked])
    user = torch.stack([vectors[one.person] for one in asked])
    tokens = write_batch(
        model, model.tokenizer, input_ids, mask, user, max_new_tokens=N_TOKENS, temperature=0.0
    )
    return [str(text) for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def ask(connection: HTTPConnection, method: str, path: str, body: object = None) -> Reply:
    """Send a request on an open connection."""
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return Reply(answer.status, json.loads(answer.read()))


def load_test(given: argparse.Namespace, folder: Path) -> None:
    model = load(given.policy)
    names = [f"person-{n}" for n in range(given.people)]
    vectors = mark(folder, UserModel(model), names)
    every = [Asked(n, prompt) for prompt in PROMPTS for n in range(given.people)]
    random.Random(0).shuffle(every)
    batches = [every[start : start + BATCH_SIZE] for start in range(0, len(every), BATCH_SIZE)]
    expected: dict[Asked, str] = {}
    for batch in batches:
        expected.update(zip(batch, offline(model, batch, vectors), strict=True))

    def write_offline() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for batch in batches * OFFLINE_TIMES:
            offline(model, batch, vectors)
        return time.process_time() - cpu, time.perf_counter() - wall

    timed = [write_offline()]
    server = Server(given.policy, given.reward, folder)
    visits = Visits(server.url, Path(given.policy).name, expected)
    before, began = server.cpu_seconds(), time.monotonic()
    end = began + 60 * given.minutes
    run_all([partial(visits.visit, n, names[n], end) for n in range(given.people)])
    seconds, rate = visits.seconds, len(visits.seconds) / (time.monotonic() - began)
    used = 1000 * (server.cpu_seconds() - before) / len(seconds)
    server.end(signal.SIGTERM)
    timed.append(write_offline())
    alone_cpu, alone = np.sum(timed, axis=0) / (2 * OFFLINE_TIMES * len(every))
    distinct = len({expected[Asked(n, PROMPTS[0])] for n in range(given.people)})
    print(f"{len(seconds)} answers for {given.people} people ({distinct} distinct texts)")
    print(f"errors {len(visits.errors)}, answers of another person {len(visits.wrong)}")
    print(f"answers a second {rate:.1f}, offline {1 / alone:.1f}, ratio {rate * alone:.2f}")
    rates = ", ".join(f"{OFFLINE_TIMES * len(every) / wall:.1f}" for _, wall in timed)
    print(f"offline before and after: {rates}")
    print(f"CPU ms an answer {used:.1f}, offline {1000 * alone_cpu:.1f}")
    half, most = np.quantile(seconds, [0.5, 0.95])
    print(f"seconds to answer: median {half:.2f}, p95 {most:.2f}")


class Visits:
    """What people who ask all the time are answered.

    Attributes:
        seconds: to each answer. wrong: people who got another text than theirs. errors: bodies.
    """

    def __init__(self, url: str, model: str, expected: Mapping[Asked, str]) -> None:
        self.address, self.model, self.expected = url.partition("//")[2], model, expected
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.errors: list[object] = []

    def visit(self, person: int, name: str, end: float) -> None:
        """Ask until a time of the monotonic clock."""
        draw, connection = random.Random(name), HTTPConnection(self.address, timeout=300)
        while time.monotonic() < end:
            prompt, start = draw.choice(PROMPTS), time.perf_counter()
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "user": name,
                "temperature": 0,
                "max_tokens": N_TOKENS,
            }
            reply = ask(connection, "POST", "/v1/chat/completions", body)
            self.seconds.append(time.perf_counter() - start)
            if reply.status != 200:
                self.errors.append(reply.body)
            elif (
                reply.body["choices"][0]["message"]["content"]
                != self.expected[Asked(person, prompt)]
            ):
                self.wrong.append(name)


def latency_test(given: argparse.Namespace, folder: Path) -> None:
    """One person answers what they are asked; from each answer to the next pair."""
    server = Server(given.policy, given.reward, folder)
    connection, seconds = HTTPConnection(server.url.partition("//")[2], timeout=60), []
    before = server.cpu_seconds()
    for person in range(given.people):
        path = f"/v1/users/person-{person}"
        ask(connection, "PUT", path, {"consent": True})
        pair = ask(connection, "GET", f"{path}/next-pair").body
        for _ in range(10):
            first, second = pair["responses"]
            judged = {"prompt": pair["prompt"], "chosen": first, "rejected": second}
            start = time.perf_counter()
            ask(connection, "POST", f"{path}/pairs", {"pairs": [judged]})
            pair = ask(connection, "GET", f"{path}/next-pair").body
            seconds.append(time.perf_counter() - start)
    used = 1000 * (server.cpu_seconds() - before) / len(seconds)
    server.end(signal.SIGTERM)
    half, most = np.quantile(seconds, [0.5, 0.95])
    print(f"{len(seconds)} answers; seconds to the next pair: median {half:.3f}, p95 {most:.3f}")
    print(f"CPU ms an answer {used:.1f}")


def run_all(functions: Sequence[Callable[[], None]]) -> None:
    """Run functions at once and wait for all."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def judge(name: str, url: str, kill: int, acknowledged: list[tuple[str, int, str]]) -> None:
    """Add judgments until the server is gone, and note those that it acknowledged."""
    connection = HTTPConnection(url.partition("//")[2], timeout=30)
    try:
        ask(connection, "PUT", f"/v1/users/{name}", {"consent": True})
        for count in itertools.count():
            text = f"{name} {kill} {count}"
            pair = {"prompt": "Write.", "chosen": text, "rejected": "No."}
            reply = ask(connection, "POST", f"/v1/users/{name}/pairs", {"pairs": [pair]})
            if reply.status == 200:
                acknowledged.append((name, reply.body["ids"][0], text))
    except (OSError, HTTPException):
        return


def kill_test(given: argparse.Namespace, folder: Path) -> None:
    names = [f"person-{n}" for n in range(8)]
    acknowledged: list[tuple[str, int, str]] = []
    draw = random.Random(given.seed)
    serve.load = cache(serve.load)  # once for all starts
    for run in (given.policy, given.reward):
        serve.load(run, trust_components=False, trust_remote_code=False)
    for kill in range(given.kills):
        server = Server(given.policy, given.reward, folder, forked=True)
        judging = [partial(judge, name, server.url, kill, acknowledged) for name in names]
        people = threading.Thread(target=run_all, args=[judging])
        people.start()
        enough = len(acknowledged) + draw.randint(1, 30)
        while len(acknowledged) < enough and people.is_alive():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        server.end(signal.SIGKILL)
        people.join()
    store = People(f"sqlite:///{folder}/people.db", max_judgments=1000)
    stored = {}
    for name in names:
        known = store.get(name)
        for one in known.judgments if known is not None else []:
            stored[name, one.id] = one.chosen
    lost = [one for one in acknowledged if stored.get(one[:2]) != one[2]]
    print(f"{given.kills} kills: {len(acknowledged)} judgments acknowledged, {len(stored)} stored")
    print(f"acknowledged and lost: {len(lost)}")


def main() -> None:
    tests = {"load": load_test, "latency": latency_test, "kills": kill_test}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tests)
    parser.add_argument("policy")
    parser.add_argument("reward")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    if given.what == "kills":
        torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        tests[given.what](given, Path(folder))


if __name__ == "__main__":
    main()
