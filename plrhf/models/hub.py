"""Exports on the Hugging Face hub: uploads one, and downloads one that is named ``hf://ORG/NAME``."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from plrhf.core.errors import bad_value
from plrhf.models.card import CARD, read_card
from plrhf.models.export import README, check_files, leads_out, restore

PREFIX = "hf://"
"""How the name of an export on the hub begins. Other names are always directories of this machine."""


def push_to_hub(directory: str | Path, name: str, *, private: bool = True) -> str:
    """Upload an export to the hub, and return the address of the commit.

    An export holds the ids of its users and a vector of each, so the repository is private unless
    asked otherwise. You must be logged in (``hf auth login``).

    Args:
        directory: the export, or its run's directory.
        name: ``ORG/NAME``, with or without `PREFIX`; it is made if it is not there.
        private: of a new repository; one that is there stays as it is.

    Raises:
        ValueError: the export is damaged, or the hub does not take it.
    """
    folder = export_of(directory)
    card = read_card(folder)
    check_files(folder, card)
    # No other file, and nothing that a link leads to: README has no digest.
    names = [CARD, *map(glob.escape, card.files), *[README] * (not leads_out(folder / README))]
    repository = name.removeprefix(PREFIX)
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        made = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        cure = f"Log in by `hf auth login`, and name a repository of yours ({_line(error)})"
        raise bad_value("name", name, "a repository that you may write to", cure) from error
    return str(made.commit_url)


def export_of(directory: str | Path) -> Path:
    """Return the export in a run's directory, or the directory itself if it is no run's.

    Args:
        directory: of this machine, or ``hf://ORG/NAME`` (``hf://ORG/NAME@REVISION``) of the hub, which
            is downloaded once.

    Raises:
        ValueError: the hub does not hand it out.
    """
    if str(directory).startswith(PREFIX):
        return _downloaded(str(directory))
    of_run = Path(directory, "export")
    restore(of_run)
    return of_run if (of_run / CARD).is_file() else Path(directory)


def _downloaded(name: str) -> Path:
    """Download an export, unless it is there already, and return its directory."""
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        cure = f"Check the name, and whether you may read it ({_line(error)})"
        raise bad_value("export", name, "a model that the hub hands out", cure) from error


def _line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split())
