"""The commands: `plrhf NAME`, train.py, eval.py and the modules that can be run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from plrhf.cli.main import CONF, USAGE_ERROR, exit_on_errors, main
from plrhf.core.errors import bad_value

STARTED = "PLRHF_COMMAND"
"""Environment variable by which `plrhf` tells the processes that it starts which command it runs: Lightning
starts them by the script's path and the settings alone."""

FOR_ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit"""
"""What Hydra's script for bash needs in zsh."""

SERVING = ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client")


@dataclass(frozen=True)
class Command:
    """What a command runs.

    Attributes:
        about: one sentence for the list of commands.
        config: name of its settings in conf/. task: dotted path of a function of settings.
        given: overrides that it begins with.
        positional: names of settings whose values may be given without their names, in this order.
        needs: libraries of an extra. extra: its name.
    """

    about: str
    config: str
    task: str
    given: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    extra: str = ""


def _evaluation(name: str, about: str) -> Command:
    return Command(about, "eval", "plrhf.cli.tasks.evaluate", (f"eval={name}",))


def _cache(action: str, about: str) -> Command:
    return Command(about, "cache", "plrhf.cli.cache.cache", (f"action={action}",))


COMMANDS = {
    "train": Command("Train a reward model or a policy.", "train", "plrhf.cli.run.train"),
    "plan": Command(
        "Say what a training would need.", "train", "plrhf.cli.run.train", ("plan=true",)
    ),
    "eval": Command("Evaluate finished runs (eval=NAME).", "eval", "plrhf.cli.tasks.evaluate"),
    "score": _evaluation("score", "Test a run again, also on other rows."),
    "compare": _evaluation("compare", "Put runs into one table and one report."),
    "adapt": _evaluation("adapt", "Fit new users to a few pairs of theirs, and test them."),
    "generate": _evaluation("generate", "Write texts for many users."),
    "winrate": _evaluation("winrate", "Judge two runs' texts side by side."),
    "referee": _evaluation("referee", "Compare all methods by one protocol."),
    "data inspect": Command(
        "Say what is in a file of judgments: data inspect FILE",
        "inspect",
        "plrhf.cli.inspect_rows.inspect_rows",
        positional=("data.path",),
    ),
    "data convert": Command(
        "Make rows of a public source: data convert polis|llmfao|ukpconvarg1 DIR OUT",
        "convert",
        "plrhf.cli.convert_rows.convert_rows",
        positional=("source", "path", "out"),
    ),
    "data styles": Command(
        "Let a language model write the texts of data=styles.",
        "make_styles",
        "plrhf.cli.make_styles.make_styles",
    ),
    "personas": Command(
        "Describe people by their choices with a language model, as user_text.",
        "personas",
        "plrhf.cli.write_personas.write_personas",
    ),
    "export": Command(
        "Make a plain Hugging Face model of a policy for one user.",
        "export",
        "plrhf.cli.export.export",
        positional=("run",),
    ),
    "forget": Command(
        "Remove a person from a run and its export.",
        "forget",
        "plrhf.cli.forget.forget",
        positional=("run",),
    ),
    "cache list": _cache("list", "Say what the cache of runs holds."),
    "cache verify": _cache("verify", "Remove what is damaged from the cache."),
    "cache prune": _cache("prune", "Make the cache smaller: cache prune max_gb=20"),
    "serve": Command(
        "Serve an export over HTTP to many people.",
        "serve",
        "plrhf.cli.serve.serve",
        positional=("run",),
        needs=SERVING,
        extra="serve",
    ),
}


