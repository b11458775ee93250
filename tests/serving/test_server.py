"""The server, asked by OpenAI's own client and by plain HTTP: for whom it writes and what it refuses."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from served import Running, mark, save_runs, serving

import plrhf
from plrhf.models.adaptation import Mixture
from plrhf.serving.guard import RateLimit, key_hash

ASKED: list[Any] = [{"role": "user", "content": "Write a note."}]
GREEDY: dict[str, Any] = {"model": "policy", "messages": ASKED, "temperature": 0, "max_tokens": 6}


def agree(http: httpx2.Client, name: str) -> None:
    assert http.put(f"/v1/users/{name}", json={"consent": True}).status_code == 200


def judge(http: httpx2.Client, name: str, **verdict: str) -> dict[str, Any]:
    """Let a person prefer the first response of the pair that they are asked next."""
    pair = http.get(f"/v1/users/{name}/next-pair").json()
    first, second = pair["responses"]
    judged = {"prompt": pair["prompt"], "chosen": first, "rejected": second, **verdict}
    return dict(http.post(f"/v1/users/{name}/pairs", json={"pairs": [judged]}).json())


@pytest.mark.slow
def test_train_users_and_nobody_are_written_to_as_by_the_model(
    asked: openai.OpenAI, runs: tuple[Path, Path]
) -> None:
    model = plrhf.load(runs[0])
    users = [*model.card.users[:3], None]
    requests = [{"prompt": "Write a note."} | ({"user_id": u} if u else {}) for u in users]
    expected = model.write(requests, max_new_tokens=6, temperature=0.0)
    assert len(set(expected)) > 2
    for user, text in zip(users, expected, strict=True):
        whom = {} if user is None else {"user": user}
        found = asked.chat.completions.create(**GREEDY, **whom)
        assert found.choices[0].message.content == text
        chunks = list(
            asked.chat.completions.create(
                **GREEDY, **whom, stream=True, stream_options={"include_usage": True}
            )
        )
        pieces = [one.choices[0].delta.content or "" for one in chunks if one.choices]
        assert "".join(pieces) == text and len(pieces) > 3
        assert chunks[-1].usage == found.usage
        assert chunks[-2].choices[0].finish_reason == found.choices[0].finish_reason == "length"
    stranger = asked.chat.completions.create(**GREEDY, user="nobody we know")
    assert stranger.choices[0].message.content == expected[-1]
    assert [one.id for one in asked.models.list()] == ["policy", "reward"]


def test_sampling_options(asked: openai.OpenAI) -> None:
    how = {**GREEDY, "temperature": 1.5}
    two = asked.chat.completions.create(**how, seed=3, n=2).choices
    again = asked.chat.completions.create(**how, seed=3, n=2, top_p=1.0).choices
    texts = [one.message.content for one in two]
    assert texts == [one.message.content for one in again] and texts[0] != texts[1]
    whole = texts[0] or ""
    stop = whole[len(whole) // 2 :][:3]
    stopped = {**how, "seed": 3, "n": 2, "stop": [stop]}
    cut = asked.chat.completions.create(**stopped).choices
    assert cut[0].message.content == whole[: whole.index(stop)] and cut[0].finish_reason == "stop"
    streamed = ["", ""]
    for chunk in asked.chat.completions.create(**stopped, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [one.message.content for one in cut]


@pytest.mark.slow
def test_the_best_of_many_is_what_the_person_likes_most(
    asked: openai.OpenAI, http: httpx2.Client
) -> None:
    how = {**GREEDY, "temperature": 1.5, "seed": 5}
    user = judging_user(http)
    best = asked.chat.completions.create(**how, user=user, n=1, extra_body={"best_of": 4})
    own = asked.chat.completions.create(**how, user=user, n=4)
    texts = [choice.message.content for choice in own.choices]
    inputs = [{"prompt": "Write a note.", "response": one, "user": user} for one in texts]
    scores = [
        one["score"] for one in http.post("/v1/score", json={"inputs": inputs}).json()["data"]
    ]
    assert best.choices[0].message.content == texts[scores.index(max(scores))]
    assert best.usage == own.usage  # of all four


def judging_user(http: httpx2.Client) -> str:
    """A person with two judgments."""
    agree(http, "best")
    judge(http, "best")
    judge(http, "best")
    return "best"


def test_scores_are_those_of_the_model(http: httpx2.Client, runs: tuple[Path, Path]) -> None:
    model = plrhf.load(runs[1])
    user = model.card.users[1]
    note = {"prompt": "Write a note.", "response": "Back at six."}
    expected = model.score([{**note, "user_id": user}, note]).tolist()
    found = http.post("/v1/score", json={"inputs": [{**note, "user": user}, note]}).json()
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_person_is_learned_and_forgotten(
    server: Running, http: httpx2.Client, asked: openai.OpenAI
) -> None:
    assert http.get("/v1/users/zoe").status_code == 404
    pair = {"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}
    refused = http.post("/v1/users/zoe/pairs", json={"pairs": [pair]})
    assert refused.status_code == 403 and "consent" in refused.json()["error"]["message"]
    agree(http, "zoe")
    before = asked.chat.completions.create(**GREEDY, user="zoe").choices[0].message.content
    assert http.get("/v1/users/zoe/certainty").json()["certainty"] == 0
    certain = [judge(http, "zoe")["certainty"] for _ in range(4)]
    assert 0 < certain[0] < certain[-1] < 1
    undone = judge(http, "zoe", verdict="skip")
    assert undone["certainty"] == certain[-1] and undone["judgments"] == 5 and undone["used"] == 4
    last = http.get("/v1/users/zoe").json()["pairs"][3]["id"]
    back = http.delete(f"/v1/users/zoe/pairs/{last}").json()
    assert back["certainty"] == pytest.approx(certain[2]) and back["judgments"] == 4
    asked.chat.completions.create(**GREEDY, user="zoe")  # which fits the policy
    policy, known = server.service.policy, server.service.person("zoe")
    assert policy is not None
    stored = server.service.people.vector("zoe", policy.users.fingerprint)
    expected = plrhf.adapt(policy.users.model, known.pairs(), Mixture()).vector
    assert stored == expected.numpy().tobytes() and expected.abs().max() > 0.1
    gone = http.delete("/v1/users/zoe").json()
    assert gone == {
        "id": "zoe",
        "deleted": True,
        "removed": {"judgments": 4, "vectors": 2, "from_exports": 0},
        "kept": [],
    }
    assert http.get("/v1/users/zoe").status_code == 404
    assert asked.chat.completions.create(**GREEDY, user="zoe").choices[0].message.content == before


@pytest.mark.slow
def test_no_pair_is_asked_twice(http: httpx2.Client) -> None:
    agree(http, "max")
    seen = set()
    for _ in range(9):
        pair = http.get("/v1/users/max/next-pair").json()
        seen.add((pair["prompt"], frozenset(pair["responses"])))
        judged = {"prompt": pair["prompt"], "chosen": pair["responses"][1]}
        judged |= {"rejected": pair["responses"][0], "verdict": "tie"}
        http.post("/v1/users/max/pairs", json={"pairs": [judged]})
    assert len(seen) == 9
    over = http.get("/v1/users/max/next-pair")
    assert over.status_code == 404 and over.json()["error"]["code"] == "no_pair_left"


@pytest.mark.slow
def test_answers_go_to_those_who_asked(server: Running, asked: openai.OpenAI) -> None:
    """Ten people at once, several times, in batches of all: each gets what they get alone."""
    names = [f"p{n}" for n in range(10)]
    for n, name in enumerate(names):
        mark(server.service, name, n)

    def write(name: str) -> str | None:
        return asked.chat.completions.create(**GREEDY, user=name).choices[0].message.content

    alone = [write(name) for name in names]
    assert len(set(alone)) == 10
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(write, names * 3)) == alone * 3


@pytest.mark.slow
def test_who_is_deleted_at_one_server_is_nobody_at_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers on one database, which share the policy's export and have one each of the rewards."""
    policy, reward = save_runs(tmp_path / "runs")
    copy = shutil.copytree(reward, tmp_path / "copy/reward")
    trained = plrhf.load(reward).card.users[2]
    note = {"prompt": "Write a note.", "response": "Back at six."}
    inputs = [{**note, "user": user} for user in (trained, "zoe", None)]
    monkeypatch.setattr("plrhf.serving.served.SWEEP_SECONDS", 0.0)

    def scores(http: httpx2.Client) -> list[float]:
        found = http.post("/v1/score", json={"inputs": inputs}).json()["data"]
        return [one["score"] for one in found]

    def text(http: httpx2.Client, **whom: str) -> Any:
        return http.post("/v1/chat/completions", json={**GREEDY, **whom}).json()["choices"][0]

    with (
        serving(policy, tmp_path, "pool=4", reward=reward) as here,
        serving(policy, tmp_path, "pool=4", reward=copy) as there,
        here.client() as http,
        there.client() as other,
    ):
        agree(other, "zoe")
        judge(other, "zoe")
        model = there.service.reward
        assert model is not None and len(set(scores(other))) == 3 and "zoe" in model.fits
        assert text(other, user=trained) != text(other)
        gone = http.delete(f"/v1/users/{trained}").json()
        assert gone["removed"]["from_exports"] == 2 and "Weights that all people" in gone["kept"][0]
        assert http.delete(f"/v1/users/{trained}").status_code == 404
        assert http.delete("/v1/users/zoe").status_code == 200
        assert len(set(scores(other))) == 1
        assert text(other, user=trained) == text(other)
        assert "zoe" not in model.fits
    for run in (policy, reward, copy):
        assert trained not in plrhf.load(run).card.users
        files = [path for path in run.rglob("export/*") if path.is_file()]
        assert not any(trained.encode() in path.read_bytes() for path in files)


