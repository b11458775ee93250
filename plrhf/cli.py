"""From the command line to a task: compose the config; say what is wrong with it in one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plrhf.config import unknown_key
from plrhf.errors import BadValue, bad_value

CONF = Path(__file__).resolve().parent.parent / "conf"
USAGE_ERROR = 2
Settings = dict[str, Any]


def main(config_name: str, task: Callable[[Settings], None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and run `task` on it.

    What the user can mend is one line on stderr and exit status 2; with ``debug=true`` a traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through: they are worded here
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def composed(config: DictConfig) -> None:
        task(resolved(config))

    try:
        composed()
    except (BadValue, HydraException, OmegaConfBaseException) as error:
        if "debug=true" in overrides:
            raise
        print(f"error: {worded(error, config_name, overrides)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def resolved(config: DictConfig) -> Settings:
    """The config as a plain dict, interpolations replaced, ``run_dir`` as Hydra has made it."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if "run_dir" in settings:
        settings["run_dir"] = HydraConfig.get().runtime.output_dir
    return settings


def worded(error: Exception, config_name: str, overrides: list[str]) -> str:
    """One line for an error of ours, of Hydra or of OmegaConf."""
    if isinstance(error, BadValue):
        return str(error)
    text = " ".join(str(error).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        return str(_unknown_override(found[1], config_name, overrides))
    if found := re.search(r"Could not find '([^']+)' Available options in '[^']+': (.*)", text):
        group, _, choice = found[1].rpartition("/")
        options = ", ".join(found[2].split())
        return str(bad_value(group, choice, f"one of {options}", f"Choose with {group}=NAME"))
    if found := re.search(
        r"(?:Missing mandatory value|missing value)[^a-z]*(?:for|:)? ?(\S+)", text
    ):
        field = found[1].strip("'\"")
        return str(bad_value(field, None, "a value, as there is no default", f"Set {field}=VALUE"))
    return f"command line {overrides}: {text}"


def _unknown_override(key: str, config_name: str, overrides: list[str]) -> BadValue:
    """The error for an override of a key the config does not have."""
    value = next(
        (o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"{key}=")), ""
    )
    others = [o for o in overrides if not o.lstrip("+").startswith(f"{key}=")]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name, overrides=others)
    parent = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
    keys = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    return unknown_key(key, value, keys)
