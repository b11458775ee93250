"""The methods of `conf/experiment/method/` for the referee: their trials, and how to build them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from plrhf.backbone.model import Backbone
from plrhf.cli.assemble import build_run_model
from plrhf.cli.config import RefereeConfig, RunConfig
from plrhf.cli.main import CONF
from plrhf.core.components import build
from plrhf.core.errors import bad_value
from plrhf.data.module import PreferenceData
from plrhf.models.adaptation import Adaptation
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.leaderboard import VANILLA
from plrhf.referee.side_by_side import Training

METHODS = Path("experiment", "method")


def config_folders() -> list[Path]:
    """Return the folders of settings: the package's, and those of ``--config-dir``."""
    folders = [CONF]
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders += [Path(one.path) for one in sources if one.provider == "command-line"]
    return folders


def method_names() -> list[str]:
    """Return the names of all methods, vanilla first."""
    paths = (path for folder in config_folders() for path in (folder / METHODS).glob("*.yaml"))
    names = sorted({path.stem for path in paths} - {"base"})
    return sorted(names, key=lambda name: name != VANILLA)


def compose_method(name: str, rows: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of ``train.py experiment=[method/NAME,ROWS] OVERRIDES`` as a plain dict.

    Args:
        rows: an experiment that defines rows, e.g. ``referee/polis``; None: `overrides` define them.
    """
    if name not in method_names():
        names = ", ".join(method_names())
        cure = f"Add {METHODS}/{name}.yaml to a folder of yours, and name that by --config-dir"
        raise bad_value("eval.methods", name, f"one of {names}", cure)
    experiments = [f"method/{name}", *([] if rows is None else [rows])]
    folders = ",".join(f"file://{one.absolute()}" for one in config_folders()[1:])
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = hydra.compose(
            "train",
            overrides=[
                f"experiment=[{','.join(experiments)}]",
                f"hydra.searchpath=[{folders}]",
                *overrides,
            ],
        )
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def grid_points(grid: Mapping[str, Sequence[Any]], n: int) -> list[dict[str, Any]]:
    """Return `n` random points of a grid without replacement, or all if it has fewer.

    The order is fixed by the grid, so a larger `n` adds points and keeps the others.
    """
    values = itertools.product(*grid.values())
    points = [dict(zip(grid, point, strict=True)) for point in values]
    random.Random(0).shuffle(points)
    return points[:n]


def with_settings(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the settings with values changed at dotted names.

    Raises:
        ValueError: there is no such setting.
    """
    changed = deepcopy(settings)
    for dotted, value in changes.items():
        *path, key = dotted.split(".")
        node = changed
        for part in path:
            node = node.get(part) or {}
        if key not in node:
            raise bad_value(f"referee.grid.{dotted}", value, "a setting of the method", "Name one")
        node[key] = value
    return changed


@dataclass(frozen=True)
class Trial:
    """A point of a method's grid, and the settings of its run."""

    point: dict[str, Any]
    config: RunConfig

    @property
    def structure(self) -> dict[str, Any]:
        """Settings that are equal for trials trained side by side: all except `optim`."""
        resolved = self.config.resolved
        return {name: resolved[name] for name in ("encoder", "aggregator", "model", "trainer")}


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rule's settings in ``conf/eval/adaptation``, replaced by the given ones."""
    path = CONF / "eval" / "adaptation" / f"{settings.get('name')}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in path.parent.glob("*.yaml")))
        cure = "Name one, or write {_target_: my_parts.MyRule}"
        raise bad_value("referee.adaptation", settings.get("name"), f"one of {names}", cure)
    return {**yaml.safe_load(path.read_text(encoding="utf-8")), **settings}


@dataclass(frozen=True)
class Method:
    """A method with its trials, for some rows and one seed; `halvings` are of `Training`."""

    name: str
    config: RunConfig
    trials: list[Trial]
    halvings: tuple[float, ...] = ()

    @property
    def referee(self) -> RefereeConfig:
        """The method's settings for the referee."""
        assert self.config.referee is not None
        return self.config.referee

    @property
    def rule(self) -> Adaptation | None:
        """The adaptation rule for unseen users; None: they are treated as the generic user."""
        given = self.referee.adaptation
        if given is None:
            return None
        own = {"name": given} if isinstance(given, str) else given
        settings = own if "_target_" in own else _with_defaults(own)
        rule: Adaptation = build(settings, "referee.adaptation", kind=Adaptation)
        return rule

    @property
    def training(self) -> Training:
        """How long the method's trials are trained."""
        return Training.of(self.config.trainer, self.halvings)

    def groups(self) -> list[list[Trial]]:
        """Return the trials in groups that can be trained side by side."""
        found: list[list[Trial]] = []
        for trial in self.trials:
            same = [one for one in found if one[0].structure == trial.structure]
            same[0].append(trial) if same else found.append([trial])
        return found


def read_method(
    name: str,
    rows: str | None,
    overrides: Sequence[str],
    *,
    seed: int,
    n_trials: int,
    halvings: Sequence[float] = (),
) -> Method:
    """Compose a method with its grid for some rows.

    Args:
        n_trials: points of the grid, or fewer where ``referee.trials`` or the grid has fewer.
        halvings: of `Training`; none: all trials are trained to the end.

    Raises:
        ValueError: the method has no grid, or is not a reward model on frozen features of texts alone.
    """
    settings = compose_method(name, rows, [*overrides, f"seed={seed}"])
    config = RunConfig.parse(settings)
    if config.referee is None or len(config.referee.grid) == 0:
        raise bad_value("referee.grid", None, "settings and values", f"Add it to {name}.yaml")
    if config.backbone.trainable != "frozen" or config.model["name"] != "reward":
        shown = f"{config.model['name']}, {config.backbone.trainable}"
        raise bad_value(
            f"method/{name}", shown, "model=reward, backbone.trainable=frozen", "Set both"
        )
    if config.data.context_pairs > 0:
        allowed = "0, as features are those of texts alone"
        cure = "Measure it with eval=adapt eval/adaptation=encode, which has the same controls"
        raise bad_value("data.context_pairs", config.data.context_pairs, allowed, cure)
    most = config.referee.trials or n_trials
    points = grid_points(config.referee.grid, min(n_trials, most))
    trials = [
        Trial(point, RunConfig.parse(with_settings(settings, point)) if point else config)
        for point in points
    ]
    return Method(name=name, config=config, trials=trials, halvings=tuple(halvings))


def build_trial(trial: Trial, data: PreferenceData, backbone: Backbone) -> PersonalRewardModel:
    """Build the model of a trial with the random initialisation of ``train.py``."""
    config = trial.config
    lightning.seed_everything(config.seed, verbose=False)
    model = build_run_model(config, data, backbone, config.backbone.path or "")
    if not (isinstance(model, PersonalRewardModel) and model.needs_only_pooled):
        raise bad_value(
            "aggregator",
            config.aggregator["name"],
            "one that acts after the trunk",
            "Set aggregator.site=last",
        )
    return model


def started_trial(
    trial: Trial, method: Method, data: PreferenceData, backbone: Backbone
) -> PersonalRewardModel:
    """Build the model of a trial, initialised from the train pairs by ``model.start``."""
    model = build_trial(trial, data, backbone)
    seen = data.restrict_to("train", "val")
    total_steps = method.training.total_steps(len(seen.train_dataloader()))
    model.initialise(seen, total_steps=total_steps)
    return model
