"""A server on a real port, of exports of random models, whose people differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn
import yaml
from runs import TINY, composed, save_model
from tiny import perturb

from plrhf.backbone.loading import load_backbone, load_tokenizer
from plrhf.cli.assemble import build_run_model, load_options
from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.cli.serve import ServeConfig, build_service
from plrhf.models.export import save_export
from plrhf.serving.app import build_app
from plrhf.serving.protocol import build_server
from plrhf.serving.service import Service
from plrhf.serving.store import Judgment


def save_run(directory: Path, backbone: Path, *overrides: str) -> Path:
    """Write what `plrhf serve` reads of a run: config.yaml, and an export in which users differ."""
    words = [*TINY, "backbone=hf", f"backbone.path={backbone}", f"run_dir={directory}"]
    words = [word for word in words if not word.startswith(("backbone.tiny", "backbone.sft"))]
    settings = composed(*words, *overrides)
    config = RunConfig.from_settings(settings)
    data = build_data(config.data)
    loaded = load_backbone(**{**load_options(config.backbone), "path": str(backbone)})
    torch.manual_seed(0)
    model = build_run_model(config, data, loaded, str(backbone))
    for name in ("user", "offsets", "weights", "clusters", "to_film", "head", "lora_B"):
        perturb(model, name, std=0.3)
    with torch.no_grad():
        model.encoder.offsets.weight[0] = 0.0  # the generic user
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    save_export(directory / "export", model, model.card, load_tokenizer(str(backbone)))
    return directory


def save_runs(directory: Path) -> tuple[Path, Path]:
    """Write a policy (soft prompt) and a reward model (FiLM) of the same users."""
    backbone = save_model(directory / "gptj")
    soft = ["model=dpo", "aggregator=soft_prompt", "aggregator.n_tokens=2"]
    policy = save_run(directory / "policy", backbone, *soft)
    return policy, save_run(directory / "reward", backbone)


def mark(service: Service, name: str, seed: int) -> None:
    """Give a person a policy vector of their own, which no other person has."""
    policy = service.policy
    assert policy is not None
    service.people.put(name, consent=True)
    service.people.add(name, [Judgment(prompt="Write.", chosen="Yes.", rejected="No.")])
    known = service.person(name)
    vector = torch.randn(policy.users.model.aggregator.user_dim, generator=torch.manual_seed(seed))
    stored = vector.numpy().astype("<f4").tobytes()
    assert service.people.save_vector(name, policy.users.fingerprint, known.revision, stored)


@dataclass
class Running:
    """A running server."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread

    def client(self, **headers: str) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=headers, timeout=300)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=120)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    run: Path, folder: Path, *overrides: str, reward: Path | None = None
) -> Iterator[Running]:
    """A server for the time of a ``with``, its people in a database in `folder`."""
    words = [f"run={run}", f"database=sqlite:///{folder}/people.db", "port=0", "device=cpu"]
    words += [] if reward is None else [f"reward={reward}"]
    config = ServeConfig.read(composed(*words, *overrides, config="serve"), "")
    service = build_service(config)
    limits: Any = {name: getattr(config, name) for name in ("keys", "rate_limit", "max_body")}
    server = build_server(build_app(service, **limits, local=True), host="127.0.0.1", port=0)
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    running = Running(f"http://127.0.0.1:{socket.getsockname()[1]}", service, server, thread)
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield running
    finally:
        running.stop()
