"""Every file of conf/ composes and builds, and settings meet the constructors they are meant for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, composed, rows_of_world, save_model, write_rows
from upstream import (
    many_comparisons,
    many_dialogues,
    write_comparisons,
    write_prism,
    write_soups,
)

from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.cli.main import CONF
from plrhf.cli.run import check_settings, make_card
from plrhf.core.components import accepted, build, kinds, locate, parameters
from plrhf.data.build import build_data
from plrhf.encoders import UserEncoder
from plrhf.evaluation.generations import GenerationOptions
from plrhf.evaluation.judges import Judge
from plrhf.models.loading import build_model
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.sft import SupervisedPolicy
from plrhf.training.loggers import build_loggers
from plrhf.training.supervised import Recipe, check_backbone, open_backbone, trainer_of
from plrhf.training.trainer import build_trainer

GROUPS = ("data", "backbone", "encoder", "aggregator", "model", "trainer", "logger", "eval")


def options(group: str) -> list[str]:
    """The choices of a group, by its files; ``base`` is what others build on."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stand-ins for what a config only names: rows, and models in directories."""
    folder = tmp_path_factory.mktemp("files")
    rows = rows_of_world(features=True)
    (folder / "hub").mkdir()
    return {
        "rows": write_rows(folder / "rows.jsonl", rows),
        "gptj": save_model(folder / "gptj"),
        "bert": save_model(folder / "bert", "bert"),
        "hub": write_rows(folder / "hub/train.jsonl", rows).parent,
        "tldr": write_comparisons(folder / "tldr", many_comparisons()),
        "psoups": write_soups(folder / "psoups"),
        "prism": write_prism(folder / "prism", *many_dialogues()),
    }


@pytest.fixture
def card_of(files: dict[str, Path]) -> Any:
    """Settings -> data, backbone, card, with the rows and model of `files` in their place."""

    def make(settings: dict[str, Any]) -> Any:
        data = build_data(composed("data=jsonl", f"data.path={files['rows']}")["data"])
        # The stand-in knows no other tokenizer's padding.
        node = {**settings["backbone"], "path": str(files["gptj"]), "pad_token": None}
        _, backbone = open_backbone(node, node["path"])
        return data, backbone, make_card({**settings, "backbone": node}, data, backbone, "")

    return make


def test_the_groups_are_all_tested() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment"}
    assert ROOT / "conf" == CONF
    for group in GROUPS:
        assert len(options(group)) > 0


@pytest.mark.parametrize("encoder", options("encoder"))
@pytest.mark.parametrize("aggregator", options("aggregator"))
def test_encoders_and_aggregators(encoder: str, aggregator: str, card_of: Any) -> None:
    settings = composed(f"encoder={encoder}", f"aggregator={aggregator}")
    _, backbone, card = card_of(settings)
    model = build_model(backbone, card, optim=Optim())
    assert isinstance(model, PersonalRewardModel)
    assert model.encoder.generic(3).shape in ((3, 0), (3, model.aggregator.user_dim))
    assert settings["encoder"]["name"] == encoder
    assert settings["aggregator"]["name"] == aggregator


@pytest.mark.parametrize("model", options("model"))
def test_models(model: str, card_of: Any) -> None:
    settings = composed(f"model={model}")
    check_settings(settings)
    _, backbone, card = card_of(settings)
    if model == "sft":
        parts = {"backbone": backbone, "optim": Optim()}
        built = build(settings["model"], "model", kind=SupervisedPolicy, **parts)
        assert built.responses == settings["backbone"]["sft"]["responses"]
        assert settings["optim"]["lr"] == settings["backbone"]["sft"]["lr"]
        assert settings["trainer"]["max_steps"] == settings["backbone"]["sft"]["max_steps"]
    else:
        kind = {"reward": PersonalRewardModel, "dpo": PersonalDPOPolicy}[model]
        assert isinstance(build_model(backbone, card, optim=Optim()), kind)


