"""The warning where a policy's reward rises and its users' true preference falls."""

from __future__ import annotations

import pandas as pd
import pytest

from plrhf.evaluation.overoptimisation import overoptimised

CASES = [
    ([1.0, 2.0, 3.0], [0.1, 0.9, 0.5], True),
    ([1.0, 2.0, 3.0], [0.1, 0.5, 0.45], False),  # within the tolerance
    ([1.0, 3.0, 2.0], [0.1, 0.9, 0.5], False),  # the reward has fallen, too
    ([1.0, 2.0, 3.0], [0.1, 0.5, 0.9], False),
    ([1.0], [0.1], False),
]


@pytest.mark.parametrize(("reward", "true", "warned"), CASES)
def test_cases(reward: list[float], true: list[float], warned: bool) -> None:
    steps = [10 * (1 + place) for place in range(len(reward))]
    judged = pd.DataFrame({"step": steps, "val/reward": reward, "val/true_preference": true})
    others = pd.DataFrame({"step": [5], "train/reward": [9.0]})
    found = overoptimised(pd.concat([others, judged], ignore_index=True))
    assert (found is not None) == warned
    if found is not None:
        said = "fell from 0.90 (step 20) to 0.50 log odds, while the reward rose from 2.00 to 3.00"
        assert said in found
    assert overoptimised(judged.drop(columns="val/true_preference")) is None
