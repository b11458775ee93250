"""What a run ships: loads to the same model, elsewhere too, and refuses what does not belong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import save_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import plrhf
from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.cli.run import train
from plrhf.core.types import PreferenceBatch
from plrhf.data.digests import json_text
from plrhf.data.module import PreferenceData
from plrhf.models.base import PersonalModule
from plrhf.models.card import read_card
from plrhf.models.export import user_model_state
from plrhf.models.loading import build_model
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

CLASSES: dict[str, type[PersonalModule]] = {
    "reward_run": PersonalRewardModel,
    "policy_run": PersonalDPOPolicy,
}


@pytest.fixture
def export(reward_run: Path, tmp_path: Path) -> Path:
    """A copy of a reward model's export, to break."""
    return Path(shutil.copytree(reward_run / "export", tmp_path / "export"))


def data_of(run: Path, model: PersonalModule) -> PreferenceData:
    data = build_data(RunConfig.of_run(run).data)
    data.tokenize(AutoTokenizer.from_pretrained(run / "export"), layout=model.backbone.layout)
    return data


def margins(model: PersonalModule, data: PreferenceData) -> pd.DataFrame:
    """Margins of the test pairs, in the batches that evaluation takes them in."""
    found: list[pd.DataFrame] = []
    batch: PreferenceBatch
    for batch in data.evaluation_loader("test"):
        rows = [data.datasets["test"].rows[place].pair_id for place in batch.row.tolist()]
        values = {
            name: value.double().numpy() for name, value in model.context_margins(batch).items()
        }
        found.append(pd.DataFrame(values, index=rows))
    return pd.concat(found).sort_index()


@pytest.mark.slow
@pytest.mark.parametrize("which", CLASSES)
def test_margins_are_bit_identical(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    model = CLASSES[which].from_pretrained(run / "export")
    assert not model.training
    table = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
    expected = table.pivot(index="pair_id", columns="context", values="margin").sort_index()
    found = margins(model, data_of(run, model))
    for context in ("user", "generic"):
        assert (found[context].to_numpy() == expected[context].to_numpy()).all()
    assert (found["user"] != found["generic"]).any()


@pytest.mark.parametrize("which", CLASSES)
def test_the_adapter_is_one_of_plain_peft(which: str, request: pytest.FixtureRequest) -> None:
    export = request.getfixturevalue(which) / "export"
    card = read_card(export)
    base = AutoModelForCausalLM.from_pretrained(export / card.backbone["path"])
    plain = PeftModel.from_pretrained(base, str(export)).eval()
    ours = CLASSES[which].from_pretrained(export).backbone.model
    ids = torch.tensor([[5, 9, 300, 41]])
    with torch.no_grad():
        logits = plain(ids).logits
        assert torch.equal(logits, ours(ids).logits)
        with plain.disable_adapter():
            assert not torch.equal(logits, plain(ids).logits)


@pytest.mark.parametrize("which", CLASSES)
def test_nothing_in_it_is_ever_unpickled(which: str, request: pytest.FixtureRequest) -> None:
    export = request.getfixturevalue(which) / "export"
    names = {path.name for path in export.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "user_encoder.safetensors"),
        *("plrhf.json", "tokenizer.json", "tokenizer_config.json", "README.md", "backbone"),
    }
    assert {path.suffix for path in (export / "backbone").iterdir()} == {".json", ".safetensors"}
    for path in export.glob("*.json"):
        json.loads(path.read_text())
    with safe_open(export / "user_encoder.safetensors", "pt") as file:
        parts = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118, it is no dict
    assert parts == ({"encoder", "aggregator", "head"} if which == "reward_run" else {"encoder"})


