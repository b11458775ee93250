"""Exports: a trained model as safetensors, tokenizer and plrhf.json. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor

from plrhf.backbone.sharding import gathered
from plrhf.core.errors import bad_value
from plrhf.data.digests import file_digest, folder_digests
from plrhf.data.in_context import OwnPairs
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.encoders import PairReader
from plrhf.models.adaptation.fitting import user_tables
from plrhf.models.card import CARD, Card, card_text, read_card

USER_MODEL = "user_encoder.safetensors"
ENROLLED = "enrolled.safetensors"
OWN_PAIRS = "own_pairs.json"
BACKBONE = "backbone"
README = "README.md"
BLOB = re.compile(r"(\.\./)+blobs/[0-9a-f]+")
ABOUT = """## Intended use

For people whose preferences it was trained on, or who are fitted to a few of their choices (`model.adapt`).
Without `user_id` its {what} are those of a generic user. It predicts preferences, not what is true or good.

## Privacy

`plrhf.json` holds the ids of the train users, and the user tables one vector for each: both are personal
data. `model.forget(ID)` removes a person. Weights that all share were learned from their choices, too.

## Citation

P-RLHF: Li et al., Personalized Language Modeling from Personalized Human Feedback, arXiv 2402.05133.
"""


def user_model_state(model: Any) -> dict[str, Tensor]:
    """Return the weights of encoder, aggregator and head."""
    state = model.state_dict().items()
    return {n: v.detach().cpu().contiguous() for n, v in state if not n.startswith("backbone.")}


def save_export(directory: Path, model: Any, card: Card, tokenizer: Any) -> None:
    """Write a model to `directory`: PEFT adapter, user model, tokenizer, README (model card), plrhf.json.

    The export is written beside `directory` and then replaces it as a whole. The frozen backbone is
    included if `card.ships_backbone` says so. All files are readable by everybody.
    """
    part = _beside(directory, "part")
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if is_first:
        _remove(part)
        part.mkdir(parents=True)
    model.backbone.save(part)
    named = model.named_parameters()
    with gathered([one for name, one in named if not name.startswith("backbone.")]):
        if not is_first:
            return
        save_file(user_model_state(model), part / USER_MODEL)
    if len(model.enrolled) > 0:
        save_file({"vectors": model.enrolled.cpu()}, part / ENROLLED)
    if model.own_pairs is not None:
        (part / OWN_PAIRS).write_text(pairs_text(model.own_pairs))
    if card.ships_backbone and model.backbone.trainable != "full":
        _copy_backbone(Path(card.backbone["path"]), part / BACKBONE)
        card = replace(card, backbone={**card.backbone, "path": BACKBONE})
    _name_base_model(part, str(card.backbone["path"]))
    tokenizer.save_pretrained(part)
    write_model_card(part, card)
    tables = [*user_tables(model.encoder)]
    if isinstance(model.encoder, PairReader):
        tables.append("vectors")
    card = replace(
        card,
        user_tables=sorted(tables),
        user_dim=model.aggregator.user_dim,
        files=folder_digests(part, without=[README, CARD]),  # people may edit the README
    )
    (part / CARD).write_text(card_text(card))
    for path in (part, *part.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    _replace_directory(part, directory)


def write_model_card(directory: Path, card: Card) -> None:
    """Write the README of an export, which says nothing of any results yet."""
    _model_card(card).save(directory / README)


def add_note(directory: Path, note: str) -> None:
    """Add a paragraph to the model card of an export."""
    with (directory / README).open("a", encoding="utf-8") as file:
        file.write(f"\n{note}\n")


def check_files(directory: Path, card: Card) -> None:
    """Raise a ValueError if a file of an export is missing, was changed or lies elsewhere."""
    for name, digest in card.files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            allowed, cure = "names of files in the export", "Export the model anew"
            raise bad_value(f"{CARD}.files", name, allowed, cure)
        if not path.is_file() or file_digest(path) != digest:
            raise bad_value(
                f"export {name}",
                "missing" if not path.is_file() else "altered or damaged",
                f"the file that {CARD} was written with",
                "Copy the export anew, or export the model anew",
            )


def read_own_pairs(directory: Path) -> dict[str, list[Row]] | None:
    """Return the pairs that an export puts in front of its users' prompts; None if it has none."""
    path = directory / OWN_PAIRS
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return {
        user: [parse_row({"user_id": user, **one}, OWN_PAIRS) for one in pairs]
        for user, pairs in found.items()
    }


def pairs_text(own_pairs: OwnPairs) -> str:
    """Return pairs of users as JSON, which `read_own_pairs` reads."""
    fields = ("prompt", "chosen", "rejected", "prompt_id")
    plain = {
        user: [{name: getattr(one, name) for name in fields} for one in pairs]
        for user, pairs in own_pairs.items()
    }
    return json.dumps(plain, indent=1) + "\n"


def enrolled_vectors(directory: Path) -> Tensor | None:
    """Return the vectors [n, user_dim] of an export's n users without rows; None if there are none."""
    path = directory / ENROLLED
    return load_file(path)["vectors"] if path.is_file() else None


