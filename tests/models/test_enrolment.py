"""Users put into an export and taken out of it: rows of tables, vectors alone, files left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows_of_world, world
from torch import Tensor, tensor

import plrhf
from plrhf.core.types import UserBatch
from plrhf.data.digests import json_text
from plrhf.models.adaptation import Basis, Gradient, NewUser, Posterior, adapt
from plrhf.models.adaptation.fitting import user_tables
from plrhf.models.base import PersonalModule
from plrhf.models.card import read_card
from plrhf.models.enrolment import enrol, forget, save_shared
from plrhf.models.export import replace_users
from plrhf.models.reward import PersonalRewardModel

PAIRS = [{"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}]


def vectors(model: PersonalModule, *places: int) -> Tensor:
    """e_u of user indices, for rows without features."""
    users = UserBatch(user_id=tensor(places), features=torch.zeros(len(places), 0))
    return model.encode(users)[0].detach()


@pytest.fixture(params=["reward_run", "policy_run"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an export, to change: lookup with FiLM, clusters with soft prompt."""
    run = request.getfixturevalue(request.param)
    return Path(shutil.copytree(run / "export", tmp_path / "export"))


def test_an_id_that_is_no_text_is_refused_before_a_file_changes(export: Path) -> None:
    before = contents(export)
    user = plrhf.load(export).adapt([])
    for bad in (7, "", " "):
        with pytest.raises(
            ValueError, match=r"^user_id=.* is not allowed: expected text that is not"
        ):
            enrol(export, bad, user)  # type: ignore[arg-type]
    rows = {name: torch.full_like(row, torch.nan) for name, row in user.rows.items()}
    with pytest.raises(ValueError, match=r"^user=.* is not allowed: expected finite numbers"):
        enrol(export, "eve", NewUser(vector=user.vector, rows=rows))
    assert contents(export) == before


def test_links_in_an_export_are_neither_read_nor_written_through(
    export: Path, tmp_path: Path
) -> None:
    secret, card = tmp_path / "secret", export / "plrhf.json"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (export / "README.md").unlink()
    for name, target in {
        "README.md": secret / "key",
        "notes": secret / "key",
        "more": secret,
    }.items():
        (export / name).symlink_to(target)
    shutil.move(card, secret / "card")  # as the hub's cache has it
    card.symlink_to(secret / "card")
    before = (secret / "card").read_bytes()
    save_shared(export, tmp_path / "shared")
    assert not any(one.is_symlink() for one in (tmp_path / "shared").rglob("*"))
    assert not any(b"secret" in one for one in contents(tmp_path / "shared").values())
    forget(export, read_card(export).users[0])
    assert (secret / "key").read_text() == "secret" and (secret / "card").read_bytes() == before
    assert not any(
        b"secret" in one for name, one in contents(export).items() if name == "README.md"
    )
    assert (export / "more").is_symlink() and (export / "notes").is_symlink()
    assert len(read_card(export).users) == 4
    with pytest.raises(ValueError, match=r"^out=.* a folder that is empty or not there"):
        save_shared(export, tmp_path / "shared")


def test_a_damaged_export_gets_no_new_digests(export: Path) -> None:
    path, (ann, *_) = export / "user_encoder.safetensors", read_card(export).users
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    before = contents(export)
    user = NewUser(vector=torch.zeros(4), rows=None)
    for change in (lambda: forget(export, ann), lambda: enrol(export, "eve", user)):
        with pytest.raises(ValueError, match=r"^export user_encoder.safetensors='altered"):
            change()
    assert contents(export) == before