def test_a_moved_backbone(export: Path, tmp_path: Path) -> None:
    card = json.loads((export / "plrhf.json").read_text())
    moved = (export / "backbone").rename(tmp_path / "moved")
    card["backbone"]["path"], card["ships_backbone"] = "/nowhere/any/more", False
    card["files"] = {}
    (export / "plrhf.json").write_text(json_text(card))
    with pytest.raises(ValueError, match=r"^backbone\.path='/nowhere/any/more' is not allowed"):
        PersonalRewardModel.from_pretrained(export)
    model = PersonalRewardModel.from_pretrained(export, backbone_path=str(moved))
    assert model.card.users == card["users"]


@pytest.mark.slow
def test_another_backbone_is_refused(export: Path, tmp_path: Path) -> None:
    path = export / "backbone"
    other = shutil.copytree(path, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.h[1].mlp.fc_in.weight[3, 5] += 1
    model.save_pretrained(other)
    with pytest.raises(ValueError) as error:
        PersonalRewardModel.from_pretrained(export, backbone_path=str(other))
    assert str(error.value) == (
        f"backbone.path={str(other)!r} is not allowed: expected the backbone the model was trained "
        "on. Give its directory as backbone_path."
    )
    with pytest.raises(ValueError, match=r"^backbone\.path="):
        other = save_model(tmp_path / "wider")
        PersonalRewardModel.from_pretrained(export, backbone_path=str(other))


def test_another_class_is_refused(export: Path) -> None:
    with pytest.raises(ValueError) as error:
        PersonalDPOPolicy.from_pretrained(export)
    assert str(error.value) == (
        "export='plrhf.models.reward.PersonalRewardModel' is not allowed: expected a PersonalDPOPolicy. "
        "Load it with from_pretrained of its own class."
    )


def without_digests(export: Path) -> None:
    """Let the card say nothing of the other files, as one who forges an export would."""
    card = json.loads((export / "plrhf.json").read_text())
    (export / "plrhf.json").write_text(json_text({**card, "files": {}}))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.full((1,), torch.nan), "'nan or inf'"),
        (torch.ones(1, dtype=torch.int8), "'torch.int8'"),
        (torch.ones(1, dtype=torch.complex64), "'torch.complex64'"),
    ],
)
def test_weights_that_are_no_finite_real_numbers_are_refused(
    value: torch.Tensor, found: str, export: Path
) -> None:
    state = load_file(export / "user_encoder.safetensors")
    state["head.weight"] = value.expand(state["head.weight"].shape).contiguous()
    save_file(state, export / "user_encoder.safetensors")
    without_digests(export)
    with pytest.raises(ValueError) as error:
        PersonalRewardModel.from_pretrained(export)
    assert str(error.value) == (
        f"user_encoder.safetensors head.weight={found} is not allowed: expected finite real "
        "numbers. Export the model anew."
    )


def test_an_export_can_be_shipped(export: Path, tmp_path: Path) -> None:
    """Everybody can read it, it says what it is, names no path of this machine, and is whole."""
    for path in export.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
    card = ModelCard.load(export / "README.md")
    assert card.data.library_name == "plrhf" and "plrhf.load" in card.text
    for section in ("Data and results", "Intended use", "Privacy", "Citation"):
        assert f"\n## {section}\n" in card.text
    assert re.search(r"\| user context \| \d+\.\d \[", card.text)
    for name in ("plrhf.json", "README.md", "adapter_config.json"):
        assert "/tmp" not in (export / name).read_text()
    moved = export.rename(tmp_path / "moved")
    assert PersonalRewardModel.from_pretrained(moved).card.backbone["path"] == "backbone"


@pytest.mark.slow
def test_an_export_that_a_kill_left_aside_is_found(export: Path) -> None:
    users = read_card(export).users
    loaders: dict[Path, Any] = {export: PersonalRewardModel.from_pretrained}
    for directory, load in {**loaders, export.parent: plrhf.load}.items():
        export.rename(export.with_name("export.old"))
        assert load(directory).card.users == users


