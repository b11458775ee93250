"""Pages of the documentation site that are made while it is built: README and the settings of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from plrhf.cli.commands import COMMANDS
from plrhf.cli.main import CONF
from plrhf.cli.settings_help import described

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
REPOSITORY = re.compile(r"\]\((?:\.\./)?((?:\.\./)*)(README|CONTRIBUTING|SECURITY)\.md")
FOLDER = re.compile(r"\]\((?:\.\./)?docs/")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those of docs/."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "settings.md", content="\n".join(settings_page())))
    files.append(File.generated(config, "api.md", content=API))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links between the repository's pages lead to the pages of the site."""
    names = {"README": "index", "CONTRIBUTING": "contributing", "SECURITY": "security"}
    markdown = REPOSITORY.sub(lambda match: f"]({match[1]}{names[match[2]]}.md", markdown)
    return FOLDER.sub("](", markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Name the search dialog, and let empty corners of tables be no headings, for readers of screens."""
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    return output.replace("<th></th>", "<td></td>")


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same for the page that says that there is no such page."""
    return on_post_page(output_content)


def settings_page() -> Iterator[str]:
    """Yield the lines of the page with all settings of all commands."""
    yield "# Settings\n"
    yield "Every setting with its default, what it does and what it may be. `plrhf COMMAND --help`"
    yield "shows the same for the choices made on its command line.\n"
    shown = set()
    for name, command in COMMANDS.items():
        if (command.config, command.given) in shown:
            continue
        shown.add((command.config, command.given))
        if command.config == "train" and name != "train":
            continue
        yield f"## plrhf {name}\n"
        yield f"{command.about}\n"
        groups, settings = described(command.config, command.given, CONF)
        for group, choice, options in groups:
            yield f"- `{group}={choice}` of {', '.join(f'`{one}`' for one in options)}"
        yield "\n| setting | default | what it does | allowed |\n|---|---|---|---|"
        for one in settings:
            cells = (f"`{one.name}`", f"`{one.default}`", one.comment, one.allowed)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


API = """# API

::: plrhf.load

::: plrhf.models.reward.PersonalRewardModel

::: plrhf.models.policy.PersonalDPOPolicy

::: plrhf.models.grpo.PersonalGRPOPolicy

::: plrhf.models.base.PersonalModule

::: plrhf.models.inference

::: plrhf.encoders.base.UserEncoder

::: plrhf.aggregators.base.Aggregator

::: plrhf.models.adaptation.base.Adaptation

::: plrhf.data.sources.base.Source

::: plrhf.core.losses
"""
