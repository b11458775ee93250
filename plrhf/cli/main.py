"""From the command line to a task: compose the config; say what is wrong with it in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plrhf.cli.jobs import is_finished, job, refuse_processes
from plrhf.core.components import Settings, unknown_key
from plrhf.core.errors import BadValue, bad_value

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package where it was installed from a wheel, beside it in a checkout.
CONF = next(one for one in (PACKAGE / "conf", PACKAGE.parent / "conf") if one.is_dir())
USAGE_ERROR, INTERRUPTED = 2, 130
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # as Lightning, torchrun and SLURM tell a process
FOR_THE_USER = (BadValue, HydraException, OmegaConfBaseException)

# Advice of libraries to their programmers, which the user of a run can do nothing about.
NOT_FOR_THE_USER = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Accessing the data pointer of FakeTensor is deprecated",
    r"`gradient_checkpointing_enable` is deprecated",
    r"`is_gradient_checkpointing` is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    r"Since DeepSpeed handles gradient clipping internally",
    r"It is recommended to use `self.log\('val/.*sync_dist=True\)`",  # these are of all processes
    r".*does not have many workers which may be a bottleneck",
    r"The number of training batches .* is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
)


def train() -> None:
    """What `train.py` and, installed, the command ``plrhf-train`` run."""
    main("train", "plrhf.cli.run.train")


def evaluate() -> None:
    """What `eval.py` and, installed, the command ``plrhf-eval`` run."""
    main("eval", "plrhf.cli.tasks.evaluate")


def main(config_name: str, task: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and run `task` on it.

    What the user can mend is one line on stderr and exit status 2; with ``debug=true`` a traceback.

    Args:
        task: dotted path of a function of settings, imported once the command line has been read,
            so that a slip on it is answered at once.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they are worded here
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch's C++ warnings, such as DDP's that all weights were used, do not concern the user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def composed(config: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            one_of_many(config, config_name, task)
            return
        with worded_errors(config_name):  # here already, as Hydra writes a line of its own
            perform(task, resolved(config))

    with worded_errors(config_name):
        composed()


def one_of_many(config: DictConfig, config_name: str, task: str) -> None:
    """Run `task` as a job of a sweep, in whatever process the launcher runs it in."""
    hydra_config = HydraConfig.get()
    overrides, folder = list(hydra_config.overrides.task), Path(hydra_config.runtime.output_dir)

    def line(error: Exception) -> str:
        if isinstance(error, FOR_THE_USER):
            return worded(error, config_name, overrides)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"

    with job(folder, overrides, f"{config_name}.py", line):
        settings = resolved(config)
        refuse_processes(settings)
        if "run_dir" in settings and is_finished(settings):
            print("finished before")
            return
        perform(task, settings)


def perform(task: str, settings: Settings) -> None:
    """Import the task, and run it on the settings."""
    run = hydra.utils.get_method(task)
    quieten()
    run(settings)


@contextlib.contextmanager
def worded_errors(config_name: str) -> Iterator[None]:
    """Within it what the user can mend ends the process in one line, unless ``debug=true``."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        yield
    except FOR_THE_USER as error:
        if "debug=true" in (one.lower() for one in overrides):
            raise
        first = all(os.environ.get(name, "0") == "0" for name in RANKS)
        if first:  # of several processes one tells
            print(f"error: {worded(error, config_name, overrides)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def quieten() -> None:
    """Leave of what libraries say only what concerns the user; their warnings about a run stay."""
    for library in ("lightning.fabric", "lightning.pytorch", "root"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in NOT_FOR_THE_USER:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("DeepSpeed").addFilter(_concerns_the_user)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    # The first is said in every CPU run that saves a model, as accelerate then imports DeepSpeed
    # where it is installed; the other of our own AdamW.
    noise = ("Setting accelerator to CPU", "**** You are using ZeRO with an untested optimizer")
    return not str(record.msg).startswith(noise)


def resolved(config: DictConfig) -> Settings:
    """The config as a plain dict, interpolations replaced; in a sweep each job its own `run_dir`."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in settings:
        settings["run_dir"] = hydra_config.runtime.output_dir
    return settings


def worded(error: Exception, config_name: str, overrides: list[str]) -> str:
    """One line for an error of ours, of Hydra or of OmegaConf."""
    if isinstance(error, BadValue):
        return str(error)
    if isinstance(error, OverrideParseException):
        return str(_unreadable(*_halves(error.override), error.message))
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return str(_unknown_override(found[1], config_name, overrides))
    if found := re.search(
        r"Could not find '([^']+)'\s+Available options in '.*':\n((\t.*\n)+)", text
    ):
        group, _, choice = found[1].rpartition("/")
        options = ", ".join(name for name in found[2].split() if name != "base")
        return str(bad_value(group, choice, f"one of {options}", f"Choose with {group}=NAME"))
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        cure = f"Add -m to run with each of them, or write {found[1]}=[{found[2]}] for a list"
        return str(bad_value(found[1], found[2], "one value", cure))
    if found := re.search(r"Missing mandatory value.*full_key: (\S+)", text, re.DOTALL):
        cure = f"Set {found[1]}=VALUE"
        return str(bad_value(found[1], None, "a value, as there is no default", cure))
    return f"command line {' '.join(overrides)}: {' '.join(text.split())}"


def _halves(override: str) -> tuple[str, str]:
    """Key and value of an override, whatever stands before them."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _unreadable(key: str, value: str, reason: str) -> BadValue:
    first = reason.splitlines()[0]
    return bad_value(key, value, "a number, text, [list] or {mapping}", f"Quote it ({first})")


def _unknown_override(key: str, config_name: str, overrides: list[str]) -> BadValue:
    """The error for an override of a key the config does not have."""
    given = dict(_halves(override) for override in overrides)
    choices = [f"{name}={value}" for name, value in given.items() if (CONF / name).is_dir()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node: Any = hydra.compose(config_name, overrides=choices)
    known, names = "", key.split(".")
    while len(names) > 1 and isinstance(node, DictConfig) and names[0] in node:
        node, known = node[names[0]], f"{known}{names.pop(0)}."
    keys = [str(name) for name in node] if isinstance(node, DictConfig) else []
    rest = "".join(f".{name}" for name in names[1:])
    return unknown_key(f"{known}{names[0]}", given.get(key, ""), keys, rest=rest)