@pytest.mark.slow
@pytest.mark.parametrize("which", CLASSES)
def test_a_checkpoint_of_a_run_is_its_model(which: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    one = CLASSES[which].load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    other = CLASSES[which].from_pretrained(run / "export")
    assert not one.training and one.card.users == other.card.users
    batch = next(iter(data_of(run, one).evaluation_loader("test")))
    with torch.no_grad():
        assert one(batch).equal(other(batch))
    assert one.hparams["n_users"] == len(other.card.users)
    assert one.hparams["optim"]["user_lr"] == one.optim.user_lr
    wrong = CLASSES["policy_run" if which == "reward_run" else "reward_run"]
    with pytest.raises(ValueError, match=r"^export=.* is not allowed: expected a Personal"):
        wrong.load_from_checkpoint(run / "checkpoints" / "best.ckpt")


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(
        ValueError, match=r"^checkpoint='.* is not allowed: expected a whole checkpoint"
    ):
        PersonalRewardModel.load_from_checkpoint(path)


def test_a_checkpoint_with_a_flipped_bit_is_refused(reward_run: Path, tmp_path: Path) -> None:
    whole = reward_run / "checkpoints/best.ckpt"
    with ZipFile(whole) as archive:
        largest = max(archive.infolist(), key=lambda one: one.file_size)
    content = bytearray(whole.read_bytes())
    content[largest.header_offset + largest.file_size] ^= 1  # its last numbers
    (tmp_path / "best.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint .*\(checksum of "):
        PersonalRewardModel.load_from_checkpoint(tmp_path / "best.ckpt")


def changed(**parts: Any) -> Any:
    def change(card: dict[str, Any]) -> None:
        for name, value in parts.items():
            card[name] = {**card[name], **value} if isinstance(value, dict) else value

    return change


BROKEN = {
    "schema": (changed(schema=2), "plrhf.json schema=2 is not allowed: expected 1."),
    "extra": (changed(extra=1), "plrhf.json.extra=1 is not allowed: expected one of the keys"),
    "type": (
        changed(users="ann"),
        "plrhf.json.users='ann' is not allowed: expected a list, each item text",
    ),
    "missing": (
        lambda card: card.pop("users"),
        "plrhf.json.users=None is not allowed: expected a v",
    ),
    "backbone": (
        changed(backbone={"lora": None, "evil": 1}),
        "plrhf.json.backbone.evil=1 is not allowed",
    ),
    "a function for a class": (
        changed(encoder={"_target_": "plrhf.core.errors.bad_value"}),
        "encoder._target_='plrhf.core.errors.bad_value' is not allowed: expected the dotted path of a",
    ),
    "a class from elsewhere": (
        changed(encoder={"_target_": "shutil.rmtree"}),
        "plrhf.json.encoder._target_='shutil.rmtree' is not allowed: expected a class of plrhf",
    ),
    "a head from elsewhere": (
        changed(model={"head": {"_target_": "shutil.rmtree"}}),
        "plrhf.json.model.head._target_='shutil.rmtree' is not allowed: expected a class of plrhf",
    ),
    "no such head": (
        changed(model={"head": {"name": "lineal"}}),
        "model.head={'name': 'lineal'} is not allowed: expected one of linear",
    ),
    "a user twice": (
        changed(users=["ann", "bob", "ann"]),
        "plrhf.json.users='ann' is not allowed: expected each user once.",
    ),
    "no class": (
        changed(model={"_target_": None}),
        "plrhf.json.model._target_=None is not allowed",
    ),
    "other shape": (changed(encoder={"rank": 3}), "user_encoder.safetensors encoder."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_card_is_refused(name: str, export: Path) -> None:
    change, message = BROKEN[name]
    card = json.loads((export / "plrhf.json").read_text())
    change(card)
    (export / "plrhf.json").write_text(json_text(card))
    with pytest.raises(ValueError) as error:
        PersonalRewardModel.from_pretrained(export)
    assert str(error.value).startswith(message)


def test_files_that_are_cut_or_gone_are_refused(export: Path) -> None:
    weights = export / "user_encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=r"^export user_encoder\.safetensors='altered or damaged' is not allowed"
    ):
        PersonalRewardModel.from_pretrained(export)
    without_digests(export)
    with pytest.raises(ValueError, match=r"^user_encoder\.safetensors=.* a whole safetensors file"):
        PersonalRewardModel.from_pretrained(export)
    weights.unlink()
    (export / "tokenizer.json").unlink()
    (export / "plrhf.json").write_text('{"schema": 1, ')
    with pytest.raises(ValueError, match=r"^export='.* is not allowed: expected a JSON object"):
        PersonalRewardModel.from_pretrained(export)
    (export / "plrhf.json").unlink()
    with pytest.raises(ValueError, match=r"^export=.* expected a directory with plrhf\.json"):
        PersonalRewardModel.from_pretrained(export)


@pytest.mark.slow
def test_code_of_a_repository_is_not_for_an_export_to_ask_for(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = json.loads((export / "plrhf.json").read_text())
    card["backbone"]["trust_remote_code"] = True
    (export / "plrhf.json").write_text(json_text(card))
    asked: list[bool] = []
    really = AutoConfig.from_pretrained

    def noticed(path: str, *, trust_remote_code: bool, **options: Any) -> Any:
        asked.append(trust_remote_code)
        return really(path, trust_remote_code=trust_remote_code, **options)

    monkeypatch.setattr("plrhf.backbone.loading.AutoConfig.from_pretrained", noticed)
    for trusted in (False, True):
        PersonalRewardModel.from_pretrained(export, trust_remote_code=trusted)
    assert list(dict.fromkeys(asked)) == [False, True]


@pytest.mark.slow
def test_a_run_is_the_same_from_a_backbone_made_anew(
    reward_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """With an empty cache, and with a backbone in it one of whose bits was flipped."""
    settings = yaml.safe_load((reward_run / "config.yaml").read_text())
    for number in range(2):
        run, cache = tmp_path / f"run{number}", tmp_path / "cache"
        capsys.readouterr()
        train({**settings, "cache_dir": str(cache), "run_dir": str(run)})
        assert ("damaged, and made anew: " in capsys.readouterr().out) == (number == 1)
        for name in ("adapter_model.safetensors", "user_encoder.safetensors"):
            expected = (reward_run / "export" / name).read_bytes()
            assert (run / "export" / name).read_bytes() == expected
        (weights,) = cache.glob("tiny_gptj-*/model.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 64
        weights.write_bytes(content)


def test_with_learned_shrinkage_all_else_starts_as_without_users(reward_run: Path) -> None:
    model = PersonalRewardModel.from_pretrained(reward_run / "export")
    no_users = {"name": "none", "_target_": "plrhf.encoders.NoneEncoder"}
    states = []
    for encoder in (no_users, {**model.card.encoder, "shrinkage": "learned"}):
        torch.manual_seed(3)
        fresh = build_model(model.backbone, replace(model.card, encoder=encoder))
        state = user_model_state(fresh).items()
        states.append({name: one for name, one in state if not name.startswith("encoder.")})
    assert {"head.weight", "aggregator.to_film.weight"} <= states[0].keys() == states[1].keys()
    assert all(one.equal(states[1][name]) for name, one in states[0].items())


def test_a_card_builds_the_users_model_again(reward_run: Path) -> None:
    model = PersonalRewardModel.from_pretrained(reward_run / "export")
    fresh = build_model(model.backbone, model.card)
    one, other = user_model_state(model), user_model_state(fresh)
    assert {name: value.shape for name, value in one.items()} == {
        name: value.shape for name, value in other.items()
    }
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert model.card.user_index("ada-000") == 1
    with pytest.raises(
        ValueError, match="^user_id='bob' is not allowed: expected one of the 5 users"
    ):
        model.card.user_index("bob")
