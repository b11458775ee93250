"""A new user from a few pairs: the prior by hand, the fit against another solver, exports changed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import rows_of_world, world
from scipy.optimize import minimize
from tiny import AGGREGATORS, WIDTH, make_batch, make_model, make_pairs
from torch import Tensor, nn, tensor

import plrhf
from plrhf.core.types import UserBatch
from plrhf.encoders import ClusterMixtureEncoder, LookupEncoder, NoneEncoder, UserEncoder
from plrhf.models.adaptation import (
    Fit,
    NewUser,
    Prior,
    adapt,
    fit_users,
    scores,
    user_tables,
)
from plrhf.models.base import PersonalModule
from plrhf.models.card import read_card
from plrhf.models.enrolment import enrol, forget
from plrhf.models.export import replace_users
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


def encoder_with(rows: Any) -> ClusterMixtureEncoder:
    """Clusters whose own rows, the generic user's first, are these."""
    table = tensor(rows)
    encoder = ClusterMixtureEncoder(
        n_users=len(table) - 1,
        user_dim=3,
        vocabulary=torch.zeros(7, 3),
        n_clusters=table.shape[1],
        init="normal",
    )
    with torch.no_grad():
        encoder.weights.weight.copy_(table)
    return encoder


def vectors(model: PersonalModule, *places: int) -> Tensor:
    """e_u of user indices, for rows without features."""
    users = UserBatch(user_id=tensor(places), features=torch.zeros(len(places), 0))
    return model.encoder(users).detach()


def test_the_prior_by_hand() -> None:
    # Departures from (1, 1): (2, 0), (0, 4), (-2, 0), so M = ((8, 0), (0, 16)) / 3.
    prior = Prior(encoder_with([[1.0, 1.0], [3.0, 1.0], [1.0, 5.0], [-1.0, 1.0]]), scale=3.0)
    assert prior.generic.tolist() == [1.0, 1.0]
    moment = 9 * tensor([[8.0, 0.0], [0.0, 16.0]]) / 3
    torch.testing.assert_close(prior.factor.T @ prior.factor, moment)
    tables = prior.tables(torch.zeros(2, 2))
    assert tables["weights.weight"].tolist() == [[1.0, 1.0]] * 3
    t = tensor([[0.5, -1.0]])
    expected = tensor([1.0, 1.0]) + t[0] @ prior.factor
    torch.testing.assert_close(prior.tables(t)["weights.weight"][1], expected)


def test_new_users_are_combinations_of_few_train_users() -> None:
    prior = Prior(encoder_with([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [2.0, 4.0, 4.0]]))
    rows = prior.tables(torch.randn(5, 2))["weights.weight"]
    assert prior.factor.shape == (2, 3)
    torch.testing.assert_close(rows[:, 1:], rows[:, :1] * tensor([[2.0, 2.0]]))


