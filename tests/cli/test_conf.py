"""Every file of conf/ composes, is read as a typed config, and builds."""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, composed, rows_of_world, save_model, write_rows
from tiny import make_backbone
from upstream import (
    many_comparisons,
    many_dialogues,
    write_comparisons,
    write_prism,
    write_soups,
)

from plrhf.backbone.loading import load_backbone
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.cli.assemble import build_run_model, build_run_trainer, open_backbone
from plrhf.cli.config import BackboneConfig, RefereeConfig, RunConfig, TrainerConfig
from plrhf.cli.eval_config import AdaptTask, EvalConfig, WinrateTask
from plrhf.cli.main import CONF
from plrhf.cli.methods import Method, read_method
from plrhf.cli.rows import build_data
from plrhf.cli.sections import DataConfig, Section
from plrhf.core.components import build, checked_settings, locate, parameter_types
from plrhf.data.module import PreferenceData
from plrhf.evaluation.generations import GenerationOptions
from plrhf.evaluation.judges import Judge
from plrhf.models.adaptation import Encode, Posterior
from plrhf.models.grpo import PersonalGRPOPolicy
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.sft import SupervisedPolicy
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
        "styles": ROOT / "tests/data/cases/styles.jsonl",
    }


@pytest.fixture(scope="module")
def rows(files: dict[str, Path]) -> PreferenceData:
    """Rows with features, for models of any encoder."""
    settings = composed("data=jsonl", f"data.path={files['rows']}")
    return build_data(RunConfig.from_settings(settings).data)


@pytest.fixture(scope="module")
def model_of(files: dict[str, Path], rows: PreferenceData) -> Any:
    """Config -> its model, with the rows and backbone of `files` in place of its own."""
    opened: dict[str, Backbone] = {}

    def make(config: RunConfig) -> Any:
        # The stand-in knows no other tokenizer's padding.
        stand_in = config.backbone.model_copy(
            update={"path": str(files["gptj"]), "pad_token": None}
        )
        if (key := repr(stand_in)) not in opened:
            opened[key] = open_backbone(stand_in, str(files["gptj"]))[1]
        return build_run_model(config, rows, copy.deepcopy(opened[key]), "")

    return make


def test_the_groups_are_all_tested() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment"}
    assert ROOT / "conf" == CONF
    for group in GROUPS:
        assert len(options(group)) > 0


@pytest.mark.parametrize(
    ("section", "constructor", "provided"),
    [
        (DataConfig, PreferenceData, {"source", "users", "schema"}),
        (TrainerConfig, build_trainer, {"run_dir", "loggers", "has_val"}),
        (BackboneConfig, load_backbone, {"shards"}),
    ],
)
def test_a_section_has_what_its_constructor_takes(
    section: type[Section], constructor: Any, provided: set[str]
) -> None:
    """A setting added to one of them must be added to the other, in plrhf/cli/config.py."""
    own = section.annotations().keys() - {"name", "source"}
    of_others = {"architecture", "pad_token", "chat_template", "tiny", "sft"}
    of_others = of_others if section is BackboneConfig else set()
    assert own - of_others == parameter_types(constructor).keys() - provided


def test_a_config_is_frozen_and_holds_objects() -> None:
    config = RunConfig.from_settings(composed("seed=3", "trainer.max_epochs=2"))
    assert (config.seed, config.data.seed, config.trainer.max_epochs) == (3, 3, 2)
    assert isinstance(config.optim, Optim) and isinstance(config.samples, GenerationOptions)
    assert config.backbone.tiny is not None and config.backbone.tiny.n_layers == 4
    for section in (config, config.trainer, config.data):
        with pytest.raises(ValueError, match="frozen"):
            section.seed = 1


@pytest.mark.slow
def test_settings_go_to_the_source_or_to_the_data(files: dict[str, Path]) -> None:
    settings = composed("data=personas", "data.n_users=3", "seed=5")["data"]
    config = DataConfig.read(settings, "data")
    assert config.seed == config.source["seed"] == 5  # both take it
    assert config.source["n_users"] == 3 and "batch_size" not in config.source
    with pytest.raises(ValueError, match=r"^data\.bach_size=4 .* Write data\.batch_size\.$"):
        DataConfig.read({**settings, "bach_size": 4}, "data")
    again, other = (
        build_data(DataConfig.read({**settings, "seed": seed}, "data")).splits.train
        for seed in (5, 6)
    )
    assert build_data(config).splits.train == again != other


