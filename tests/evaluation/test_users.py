"""users.json: projections by hand, and what runs of both kinds of encoder leave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plrhf.evaluation.users import principal_components
from plrhf.reporting import report
from plrhf.reporting.runs import read_run, read_users


@pytest.mark.parametrize("width", [2, 13])
def test_principal_components_by_hand(width: int) -> None:
    # Four points on two crossed lines, of variances 16 and 4 along them, away from the origin.
    plane = np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 0.0]])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0][:2]
    places, explained = principal_components(plane @ turn + 7)
    assert explained == pytest.approx([0.8, 0.2])
    assert np.abs(places) == pytest.approx(np.abs(plane), abs=1e-4)
    largest = np.abs(places).argmax(axis=0)
    assert all(places[row][column] > 0 for column, row in enumerate(largest))


def test_one_user_has_a_place() -> None:
    places, explained = principal_components(np.array([[3.0, 1.0, 2.0]]))
    assert places == [[0.0, 0.0]] and explained == [0.0, 0.0]
    places, explained = principal_components(np.array([[1.0], [3.0]]))  # in one dimension
    assert np.array(places)[:, 1] == pytest.approx([0, 0]) and explained == [1.0, 0.0]


@pytest.mark.slow
def test_policy_of_clusters_in_words(policy_run: Path) -> None:
    learned = json.loads((policy_run / "users.json").read_text())
    card = json.loads((policy_run / "export" / "plrhf.json").read_text())
    state = load_file(policy_run / "export" / "user_encoder.safetensors")
    weights = torch.softmax(state["encoder.weights.weight"], dim=1)  # row 0 is the generic user
    assert [user["user_id"] for user in learned["users"]] == card["users"]
    for row, user in enumerate(learned["users"], start=1):
        assert user["weights"] == pytest.approx(weights[row].tolist(), abs=1e-5)
    assert learned["generic"]["weights"] == pytest.approx(weights[0].tolist(), abs=1e-5)
    clusters = weights.mean(dim=0).argsort(descending=True)[:3].tolist()
    owners = [one["owner"] for one in learned["nearest_tokens"]]
    assert owners == ["generic user", *(f"cluster {place}" for place in clusters)]
    for one in learned["nearest_tokens"]:
        assert len(one["vectors"]) == 2  # aggregator.n_tokens
        cosines = [[cosine for _, cosine in vector] for vector in one["vectors"]]
        assert all(row == sorted(row, reverse=True) and row[2] >= -1 for row in cosines)
    page = (policy_run / "report.html").read_text()
    assert "Soft prompts in words" in page and "Cluster weights" in page


def test_reward_model_of_a_lookup(reward_run: Path) -> None:
    run = read_run(reward_run)
    users = read_users(run)
    # Unseen users have the generic vector and are not on the map.
    assert set(users["user_kind"].dropna()) == {"seen"} and len(users) == 5 + 1
    assert users["group"].iloc[0].startswith("prefers ")
    assert users["profile"].iloc[0].startswith("Prefers ")
    assert report.tokens_section(run) is None
    assert report.user_model_section(run) is not None


def test_a_run_that_tells_nobody_apart(reward_run: Path, tmp_path: Path) -> None:
    for name in ("results.json", "predictions.parquet"):
        (tmp_path / name).write_bytes((reward_run / name).read_bytes())
    with pytest.raises(ValueError, match=r"expected a run that left users\.json\. Train with enc"):
        read_users(read_run(tmp_path))
    assert report.user_model_section(read_run(tmp_path)) is None