def replace_users(
    directory: str | Path,
    users: Sequence[str],
    tables: Mapping[str, Tensor],
    vectors: Tensor | None = None,
    own_pairs: OwnPairs | None = None,
) -> None:
    """Replace the users of an export: their ids, and the encoder's tables with one row for each user.

    The new export is written beside the old one and then replaces it, so the export can be loaded at
    any time.

    Args:
        tables: by name in the encoder, [1 + users with rows, ...]; other weights stay as they are.
        vectors: of the last users, who have no rows, [n, user_dim]; None: there are none.
        own_pairs: pairs that are put in front of users' prompts; None: the model reads none.

    Raises:
        ValueError: a table has another number of rows.
    """
    n_enrolled = 0 if vectors is None else len(vectors)
    n_rows = len(users) - n_enrolled + 1
    for name, table in tables.items():
        if len(table) != n_rows:
            raise bad_value(
                f"encoder {name}",
                f"{len(table)} rows",
                f"{n_rows}, one a user and the generic user's",
                "Let user_parameters() name only parameters whose row u belongs to user u",
            )
    directory = Path(directory)
    remove_leftovers(directory)
    rows = {f"encoder.{name}": table.detach().cpu().contiguous() for name, table in tables.items()}
    card = replace(read_card(directory), users=list(users), enrolled=n_enrolled)
    written = {
        USER_MODEL: {**load_file(directory / USER_MODEL), **rows},
        ENROLLED: {} if vectors is None or n_enrolled == 0 else {"vectors": vectors.contiguous()},
    }
    part = _beside(directory, "part")
    try:
        _copy(directory, part, card)
        _write_users(part, card, written, own_pairs)
    except BaseException:
        _remove(part)
        raise
    _replace_directory(part, directory)


def _write_users(
    part: Path, card: Card, written: Mapping[str, dict[str, Tensor]], own_pairs: OwnPairs | None
) -> None:
    """Write the card and the files of its users; those without tensors are removed."""
    files = dict(card.files)
    for name, state in written.items():
        (part / name).unlink(missing_ok=True)
        files.pop(name, None)
        if len(state) > 0:
            save_file(state, part / name)
            (part / name).chmod(0o644)
            files[name] = file_digest(part / name)
    if own_pairs is not None:
        (part / OWN_PAIRS).write_text(pairs_text(own_pairs))
        files[OWN_PAIRS] = file_digest(part / OWN_PAIRS)
    (part / CARD).write_text(card_text(replace(card, files=files)))


def copy_listed(directory: Path, target: Path, card: Card) -> None:
    """Copy the card of an export and the files that it lists, and nothing else, to an empty directory."""
    for name in (CARD, *card.files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, target / name)


def leads_out(path: Path) -> bool:
    """Say whether a path is a link to anywhere but a file of the hub's cache, named by its hash."""
    return path.is_symlink() and BLOB.fullmatch(os.readlink(path)) is None


def _copy(directory: Path, target: Path, card: Card) -> None:
    """Copy all files of an export; links of others stay links, and nothing is written through ours."""
    shutil.copytree(directory, target, symlinks=True)
    for name in (CARD, README, *card.files):  # links in the hub's cache
        if (target / name).is_symlink():
            (target / name).unlink()
            if (directory / name).is_file() and not (
                name == README and leads_out(directory / name)
            ):
                shutil.copyfile(directory / name, target / name)


def _replace_directory(new: Path, old: Path) -> None:
    """Replace a directory, which need not exist, by another one."""
    aside = _beside(old, "old")
    _remove(aside)
    if old.exists():
        os.rename(old, aside)
    os.rename(new, old)
    _remove(aside)


def restore(directory: Path) -> None:
    """Repair an export after a kill between the two renames of `_replace_directory`."""
    aside = _beside(directory, "old")
    if not directory.exists() and aside.is_dir() and not aside.is_symlink():
        os.rename(aside, directory)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed writers of an export left beside it, in which forgotten users may stand."""
    restore(directory)
    for suffix in ("part", "old"):
        _remove(_beside(directory, suffix))


def _beside(directory: Path, suffix: str) -> Path:
    """Return the path of a directory beside `directory`, with `suffix` added to its name."""
    return directory.with_name(f"{directory.name}.{suffix}")


def _remove(path: Path) -> None:
    """Delete a directory and its contents; of a symbolic link, delete the link only."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _copy_backbone(source: Path, target: Path) -> None:
    """Copy the files that loading a model needs, without its tokenizer."""
    target.mkdir()
    for pattern in ("*.safetensors", "*.safetensors.index.json", "*config.json"):
        for path in source.glob(pattern):
            if path.name != "tokenizer_config.json":
                shutil.copyfile(path, target / path.name)


def _name_base_model(directory: Path, path: str) -> None:
    """Let the adapter's config name the base model as plrhf.json does, not where this machine has it."""
    file = directory / "adapter_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = path
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _model_card(card: Card) -> ModelCard:
    """Return a model card that says what the export is and how to use it, without user names or paths."""
    path = str(card.backbone["path"])
    is_on_hub = not card.ships_backbone and not Path(path).is_absolute()
    data = ModelCardData(
        library_name="plrhf",
        base_model=path if is_on_hub else None,
        tags=["personalised-rlhf", "preference-learning", str(card.model["name"])],
    )
    base = f"`{path}`" if is_on_hub else "shipped" if card.ships_backbone else "a local model"
    method = "write" if card.model["name"] in ("dpo", "grpo") else "score"
    response = "" if method == "write" else ', "response": "Back at six."'
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# A personalised {'policy' if method == 'write' else 'reward model'}\n\n"
        f"Made by plrhf: encoder `{card.encoder['name']}`, aggregator `{card.aggregator['name']}`, "
        f"{len(card.users)} users; language model: {base}.\n\n"
        "```python\nimport plrhf\n\n"
        'model = plrhf.load("DIR")  # this directory\n'
        f'model.{method}([{{"prompt": "Write a note."{response}}}])\n```\n\n'
        f"{ABOUT.format(what='texts' if method == 'write' else 'rewards')}"
    )
