"""What docs/serving.md tells a newcomer to type works, and wrong requests are refused."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from collections import Counter
from typing import Any

import pytest
from runs import ROOT
from served import Running

GUIDE = (ROOT / "docs/serving.md").read_text()
N_FUZZED = 90


@pytest.mark.slow
def test_the_guide(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8000", server.url), found)
    assert len(capsys.readouterr().out) > 5
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
    (curls,) = [block for block in blocks if "curl" in block]
    lines = curls.replace("\\\n", " ").strip().split("\n")
    answers = []
    for line in lines:
        asked = line.replace("localhost:8000", server.url).replace("curl ", "curl -s ", 1)
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout))
    assert [("error" in answer) for answer in answers] == [False] * 5
    assert len(answers[1]["responses"]) == 2 and answers[2]["used"] == 1
    assert answers[4]["removed"]["judgments"] == 1


def test_every_route_is_named(server: Running) -> None:
    app: Any = server.server.config.app
    paths = {route.path for route in app.app.routes} - {"/", "/page/{name}"}
    assert len(paths) > 8
    for path in paths:
        assert re.sub(r"{pair_id}", "{pair}", re.sub(r"{user_id}", "{id}", path)) in GUIDE, path


@pytest.mark.slow
def test_wrong_requests_are_refused(server: Running) -> None:
    fuzz = runpy.run_path(str(ROOT / "benchmarks/serving_fuzz.py"))
    statuses: Counter[int] = Counter()
    with server.client() as client:
        for shot in fuzz["shots"](N_FUZZED, 1):
            answer = client.request(
                shot.method, shot.path, content=shot.content, headers=shot.headers
            )
            assert fuzz["fault_of"](answer) is None, (shot.method, shot.path, answer.text[:300])
            statuses[answer.status_code] += 1
        assert client.get("/v1/users/fuzz").status_code == 404  # nothing wrong was taken
    assert {400, 404, 405, 413, 415} <= set(statuses)
