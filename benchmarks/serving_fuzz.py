"""Requests that a server must refuse: wrong types, huge bodies, broken Unicode, SQL, HTML, path tricks.

    python benchmarks/serving_fuzz.py http://127.0.0.1:8000 --requests 3000

Each answer must be an error of the client (4xx) in OpenAI's form that leaks nothing of the server.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        2**70,
        1e308,
        [],
        {},
        [[]],
        {"a": {}},
        "",
        " ",
        "\x00",
        "a\x00b",
        "x" * 20_000,
    ),
    *(
        "'; DROP TABLE people; --",
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "%s%n",
        "${7*7}",
    ),
    *("\ud800", "\u202e", "NaN", "-Infinity", "0x10", "1e999"),
)
NO_TEXT: tuple[Any, ...] = (-1, 2**70, 1e308, 0.5, [], {}, [[]], {"a": {}}, [1], "\x00", "\ud800")
PATHS = (
    *(
        "/v1/users/..%2f..%2fetc%2fpasswd",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/v1/users/%00",
    ),
    *(
        "/v1/users/%ff%fe",
        "/v1/users/a%2Fb",
        "/v1/users/" + "a" * 300,
        "/v1/users/%20",
        "//v1//models",
    ),
    *(
        "/v1/users/a/pairs/-1",
        "/v1/users/a/pairs/" + "9" * 40,
        "/v1/users/a/pairs/x",
        "/etc/passwd",
    ),
    *("/v1/users/nobody/next-pair", "/v1/users/'%20OR%201=1--", "/docs", "/openapi.json", "/.env"),
    *("/v1/models/", "/v1/users/a/"),
)
VALID: dict[str, tuple[str, Any]] = {
    "/v1/chat/completions": (
        "POST",
        {"model": "policy", "messages": [{"role": "user", "content": "A"}], "max_tokens": 1},
    ),
    "/v1/score": ("POST", {"inputs": [{"prompt": "A", "response": "B"}]}),
    "/v1/users/fuzz": ("PUT", {"consent": True}),
    "/v1/users/fuzz/pairs": ("POST", {"pairs": [{"prompt": "A", "chosen": "B", "rejected": "C"}]}),
}
REQUIRED = {"model", "messages", "inputs", "consent", "pairs"}
LEAKS = ("Traceback", "sqlalchemy", "sqlite", "site-packages", ".py", "pydantic", "/root", "/work")


@dataclass(frozen=True)
class Shot:
    """One request."""

    method: str
    path: str
    content: bytes | None = None
    headers: dict[str, str] | None = None


def shots(n: int, seed: int) -> Iterator[Shot]:
    """Yield n requests that are wrong, the same ones for a seed."""
    draw = random.Random(seed)
    makers = (
        _wrong_field,
        _wrong_leaf,
        _unknown_field,
        _missing_field,
        _no_json,
        _path,
        _method,
        _headers,
    )
    for _ in range(n):
        yield draw.choice(makers)(draw)


def _valid(draw: random.Random) -> tuple[str, str, dict[str, Any]]:
    path = draw.choice(sorted(VALID))
    method, body = VALID[path]
    return method, path, dict(body)


def _as_json(method: str, path: str, body: Any) -> Shot:
    headers = {"content-type": "application/json"}
    return Shot(method, path, json.dumps(body).encode(), headers)


def _wrong_field(draw: random.Random) -> Shot:
    method, path, body = _valid(draw)
    field = draw.choice(sorted(body))
    wrong = [one for one in NASTY if not (field == "consent" and one is True)]
    wrong = [one for one in wrong if not (field == "max_tokens" and one is None)]
    return _as_json(method, path, {**body, field: draw.choice(wrong)})


def _wrong_leaf(draw: random.Random) -> Shot:
    """Put what is no text, or no text that can be stored, in the place of one text deep in the body."""
    method, path, body = _valid(draw)
    body = copy.deepcopy(body)
    at: Any = body
    while True:
        key = draw.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list):
            at[key] = draw.choice(NO_TEXT)
            return _as_json(method, path, body)
        at = at[key]


def _unknown_field(draw: random.Random) -> Shot:
    method, path, body = _valid(draw)
    name = draw.choice(("tools", "__proto__", "'; --", "logprobs", "\x00", "a" * 500))
    return _as_json(method, path, {**body, name: draw.choice(NASTY)})


def _missing_field(draw: random.Random) -> Shot:
    method, path, body = _valid(draw)
    body.pop(draw.choice(sorted(REQUIRED & set(body))))
    return _as_json(method, path, body)


def _no_json(draw: random.Random) -> Shot:
    method, path, _ = _valid(draw)
    broken = (
        b"{",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b"nul",
        b'{"a": 1',
        b"<xml/>",
        b'"\\ud800"',
        b"1" * 5000,
    )
    content = draw.choice((*broken, draw.randbytes(draw.randint(1, 400)), b"x" * 2_000_000))
    return Shot(method, path, content, {"content-type": "application/json"})


def _path(draw: random.Random) -> Shot:
    if draw.random() < 0.7:
        return Shot("GET", draw.choice(PATHS))
    text = "".join(chr(draw.choice((*range(32), 47, 127, 0x202E, 0xFFFF))) for _ in range(3))
    return Shot("GET", "/v1/users/" + quote(text, safe=""))


def _method(draw: random.Random) -> Shot:
    path = draw.choice(("/v1/models", "/v1/chat/completions", "/healthz", "/"))
    return Shot(draw.choice(("PATCH", "TRACE", "DELETE", "PROPFIND")), path)


def _headers(draw: random.Random) -> Shot:
    method, path, body = _valid(draw)
    kind = draw.choice(
        ("text/plain", "multipart/form-data", "", "application/x-www-form-urlencoded")
    )
    return Shot(method, path, json.dumps(body).encode(), {"content-type": kind, "x-a": "b" * 5000})


def fault_of(answer: httpx2.Response) -> str | None:
    """Say what is wrong with the answer to a wrong request; None if it is right."""
    if not 400 <= answer.status_code < 500:
        return f"status {answer.status_code}"
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "not in OpenAI's form"
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "not in OpenAI's form"
    leaked = [one for one in LEAKS if one in error["message"]]
    return f"leaks {leaked[0]}" if leaked else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    statuses: Counter[int] = Counter()
    faults: Counter[str] = Counter()
    with httpx2.Client(base_url=given.url, timeout=60) as client:
        for shot in shots(given.requests, given.seed):
            answer = client.request(
                shot.method, shot.path, content=shot.content, headers=shot.headers
            )
            statuses[answer.status_code] += 1
            if (fault := fault_of(answer)) is not None:
                faults[f"{shot.method} {shot.path[:60]}: {fault}"] += 1
        alive = client.get("/healthz").status_code == 200
    print(f"{given.requests} requests, answers {dict(statuses)}, alive {alive}")
    print(f"faults: {dict(faults) if faults else 'none'}")


if __name__ == "__main__":
    main()
