"""Watches a policy trained by reinforcement learning: does what is rewarded stay what users prefer?"""

from __future__ import annotations

import pandas as pd

TOLERANCE = 0.1
"""Fall of the mean true preference, in log odds, that is not yet warned of."""

WATCHED = ["val/reward", "val/true_preference"]


def overoptimised(metrics: pd.DataFrame) -> str | None:
    """Return a line if true preference has fallen since its best validation while the reward rose.

    Args:
        metrics: the table of metrics.csv of `PersonalGRPOPolicy`, with true preferences where known.

    Returns:
        None if that did not happen or is not known.
    """
    if not set(WATCHED) <= set(metrics.columns):
        return None
    judged = metrics.dropna(subset=WATCHED).reset_index(drop=True)
    if len(judged) < 2:
        return None
    steps, rewards, true = (judged[name].tolist() for name in ("step", *WATCHED))
    best = true.index(max(true))
    if true[-1] >= true[best] - TOLERANCE or rewards[-1] <= rewards[best]:
        return None
    return (
        f"true preference on val prompts fell from {true[best]:.2f} (step {int(steps[best])}) to "
        f"{true[-1]:.2f} log odds, while the reward rose from {rewards[best]:.2f} to {rewards[-1]:.2f}: "
        "the policy exploits the reward model. Train fewer steps (trainer.max_steps), or raise model.beta"
    )