class Biased(UserEncoder):
    """An outsider's: a number and a 2 x 3 table a user, and something shared."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(5))
        self.grid = nn.Parameter(torch.randn(5, 2, 3))

    def forward(self, users: UserBatch) -> Tensor:
        own = self.grid[users.user_id].sum(dim=1)
        return self.shared + own + self.bias[users.user_id, None]

    def generic(self, batch_size: int) -> Tensor:
        return (self.shared + self.grid[0].sum(dim=0) + self.bias[0]).expand(batch_size, -1)

    def user_parameters(self) -> list[nn.Parameter]:
        return [self.grid, self.bias]


def test_parameters_of_any_shape() -> None:
    encoder = Biased()
    assert set(user_tables(encoder)) == {"bias", "grid"}
    prior = Prior(encoder)
    tables = prior.tables(torch.randn(7, 4))
    assert {name: tuple(table.shape) for name, table in tables.items()} == {
        "bias": (8,),
        "grid": (8, 2, 3),
    }
    assert tables["bias"][0] == encoder.bias[0] and tables["grid"][0].equal(encoder.grid[0])
    # The train users themselves are among what the prior reaches.
    departures = torch.cat([encoder.bias[:, None], encoder.grid.flatten(1)], dim=1)
    reached = torch.linalg.lstsq(prior.factor.T, (departures[2] - departures[0])[:, None])
    again = prior.tables(reached.solution.detach().T)
    torch.testing.assert_close(again["grid"][1], encoder.grid[2].detach())


def test_no_parameters_of_single_users() -> None:
    with pytest.raises(ValueError) as caught:
        Prior(NoneEncoder())
    assert str(caught.value) == (
        "encoder='NoneEncoder' is not allowed: expected one with parameters of single users. "
        "Adapt a model trained with encoder=lookup or encoder=cluster."
    )


def solved(model: Any, batch: Any, scale: float) -> np.ndarray:
    """The offset of one new user by another solver: logistic regression with a Gaussian prior."""

    def array(value: Tensor) -> np.ndarray:
        return value.detach().double().numpy()

    pooled = array(model.pooled_trunk(batch))
    difference = (pooled[:, 0] - pooled[:, 1]) * array(model.head.weight)[0]  # [B, d]
    to_gamma = array(model.aggregator.to_film.weight)[:WIDTH]
    basis, start = array(model.encoder.basis), array(model.encoder.generic_vector)
    rows = array(model.encoder.offsets.weight)[1:]
    precision = np.linalg.inv(scale**2 * rows.T @ rows / len(rows))

    def objective(offset: np.ndarray) -> float:
        margins = difference @ (1 + to_gamma @ (start + offset @ basis))  # beta_u cancels out
        return np.logaddexp(0, -margins).sum() + 0.5 * offset @ precision @ offset

    return minimize(objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6}).x


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_fit_is_the_most_likely_user(scale: float) -> None:
    model = make_model(PersonalRewardModel, aggregator="film_last").eval()
    with torch.no_grad():
        model.head.weight *= 30  # so that pairs say something against the prior
    prior = Prior(model.encoder, scale=scale)
    pairs, owners = make_pairs(11), [1, 1, 2, 1, 2, 2, 1, 2, 4, 2, 1]
    one, other = (
        make_batch(pairs[:7], users=owners[:7]),
        make_batch(pairs[7:], users=owners[7:]),
    )
    t = fit_users(model, [one, other], prior, n_users=4, steps=40)
    rows = prior.tables(t)["offsets.weight"]
    for user in (1, 2, 4):  # each alone, and by other means
        own = [pair for pair, of in zip(pairs, owners, strict=True) if of == user]
        expected = solved(model, make_batch(own, users=[1] * len(own)), scale)
        # The sum of float32 losses, here 130 nats, is no finer than what these moves change in it.
        np.testing.assert_allclose(rows[user].numpy(), expected, atol=5e-3)
        assert np.abs(expected).max() > 0.05
    assert t[2].tolist() == [0.0, 0.0]  # nothing is known of the third


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_the_fit_in_a_table_really_enlarged(kind: Any, aggregator: str) -> None:
    """At the optimum the gradient through the model's own forward vanishes, and nothing else moved."""
    model = make_model(kind, aggregator=aggregator).eval()
    before = copy.deepcopy(model.state_dict())
    prior = Prior(model.encoder, scale=2.0)
    batch = make_batch(make_pairs(5), users=[1] * 5)
    row = prior.tables(fit_users(model, [batch], prior, n_users=1, steps=30))["offsets.weight"][1]
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    encoder: LookupEncoder = model.encoder
    table = torch.cat([encoder.offsets.weight, row[None]]).detach()
    encoder.offsets = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    batch.user_id = torch.full((5,), len(table) - 1)
    margins, extra = model.margins_in(batch, ("user",))
    likelihood = model.pair_loss(margins, extra).sum()
    precision = torch.linalg.inv(prior.factor.T @ prior.factor)
    penalty = 0.5 * encoder.offsets.weight[-1] @ precision @ encoder.offsets.weight[-1]
    (gradient,) = torch.autograd.grad(likelihood + penalty, encoder.offsets.weight)
    pull = precision @ row  # of the prior; that of the pairs must be its opposite
    assert gradient[-1].abs().max() < 0.04 * pull.abs().max()  # float32 losses are no finer
    assert gradient[:-1].abs().max() == 0


