"""The settings of eval.py as typed, frozen objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from hydra.core.hydra_config import HydraConfig

from plrhf.cli.config import LoggerConfig
from plrhf.cli.sections import DataConfig, Section, Seed, check_writable
from plrhf.core.checks import FractionBelowOne, NonNegativeInt, PositiveInt
from plrhf.core.components import build, construct, locate, parameters
from plrhf.core.errors import bad_value
from plrhf.evaluation.best_of import BestOf
from plrhf.evaluation.generations import GenerationOptions
from plrhf.evaluation.trials import FewShotOptions
from plrhf.models.adaptation import Adaptation

TEXT_OPTIONS = (
    *("max_prompt_tokens", "max_tokens", "on_long_prompt", "on_long_response"),
    *("separator", "use_user_text", "use_user_features", "history_turns"),
    *("context_pairs", "min_context_pairs"),
)
"""Settings of data that are fixed by the trained model."""

OF_TRAINING = (
    *("val_fraction", "test_fraction", "seen_prompt_test_fraction", "unseen_fraction"),
    *("min_pairs_per_user", "max_users", "shuffle_users", "batch_size", "batch_tokens"),
    "split_by",
)
"""Settings of data that have no effect if all rows are test rows."""


class ScoreTask(Section):
    """Settings of eval=score, which has none of its own."""

    name: Literal["score"]


class CompareTask(Section):
    """Settings of eval=compare."""

    name: Literal["compare"]
    baseline: str | None


class WinrateTask(Section):
    """Settings of eval=winrate."""

    name: Literal["winrate"]
    writer: Literal["policy", "generic", "reference", "best_of_policy", "best_of_reference"]
    against: str
    judge: dict[str, Any]  # ``_target_`` and arguments

    @classmethod
    def read(cls, settings: Mapping[str, Any], field: str) -> Self:
        if isinstance(settings.get("judge"), str):
            raise bad_value(
                "eval.judge",
                settings["judge"],
                "a judge's settings",
                "Choose one with eval/judge=NAME",
            )
        return super().read(settings, field)


class RefereeTask(Section):
    """Settings of eval=referee.

    Attributes:
        rows: names of experiments that define rows; None: the rows of ``data``.
        methods: names in ``conf/experiment/method``; None: all that work with the rows.
        trials: largest number of points of each method's grid.
        halvings: shares of the steps after each of which the worse half of a method's trials stops.
        shots: numbers of pairs given of unseen users. draws: random draws of these pairs for each user.
        jobs: number of processes that share the work.
    """

    name: Literal["referee"]
    rows: list[str] | None
    methods: list[str] | None
    seeds: list[Seed]
    trials: PositiveInt
    halvings: list[FractionBelowOne]
    shots: list[NonNegativeInt]
    draws: PositiveInt
    jobs: PositiveInt


@dataclass(frozen=True)
class AdaptTask:
    """Settings of eval=adapt: the few-shot curve, and the adaptation rule."""

    options: FewShotOptions
    rule: Adaptation
    adaptation: dict[str, Any]  # the rule's ``_target_`` and arguments

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self:
        adaptation = settings["adaptation"]
        if isinstance(adaptation, str):
            raise bad_value(
                "eval.adaptation",
                adaptation,
                "a rule's settings",
                "Choose one with eval/adaptation=NAME",
            )
        curve = {name: value for name, value in settings.items() if name != "adaptation"}
        return cls(
            options=construct(FewShotOptions, curve, "eval"),
            rule=build(adaptation, "eval.adaptation", kind=Adaptation),
            adaptation=adaptation,
        )


Task: TypeAlias = (
    ScoreTask | CompareTask | WinrateTask | RefereeTask | GenerationOptions | AdaptTask
)


class EvalConfig(Section):
    """All settings of eval.py."""

    run: str | None
    runs: str | None
    out: str | None
    cache_dir: str  # the caller's: what a run names is not written to
    data: DataConfig | None
    logger: LoggerConfig | None = None  # of eval=compare
    backbone: dict[str, Any] | None = None  # of eval=referee
    seed: Seed | None
    trust_components: bool
    debug: bool
    task: Any  # a `Task`, read by `from_settings`
    resolved: dict[str, Any]  # the plain settings

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Check the settings of a command line and return them as objects.

        Raises:
            ValueError: a setting is wrong, or has no effect on the task.
        """
        node = settings["eval"]
        if settings["data"] is not None and settings["data"].get("seed") is None:
            settings = {**settings, "data": {**settings["data"], "seed": 0}}
        task = _read_task(node)
        rest = {name: value for name, value in settings.items() if name != "eval"}
        config = cls.read({**rest, "task": None, "resolved": settings}, "")
        config = config.model_copy(update={"task": task})
        if config.out is not None:
            check_writable("out", config.out)
        config.check_effect(node["name"])
        return config

    def check_effect(self, task: str) -> None:
        """Raise a ValueError if a setting on the command line has no effect on the task."""
        unused: dict[str, Any] = {}
        if task == "referee":
            unused = {"run": self.run, "runs": self.runs, "seed": self.seed}
        elif task == "compare":
            unused = {"run": self.run, "data": self.data}
        else:
            unused["runs"] = self.runs
        if task == "winrate":
            unused["data"] = self.data
        if task != "compare":
            unused["logger"] = self.logger
        if task not in ("generate", "adapt", "referee") and self.data is None:
            unused["seed"] = self.seed
        for name, value in unused.items():
            if value is not None:
                shown = self.resolved[name]
                shown = shown.get("name", shown) if isinstance(shown, dict) else shown
                raise bad_value(name, shown, f"null for eval={task}", f"Leave {name} out")
        if task == "generate" and self.task.best_of is None:
            self._check_no_best_of()
        if self.data is not None and task != "referee":
            self._check_data(self.data)

    def _check_no_best_of(self) -> None:
        """Raise a ValueError for settings of best-of-n on the command line, if there is no n."""
        for name in ("writers", "temperature"):
            if f"best_of.{name}" in overridden("eval"):
                value, cure = self.resolved["eval"]["best_of"][name], "Set eval.best_of.n=16, too"
                raise bad_value(f"eval.best_of.{name}", value, "left out without n", cure)

    def _check_data(self, data: DataConfig) -> None:
        """Raise a ValueError for settings of ``data`` that cannot apply to a trained model's rows."""
        given = overridden("data")
        of_source = parameters(locate(data.source["_target_"], "data"))
        for name in (*TEXT_OPTIONS, *OF_TRAINING):
            if name in given and name not in of_source:
                reason = (
                    "left to the run, whose texts are made one way"
                    if name in TEXT_OPTIONS
                    else "left out, as all rows of data= are test rows"
                )
                value = getattr(data, name)
                raise bad_value(f"data.{name}", value, reason, f"Leave data.{name} out")


