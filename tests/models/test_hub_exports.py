"""An export goes to a stub of the hub and comes back the same."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from runs import composed

import plrhf
from plrhf.cli.export import export
from plrhf.data.digests import folder_digests
from plrhf.models.card import read_card
from plrhf.models.hub import export_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the stub holds: files by name, and what it was asked to make."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's API that an upload and a download need; all files are small ones."""

    hub: Hub

    def do_POST(self) -> None:  # noqa: N802
        """Make a repository, say how files are to be sent, or take a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            self.hub.made.append(json.loads(body))
            found = {"url": "http://127.0.0.1/ada/notes", "name": "ada/notes"}
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            found = {"files": [{"path": name, **how} for name in names]}
        elif "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    content = base64.b64decode(one["value"]["content"])
                    self.hub.files[one["value"]["path"]] = content
            found = {"commitUrl": f"http://127.0.0.1/ada/notes/commit/{COMMIT}"}
            found |= {"commitOid": COMMIT, "success": True}
        self.answer(json.dumps(found).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:  # noqa: N802
        """Describe the repository, or send a file."""
        if not self.path.startswith("/ada/notes/resolve/"):
            found: Any = {"id": "ada/notes", "sha": COMMIT}
            if "/tree/" in self.path:
                files = self.hub.files.items()
                kind = {"type": "file", "oid": COMMIT}
                found = [{**kind, "path": name, "size": len(one)} for name, one in files]
            self.answer(json.dumps(found).encode(), {"Content-Type": "application/json"})
            return
        content = self.hub.files[self.path.split("/", 5)[5]]
        etag = hashlib.sha1(content).hexdigest()  # noqa: S324
        self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: bytes, headers: dict[str, str]) -> None:
        """Send an answer, without its content if only the headers were asked for."""
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this machine, for which huggingface_hub is told an address, a token and a cache."""
    handler = type("Handler", (Answers,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stub")
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_an_export_goes_to_the_hub_and_comes_back(
    hub: Hub, reward_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(composed(f"run={reward_run}", "out=ada/notes", "to=hub", config="export"))
    assert capsys.readouterr().out.splitlines() == [
        f"pushed: http://127.0.0.1/ada/notes/commit/{COMMIT}",
        'next: plrhf.load("hf://ada/notes")',
    ]
    assert [one["visibility"] for one in hub.made] == ["private"]
    back = export_of("hf://ada/notes")
    assert folder_digests(back, without=[]) == folder_digests(reward_run / "export", without=[])
    asked = [{"prompt": "Write a note.", "response": "Back at six."}]
    assert plrhf.load("hf://ada/notes@main").score(asked) == plrhf.load(reward_run).score(asked)


@pytest.mark.slow
def test_nothing_but_the_export_goes_to_the_hub(hub: Hub, reward_run: Path, tmp_path: Path) -> None:
    copy, secret = tmp_path / "export", tmp_path / "secret"
    shutil.copytree(reward_run / "export", copy)
    secret.write_text("secret")
    (copy / "optimizer.pt").write_text("secret")
    (copy / "notes").symlink_to(secret)
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(secret)
    plrhf.push_to_hub(copy, "ada/notes")
    assert set(hub.files) == {"plrhf.json", *read_card(copy).files}


def test_what_the_hub_refuses_is_one_line(hub: Hub, reward_run: Path) -> None:
    with pytest.raises(ValueError, match=r"name='a/b/c' is not allowed: .* may write to") as caught:
        plrhf.push_to_hub(reward_run, "a/b/c")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"export='hf://a/b/c' is not allowed"):
        plrhf.load("hf://a/b/c")
    (reward_run.parent / "none").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"a directory with plrhf\.json"):
        plrhf.push_to_hub(reward_run.parent / "none", "ada/notes")
    assert hub.made == []