@pytest.mark.slow
def test_a_person_has_at_most_max_judgments(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with (
        serving(runs[1], tmp_path, "pool=4", "max_judgments=2") as running,
        running.client() as http,
    ):
        agree(http, "zoe")
        judge(http, "zoe")
        number = judge(http, "zoe")["ids"][0]
        refused = judge(http, "zoe")["error"]
        assert (
            refused["code"] == "too_many_judgments" and "raise max_judgments" in refused["message"]
        )
        assert http.get("/v1/users/zoe/certainty").json()["judgments"] == 2
        http.delete(f"/v1/users/zoe/pairs/{number}")
        assert judge(http, "zoe")["judgments"] == 2


@pytest.mark.slow
def test_keys_limits_and_a_stop_that_lets_answers_end(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    limits = [f"keys=[{key_hash('secret')}]", "rate_limit=4", "pool=0"]
    with serving(runs[0], tmp_path, *limits) as running:
        with running.client() as http, running.client(Authorization="Bearer secret") as own:
            refused = http.get("/v1/models")
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert http.get("/healthz").status_code == 200
            assert [own.get("/v1/models").status_code for _ in range(3)] == [200, 200, 200]
            scored = {"inputs": [{"prompt": "A", "response": "B"}]}
            assert own.post("/v1/score", json=scored).status_code == 404  # no reward model
            limited = own.get("/v1/models")
            assert limited.status_code == 429 and int(limited.headers["Retry-After"]) >= 1
        guard: Any = running.server.config.app
        guard.rate.per_minute = None
        got: list[str | None] = []

        def long() -> None:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret")
            found = client.chat.completions.create(**{**GREEDY, "max_tokens": 60})
            got.append(found.choices[0].finish_reason)

        thread = threading.Thread(target=long)
        thread.start()
        policy = running.service.policy
        assert policy is not None
        while policy.engine.n_written == 0:  # it has not begun
            time.sleep(0.001)
        running.stop()
        thread.join()
        assert got in (["length"], ["stop"])


def test_a_database_that_fails_is_said_to_and_costs_no_later_request(
    server: Running, http: httpx2.Client
) -> None:
    agree(http, "sql")
    with server.service.people.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE people RENAME TO gone")
    failed = http.get("/v1/users/sql")
    with server.service.people.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO people")
    assert failed.status_code == 503 and int(failed.headers["Retry-After"]) >= 1
    assert failed.json()["error"]["code"] == "database_unavailable"
    assert http.get("/v1/users/sql").status_code == 200


def test_the_rate_is_a_bucket_that_fills() -> None:
    limit = RateLimit(3)
    assert [limit.wait("a", 0.0) for _ in range(4)] == [0, 0, 0, 20]
    assert limit.wait("b", 0.0) == 0
    assert limit.wait("a", 19.0) == pytest.approx(1.0) and limit.wait("a", 20.0) == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", {**GREEDY, "model": "gpt-9"}, 404, "model_not_found"),
        ("POST", "/v1/chat/completions", {**GREEDY, "tools": []}, 400, "invalid_value"),
        (
            "POST",
            "/v1/chat/completions",
            {**GREEDY, "max_tokens": 999},
            400,
            "context_length_exceeded",
        ),
        ("POST", "/v1/chat/completions", {**GREEDY, "messages": []}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**GREEDY, "temperature": "hot"}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**GREEDY, "best_of": 2, "n": 3}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**GREEDY, "stop": [""]}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**GREEDY, "messages": ASKED * 2}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", {**GREEDY, "user": "a" * 300}, 400, "invalid_value"),
        ("PUT", "/v1/users/a%2Fb", {"consent": True}, 404, "not_found"),
        ("PUT", "/v1/users/%00", {"consent": True}, 400, "invalid_value"),
        ("PUT", "/v1/users/ada", {"consent": 1}, 400, "invalid_value"),
        ("PUT", "/v1/users/ada", {"consent": True, "x": "y" * 9000}, 413, "request_too_large"),
        ("PATCH", "/v1/users/ada", {"consent": True}, 405, "method_not_allowed"),
        ("GET", "/v1/nothing", None, 404, "not_found"),
    ],
)
def test_what_is_refused(
    http: httpx2.Client, method: str, path: str, body: Any, status: int, code: str
) -> None:
    found = http.request(method, path, json=body)
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "access-control-allow-origin" not in found.headers