TASKS: dict[str, Any] = {
    "score": ScoreTask,
    "compare": CompareTask,
    "winrate": WinrateTask,
    "referee": RefereeTask,
    "adapt": AdaptTask,
    "generate": GenerationOptions,
}
"""Class of the settings of each task."""


def _read_task(node: Mapping[str, Any]) -> Task:
    """Check the settings ``eval`` and return the task they choose."""
    kind = TASKS[node["name"]]
    if kind is GenerationOptions:
        rest = dict(node)
        settings, best_of = rest.pop("best_of"), None
        if (settings["n"], settings["reward"]) != (None, None):
            best_of = construct(BestOf, settings, "eval.best_of")
        return construct(GenerationOptions, rest, "eval", origin="eval", best_of=best_of)
    return AdaptTask.read(node) if kind is AdaptTask else kind.read(node, "eval")


def overrides_of(*sections: str) -> list[str]:
    """Return the command line's overrides that choose or change these sections."""
    if not HydraConfig.initialized():
        return []
    given = HydraConfig.get().overrides.task
    return [one for one in given if one.lstrip("+~").partition("=")[0].split(".")[0] in sections]


def overridden(section: str) -> set[str]:
    """Return the names of a section's settings that are set on the command line."""
    if not HydraConfig.initialized():
        return set()
    keys = [one.lstrip("+").partition("=")[0] for one in HydraConfig.get().overrides.task]
    return {key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")}