@pytest.mark.parametrize("data", options("data"))
def test_data(
    data: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    own = {"jsonl": [f"data.path={files['rows']}"], "personas": ["data.n_users=3"]}
    own |= {name: [f"data.path={files[name]}"] for name in ("hub", "tldr", "psoups", "prism")}
    settings = composed(f"data={data}", *own[data], "seed=5")
    built = build_data(settings["data"])
    assert built.seed == 5 and built.n_users > 0
    if data == "jsonl":  # eval.py has no other: a world is of the run it was made for
        other = composed(f"data={data}", *own[data], config="eval")
        assert build_data(other["data"], users=["ann"]).n_users == 1


@pytest.mark.parametrize("backbone", options("backbone"))
def test_backbones(backbone: str, files: dict[str, Path]) -> None:
    own = {"hf": [f"backbone.path={files['gptj']}"]}
    node = composed(f"backbone={backbone}", *own.get(backbone, []))["backbone"]
    check_backbone(node)
    Recipe(**node["sft"])
    if node["tiny"] is not None:
        made = Backbone(model=tiny_gptj(**node["tiny"], eos_token_id=0), lora=node["lora"])
        assert 1e6 < sum(p.numel() for p in made.parameters()) < 3e6
    # Settings made for large weights, on small ones of the same architecture.
    tokenizer, opened = open_backbone({**node, "path": str(files["gptj"])}, str(files["gptj"]))
    assert tokenizer.pad_token is not None
    adapted = {n.split(".")[-2] for n, _ in opened.model.named_modules() if n.endswith(".lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    if backbone == "gptj_6b":
        assert opened.vocabulary().dtype == torch.bfloat16
        assert all(block.gradient_checkpointing for block in opened.blocks)


@pytest.mark.parametrize("trainer", options("trainer"))
def test_trainers(trainer: str, card_of: Any, tmp_path: Path) -> None:
    settings = composed(f"trainer={trainer}")
    given = accepted(settings["trainer"], kinds(build_trainer), "trainer")
    assert given.keys() == kinds(build_trainer).keys() - {"run_dir", "loggers", "has_val"}
    if settings["trainer"]["accelerator"] == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^trainer\.accelerator='gpu' is not allowed"):
            trainer_of(settings, card_of(settings)[0], tmp_path)
    else:
        built = trainer_of(settings, card_of(settings)[0], tmp_path)
        assert built.precision == settings["trainer"]["precision"]


@pytest.mark.parametrize("logger", options("logger"))
def test_loggers(logger: str, tmp_path: Path) -> None:
    node = composed(f"logger={logger}")["logger"]
    given = accepted(node, kinds(build_loggers), "logger")
    if logger == "wandb" and find_spec("wandb") is None:
        with pytest.raises(ValueError, match="^logger='wandb' is not allowed.* Install wandb"):
            build_loggers(run_dir=tmp_path, **given)
    else:
        assert len(build_loggers(run_dir=tmp_path, **given)) == (1 if logger == "csv" else 2)


@pytest.mark.parametrize("task", options("eval"))
def test_tasks(task: str) -> None:
    settings = composed(f"eval={task}", config="eval")
    assert settings["data"] is None and settings["eval"]["name"] == task
    if task == "generate":
        build(
            {"_target_": "plrhf.evaluation.generations.GenerationOptions", **settings["eval"]},
            "eval",
        )
    if task == "adapt":
        build({"_target_": "plrhf.evaluation.few_shot.Shots", **settings["eval"]}, "eval")


@pytest.mark.parametrize("judge", options("eval/judge"))
def test_judges(judge: str, tmp_path: Path) -> None:
    own = {"chat": ["eval.judge.url=http://localhost:1/v1", "eval.judge.model=m"]}
    own["reward"] = [f"eval.judge.export={tmp_path}"]
    asked = ["eval=winrate", f"eval/judge={judge}", *own.get(judge, [])]
    node = composed(*asked, config="eval")["eval"]["judge"]
    assert node["name"] == judge
    if judge == "reward":  # its settings pass, and there is no model
        with pytest.raises(ValueError, match=r"^export='.*' is not allowed"):
            build(node, "eval.judge", kind=Judge)
    else:
        assert isinstance(build(node, "eval.judge", kind=Judge), Judge)


SWEEPS = [f"ablation/{name}" for name in options("experiment/ablation")]


@pytest.mark.parametrize("experiment", [*options("experiment"), *SWEEPS])
def test_experiments(experiment: str, files: dict[str, Path], card_of: Any, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node: Any = OmegaConf.to_container(compose("train", overrides=overrides))
    if experiment == "ablation/soft_prompt":  # what others are made to do with a soft prompt
        overrides = ["experiment=[ablation/user_models,ablation/soft_prompt]"]
    if "path" in node["data"]:
        overrides.append(f"data.path={files['rows']}")
    if node["backbone"]["tiny"] is None:
        overrides.append(f"backbone.path={files['gptj']}")
    settings = composed(*overrides)
    check_settings(settings)
    data, backbone, card = card_of(settings)
    accepted(settings["trainer"], kinds(build_trainer), "trainer")
    if settings["trainer"]["accelerator"] == "cpu":
        trainer_of(settings, data, tmp_path)
    if settings["model"]["name"] != "sft":
        build_model(backbone, card, optim=build(settings["optim"], "optim"))


def jobs_of(*overrides: str) -> Iterator[dict[str, Any]]:
    """Settings of jobs of a sweep, until each value of each parameter was there."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=list(overrides), return_hydra_config=True)
    given = {override.split("=")[0] for override in overrides}
    grid = {
        name: str(values).split(",")
        for name, values in (node.hydra.sweeper.params or {}).items()
        if name not in given
    }
    for n in range(max((len(values) for values in grid.values()), default=1)):
        own = (f"{name}={values[n % len(values)]}" for name, values in grid.items())
        yield composed(*overrides, *own)


def check_job(settings: dict[str, Any]) -> None:
    """Assert that a job of the ablation would be taken, as far as that shows without its data."""
    check_settings(settings)
    assert settings["data"]["seed"] == settings["seed"]
    for name in ("encoder", "aggregator", "model", "optim"):
        part = settings[name]
        accepted(part, kinds(locate(part["_target_"], name)), name)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_by_themselves(sweep: str) -> None:
    own_seed = composed("experiment=ablation/backbone")["seed"]
    for settings in jobs_of(f"experiment={sweep}"):
        check_job(settings)
        assert (settings["seed"] == own_seed) == (sweep == "ablation/backbone")


def test_sweeps_of_make_ablation() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    sweeps = [shlex.split(line.rstrip("; \\"))[1:] for line in lines if line.startswith("\tsweep ")]
    folders = [words[-1] for words in sweeps]
    assert len(set(folders)) == len(folders) > 10
    assert all(folder.startswith("$(INTO)/") for folder in folders)
    optims: dict[tuple[str, str], dict[str, Any]] = {}
    for experiment, *words in sweeps:
        job = next(jobs_of(experiment, *(word.partition(",")[0] for word in words[:-1])))
        check_job(job)
        of = (job["encoder"]["name"], job["aggregator"]["name"])
        of = ("lookup", of[1]) if of[0] in ("none", "uniform") else of  # whose settings they share
        assert job["optim"] == optims.setdefault(of, job["optim"])  # in all sweeps alike
    rates = {of: (optim["user_lr"], optim["user_weight_decay"]) for of, optim in optims.items()}
    assert rates == {
        ("lookup", "film"): (0.03, 1.0),
        ("cluster", "film"): (0.03, 0.5),
        ("features", "film"): (0.01, 1.0),
        **{(name, "soft_prompt"): (0.1, 0.0) for name in ("lookup", "cluster", "features")},
    }


class Part:
    def __init__(self, *, width: int, rate: float = 0.5, kind: Literal["a", "b"] = "a") -> None:
        self.width, self.rate, self.kind = width, rate, kind


class Inheriting(Part):
    def __init__(self, *, depth: int | None = None, sizes: tuple[int, ...] = (), **part: Any):
        super().__init__(**part)
        self.depth, self.sizes = depth, sizes


def made(**settings: Any) -> Any:
    return build({"_target_": f"{__name__}.Inheriting", "name": "it", **settings}, "part", depth=3)


def test_build_hands_over_what_is_named_and_nothing_else() -> None:
    part = build({"_target_": f"{__name__}.Part", "width": 4, "rate": 1}, "part", unasked=7)
    assert (part.width, part.rate, type(part.rate)) == (4, 1.0, float)
    inherited = made(width=2, sizes=[3, 1])
    assert (inherited.depth, inherited.sizes, inherited.kind) == (3, (3, 1), "a")
    assert set(parameters(Inheriting)) == {"depth", "sizes", "width", "rate", "kind"}
    assert kinds(Inheriting)["width"] is int


REFUSED = {
    "unknown": (
        {"width": 1, "rat": 2},
        "part.rat=2 is not allowed: expected one of the keys kind, rate, sizes, width. "
        "Write part.rate.",
    ),
    "missing": (
        {},
        "part.width=None is not allowed: expected a value. Set +part.width=VALUE.",
    ),
    "text for a number": (
        {"width": "4"},
        "part.width='4' is not allowed: expected a whole number. Set part.width=1.",
    ),
    "bool for a number": (
        {"width": 1, "rate": True},
        "part.rate=True is not allowed: expected a number. Set part.rate=0.5.",
    ),
    "choice": (
        {"width": 1, "kind": "c"},
        "part.kind='c' is not allowed: expected a or b. Set part.kind=a.",
    ),
    "what the run provides": (
        {"width": 1, "depth": 2},
        "part.depth=2 is not allowed: expected one of the keys kind, rate, sizes, width. "
        "Write part.width.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        made(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "target",
    ["os.getcwd", "shutil.rmtree", "plrhf.nowhere.Encoder", "Encoder", None, "torch.nn.Linear"],
)
def test_only_classes_of_the_kind_asked_for_are_called(target: str | None) -> None:
    with pytest.raises(ValueError, match=rf"^encoder\._target_={target!r} is not allowed"):
        build({"_target_": target, "path": "/never"}, "encoder", kind=UserEncoder)


def test_texts_refuse_out_of_range() -> None:
    good: dict[str, Any] = {"users": 2, "prompts": 1, "max_new_tokens": 1}
    GenerationOptions(**good)
    bad = {"users": 0, "prompts": 0, "max_new_tokens": 0, "temperature": -1.0, "top_p": 0.0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=rf"^samples\.{name}={value} is not allowed: expected"):
            GenerationOptions(**{**good, name: value}, origin="samples")
    with pytest.raises(ValueError, match=r"^eval\.users=\[\] is not allowed"):
        GenerationOptions(**{**good, "users": []})
