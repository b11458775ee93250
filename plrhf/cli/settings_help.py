"""Explains every setting of a command: its default, its comment in conf/, and what it may be."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from plrhf.cli.config import RunConfig
from plrhf.cli.eval_config import TASKS, EvalConfig
from plrhf.cli.sections import DataConfig, Section
from plrhf.core.checks import describe
from plrhf.core.components import locate, parameter_types

LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?P<value>[^#]*?)\s*(?:#\s*(?P<comment>.*))?$")
WIDTH = 78  # of a terminal of 80 columns
NOT_SHOWN = ("hydra", "_target_", "name")
SECTIONS: dict[str, type[Section]] = {"train": RunConfig, "eval": EvalConfig}


@dataclass(frozen=True)
class Explained:
    """A setting as the help shows it.

    Attributes:
        name: dotted. default: as on the command line. comment: of its file in conf/, may be empty.
        allowed: in words; empty where the setting is not annotated. kind: the annotation, or None.
    """

    name: str
    default: str
    comment: str
    allowed: str
    kind: Any


def described(
    config_name: str, overrides: Sequence[str], conf: Path
) -> tuple[list[tuple[str, str, list[str]]], list[Explained]]:
    """Describe a command for the choices made on its command line.

    Returns:
        For each group its name, its choice and its options; and every setting.
    """
    config, choices = _composed(config_name, overrides, conf)
    groups = [(group, choice, _options(conf / group)) for group, choice in choices.items()]
    return groups, list(explained(config, config_name, choices, conf))


def help_text(command: str, config_name: str, overrides: Sequence[str], conf: Path) -> str:
    """Return the help of a command, for the choices made on its command line."""
    groups, settings = described(config_name, overrides, conf)
    lines = [f"{command} SETTING=VALUE ...", "", _purpose(conf / f"{config_name}.yaml"), ""]
    if len(groups) > 0:
        lines += ["Parts, chosen by NAME=CHOICE; each has settings of its own below:", ""]
        for group, choice, options in groups:
            text = f"{group}={choice}".ljust(24) + f" of {', '.join(options)}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 30)
        lines.append("")
    lines += ["Settings and their defaults:", ""]
    for one in settings:
        lines.append(f"  {one.name}={one.default}")
        said = "; ".join(filter(None, [one.comment, one.allowed]))
        lines += textwrap.wrap(said, WIDTH, initial_indent="      ", subsequent_indent="      ")
    lines += ["", f"Another choice's settings: {command} NAME=CHOICE --help"]
    return "\n".join(lines)


def explained(
    config: DictConfig, config_name: str, choices: Mapping[str, str], conf: Path
) -> Iterator[Explained]:
    """Yield every setting of a composed config."""
    settings: Any = OmegaConf.to_container(config, resolve=False)
    comments = _comments(conf / f"{config_name}.yaml")
    for group, choice in choices.items():
        for name in ("base", choice):
            found = _comments(conf / group / f"{name}.yaml").items()
            comments |= {f"{group}.{key}".replace("/", "."): text for key, text in found}
    section = SECTIONS.get(config_name)
    kinds = {} if section is None else section.annotations()
    for name, value, kind in _leaves(settings, "", kinds):
        default = (
            value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        )
        default = default.removesuffix("\n").removesuffix("...").strip()
        allowed = "" if kind is None else describe(kind)
        allowed = (
            "" if "a value of type" in allowed else allowed
        )  # its own settings are shown below
        yield Explained(name, default, comments.get(name, ""), allowed, kind)


def _leaves(
    settings: Mapping[str, Any], prefix: str, kinds: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name, value and annotation of each setting that is not a mapping of others."""
    for name, value in settings.items():
        if name in NOT_SHOWN:
            continue
        dotted, kind = f"{prefix}{name}", kinds.get(name)
        if isinstance(value, dict) and len(value) > 0:
            yield from _leaves(value, f"{dotted}.", _kinds_below(dotted, value, kind))
        else:
            yield dotted, value, kind


def _kinds_below(field: str, settings: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return the annotations of the settings in a mapping: of a section, component or dataclass."""
    found: dict[str, Any] = {}
    task = TASKS[settings["name"]] if field == "eval" else None
    for choice in (kind, *get_args(kind), task):
        if isinstance(choice, type) and issubclass(choice, Section):
            found |= choice.annotations()
        elif isinstance(choice, type) and is_dataclass(choice):
            found |= parameter_types(choice)
    if "_target_" in settings:
        found |= parameter_types(locate(settings["_target_"], field))
        if field == "data":
            found |= DataConfig.annotations()
    return found


def _composed(
    config_name: str, overrides: Sequence[str], conf: Path
) -> tuple[DictConfig, dict[str, str]]:
    """Compose the config of a command line; return it with the choice of each group."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        whole = compose(config_name, overrides=list(overrides), return_hydra_config=True)
    defaults = yaml.safe_load((conf / f"{config_name}.yaml").read_text(encoding="utf-8"))[
        "defaults"
    ]
    optional = [name for one in defaults if isinstance(one, dict) for name in one]
    chosen: dict[str, Any] = {**dict.fromkeys(optional), **whole.hydra.runtime.choices}
    choices = {
        str(group): "null" if choice is None else str(choice)
        for group, choice in chosen.items()
        if (conf / str(group)).is_dir()
    }
    return whole, choices


def _purpose(path: Path) -> str:
    """Return the comment at the top of a config file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")


def _options(folder: Path) -> list[str]:
    """Return the choices of a group, those in folders of it as FOLDER/*."""
    files = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "base")
    below = sorted(f"{path.name}/*" for path in folder.iterdir() if path.is_dir())
    return files if folder.name in ("eval", "adaptation", "judge") else [*files, *below]


def _comments(path: Path) -> dict[str, str]:
    """Return the comment behind each setting of a config file, by dotted name."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indent and key of the mappings that a line is in
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        above = [one for one in above if one[0] < indent]
        if match["comment"]:
            found[".".join([*(key for _, key in above), match["key"]])] = match["comment"]
        above.append((indent, match["key"]))
    return found