def run(name: str, arguments: Sequence[str], *, shown: str | None = None) -> None:
    """Run a command, or print its help, or the schema of its settings.

    Args:
        name: in `COMMANDS`. arguments: what follows it on the command line.
        shown: how the command was called, for its help; None: ``plrhf name``.
    """
    command, shown = COMMANDS[name], f"plrhf {name}" if shown is None else shown
    with exit_on_errors(command.config):
        for library in command.needs:
            if find_spec(library) is None:
                cure = f"Install the extra: pip install -c constraints.txt '.[{command.extra}]'"
                raise bad_value(shown, library, "a library that is installed", cure)
        given = _named(command, arguments)
        if any(one in ("-h", "--help") for one in given):
            from plrhf.cli.settings_help import help_text  # it loads all components

            overrides = [one for one in given if "=" in one and not one.startswith("-")]
            print(help_text(shown, command.config, [*command.given, *overrides], CONF))
            return
        if "--schema" in given:
            from plrhf.cli.settings_schema import schema_text

            print(schema_text(command.config, command.given, CONF))
            return
    # Other processes of a training are started by the script's path, with these arguments.
    sys.argv = [sys.argv[0], *command.given, *given]
    main(command.config, command.task)


def command_line() -> str:
    """Return the command line of this process as it was typed."""
    script, *given = sys.argv
    if Path(script).name == "plrhf" and STARTED in os.environ:
        return " ".join(["plrhf", os.environ[STARTED], *given])
    return " ".join(["python", script, *given])


def _named(command: Command, arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the names of those that were given by position."""
    names = list(command.positional)
    given = []
    for one in arguments:
        if len(names) > 0 and "=" not in one and not one.startswith(("-", "~", "+")):
            one = f"{names.pop(0)}={quoted(one)}"
        given.append(one)
    return given


def quoted(text: str) -> str:
    """Quote a text as the value of a setting, in Hydra's grammar."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def plrhf() -> None:
    """Run ``plrhf NAME SETTING=VALUE ...``, the installed command."""
    words = sys.argv[1:]
    if STARTED in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        words = [*os.environ[STARTED].split(), *words]
    names = (" ".join(words[:2]), " ".join(words[:1]))
    if words[:1] in (["--version"], ["version"]):
        print(f"plrhf {version('plrhf')}")
    elif words[:1] in (["-sc"], ["--shell-completion"]):
        _complete()
    elif words[:1] in ([], ["-h"], ["--help"], ["help"]):
        print(_overview())
    elif (name := next((one for one in names if one in COMMANDS), None)) is not None:
        os.environ[STARTED] = name
        run(name, words[len(name.split()) :])
    else:
        wrong = bad_value(
            "plrhf", names[0], f"one of the commands {', '.join(COMMANDS)}", "Write plrhf --help"
        )
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def _complete() -> None:
    """Print how the line in ``COMP_LINE`` may go on: Hydra knows settings, we know commands.

    Without a line, Hydra prints the script for the shell.
    """
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()[1:]
    place = len(typed) - (0 if line.endswith(" ") else 1)  # of the word that is being typed
    candidates = [one.split() for one in COMMANDS]
    name = next((one for one in candidates if one == typed[: len(one)] and len(one) <= place), None)
    if "COMP_LINE" in os.environ and name is None:
        begun = [one for one in candidates if one[:place] == typed[:place]]
        print(*sorted({one[place] for one in begun if len(one) > place}), sep="\n")
        return
    if "install=zsh" in sys.argv:
        print(FOR_ZSH)
    command = COMMANDS["train" if name is None else " ".join(name)]
    rest = typed[0 if name is None else len(name) :]
    os.environ["COMP_LINE"] = " ".join(["plrhf", *command.given, *rest]) + " " * line.endswith(" ")
    main(command.config, command.task)


def _overview() -> str:
    """Return the list of commands."""
    lines = [f"  {name:14} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "plrhf COMMAND SETTING=VALUE ...",
            "",
            "Personalised RLHF: user models learned with reward models and policies.",
            "",
            *lines,
            "",
            "plrhf COMMAND --help shows its settings, plrhf COMMAND --schema their JSON schema.",
            "plrhf --version shows the version.",
            'eval "$(plrhf -sc install=bash)" completes commands and settings (zsh: install=zsh).',
        ]
    )


def train() -> None:
    """Run the command line of train.py."""
    run("train", sys.argv[1:], shown="python train.py")


def evaluate() -> None:
    """Run the command line of eval.py."""
    run("eval", sys.argv[1:], shown="python eval.py")