@pytest.mark.slow
def test_a_loaded_model_enrols_and_forgets_in_memory_and_in_its_export(export: Path) -> None:
    model = plrhf.load(export)
    user = model.adapt(PAIRS, Posterior(steps=5, prior_scale=20.0))
    before = vectors(model, *range(6))
    state = torch.get_rng_state()
    model.enrol("eve", user)
    assert torch.get_rng_state().equal(state)
    assert model.card.user_index("eve") == 6
    for one in (model, plrhf.load(export)):
        torch.testing.assert_close(vectors(one, 6)[0], user.vector)
        assert vectors(one, *range(6)).equal(before)
    model.forget("eve")
    assert vectors(model, *range(6)).equal(before)
    with pytest.raises(ValueError, match="^user_id='eve' is not allowed"):
        model.card.user_index("eve")


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of all files of a directory, by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_new_user_is_fitted_enrolled_and_forgotten(export: Path) -> None:
    before = contents(export)
    model = PersonalModule.from_pretrained(export)
    stranger = world().user_ids[5]
    pairs = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in rows_of_world()
        if row["user_id"] == stranger
    ][:3]
    user = adapt(model, pairs, Posterior(steps=5, prior_scale=20.0))
    generic = model.encoder.generic(1)[0].detach()
    assert (user.vector - generic).abs().max() > 1e-3
    assert adapt(model, []).vector.equal(generic)

    enrol(export, stranger, user)
    grown = PersonalModule.from_pretrained(export)
    assert grown.card.user_index(stranger) == 6
    torch.testing.assert_close(vectors(grown, 6)[0], user.vector)
    assert vectors(grown, *range(6)).equal(vectors(model, *range(6)))
    with pytest.raises(ValueError, match=f"^user_id='{stranger}' is not allowed: expected an id"):
        enrol(export, stranger, user)

    forget(export, stranger)
    assert contents(export) == before


@pytest.mark.slow
def test_nothing_of_a_forgotten_user_is_left(export: Path) -> None:
    model = PersonalModule.from_pretrained(export)
    ids = list(model.card.users)
    (table,) = user_tables(model.encoder).values()
    row = table[3].detach().numpy().tobytes()

    def holding(what: bytes) -> set[str]:
        return {name for name, content in contents(export).items() if what in content}

    assert holding(row) == {"user_encoder.safetensors"}
    assert holding(ids[2].encode()) == {"plrhf.json"}
    names = set(contents(export))
    forget(export, ids[2])
    assert holding(row) == holding(ids[2].encode()) == set()
    assert set(contents(export)) == names
    smaller = PersonalModule.from_pretrained(export)
    assert smaller.card.users == ids[:2] + ids[3:]
    assert vectors(smaller, 0, 1, 2, 3, 4).equal(vectors(model, 0, 1, 2, 4, 5))
    with pytest.raises(ValueError, match=rf"^user_id='{ids[2]}' is not allowed: expected one of"):
        forget(export, ids[2])


def test_rows_that_do_not_fit_the_export(export: Path) -> None:
    card = read_card(export)
    with pytest.raises(ValueError) as caught:
        replace_users(export, card.users, {"offsets.weight": torch.zeros(4, 2)})
    assert str(caught.value) == (
        "encoder offsets.weight='4 rows' is not allowed: expected 6, one a user and the generic "
        "user's. Let user_parameters() name only parameters whose row u belongs to user u."
    )
    with pytest.raises(ValueError, match=r"^user=\{'odd': \(3,\)\} is not allowed: expected rows"):
        enrol(export, "eve", NewUser(vector=torch.zeros(3), rows={"odd": torch.zeros(3)}))


def answers(model: Any, *names: str | None) -> Any:
    """What a model makes of one text for each of the users: rewards, or texts written."""
    asked = [{"prompt": "Write a note.", "response": "Back at six."} for _ in names]
    asked = [
        one if name is None else {**one, "user_id": name}
        for one, name in zip(asked, names, strict=True)
    ]
    if isinstance(model, PersonalRewardModel):
        return model.score(asked).tolist()
    return model.write(asked, max_new_tokens=6, temperature=0.0)