def test_scores_are_those_of_the_model() -> None:
    model = make_model(PersonalRewardModel, aggregator="soft_prompt").eval()
    batch = make_batch(make_pairs(), users=[1, 2, 3, 0, 5, 1, 2])
    with torch.no_grad():
        margins, _ = scores(model, batch, dict(user_tables(model.encoder)))
    torch.testing.assert_close(margins, model.context_margins(batch)["user"])


@pytest.fixture(params=["reward_run", "policy_run"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an export, to change: lookup with FiLM, clusters with soft prompt."""
    run = request.getfixturevalue(request.param)
    return Path(shutil.copytree(run / "export", tmp_path / "export"))


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_the_trunk_runs_once_where_it_does_not_depend_on_the_user(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, aggregator="film_last").eval()
    batches = [make_batch(make_pairs(n), users=[1] * n) for n in (5, 3)]
    with torch.no_grad():
        for batch in batches:
            if kind is PersonalDPOPolicy:
                batch.ref_logps = model.reference_logps(batch)
    prior = Prior(model.encoder, scale=2.0)
    monkeypatch.setattr("plrhf.models.adaptation.KEPT_NUMBERS", 0)
    naive = fit_users(model, batches, prior, n_users=1, steps=10)
    monkeypatch.undo()
    runs: list[int] = []
    model.backbone.trunk.register_forward_hook(lambda *_: runs.append(1))
    found = fit_users(model, batches, prior, n_users=1, steps=10)
    assert len(runs) <= len(batches)
    torch.testing.assert_close(found, naive)
    assert naive.abs().max() > 1e-3


def test_sparse_tables_are_adapted_as_dense_ones() -> None:
    found = []
    for sparse in (False, True):
        model = make_model(PersonalRewardModel, aggregator="film_last").eval()
        model.encoder.offsets.sparse = sparse
        batch = make_batch(make_pairs(5), users=[1] * 5)
        found.append(fit_users(model, [batch], Prior(model.encoder), n_users=1, steps=10))
        assert model.encoder.offsets.sparse is sparse
    assert found[0].equal(found[1]) and found[0].abs().max() > 0


def test_pairs_too_long_are_counted_and_never_all_there_is(export: Path) -> None:
    model = plrhf.load(export)
    short = {"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}
    long = {**short, "chosen": "sea " * 2000}
    user = model.adapt([short, long, short], Fit(steps=3))
    assert (user.n_pairs, user.n_too_long) == (2, 1)
    assert model.adapt([]).n_pairs == 0
    with pytest.raises(ValueError) as caught:
        model.adapt([long, long])
    assert str(caught.value) == (
        "pairs='2 too long' is not allowed: expected prompt and response of at most "
        f"{model.card.text['max_tokens']} tokens. Give shorter pairs, or train with a larger "
        "data.max_tokens."
    )


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
        enrol(export, "eve", NewUser(rows=rows, vector=user.vector))
    assert contents(export) == before


def test_a_loaded_model_enrols_and_forgets_in_memory_and_in_its_export(export: Path) -> None:
    model = plrhf.load(export)
    pairs = [{"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}]
    user = model.adapt(pairs, Fit(steps=5, prior_scale=20.0))
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


def test_a_new_user_is_fitted_enrolled_and_forgotten(export: Path) -> None:
    before = contents(export)
    model = PersonalModule.from_pretrained(export)
    stranger = world().user_ids[5]
    pairs = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in rows_of_world()
        if row["user_id"] == stranger
    ][:3]
    user = adapt(model, pairs, Fit(steps=5, prior_scale=20.0))
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
        enrol(export, "eve", NewUser(rows={"odd": torch.zeros(3)}, vector=torch.zeros(3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps": 0},
            "eval.steps=0 is not allowed: expected a whole number from 1. Set eval.steps=40.",
        ),
        (
            {"prior_scale": 0.0},
            "eval.prior_scale=0.0 is not allowed: expected a number above 0. "
            "Set eval.prior_scale=1.0.",
        ),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Fit(**settings)
    assert str(caught.value) == message