@pytest.mark.sampled
@pytest.mark.parametrize("encoder", options("encoder"))
@pytest.mark.parametrize("aggregator", options("aggregator"))
def test_encoders_and_aggregators(encoder: str, aggregator: str, model_of: Any) -> None:
    overrides = [f"encoder={encoder}", f"aggregator={aggregator}"]
    if aggregator == "none" and encoder != "none":  # so that users act somewhere
        overrides.append("model.head=basis")
    if encoder == "pair_tokens":  # whose width depends on the pairs
        overrides.append("encoder.max_pairs=2")
    config = RunConfig.from_settings(composed(*overrides))
    model = model_of(config)
    assert isinstance(model, PersonalRewardModel)
    assert model.encoder.generic(3).shape in ((3, 0), (3, model.aggregator.user_dim))
    assert (config.encoder["name"], config.aggregator["name"]) == (encoder, aggregator)


@pytest.mark.parametrize("model", options("model"))
def test_models(model: str, model_of: Any) -> None:
    config = RunConfig.from_settings(composed(f"model={model}"))
    if model == "sft":
        parts = {"backbone": make_backbone(), "optim": config.optim}
        built = build(config.model, "model", kind=SupervisedPolicy, **parts)
        sft = config.backbone.sft
        assert config.is_supervised and built.responses == sft.responses
        assert (config.optim.lr, config.trainer.max_steps) == (sft.lr, sft.max_steps)
        assert config.trainer.max_epochs == sft.max_epochs
    else:
        kinds = (PersonalRewardModel, PersonalDPOPolicy, PersonalGRPOPolicy)
        kind = dict(zip(("reward", "dpo", "grpo"), kinds, strict=True))[model]
        assert isinstance(model_of(config), kind)


