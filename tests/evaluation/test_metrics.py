"""Running accuracy and the summary of a predictions table, against hand-worked values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.utilities import dim_zero_sum

from plrhf.cli.run import note_without_gain
from plrhf.evaluation.metrics import choose_length_rule, personal_gain, summarise
from plrhf.models.metrics import ExactMean, UserAccuracy, accuracy_from_counts, user_counts

MARGINS = torch.tensor([1.0, 2, 3, 4, -1, 0, 0, 1, 2, -1, -2, -3, -1, -1])
USERS = torch.tensor([4] * 5 + [0] * 2 + [2] * 7)


def predictions() -> pd.DataFrame:
    """Seen users with 5, 2 and 7 test pairs, an unseen one with 3, two val pairs; two contexts."""
    owners = ["ann"] * 5 + ["bob"] * 2 + ["cid"] * 7 + ["dan"] * 3 + ["ann"] * 2
    margins = [*MARGINS.tolist(), 2.0, -1.0, 1.0, 9.0, 9.0]
    rows = [
        {
            "split": "val" if number >= 17 else "test",
            "user_kind": "unseen" if owner == "dan" else "seen",
            "prompt_kind": "seen" if number % 3 == 0 else "unseen",
            "context": context,
            "user_id": owner,
            "pair_id": f"pair-{number}",
            "prompt_id": f"prompt-{number % 4}",
            "margin": margin if context == "user" else -1.0,
            "correct": 0.5 * (np.sign(margin) + 1) if context == "user" else 0.0,
            "chosen_tokens": 11,
            # of the 14 seen pairs: 8 longer chosen, 2 equal, 4 shorter chosen
            "rejected_tokens": 7 if number < 8 else 11 if number < 10 else 12,
        }
        for context in ("user", "generic")
        for number, (owner, margin) in enumerate(zip(owners, margins, strict=True))
    ]
    return pd.DataFrame(rows)


def test_a_mean_is_of_sums_and_weights() -> None:
    mean = ExactMean()
    mean.update(torch.tensor(5.0), torch.tensor(2))
    mean.update(torch.tensor(3 * 2.0**-30), torch.tensor(3))
    assert mean.compute().item() == 1.0 + 3 * 2.0**-30 / 5  # which float32 cannot tell from 1
    mean.reset()
    mean.update(torch.tensor(3.0), torch.tensor(1))
    assert mean.compute().item() == 3.0


def test_sums_do_not_depend_on_batches() -> None:
    whole, parts = UserAccuracy(n_users=5), UserAccuracy(n_users=5)
    whole.update(MARGINS, USERS)
    for start, stop in ((0, 1), (1, 7), (7, 7), (7, 14)):
        parts.update(MARGINS[start:stop], USERS[start:stop])
    assert torch.equal(whole.counts[:2], parts.counts[:2])  # exact; nll to rounding
    assert torch.allclose(whole.counts, parts.counts, rtol=1e-15)
    values = parts.compute()
    assert values["accuracy_micro"].item() == pytest.approx(7 / 14)
    assert values["accuracy_macro"].item() == pytest.approx((4 / 5 + 1 / 2 + 2 / 7) / 3)
    nll = sum(math.log(1 + math.exp(-margin)) for margin in MARGINS.tolist()) / 14
    assert values["nll"].item() == pytest.approx(nll)
    assert all(value.shape == () for value in values.values())


def test_metric_adds_up_over_processes_and_resets() -> None:
    halves = [user_counts(MARGINS[i::2], USERS[i::2], 5) for i in (0, 1)]
    metric = UserAccuracy(n_users=5)
    metric.update(MARGINS, USERS)
    assert metric._reductions["counts"] is dim_zero_sum
    assert torch.allclose(dim_zero_sum(torch.stack(halves)), metric.counts)
    assert accuracy_from_counts(halves[0] + halves[1])["accuracy_micro"] == pytest.approx(0.5)
    metric.reset()
    metric.update(MARGINS[:5], USERS[:5])
    assert metric.compute()["accuracy_micro"].item() == pytest.approx(0.8)


def test_metric_takes_half_precision_and_keeps_no_graph() -> None:
    metric = UserAccuracy(n_users=5)
    metric.update(MARGINS.bfloat16().requires_grad_(), USERS)
    assert not metric.counts.requires_grad
    assert metric.compute()["accuracy_micro"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_index_out_of_range_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"expected indices from 0 to 4\. Build UserAccuracy"):
        UserAccuracy(n_users=5).update(MARGINS[:2], torch.tensor([2, wrong]))


def test_summary_by_hand() -> None:
    summary = summarise(predictions(), longer_wins=True, n_resamples=100)
    seen, unseen = summary["test"]["seen"], summary["test"]["unseen"]
    assert seen["user"]["accuracy_micro"]["value"] == pytest.approx(7 / 14)
    assert seen["user"]["accuracy_worst10"]["value"] == pytest.approx(2 / 7)
    assert (seen["user"]["n_pairs"], seen["user"]["n_users"]) == (14, 3)
    assert seen["generic"]["accuracy_micro"]["value"] == 0
    assert unseen["user"]["accuracy_micro"] == {"value": pytest.approx(2 / 3), "ci95": None}
    assert summary["oracle"] is None


def test_four_cells_by_hand() -> None:
    cells = summarise(predictions(), longer_wins=True, n_resamples=50)["cells"]
    assert list(cells) == [
        f"{user}_user_{prompt}_prompt"
        for user in ("seen", "unseen")
        for prompt in ("seen", "unseen")
    ]
    # Every third pair is on a seen prompt: margins 1 4 0 -1 -3 of the seen users' 14, and 2 of dan's.
    seen_seen, seen_unseen, unseen_seen, unseen_unseen = cells.values()
    sizes = [(cell["user"]["n_pairs"], cell["user"]["n_users"]) for cell in cells.values()]
    assert sizes == [(5, 3), (9, 3), (1, 1), (2, 1)]
    assert seen_seen["user"]["accuracy_micro"]["value"] == pytest.approx(2.5 / 5)
    assert seen_unseen["user"]["accuracy_micro"]["value"] == pytest.approx(4.5 / 9)
    assert seen_seen["user"]["accuracy_macro"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert unseen_seen["user"]["accuracy_micro"]["value"] == 0
    assert unseen_unseen["user"]["accuracy_micro"]["value"] == 1
    assert seen_seen["generic"]["accuracy_micro"]["value"] == 0


def test_a_cell_without_pairs_is_null_and_one_with_all_is_the_whole() -> None:
    table = predictions().assign(prompt_kind="unseen")
    summary = summarise(table, longer_wins=True, n_resamples=50)
    assert summary["cells"]["seen_user_seen_prompt"] is None
    assert summary["cells"]["unseen_user_unseen_prompt"] == summary["test"]["unseen"]
    unknown = summarise(table.assign(prompt_kind="unknown"), longer_wins=True, n_resamples=50)
    assert set(unknown["cells"].values()) == {None}
    assert unknown["test"] == summary["test"]


def test_results_do_not_tell_roundings_of_float32_apart() -> None:
    table = predictions()
    summary = summarise(table, longer_wins=True, n_resamples=50)
    other = table.assign(margin=table["margin"] * (1 + 1e-7))
    assert summarise(other, longer_wins=True, n_resamples=50) == summary
    other = table.assign(margin=table["margin"] * 1.01)
    assert summarise(other, longer_wins=True, n_resamples=50) != summary
    nll = sum(math.log(1 + math.exp(-margin)) for margin in MARGINS.tolist()) / 14
    assert summary["test"]["seen"]["user"]["nll"]["value"] == round(nll, 4)
    assert summary["test"]["seen"]["user"]["accuracy_micro"]["value"] == 7 / 14


@pytest.mark.parametrize(("longer", "expected"), [(True, 9 / 14), (False, 5 / 14)])
def test_length_only_counts_equal_lengths_half(longer: bool, expected: float) -> None:
    table = predictions()
    control = summarise(table, longer_wins=longer, n_resamples=9)["controls"]["length_only"]
    assert control["rule"].startswith("the longer" if longer else "the shorter")
    assert control["seen"]["accuracy_micro"]["value"] == pytest.approx(expected)
    assert control["seen"]["n_pairs"] == 14  # each pair once, though it has two contexts
    assert control["seen"]["nll"] == {"value": None, "ci95": None}


def test_oracle_rows_and_missing_cells_are_json() -> None:
    table = predictions()
    oracle = table[table["context"] == "user"].assign(context="oracle", margin=3.0, correct=1.0)
    table = pd.concat([table, oracle])
    summary = summarise(table[table["user_kind"] == "seen"], longer_wins=True, n_resamples=9)
    assert summary["oracle"]["seen"]["accuracy_macro"]["value"] == 1
    assert summary["test"]["unseen"]["user"]["n_pairs"] == 0
    assert summary["test"]["unseen"]["user"]["ece"] == {"value": None, "ci95": None}
    json.dumps(summary, allow_nan=False)


def test_length_rule_is_chosen_off_the_test_set() -> None:
    table = predictions()
    val = table[table["split"] == "val"]
    assert choose_length_rule(val) is False
    assert choose_length_rule(val.assign(rejected_tokens=np.uint16(3))) is True
    with pytest.raises(ValueError, match=r"split='test' is not allowed: expected train or val"):
        choose_length_rule(table)


@pytest.mark.parametrize(
    ("n_personal", "alpha", "is_said"), [(5, 0.5, True), (1, 0.5, False), (5, 1, False)]
)
def test_no_gain_on_val_is_said_and_noted(
    n_personal: int, alpha: float, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of nine users with 4 val pairs each, so many lose one by the user model, and the others gain one."""
    rows = [
        {
            **{"split": "val", "user_kind": "seen", "context": context, "user_id": f"u{user}"},
            **{"pair_id": f"{user}-{pair}", "margin": margin, "correct": float(margin > 0)},
        }
        for user in range(9)
        for pair in range(4)
        for context, margin in (
            ("generic", 1.0 if pair < 2 else -1.0),
            ("user", 1.0 if pair < (1 if user < n_personal else 3) else -1.0),
        )
    ]
    gain = personal_gain(pd.DataFrame(rows))
    assert gain is not None and gain["value"] == pytest.approx((9 - 2 * n_personal) / 36)
    (tmp_path / "README.md").write_text("# A model\n")
    note_without_gain(tmp_path, pd.DataFrame(rows), alpha=alpha)
    out, card = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    assert ("not better than the generic one: -2.8 points" in out) == is_said
    assert card.startswith("# A model\n") and ("-2.8 points" in card) == is_said