def test_bodies_that_are_no_json(http: httpx2.Client) -> None:
    as_json = {"content-type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[" * 3000, b'{"consent": NaN}', b'{"consent": "\\ud800"}'):
        found = http.put("/v1/users/ada", content=content, headers=as_json)
        assert found.status_code == 400 and json.loads(found.content)["error"]
    plain = http.put(
        "/v1/users/ada", content=b'{"consent": true}', headers={"content-type": "text/plain"}
    )
    assert plain.status_code == 415


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"inputs": [{"prompt": "A", "response": "\ud800"}]}),
        ("/v1/score", {"inputs": [{"prompt": "\udfffA", "response": "B"}]}),
        ("/v1/users/ada/pairs", {"pairs": [{"prompt": "A", "chosen": "\udc00", "rejected": "B"}]}),
        ("/v1/chat/completions", {**GREEDY, "stop": "\ud800"}),
        ("/v1/chat/completions", {**GREEDY, "model": "\ud800"}),
    ],
)
def test_halves_of_characters_are_refused(http: httpx2.Client, path: str, body: Any) -> None:
    as_json = {"content-type": "application/json"}
    found = http.post(path, content=json.dumps(body).encode(), headers=as_json)
    assert found.status_code == 400 and "lone surrogates" in found.json()["error"]["message"]


def test_a_foreign_name_of_this_machine_is_refused(http: httpx2.Client) -> None:
    for host in ("evil.example", "evil.example:8000", "", "[::1", "127.0.0.1.evil.example"):
        assert http.get("/v1/models", headers={"host": host}).status_code in (400, 403)
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200
