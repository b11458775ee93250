"""The curve of new users: who is given and asked what, the controls, adapt.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import launch, rows_of_world, write_rows
from tiny import WIDTH, make_model, make_pairs

from plrhf.core.stats import Outcomes, correctness
from plrhf.core.types import UserBatch
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.features import FeatureSchema
from plrhf.data.module import PreferenceData
from plrhf.data.packing import packed
from plrhf.data.rows import Row
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.encoders import HybridEncoder
from plrhf.evaluation.abstention import abstention_curve
from plrhf.evaluation.ask_in_turn import ask_in_turn
from plrhf.evaluation.few_shot import FewShotTrials, summarised
from plrhf.evaluation.trials import FewShotOptions, Trial, check_trials, draw_trials, rows_of_users
from plrhf.models.adaptation import AdaptedUsers, Gradient, Mixture, Posterior
from plrhf.models.reward import PersonalRewardModel


def rows_of(**counts: int) -> list[Row]:
    """So many rows of each user, one user after the other."""
    users = [user for user, count in counts.items() for _ in range(count)]
    return [
        Row(f"p{n}", "c", "r", user_id=user, prompt_id=f"p{n}", pair_id=f"{n}")
        for n, user in enumerate(users)
    ]


def test_who_is_given_and_asked_what() -> None:
    # ann and bob have test pairs only; cid has 4 pairs outside test and 2 in it; dan has too few.
    rows = rows_of(ann=7, bob=4, cid=6, dan=3, eva=5)
    outside = {"11", "12", "13", "14"} | {"20", "21"}  # of cid, and of eva, who has 2
    trials, left_out = draw_trials(rows, outside, FewShotOptions(shots=[0, 3], draws=9), seed=0)
    assert left_out == 2 and len(trials) == 9
    for ann, bob, cid in trials:
        assert len(ann.given) == len(bob.given) == len(cid.given) == 3
        assert sorted(ann.given + ann.asked) == [0, 1, 2, 3, 4, 5, 6]
        assert sorted(bob.given + bob.asked) == [7, 8, 9, 10]
        assert set(cid.given) < {11, 12, 13, 14} and cid.asked == [15, 16]
    assert len({tuple(ann.given) for ann, _, _ in trials}) > 5
    again, _ = draw_trials(rows, outside, FewShotOptions(shots=[0, 3], draws=9), seed=0)
    other, _ = draw_trials(rows, outside, FewShotOptions(shots=[0, 3], draws=9), seed=1)
    assert again == trials and other != trials


def test_too_few_pairs_or_users() -> None:
    with pytest.raises(ValueError) as caught:
        draw_trials(rows_of(ann=7, bob=4, cid=2), set(), FewShotOptions(shots=[2, 4]), seed=0)
    assert str(caught.value) == (
        "eval.shots=[2, 4] is not allowed: expected at most 3 pairs given, which leaves 2 of 3 "
        "unseen users some to ask. Lower eval.shots, or give more rows with data= (personas: "
        "data.test_pairs_per_user=60)."
    )
    with pytest.raises(ValueError) as caught:
        draw_trials(rows_of(ann=7, bob=4), {"7", "8", "9", "10"}, FewShotOptions(shots=[1]), seed=0)
    assert str(caught.value) == (
        "unseen users=1 is not allowed: expected 2 or more with pairs to give and to ask. Train "
        "with data.unseen_fraction=0.1 (personas: data.n_unseen_users=40), or name rows of other "
        "people with data=."
    )


def test_people_held_out_of_training_bring_the_rows_it_left_aside(tmp_path: Path) -> None:
    rows = rows_of_world(n_unseen_users=0, test_pairs_per_user=4)
    data = PreferenceData(
        source=JsonlSource(path=str(write_rows(tmp_path / "rows.jsonl", rows))),
        seed=3,
        batch_size=7,
        eval_batch_size=7,
        unseen_fraction=0.4,
    )
    unseen = {row["user_id"] for row in rows} - set(data.splits.users)
    assert 0 < len(unseen) < 5
    given, asked = rows_of_users(data, "unseen")

    def expected(*splits: str) -> set[str]:
        mine = [row for row in rows if row["user_id"] in unseen]
        return {row["pair_id"] for row in mine if row["split"] in splits}

    assert {row.pair_id for row in given} == expected("train", "val")
    assert {row.pair_id for row in asked} == expected("test")
    # Settings are chosen on train users: none of them is unseen, and no test pair takes part.
    given, asked = rows_of_users(data, "seen")
    assert {row.split for row in given} == {"train"} and {row.split for row in asked} == {"val"}
    assert {row.user_id for row in [*given, *asked]}.isdisjoint(unseen)


def test_a_pair_asked_is_never_given() -> None:
    """The fault of a published evaluation: shots stay in what is asked."""
    rows = rows_of(ann=4, bob=3)
    check_trials([[Trial([0, 1], [2, 3]), Trial([4], [5, 6])]], rows)
    for trial in (Trial([0, 1], [1, 2]), Trial([5], [4, 5])):
        with pytest.raises(ValueError) as caught:
            curve_of([[Trial([3], [0]), trial]])
        assert str(caught.value) == (
            f"pairs asked='{trial.given[-1]}' is not allowed: expected pairs that were not given. "
            "Take what is given out of what is asked."
        )
    # The same texts under another id, chosen the other way round.
    rows[3] = replace(rows[0], pair_id="3", chosen="r", rejected="c")
    with pytest.raises(ValueError, match="^pairs asked='3' is not allowed"):
        check_trials([[Trial([0, 1], [2, 3]), Trial([4], [5, 6])]], rows)


def test_a_pair_judged_twice_is_not_given_where_it_is_asked() -> None:
    rows = rows_of(ann=6, bob=4)
    texts = ["one", "two", "one", "three", "four", "five", "one", "two", "six", "seven"]
    rows = [replace(row, prompt=text) for row, text in zip(rows, texts, strict=True)]
    rows[2] = replace(rows[2], chosen="r", rejected="c")  # the same pair, the other choice
    trials, _ = draw_trials(rows, {"0", "1"}, FewShotOptions(shots=[1], draws=4), seed=0)
    for ann, bob in trials:
        assert (ann.given, ann.asked) == ([1], [2, 3, 4, 5])
        assert sorted(bob.given + bob.asked) == [6, 7, 8, 9]  # ann's are no business of bob's


def curve_of(trials: list[list[Trial]]) -> FewShotTrials:
    nothing: Any = None
    dataset: Any = SimpleNamespace(rows=rows_of(ann=200))
    return FewShotTrials(nothing, dataset, trials, batch_size=5)


def test_the_control_is_always_somebody_else() -> None:
    one, two, three = Trial([], [0, 1]), Trial([], [2]), Trial([], [3, 4])
    curve = curve_of([[one, two, three], [one, two, three], [one, two, three]])
    assert curve.asked == [0, 1, 2, 3, 4] * 3
    assert curve.own == [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8]
    # The next user of the same draw, then the one after, then the next again.
    assert curve.others == [1, 1, 2, 0, 0, 5, 5, 3, 4, 4, 7, 7, 8, 6, 6]


def test_pooled_pairs_are_of_as_many_other_people() -> None:
    trials = [Trial([10 * user + n for n in range(4)], [100 + user]) for user in range(4)]
    curve = curve_of([trials, trials])
    assert curve.pooled(1, 3) == [20, 30, 0]  # one pair of each of the three others
    assert curve.pooled(1, 4) == [20, 30, 0, 21]  # then another one, never the same twice
    assert curve.pooled(6, 2) == [30, 0]  # of the second draw
    assert curve.given(6, 2) == [20, 21]


def people_within_reach(options: FewShotOptions) -> FewShotTrials:
    """Trials of simulated people whom a model can describe: only the person decides."""
    model = make_model(PersonalRewardModel, aggregator="film_last").eval()
    n_users, n_pairs = 8, 48
    with torch.no_grad():
        model.head.weight *= 4
        model.encoder.generic_vector.zero_()
        rows = torch.randn(n_users, 2)
        hidden = torch.randn(n_users * n_pairs, 2, WIDTH)
        to_gamma = model.aggregator.to_film.weight[:WIDTH]
        weights = model.head.weight[0] * (rows @ model.encoder.basis @ to_gamma.T)  # [N, d]
        common = model.head.weight[0]
        hidden -= (hidden @ common)[..., None] * common / common.square().sum()
        of_pair = (hidden[:, 0] - hidden[:, 1]).view(n_users, n_pairs, WIDTH)
        likes_second = (torch.einsum("und,ud->un", of_pair, weights) < 0).flatten()
        hidden[likes_second] = hidden[likes_second].flip(1)
    people = rows_of(**{f"user{user}": n_pairs for user in range(n_users)})
    pairs = make_pairs(len(people))
    schema = FeatureSchema.fit(())
    dataset = PairDataset(people, pairs, layout=packed, user_index={}, schema=schema)
    dataset.hidden = TextValues(hidden.flatten(0, 1), torch.arange(2 * len(people)).view(-1, 2))
    trials, _ = draw_trials(people, set(), options, seed=0)
    return FewShotTrials(model, dataset, trials, batch_size=50)


@pytest.mark.slow
def test_a_model_that_knows_how_people_differ_learns_who_this_is() -> None:
    """Simulated people within the model's reach: their own pairs tell, other people's do not."""
    curve = people_within_reach(FewShotOptions(shots=[24], draws=3))
    found = curve.fit(Posterior(laplace=True), 24)
    accuracy = {
        name: correctness(curve.margins(found, owners)).mean()
        for name, owners in (("own", curve.own), ("others", curve.others))
    }
    assert accuracy["own"] > 0.85
    assert accuracy["others"] < 0.65
    nobody = AdaptedUsers(vectors=curve.model.encoder.generic(curve.n_trials))
    assert curve.margins(nobody, curve.own) == pytest.approx(0, abs=1e-4)
    # What is not known of the person shrinks margins and turns none.
    plain, shrunk = (curve.margins(found, curve.own, attenuated=yes) for yes in (False, True))
    assert (np.sign(plain) == np.sign(shrunk)).all() and (np.abs(shrunk) < np.abs(plain)).all()


@pytest.mark.parametrize("rule", [Posterior(steps=20), Gradient(steps=3), Mixture(steps=20)])
def test_people_without_pairs_are_known_by_their_features(rule: Any) -> None:
    plain = people_within_reach(FewShotOptions(shots=[2], draws=1))
    rows = [
        replace(row, user_features={"age": 20 + 9 * int(row.user_id[4:])})
        for row in plain.dataset.rows
    ]
    schema = FeatureSchema.fit(rows)
    dataset = PairDataset(rows, plain.dataset.pairs, layout=packed, user_index={}, schema=schema)
    dataset.hidden = plain.dataset.hidden
    model = plain.model
    model.encoder = encoder = HybridEncoder(
        n_users=5,
        user_dim=model.aggregator.user_dim,
        n_numbers=1,
        category_sizes=(),
        vocabulary=torch.zeros(1, 1),
        init="normal",
        offset_scale=1.0,
    )
    curve = FewShotTrials(model, dataset, [plain.trials], batch_size=50)
    by_hand = torch.tensor([schema.encode({"age": 20 + 9 * user}) for user in range(8)])
    nobody = torch.zeros(8, dtype=torch.int64)
    expected = encoder.known(UserBatch(user_id=nobody, features=by_hand)).detach()
    torch.testing.assert_close(curve.fit(rule, 0).vectors, expected)
    assert not expected[0].allclose(encoder.generic(1)[0], atol=1e-2)
    assert not curve.fit(rule, 2).vectors.allclose(expected, atol=1e-3)
    of_nobody = curve.fit(rule, 0, pooled=True).vectors
    torch.testing.assert_close(of_nobody, encoder.generic(8).detach())


@pytest.mark.parametrize("rule", ["information", "uncertainty", "variety", "random"])
def test_pairs_are_asked_in_turn(rule: Any) -> None:
    curve = people_within_reach(FewShotOptions(shots=[3], draws=1, elicitation="information"))
    assert [len(trial.given) for trial in curve.trials] == [24] * 8  # to choose from
    (trials,) = ask_in_turn(curve, Posterior(laplace=True), rule, 3, seed=0)
    for before, after in zip(curve.trials, trials, strict=True):
        assert len(set(after.given)) == 3 and set(after.given) <= set(before.given)
        assert after.asked == before.asked
    chosen = FewShotTrials(curve.model, curve.dataset, [trials], batch_size=50)

    def learned(trials: FewShotTrials) -> float:
        """Variance that the answers have removed of what is to be learned of a person."""
        covariance = trials.fit(Posterior(laplace=True), 3).covariance
        assert covariance is not None
        return 1 - float(covariance.diagonal(dim1=1, dim2=2).mean())

    if rule == "information":  # three random pairs tell less
        assert learned(chosen) > 1.5 * learned(curve)
    with pytest.raises(ValueError, match=r"^eval.elicitation='Posterior' is not allowed: expected"):
        ask_in_turn(curve, Posterior(), rule, 3, seed=0)


def outcomes(*margins: float) -> Outcomes:
    """Two pairs of ann, then two of bob."""
    found = np.array(margins)
    users = np.array(["ann", "ann", "bob", "bob"])
    return Outcomes(np.arange(4), users, found, correctness(found))


def test_curves_by_hand() -> None:
    found = {
        "adapted": [outcomes(1, -1, 1, -1), outcomes(1, 1, 1, -2)],
        "other_user": [outcomes(1, -1, 1, -1), outcomes(-1, -1, 1, 0)],
        "generic": [outcomes(1, -1, 1, -1)] * 2,
        "oracle": [outcomes(1, 1, 1, 1)] * 2,
    }
    result = summarised(found)
    values = {name: [one["value"] for one in curve] for name, curve in result["curves"].items()}
    assert values == {
        "adapted": [0.5, 0.75],
        "other_user": [0.5, 0.375],
        "generic": [0.5, 0.5],
        "oracle": [1.0, 1.0],
    }
    assert [one["value"] for one in result["over_generic"]["adapted"]] == [0.0, 0.25]
    assert result["over_generic"]["adapted"][1]["ci95"] == [0.0, 0.5]
    recovered = result["gain_recovered"]
    assert [one["value"] for one in recovered["adapted"]] == [0.0, 0.5]
    assert [one["value"] for one in recovered["other_user"]] == [0.0, -0.25]
    del found["oracle"]
    result = summarised(found)
    assert result["curves"]["oracle"] is None and result["gain_recovered"] is None


def test_likelihood_and_calibration_by_hand() -> None:
    found = {"adapted": [outcomes(1, -1, 2, -3)], "generic": [outcomes(1, -1, 1, -1)]}
    found["attenuated"] = [outcomes(0.5, -0.5, 1, -1.5)]
    result = summarised(found)
    assert set(result["curves"]) == {"adapted", "generic", "oracle"}  # signs are the same
    for name, margins in (("adapted", (1, -1, 2, -3)), ("attenuated", (0.5, -0.5, 1, -1.5))):
        nll = np.mean([np.log1p(np.exp(-margin)) for margin in margins])
        assert result["nll"][name][0]["value"] == pytest.approx(nll)
    # Four bins of one confidence each: |1 + 0 - 2 * 0.731| / 4 and so on.
    confident = 1 / (1 + np.exp(-np.array([1, 2, 3])))
    gaps = [abs(1 - 2 * confident[0]), abs(1 - confident[1]), confident[2]]
    assert result["ece"]["adapted"][0]["value"] == pytest.approx(sum(gaps) / 4)


def test_the_surest_are_answered_first() -> None:
    """Sure by size: 3 (right), -2 (wrong), 1 (right), 0.5 (right)."""
    values = [one["value"] for one in abstention_curve(outcomes(1, 3, -2, 0.5))]
    assert values == [0.75, pytest.approx(2 / 3), 0.5, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shots": [0, 4, 2]},
            "eval.shots=[0, 4, 2] is not allowed: expected whole numbers from 0, each above the "
            "one before. Set eval.shots=[0,1,2,4,8,16].",
        ),
        (
            {"shots": [-1]},
            "eval.shots=[-1] is not allowed: expected whole numbers from 0, each above the one "
            "before. Set eval.shots=[0,1,2,4,8,16].",
        ),
        (
            {"shots": [0], "draws": 0},
            "eval.draws=0 is not allowed: expected a whole number from 1. Set eval.draws=5.",
        ),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FewShotOptions(**settings)
    assert str(caught.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reward_run", "policy_run"])
def test_a_run_is_asked_about_people_it_has_not_met(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: Any
) -> None:
    run = request.getfixturevalue(which)
    asked = ["eval=adapt", f"run={run}", "eval.shots=[0,1,3]", "eval.draws=2"]
    launch("eval", *asked, "eval.adaptation.steps=4", f"out={tmp_path}")
    result = json.loads((tmp_path / "adapt.json").read_text())
    assert set(result) == {
        *("schema", "fingerprint", "shots", "curves", "over_generic", "gain_recovered"),
        *("users", "n_users", "n_draws", "left_out", "adaptation", "nll", "ece"),
        *("elicitation", "abstention", "digest"),
    }
    assert result["adaptation"]["name"] == "posterior" and result["adaptation"]["steps"] == 4
    assert set(result["nll"]) == set(result["ece"]) == set(result["curves"])
    assert (result["schema"], result["shots"]) == (1, [0, 1, 3])
    counts = [result[name] for name in ("users", "n_users", "n_draws", "left_out")]
    assert counts == ["unseen", 2, 2, 0]
    assert set(result["curves"]) == {"adapted", "other_user", "pooled", "generic", "oracle"}
    for curve in (*result["curves"].values(), *result["over_generic"].values()):
        assert len(curve) == 3 and all(set(one) == {"value", "ci95"} for one in curve)
    first = [result["curves"][name][0] for name in ("adapted", "other_user", "pooled", "generic")]
    assert first[0] == first[1] == first[2] == first[3]  # nothing given, nothing learned
    shown = capsys.readouterr().out
    assert "2 unseen users, 2 draws" in shown
    assert shown.replace("\n", "").endswith(f"curve: {tmp_path / 'adapt.json'}")


@pytest.mark.slow
def test_train_users_as_if_they_were_new(reward_run: Path, tmp_path: Path) -> None:
    asked = ["eval=adapt", "eval.users=seen", "eval.shots=[9]", "eval.draws=1"]
    asked += ["eval/adaptation=reweight", "eval.adaptation.map_only=true"]
    launch("eval", *asked, f"run={reward_run}", f"out={tmp_path}")
    result = json.loads((tmp_path / "adapt_seen.json").read_text())
    assert (result["users"], result["n_users"]) == ("seen", 5)
    assert result["adaptation"]["map_only"] is True


def test_shots_without_brackets(reward_run: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        launch("eval", "eval=adapt", f"run={reward_run}", "eval.shots=0,1,2")
    assert capsys.readouterr().err == (
        "error: eval.shots='0,1,2' is not allowed: expected one value. Add -m to run with each of "
        "them, or write eval.shots=[0,1,2] for a list.\n"
    )