@pytest.mark.slow
def test_users_without_rows_are_enrolled_and_forgotten(export: Path) -> None:
    """eve and fay have vectors alone, and gil, who comes between them, has rows."""
    before, model = contents(export), plrhf.load(export)
    known = list(model.card.users)
    asked = answers(model, *known, None)
    user = model.adapt(PAIRS, Basis(l2=0.1))
    assert user.rows is None and user.vector.shape == (model.aggregator.user_dim,)
    others = {"eve": user.vector, "fay": torch.randn_like(user.vector)}
    gil = model.adapt(PAIRS, Posterior(prior_scale=20.0))
    enrol(export, "eve", user)
    enrol(export, "gil", gil)
    model.enrol("fay", NewUser(vector=others["fay"]))  # which tells the model of the others too
    assert (model.card.users, model.card.enrolled) == ([*known, "gil", "eve", "fay"], 2)
    with pytest.raises(ValueError, match=r"^user_id='eve' is not allowed: expected an id the"):
        enrol(export, "eve", user)
    for one in (model, plrhf.load(export)):
        for name, vector in others.items():  # bit for bit
            assert vectors(one, one.card.user_index(name))[0].equal(vector)
        torch.testing.assert_close(vectors(one, one.card.user_index("gil"))[0], gil.vector)
        assert answers(one, *known, None) == asked
        mixed_batch = answers(one, "eve", known[0], "fay", None)
        alone = [answers(one, name)[0] for name in ("eve", known[0], "fay", None)]
        assert mixed_batch == pytest.approx(alone) if isinstance(alone[0], float) else alone
    model.forget("eve")  # the others keep theirs
    assert vectors(model, model.card.user_index("fay"))[0].equal(others["fay"])
    assert user.vector.numpy().tobytes() not in b"".join(contents(export).values())
    for name in ("gil", "fay"):
        model.forget(name)
    assert contents(export) == before


@pytest.mark.slow
def test_rows_may_be_adapted_in_a_model_with_vectors_alone(export: Path) -> None:
    model = plrhf.load(export)
    model.enrol("eve", NewUser(vector=torch.ones(model.aggregator.user_dim)))
    again = model.adapt(PAIRS, Posterior(steps=3))
    assert plrhf.load(export).adapt(PAIRS, Posterior(steps=3)).vector.equal(again.vector)


def test_a_vector_of_another_width_is_refused_before_a_file_changes(export: Path) -> None:
    before, width = contents(export), read_card(export).user_dim
    for vector in (torch.zeros(width + 1), torch.zeros(1, width)):
        with pytest.raises(ValueError, match=rf"^user=.* expected a vector of shape \({width},\)"):
            enrol(export, "eve", NewUser(vector=vector))
    with pytest.raises(ValueError, match=r"^user='vector' is not allowed: expected finite numbers"):
        enrol(export, "eve", NewUser(vector=torch.full((width,), torch.nan)))
    assert contents(export) == before


@pytest.mark.slow
def test_an_export_from_before_there_were_vectors_without_rows(export: Path) -> None:
    card = json.loads((export / "plrhf.json").read_text())
    del card["enrolled"], card["user_dim"]
    (export / "plrhf.json").write_text(json_text(card))
    model = plrhf.load(export)
    vector = torch.randn(model.aggregator.user_dim)
    model.enrol("eve", NewUser(vector=vector))
    loaded = plrhf.load(export)
    assert vectors(loaded, loaded.card.user_index("eve"))[0].equal(vector)
    (export / "enrolled.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^export enrolled\.safetensors='missing' is not allowed"):
        plrhf.load(export)


@pytest.mark.slow
def test_what_all_share_names_nobody_and_answers_as_the_generic_user(
    export: Path, tmp_path: Path
) -> None:
    model = plrhf.load(export)
    model.enrol("eve", model.adapt(PAIRS, Gradient(steps=2)))
    out = tmp_path / "shared"
    save_shared(export, out)
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert not any(f'"{user}"'.encode() in everything for user in read_card(export).users)
    shared = plrhf.load(out)
    assert torch.equal(vectors(shared, 0), vectors(model, 0))
    for name, table in user_tables(shared.encoder).items():
        assert torch.equal(table, user_tables(model.encoder)[name][:1])
    assert read_card(out).users == [] and read_card(export).users[-1] == "eve"
    with pytest.raises(ValueError, match="^adaptation='posterior' .* Set eval/adaptation=gradient"):
        shared.adapt(PAIRS, Posterior(steps=5))
    shared.enrol("mia", shared.adapt(PAIRS, Gradient(steps=2)))
