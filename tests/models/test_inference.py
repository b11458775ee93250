"""A shipped model asked from Python says what its run said, and refuses what it cannot answer."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from test_export import data_of

import plrhf
from plrhf.models import adaptation, enrolment
from plrhf.models import inference as serve
from plrhf.models.card import read_card
from plrhf.models.inference import score, write
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0}
NOTE = {"prompt": "Write a note.", "response": "Back at six."}


@pytest.mark.slow
def test_rewards_are_those_of_the_run(reward_run: Path) -> None:
    export = reward_run / "export"
    model = PersonalRewardModel.from_pretrained(export)
    rows = [
        row for row in data_of(reward_run, model).splits.test if row.user_id in model.card.users
    ]
    table = pd.read_parquet(reward_run / "predictions.parquet").set_index(["context", "pair_id"])
    assert len(rows) == 20
    for context in ("user", "generic"):
        asked = [
            {"prompt": row.prompt, "response": text}
            | ({"user_id": row.user_id} if context == "user" else {})
            for row in rows
            for text in (row.chosen, row.rejected)
        ]
        rewards = score(model, asked, batch_size=7).view(-1, 2)
        expected = table.loc[context]["margin"].loc[[row.pair_id for row in rows]]
        margins = (rewards[:, 0] - rewards[:, 1]).double()
        torch.testing.assert_close(margins, torch.tensor(expected.to_numpy()), atol=1e-5, rtol=0)


def test_texts_are_those_of_the_run(policy_run: Path) -> None:
    export = policy_run / "export"
    model = PersonalDPOPolicy.from_pretrained(export)
    lines = [json.loads(line) for line in (policy_run / "generations.jsonl").open()]
    lines = [line for line in lines if line["writer"] == "policy"]
    assert len({line["user_id"] for line in lines}) > 1
    samples = yaml.safe_load((policy_run / "config.yaml").read_text())["samples"]
    how: dict[str, Any] = {name: samples[name] for name in ("max_new_tokens", "temperature")}
    assert write(model, lines, **how) == [line["response"] for line in lines]


@pytest.mark.slow
def test_the_example(reward_run: Path, policy_run: Path) -> None:
    assert serve.__doc__ is not None
    start, end = serve.__doc__.index("    import plrhf"), serve.__doc__.index("\nRequests are")
    code = textwrap.dedent(serve.__doc__[start:end])
    for name, run in (("REWARD_DIR", reward_run), ("POLICY_DIR", policy_run)):
        code = code.replace(name, str(run))
    code = code.replace('"ada"', repr(read_card(reward_run / "export").users[2]))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["rewards"].shape == (2,) and len(found["texts"]) == 2
    assert found["rewards"][0] != found["rewards"][1]


@pytest.mark.slow
def test_nothing_asked(reward_run: Path, policy_run: Path) -> None:
    reward = PersonalRewardModel.from_pretrained(reward_run / "export")
    policy = PersonalDPOPolicy.from_pretrained(policy_run / "export")
    assert score(reward, []).shape == (0,)
    assert write(policy, [], max_new_tokens=3) == []


def test_what_cannot_be_answered(reward_run: Path) -> None:
    export = reward_run / "export"
    model = PersonalRewardModel.from_pretrained(export)
    users = model.card.users
    assert len(users) == 5  # of more the first five are shown
    longest = model.card.text["max_tokens"]
    for asked, message in (
        (
            {**NOTE, "response": " "},
            "asked[0].response=' ' is not allowed: expected text that is not blank. "
            "Give the text to be scored.",
        ),
        (
            {**NOTE, "user_id": "eve"},
            f"user_id='eve' is not allowed: expected one of the {len(users)} users the model was "
            f"trained on ({', '.join(users)}). Name one of them, or leave it out for the generic user.",
        ),
        (
            {**NOTE, "response": "sea " * 2000},
            "asked='1 too long' is not allowed: expected prompt and response of at most "
            f"{longest} tokens. Leave out what is longer, or train with a larger data.max_tokens.",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            score(model, [asked])
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"asked\[0\].*prompt"):
        score(model, [{"response": "Yes."}])


@pytest.mark.slow
def test_a_loaded_model_is_asked_itself(reward_run: Path, policy_run: Path) -> None:
    reward, policy = plrhf.load(reward_run / "export"), plrhf.load(policy_run)  # a run will do
    assert isinstance(reward, plrhf.PersonalRewardModel)
    assert isinstance(policy, plrhf.PersonalDPOPolicy)
    asked = [{**NOTE, "user_id": reward.card.users[1]}, NOTE]
    assert reward.score(asked).equal(score(reward, asked))
    assert policy.write(asked, **GREEDY) == write(policy, asked, **GREEDY)


def test_the_package_is_imported_lazily() -> None:
    code = """
import sys
import plrhf
print(sorted({"torch", "lightning", "transformers", "pandas"} & sys.modules.keys()))
print(set(plrhf.__all__) <= set(dir(plrhf)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n") == ["[]", "True", ""]
    for name in plrhf.__all__:
        assert getattr(plrhf, name).__name__ == name
    assert plrhf.adapt is adaptation.adapt and plrhf.enrol is enrolment.enrol
    with pytest.raises(AttributeError, match="^module 'plrhf' has no attribute 'nothing'$"):
        _ = plrhf.nothing


def test_what_was_trained_in_bfloat16_is_asked_in_it(reward_run: Path) -> None:
    model = plrhf.load(reward_run)
    full = model.score([NOTE])
    model.card = replace(model.card, precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.score([NOTE])
    found = model.score([NOTE])
    assert found.equal(expected) and not found.equal(full)


def test_rewards_in_the_training_of_another_model_are_the_same(reward_run: Path) -> None:
    model = plrhf.load(reward_run)
    expected = model.score([NOTE])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of a policy that learns from them
        assert model.score([NOTE]).equal(expected)