@pytest.mark.slow
@pytest.mark.parametrize("data", options("data"))
def test_data(
    data: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    own = {"jsonl": [f"data.path={files['rows']}"], "personas": ["data.n_users=3"]}
    given = ("hub", "tldr", "psoups", "prism", "styles")
    own |= {name: [f"data.path={files[name]}"] for name in given}
    built = build_data(RunConfig.from_settings(composed(f"data={data}", *own[data], "seed=5")).data)
    assert built.seed == 5 and built.n_users > 0
    if data == "jsonl":  # eval.py has no other: a world is of the run it was made for
        other = EvalConfig.from_settings(composed(f"data={data}", *own[data], config="eval"))
        assert other.data is not None
        assert build_data(other.data, users=["ann"]).n_users == 1


@pytest.mark.slow
@pytest.mark.parametrize("backbone", options("backbone"))
def test_backbones(backbone: str, files: dict[str, Path]) -> None:
    own = {"hf": [f"backbone.path={files['gptj']}"]}
    settings = composed(f"backbone={backbone}", *own.get(backbone, []))
    config = RunConfig.from_settings(settings).backbone
    if config.tiny is not None:
        shape = config.tiny.model_dump()
        made = Backbone(model=tiny_gptj(**shape, eos_token_id=0), lora=config.lora)
        assert 1e6 < sum(p.numel() for p in made.parameters()) < 3e6
    # Settings made for large weights, on small ones of the same architecture.
    tokenizer, opened = open_backbone(config, str(files["gptj"]))
    assert tokenizer.pad_token is not None
    adapted = {n.split(".")[-2] for n, _ in opened.model.named_modules() if n.endswith(".lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    if backbone == "gptj_6b":
        assert opened.vocabulary().dtype == torch.bfloat16
        assert all(block.gradient_checkpointing for block in opened.blocks)


@pytest.mark.parametrize("trainer", options("trainer"))
def test_trainers(trainer: str, tmp_path: Path) -> None:
    config = RunConfig.parse(composed(f"trainer={trainer}"))
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^trainer\.accelerator='gpu' is not allowed"):
            build_run_trainer(config, tmp_path, has_val=True)
    else:
        built = build_run_trainer(config, tmp_path, has_val=True)
        assert built.precision == config.trainer.precision


@pytest.mark.parametrize("logger", options("logger"))
def test_loggers(logger: str, tmp_path: Path) -> None:
    config = RunConfig.from_settings(composed(f"logger={logger}"))
    if logger in ("wandb", "mlflow") and find_spec(logger) is None:
        with pytest.raises(ValueError, match=f"^logger='{logger}' is not allowed.* Install it"):
            build_run_trainer(config, tmp_path, has_val=True)
    else:
        built = build_run_trainer(config, tmp_path, has_val=True)
        assert len(built.loggers) == (1 if logger == "csv" else 2)


@pytest.mark.parametrize("task", options("eval"))
def test_tasks(task: str) -> None:
    config = EvalConfig.from_settings(composed(f"eval={task}", config="eval"))
    kinds_of = {"generate": GenerationOptions, "adapt": AdaptTask, "winrate": WinrateTask}
    assert config.data is None
    assert isinstance(config.task, kinds_of.get(task, Section))


@pytest.mark.parametrize("rule", options("eval/adaptation"))
def test_adaptation_rules(rule: str) -> None:
    settings = composed("eval=adapt", f"eval/adaptation={rule}", config="eval")
    task = EvalConfig.from_settings(settings).task
    assert type(task.rule).__name__.lower() == rule == task.adaptation["name"]


@pytest.mark.parametrize("judge", options("eval/judge"))
def test_judges(judge: str, tmp_path: Path) -> None:
    own = {"chat": ["eval.judge.url=http://localhost:1/v1", "eval.judge.model=m"]}
    own["reward"] = [f"eval.judge.export={tmp_path}"]
    asked = ["eval=winrate", f"eval/judge={judge}", *own.get(judge, [])]
    node = composed(*asked, config="eval")["eval"]["judge"]
    assert node["name"] == judge
    if judge == "reward":  # its settings pass, and there is no model
        with pytest.raises(ValueError, match=r"^eval\.judge\.export='.*' is not allowed"):
            build(node, "eval.judge", kind=Judge)
    else:
        assert isinstance(build(node, "eval.judge", kind=Judge), Judge)


SWEEPS = [f"ablation/{name}" for name in options("experiment/ablation")]
METHODS = [f"method/{name}" for name in options("experiment/method")]
ROWS = [f"referee/{name}" for name in options("experiment/referee")]
EXPERIMENTS = [*options("experiment"), *SWEEPS, *METHODS, *ROWS]


@pytest.mark.sampled
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments(
    experiment: str, files: dict[str, Path], model_of: Any, tmp_path: Path
) -> None:
    overrides = [f"experiment={experiment}"]
    if experiment == "ablation/soft_prompt":  # what others are made to do with a soft prompt
        overrides = ["experiment=[ablation/user_models,ablation/soft_prompt]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node: Any = compose("train", overrides=overrides)
    if "path" in list(node["data"]):  # also where it has no value yet
        node["data"]["path"] = str(files["rows"])
    if node["backbone"]["tiny"] is None:
        node["backbone"]["path"] = str(files["gptj"])
    settings: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    config = RunConfig.from_settings(settings)
    if config.trainer.accelerator == "cpu":
        build_run_trainer(config, tmp_path, has_val=True)
    if not config.is_supervised:
        model_of(config)


@pytest.mark.sampled
@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_grid_of_settings_that_there_are(method: str) -> None:
    referee = RunConfig.parse(composed(f"experiment={method}")).referee
    assert referee is not None
    assert math.prod(len(values) for values in referee.grid.values()) >= 12
    last = {name: values[-1] for name, values in referee.grid.items()}
    settings = composed(f"experiment={method}", *(f"{k}={v}" for k, v in last.items()))
    for name, value in last.items():
        found: Any = settings
        for part in name.split("."):
            found = found[part]
        assert found == value
    check_job(settings)


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
    config = RunConfig.from_settings(settings)
    assert config.data.seed == config.seed
    for name in ("encoder", "aggregator", "model"):
        part = settings[name]
        checked_settings(part, parameter_types(locate(part["_target_"], name)), name)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_by_themselves(sweep: str) -> None:
    own_seed = composed("experiment=ablation/backbone")["seed"]
    for settings in jobs_of(f"experiment={sweep}"):
        check_job(settings)
        assert (settings["seed"] == own_seed) == (sweep == "ablation/backbone")


@pytest.mark.slow
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


def test_rows_may_ask_for_fewer_trials_than_the_comparison() -> None:
    def trials(n_trials: int, *of_rows: str) -> int:
        where = ["data=personas", "backbone=hf", "backbone.path=DIR", *of_rows]
        return len(read_method("lookup", None, where, seed=0, n_trials=n_trials).trials)

    fewer = "+referee.trials=2"
    assert [trials(1, fewer), trials(5, fewer), trials(5)] == [1, 2, 5]


def test_a_methods_rule_is_a_name_with_settings_or_anybodys_class() -> None:
    def rule(adaptation: Any) -> Any:
        referee = RefereeConfig.model_construct(adaptation=adaptation)
        config: Any = SimpleNamespace(referee=referee)
        return Method(name="mine", config=config, trials=[]).rule

    assert rule(None) is None and rule("posterior").prior_scale == Posterior().prior_scale
    assert rule({"name": "basis", "l2": 0.25}).l2 == 0.25
    assert isinstance(rule({"_target_": "plrhf.models.adaptation.Encode"}), Encode)
    with pytest.raises(ValueError, match=r"^referee\.adaptation='prior' .* expected one of basis"):
        rule("prior")
