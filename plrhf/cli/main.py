"""The entry points of train.py and eval.py: compose the config, run a task, print errors in one line."""

from __future__ import annotations

import contextlib
import logging
import math
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

from plrhf.cli.jobs import best_value, is_finished, refuse_processes, sweep_job
from plrhf.cli.outputs import FilesMissing, one_line
from plrhf.core.components import Settings, unknown_key
from plrhf.core.errors import BadValue, bad_value, printable
from plrhf.core.files import is_disk_full

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package where it was installed from a wheel, beside it in a checkout.
CONF = next(one for one in (PACKAGE / "conf", PACKAGE.parent / "conf") if one.is_dir())
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130  # exit statuses
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # as Lightning, torchrun and SLURM tell a process
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
FOR_THE_USER = (BadValue, FilesMissing, *HYDRA_ERRORS)
# Mappings whose keys are the user's. Hydra takes a new key of theirs only with "+" in front.
MAPPINGS = ("data.columns.", "data.splits.", "backbone.architecture.")

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
    r"You have overridden `on_before_batch_transfer` in `LightningModule`",
)


def main(config_name: str, task: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and run `task` on it.

    An error in the user's input is printed as one line on stderr, with exit status 2; with
    ``debug=true`` as a traceback.

    Args:
        task: dotted path of a function of settings. It is imported after the command line has been
            parsed, so that typing errors are reported at once.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to `exit_on_errors`
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch's C++ warnings, such as DDP's that all weights were used, do not concern the user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def composed(config: DictConfig) -> float | None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_sweep_job(config, config_name, task)
        with exit_on_errors(config_name):  # here already, as Hydra prints a line of its own
            return run_task(task, plain_settings(config))

    sys.argv[1:] = as_hydra_takes_them(sys.argv[1:])
    with exit_on_errors(config_name):
        composed()


def as_hydra_takes_them(words: list[str]) -> list[str]:
    """Put ``++`` in front of the keys of `MAPPINGS`, so that ``data.columns.user_id=worker`` works."""
    return [f"++{word}" if word.startswith(MAPPINGS) else word for word in words]


def run_sweep_job(config: DictConfig, config_name: str, task: str) -> float | None:
    """Run a task as a job of a sweep.

    Returns:
        What the task returns, for the sweeper; nan if the job failed.
    """
    hydra_config = HydraConfig.get()
    overrides, folder = list(hydra_config.overrides.task), Path(hydra_config.runtime.output_dir)

    def line(error: Exception) -> str:
        if isinstance(error, HYDRA_ERRORS):
            return hydra_error_line(error, config_name, overrides)
        return one_line(error)

    with sweep_job(folder, overrides, f"{config_name}.py", line):
        settings = plain_settings(config)
        refuse_processes(settings)
        if "run_dir" not in settings:
            return run_task(task, settings)
        if not settings["overwrite"] and is_finished(settings):
            print("finished before")
            return best_value(folder, settings["trainer"]["monitor"])
        if settings["ckpt"] is None:
            settings["overwrite"] = True  # what a job that was cut short left in its own folder
        return run_task(task, settings)
    return math.nan


def run_task(task: str, settings: Settings) -> float | None:
    """Import the function with this dotted path and call it with the settings."""
    function = hydra.utils.get_method(task)
    silence_libraries()
    return function(settings)


@contextlib.contextmanager
def exit_on_errors(config_name: str) -> Iterator[None]:
    """End the process with one line if the block raises an error that the user can fix.

    With ``debug=true``, and for other errors, the traceback is shown.
    """
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    debug = "debug=true" in (one.lower() for one in overrides)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug or not (isinstance(error, FOR_THE_USER) or is_disk_full(error)):
            raise
        line = one_line(error)
        if isinstance(error, HYDRA_ERRORS):
            line = hydra_error_line(error, config_name, overrides)
        if all(os.environ.get(name, "0") == "0" for name in RANKS):  # one of several processes
            print(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(USAGE_ERROR if isinstance(error, (BadValue, *HYDRA_ERRORS)) else FAILED)


def silence_libraries() -> None:
    """Hide library messages that users can do nothing about; warnings about the run are still shown."""
    for library in ("lightning.fabric", "lightning.pytorch", "root"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in NOT_FOR_THE_USER:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("DeepSpeed").addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Return whether DeepSpeed's log message is of interest to users."""
    # The first is said in every CPU run that saves a model, as accelerate then imports DeepSpeed
    # where it is installed; the other of our own AdamW.
    noise = ("Setting accelerator to CPU", "**** You are using ZeRO with an untested optimizer")
    return not str(record.msg).startswith(noise)


def plain_settings(config: DictConfig) -> Settings:
    """Return the config as a plain, resolved dict; a job of a sweep gets its own `run_dir`."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in settings:
        settings["run_dir"] = hydra_config.runtime.output_dir
    return settings


def hydra_error_line(error: Exception, config_name: str, overrides: list[str]) -> str:
    """Explain an error of Hydra or OmegaConf in one line."""
    if isinstance(error, OverrideParseException):
        return str(_unreadable(*_split_override(error.override), error.message))
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


def _split_override(override: str) -> tuple[str, str]:
    """Split an override into key and value, without a leading ``+`` or ``~``."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _unreadable(key: str, value: str, reason: str) -> BadValue:
    """Return the error for an override whose value cannot be parsed."""
    first = reason.splitlines()[0]
    return bad_value(key, value, "a number, text, [list] or {mapping}", f"Quote it ({first})")


def _unknown_override(key: str, config_name: str, overrides: list[str]) -> BadValue:
    """Return the error for an override of a key that is not in the config."""
    given = dict(_split_override(override) for override in overrides)
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
