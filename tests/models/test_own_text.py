"""Models that read own pairs in front of prompts: asked from Python, enrolled, and on few-shot curves."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows_of_world, world

import plrhf
from plrhf.data.digests import file_digest, json_text
from plrhf.data.in_context import row_tokenizer, show_pairs
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.encoders import UniformEncoder
from plrhf.evaluation.few_shot import FewShotTrials
from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.judges import Contest
from plrhf.evaluation.reward_judge import RewardJudge
from plrhf.evaluation.trials import Trial
from plrhf.models.adaptation import Encode
from plrhf.models.adaptation.base import AdaptedUsers
from plrhf.models.export import OWN_PAIRS, pairs_text
from plrhf.models.pair_batches import dataset_of

ROWS = [parse_row(row, f"row {number}") for number, row in enumerate(rows_of_world())]
KNOWN, STRANGER = world().user_ids[1], world().user_ids[5]
ASKED = {"prompt": "Write a note.", "response": "Back at six."}


def pairs_of(user: str, number: int) -> list[Row]:
    return [row for row in ROWS if row.user_id == user][:number]


def with_text(export: Path, own_pairs: Any = None, **text: Any) -> Any:
    """The model of an export with other text options, and with own pairs of users."""
    card = json.loads((export / "plrhf.json").read_text())
    card["text"] |= {"max_prompt_tokens": 500, "max_tokens": 600, **text}
    if own_pairs is not None:
        (export / OWN_PAIRS).write_text(pairs_text(own_pairs))
        card["files"][OWN_PAIRS] = file_digest(export / OWN_PAIRS)
    (export / "plrhf.json").write_text(json_text(card))
    return plrhf.load(export)


@pytest.fixture
def export(reward_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_run / "export", tmp_path / "export"))


@pytest.mark.slow
def test_rewards_are_those_with_the_pairs_written_out(export: Path, tmp_path: Path) -> None:
    own = pairs_of(KNOWN, 2)
    twin = with_text(Path(shutil.copytree(export, tmp_path / "twin")), use_user_text=True)
    model = with_text(export, {KNOWN: own}, context_pairs=2)
    written = {**ASKED, "user_id": KNOWN, "user_text": show_pairs(own)}
    expected = twin.score([written, ASKED])
    torch.testing.assert_close(model.score([{**ASKED, "user_id": KNOWN}, ASKED]), expected)
    assert not torch.isclose(twin.score([{**ASKED, "user_id": KNOWN}])[0], expected[0], atol=1e-5)
    # Asked for a pair of their own, only the other stands in front.
    same = {"prompt": own[0].prompt, "response": own[0].chosen, "user_id": KNOWN}
    torch.testing.assert_close(
        model.score([same]), twin.score([{**same, "user_text": show_pairs(own[1:])}])
    )
    model.own_pairs = None
    with pytest.raises(ValueError, match=r"^own_pairs=None is not allowed: .* Load the run's exp"):
        model.score([ASKED])


@pytest.mark.slow
@pytest.mark.parametrize("users", ["own", "held_out"])
def test_a_judge_puts_pairs_of_known_users_in_front(export: Path, users: Any) -> None:
    model = with_text(export, {KNOWN: pairs_of(KNOWN, 2)}, context_pairs=2)
    given: dict[str, Any] = {"prompt": ASKED["prompt"], "user_id": KNOWN, "prompt_id": "p"}
    given |= {"profile": None, "user_features": None, "writer": "policy", "score": None}
    texts = [row.chosen for row in ROWS[:20]]
    written = [GeneratedText(**given, response=text) for text in texts]
    contests = [Contest(ours=one, theirs=other) for one, other in permutations(written, 2)]
    judge = RewardJudge(export=export, users=users)
    found = judge.compare(contests).wins[:, 0]
    orders = {}
    for kind, user in (("own", {"user_id": KNOWN}), ("held_out", {})):
        asked = [{"prompt": ASKED["prompt"], "response": text, **user} for text in texts]
        scores = model.score(asked).tolist()
        orders[kind] = [float(one > other) for one, other in permutations(scores, 2)]
    assert found.tolist() == orders[users] and orders["own"] != orders["held_out"]


@pytest.mark.slow
def test_a_new_user_is_enrolled_with_exactly_the_pairs_given(export: Path) -> None:
    model = with_text(export, {KNOWN: pairs_of(KNOWN, 2)}, context_pairs=2)
    given = [
        {name: getattr(row, name) for name in ("prompt", "chosen", "rejected")}
        for row in pairs_of(STRANGER, 3)
    ]
    user = model.adapt(given)
    assert [row.chosen for row in user.pairs] == [one["chosen"] for one in given]
    model.enrol("eve", user)
    asked = {**ASKED, "user_id": "eve"}
    with_pairs = model.score([asked])
    torch.testing.assert_close(plrhf.load(export).score([asked]), with_pairs)
    assert list(json.loads((export / OWN_PAIRS).read_text())) == [KNOWN, "eve"]
    model.own_pairs = {}
    assert not torch.isclose(model.score([asked]), with_pairs, atol=1e-5).any()
    model.forget("eve")
    assert list(json.loads((export / OWN_PAIRS).read_text())) == list(model.own_pairs) == [KNOWN]


def test_a_model_that_tells_nobody_apart_but_by_their_pairs_needs_no_fitting(export: Path) -> None:
    model = with_text(export, {}, context_pairs=2)
    words = model.backbone.vocabulary()
    model.encoder = UniformEncoder(user_dim=model.aggregator.user_dim, vocabulary=words)
    given = [
        {name: getattr(row, name) for name in ("prompt", "chosen", "rejected")}
        for row in pairs_of(STRANGER, 3)
    ]
    user = model.adapt(given)
    assert user.vector.equal(model.encoder.generic(1)[0]) and user.rows == {}
    assert [row.chosen for row in user.pairs] == [one["chosen"] for one in given]


@pytest.mark.slow
def test_a_curve_gives_exactly_the_trials_pairs(export: Path) -> None:
    model = with_text(export, {}, context_pairs=2)
    tokenizer: Any = row_tokenizer(model.tokenizer, model.card.text)
    rows = [*pairs_of(STRANGER, 5), *pairs_of(world().user_ids[6], 4)]
    dataset = dataset_of(model, tokenizer, rows, batch_size=4)
    trials = [[Trial([0, 1, 2], [3, 4]), Trial([5, 6, 7], [8])]]
    curve = FewShotTrials(model, dataset, trials, batch_size=4, row_tokenizer=tokenizer)

    def expected(place: int, given: list[int]) -> float:
        row = tokenizer.with_pairs(rows[place], [rows[one] for one in given])
        batch = dataset_of(model, tokenizer.whole, [row], batch_size=1).batch([0])
        return float(model(batch)[0].detach())

    class Generic(Encode):
        """Gives the generic vector, whatever the encoder."""

        def fit(
            self, model: Any, batches: Any, *, n_users: int, features: Any = None
        ) -> AdaptedUsers:
            return AdaptedUsers(vectors=model.encoder.generic(n_users).detach())

    for k in (0, 2, 3):
        users = curve.fit(Generic(), k)
        own = [expected(3, [0, 1, 2][:k]), expected(4, [0, 1, 2][:k]), expected(8, [5, 6, 7][:k])]
        other = [expected(3, [5, 6, 7][:k]), expected(4, [5, 6, 7][:k]), expected(8, [0, 1, 2][:k])]
        for owners, margins in ((curve.own, own), (curve.others, other)):
            assert curve.margins(users, owners).tolist() == pytest.approx(margins, abs=1e-5)
    assert own != pytest.approx(other, abs=1e-5)
