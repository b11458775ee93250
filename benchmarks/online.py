"""Policies beside best-of-n and the reference, judged by true preferences on the same pairs.

    python benchmarks/online.py RUN_OF_P_DPO RUN_OF_GRPO --reward RUN_OF_REWARD_MODEL

For each pair of a seen user (a user and a prompt) each writer samples one response at temperature 1, with
the same seed; best-of-n takes the reference's best of n by the reward model. It prints for each writer the
mean true preference in log odds, the mean difference to the reference, and how often the response is better
than the reference's (ties one half), with a 95% interval over users; then the same of each two policies.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import plrhf
from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.core.bootstrap import bootstrap
from plrhf.core.types import UserBatch
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.evaluation.best_of import (
    best_of_curve,
    best_texts,
    candidate_rewards,
    describe_curve,
)
from plrhf.models.generation import generate
from plrhf.models.policy import PersonalPolicy
from plrhf.models.reward import PersonalRewardModel

SEED = 0


def sampled(
    policy: PersonalPolicy, rows: list[Row], data: PreferenceData, *, as_reference: bool = False
) -> list[str]:
    """Sample a response of a policy, or of its reference, to each row's prompt for its user."""
    users = UserBatch(
        user_id=torch.tensor([policy.card.user_index(row.user_id) for row in rows]),
        features=data.schema.table([row.user_features for row in rows]),
    )
    prompts = [data.row_tokenizer.prompt(row) for row in rows]
    asked = None if as_reference else users
    return generate(policy, policy.tokenizer, prompts, asked, max_new_tokens=64, seed=SEED)


def share_above_zero(gain: Tensor, users: list[str]) -> str:
    """Write how many of the gains [N] are above 0, ties one half, with a 95% interval over users."""
    wins = (gain > 0).double() + 0.5 * (gain == 0).double()
    person = np.unique(users, return_inverse=True)[1]
    won, asked = np.bincount(person, wins.numpy()), np.bincount(person)
    share = {"share": lambda weights: weights @ won / (weights @ asked)}
    found = bootstrap(share, n_users=len(asked))["share"]
    low, high = found["ci95"] or (float("nan"), float("nan"))
    return f"{found['value']:.0%} [{low:.0%}, {high:.0%}]"


def main() -> None:
    """Sample and judge, and print a line for each writer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policies", nargs="+", help="runs of policies on one world")
    parser.add_argument("--reward", required=True, help="run of a reward model of the same users")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--best-of", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = build_data(RunConfig.of_run(Path(args.policies[0])).data)
    policies = {run: plrhf.load(run) for run in args.policies}
    reward = plrhf.load(args.reward)
    assert isinstance(reward, PersonalRewardModel)
    first = next(iter(policies.values()))
    assert isinstance(first, PersonalPolicy)
    data.tokenize(first.tokenizer, layout=first.backbone.layout)
    known = data.user_index
    seen = [row for row in data.datasets[args.split].rows if row.user_id in known]
    step = max(1, len(seen) // args.pairs)
    rows = seen[::step][: args.pairs]
    texts = {"reference": sampled(first, rows, data, as_reference=True)}
    many = sampled(first, rows * args.best_of, data, as_reference=True)
    candidates = [many[place :: len(rows)] for place in range(len(rows))]
    rewards = candidate_rewards(reward, rows, candidates)
    texts[f"best of {args.best_of}"] = best_texts(candidates, rewards)
    of_rows = zip(rows, candidates, strict=True)
    true = [[data.source.true_score(row.user_id, one) for one in own] for row, own in of_rows]
    print(describe_curve(best_of_curve(rewards, true)))
    for run, policy in policies.items():
        assert isinstance(policy, PersonalPolicy)
        texts[run] = sampled(policy, rows, data)
    scores = {
        writer: torch.tensor(
            [data.source.true_score(row.user_id, one) for row, one in zip(rows, own, strict=True)]
        )
        for writer, own in texts.items()
    }
    users = [row.user_id for row in rows]
    for writer, own in scores.items():
        gain = own - scores["reference"]
        print(
            f"{writer}: true preference {float(own.mean()):+.2f}, gain {float(gain.mean()):+.2f}, "
            f"better in {share_above_zero(gain, users)} of {len(rows)} pairs"
        )
    for one, other in combinations(policies, 2):
        share = share_above_zero(scores[one] - scores[other], users)
        print(f"{one} over {other}: better in {share}")


if __name__ == "__main__":
    main()
