"""``plrhf serve run=DIR``: loads models of runs and serves them to people over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, StringConstraints

from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.cli.sections import Section
from plrhf.core.checks import NonNegativeFloat, NonNegativeInt, PositiveInt
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.evaluation.elicitation import Rule
from plrhf.evaluation.people import evenly
from plrhf.evaluation.records import read_record
from plrhf.evaluation.users import LearnedUsers
from plrhf.models.base import PersonalModule
from plrhf.models.inference import load
from plrhf.models.policy import PersonalPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.serving.app import build_app
from plrhf.serving.engine import Engine
from plrhf.serving.guard import LOCAL
from plrhf.serving.protocol import build_server
from plrhf.serving.served import ServedModel
from plrhf.serving.service import Options, Service
from plrhf.serving.store import People
from plrhf.serving.user_model import UserModel

SWITCH_SECONDS = 0.0005  # after which a thread lets others run


class ServeConfig(Section):
    """All settings of ``plrhf serve``; conf/serve.yaml says what each is."""

    run: str
    reward: str | None
    database: str
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    device: str
    keys: list[Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]]
    rate_limit: PositiveInt | None
    max_body: PositiveInt
    max_judgments: PositiveInt
    max_tokens: PositiveInt
    batch_size: PositiveInt
    max_wait: NonNegativeFloat
    max_waiting: PositiveInt
    pool: NonNegativeInt
    ask: Rule
    trust_components: bool
    debug: bool


def serve(settings: Settings) -> None:
    """Serve until the process is asked to end; running answers are then finished."""
    config = ServeConfig.read(settings, "")
    service = build_service(config)
    app = build_app(
        service,
        keys=config.keys,
        rate_limit=config.rate_limit,
        max_body=config.max_body,
        local=config.host in LOCAL and len(config.keys) == 0,
    )
    server = build_server(app, host=config.host, port=config.port)
    # The engine's thread waits less for those that read requests; Python's default is 5 ms.
    sys.setswitchinterval(SWITCH_SECONDS)
    socket = server.config.bind_socket()
    socket.listen()  # who reads the next line may connect at once
    names = " and ".join(model.name for model in service.models)
    print(f"serving {names} on http://{config.host}:{socket.getsockname()[1]}", flush=True)
    server.run(sockets=[socket])


def build_service(config: ServeConfig) -> Service:
    """Load the models of the settings and open the database.

    Raises:
        ValueError: a run is of the wrong kind, or something cannot be loaded or opened.
    """
    models = [_load(config.run, config)]
    if config.reward is not None:
        models.append(_load(config.reward, config))
        wanted = (("run", PersonalPolicy, "dpo"), ("reward", PersonalRewardModel, "reward"))
        for model, (name, kind, word) in zip(models, wanted, strict=True):
            if not isinstance(model, kind):
                raise bad_value(
                    name, getattr(config, name), f"a run of model={word}", f"Set {name} to one"
                )
    people = People(config.database, max_judgments=config.max_judgments)
    asker = config.run if config.reward is None else config.reward
    pool = _pool(Path(asker), config) if config.pool > 0 else []
    words = _words(Path(asker))
    names = [_name(Path(directory)) for directory in (config.run, config.reward or config.run)]
    if config.reward is not None and names[0] == names[1]:
        names[1] += "-reward"
    served = [
        ServedModel(
            name,
            UserModel(model, pool, words) if model is models[-1] else UserModel(model),
            Engine(
                model,
                batch_size=config.batch_size,
                max_wait=config.max_wait,
                max_waiting=config.max_waiting,
            ),
            people,
        )
        for model, name in zip(models, names, strict=False)
    ]
    policy = served[0] if isinstance(models[0], PersonalPolicy) else None
    reward = served[-1] if isinstance(models[-1], PersonalRewardModel) else None
    return Service(people, policy, reward, Options(max_tokens=config.max_tokens, ask=config.ask))


def _load(directory: str, config: ServeConfig) -> PersonalModule:
    """Load the model of a run on the device of the settings."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = config.trust_components
    model = load(directory, trust_components=trust, trust_remote_code=trust)
    model.backbone.merge_adapters()
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise bad_value("device", device, "a device of this machine", "Set device=cpu") from error


def _pool(run: Path, config: ServeConfig) -> list[dict[str, Any]]:
    """Return distinct pairs of a run's training rows, chosen evenly."""
    if not (run / "config.yaml").is_file():
        raise bad_value(
            "pool",
            config.pool,
            f"0, as {run} is an export without the run's config.yaml",
            "Set pool=0, or give the directory of the run",
        )
    trained = RunConfig.of_run(run, trust_components=config.trust_components)
    rows = build_data(trained.data).splits.train
    distinct = {(str(row.prompt), frozenset((row.chosen, row.rejected))): row for row in rows}
    chosen = evenly(list(distinct.values()), config.pool)
    return [
        {"prompt": _plain(row.prompt), "chosen": row.chosen, "rejected": row.rejected}
        for row in chosen
    ]


def _words(run: Path) -> dict[str, str]:
    """Return what a run's users.json says about its train users, where it says anything."""
    path = run / "users.json"
    if not path.is_file():
        return {}
    users = read_record(path, LearnedUsers).users
    return {one["user_id"]: one["group"] for one in users if one["group"] is not None}


def _plain(prompt: Any) -> Any:
    """Return a row's prompt with messages as a list of dicts."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _name(directory: Path) -> str:
    """Return what clients call a model by: the name of the run's directory."""
    found = directory.resolve()
    return found.parent.name if found.name == "export" else found.name
