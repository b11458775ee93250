"""Probes against hand counts, scikit-learn, and rows made with and without a leak."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from plrhf.data.rows import Row
from plrhf.data.splits import Splits
from plrhf.evaluation import probes

WORDS = ("sea", "boat", "calm", "wide", "blue", "wind", "sail", "home", "far", "storm", "pier")


def row(user: str, prompt: str, chosen: str, rejected: str, **more: Any) -> Row:
    pair = f"{user} {prompt} {chosen} {rejected}"
    return Row(prompt, chosen, rejected, user, **{"prompt_id": prompt, "pair_id": pair, **more})


def splits(
    sizes: tuple[int, int, int] = (300, 130, 70),
    *,
    of_chosen: Callable[[str], str] = str,
    of_rejected: Callable[[str], str] = str,
) -> Splits:
    """Random sentences of 4 to 9 words by 23 users, dressed as the arguments say."""
    draw = random.Random(3)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(4, 9))).capitalize() + "."

    parts = [
        [
            row(
                f"u{draw.randrange(23)}",
                f"{split}-{number}",
                of_chosen(sentence()),
                of_rejected(sentence()),
            )
            for number in range(size)
        ]
        for split, size in enumerate(sizes)
    ]
    return Splits(*parts, users=tuple(f"u{n}" for n in range(23)), dropped={})


def test_nothing_is_found_where_nothing_leaks() -> None:
    found = probes.probe(splits())
    assert found["warnings"] == []
    for name in ("format_only", "length_only"):
        low, high = found[name]["accuracy"]["ci95"]
        assert low <= 0.5 <= high
        assert (found[name]["n_pairs"], found[name]["n_users"]) == (130, 23)


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: f"['{text}']",
        lambda text: f"{text} ",
        lambda text: f"\n{text}",
        lambda text: text.replace(" ", "  ", 1),
        lambda text: f"**{text}**",
        lambda text: f"- {text}",
        lambda text: f"1. {text}",
        str.lower,
        lambda text: text.rstrip("."),
    ],
)
@pytest.mark.parametrize("side", ["of_chosen", "of_rejected"])
def test_a_format_that_holds_the_label_is_found(dress: Any, side: str) -> None:
    found = probes.probe(splits((90, 40, 5), **{side: dress}))
    assert found["format_only"]["accuracy"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert [line.split(":")[0] for line in found["warnings"]][0] == "probe format_only"


@pytest.mark.parametrize("side", ["of_chosen", "of_rejected"])
def test_a_taste_for_length_is_found_in_either_direction(side: str) -> None:
    found = probes.probe(splits(**{side: lambda text: f"{text[:-1]} and so on."}))
    assert found["length_only"]["accuracy"]["ci95"][0] > 0.6
    low, high = (100 * end for end in found["length_only"]["accuracy"]["ci95"])
    value = 100 * found["length_only"]["accuracy"]["value"]
    assert found["warnings"][-1] == (
        f"probe length_only: fitted on train, it alone gets {value:.1f}% [{low:.1f}, {high:.1f}] of "
        "val pairs right: a leak, or a taste that everybody shares"
    )


def test_the_fit_is_scikit_learns() -> None:
    generator = np.random.default_rng(4)
    differences = generator.normal(0.3, [1.0, 20.0, 0.1], size=(57, 3))
    differences = np.column_stack([differences, np.zeros(57)])  # a mark no text has
    scale = np.sqrt((differences[:, :3] ** 2).mean(axis=0))
    # Each pair in both orders, at half the weight.
    mirrored = np.concatenate([differences[:, :3], -differences[:, :3]]) / scale
    labels = np.repeat([1, 0], 57)
    theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10).fit(mirrored, labels)
    ours = probes.fit_bradley_terry(differences)
    assert ours[:3] * scale == pytest.approx(theirs.coef_[0], abs=1e-6)
    assert ours[3] == 0


def test_separable_pairs_have_finite_weights() -> None:
    weights = probes.fit_bradley_terry(np.ones((5000, 2)))
    assert np.isfinite(weights).all() and (weights > 0).all()


def test_overlap_by_hand() -> None:
    train = [row("ann", "p1", "a", "b"), row("bob", "p2", "c", "d"), row("Zoe", "p3", "e", "f")]
    val = [row("ann", "p1", "b", "a")]
    test = [
        row("cid", "p1", "a", "b"),  # unseen user, but prompt, response and pair of ann's
        row("zoe ", "p4", "x", "f"),  # not unseen: Zoe
        row("bob", "p5", "a", "b"),  # responses of another prompt
        row("bob", "p2", "d", "c", pair_id="again"),
        row("dan", "p2", "y", "z", prompt_id="p6"),  # the same text by another id
    ]
    found = probes.overlap(Splits(train, val, test, users=("Zoe", "ann", "bob"), dropped={}))
    names = ("pairs", "unseen_user", "user", "prompt", "response", "pair", "judgment")
    assert {pair: tuple(counts[name] for name in names) for pair, counts in found.items()} == {
        "train_val": (1, 0, 1, 1, 1, 1, 1),
        "train_test": (5, 1, 2, 3, 4, 2, 1),
        "val_test": (5, 0, 0, 1, 2, 1, 0),
    }


def test_warnings_name_what_is_shared_against_the_protocol() -> None:
    train = [row("ann", "p1", "a", "b"), row("bob", "p2", "c", "d")]
    val = [row("ann", "p7", "x", "y")]
    test = [row("bob", "p1", "a", "b"), row("ann", "p9", "v", "w"), row("ann ", "p8", "c", "d")]
    parts = Splits(train, val, test, users=("ann", "bob"), dropped={})

    def lines(**more: Any) -> list[str]:
        found = probes.probe(Splits(train, val, test, users=("ann", "bob"), dropped={}, **more))
        return [line for line in found["warnings"] if "not run" not in line]  # of one val user

    assert lines() == [
        "probe unseen_user: 1 of 3 test pairs are of users called unseen, whom train has; "
        "1 of 3 test pairs are of users called unseen, whom val has",
        "probe prompt: 1 of 3 test pairs are on prompts of train",
    ]
    assert [line.split(":")[0] for line in lines(shared_prompts=("train_test",))] == [
        "probe unseen_user"
    ]
    test.append(row("bob", "p2", "d", "c"))
    assert "probe judgment: 1 of 4 test pairs are choices that the same user makes in train" in (
        lines()
    )
    assert parts.test is test


def test_a_fixed_set_of_items_is_no_leak() -> None:
    def judged(users: str) -> list[Row]:  # everybody likes the marked one of the same four texts
        texts = [("**A.**", "B"), ("**C.**", "D")]
        return [row(user, "p1", *pair) for user in users for pair in texts]

    parts = Splits(judged("abc"), judged("de"), judged("fg"), users=tuple("abc"), dropped={})
    assert probes.probe(parts)["format_only"]["accuracy"]["value"] == 1
    assert probes.probe(parts)["warnings"] == []
    new = [row(user, "p1", "**E.**", "F") for user in "de"]
    found = probes.probe(Splits(parts.train, new, parts.test, users=parts.users, dropped={}))
    assert found["format_only"]["known_texts"] == 0
    assert [line.split(":")[0] for line in found["warnings"]] == [
        f"probe {name}" for name in ("format_only", "length_only")
    ]


def test_without_val_a_leak_is_found_on_held_out_train_pairs() -> None:
    found = probes.probe(splits((90, 0, 9), of_chosen=lambda text: f"**{text}**"))
    assert found["format_only"]["scored_on"] == "held-out train pairs"
    assert found["format_only"]["n_pairs"] == 18  # every fifth
    assert found["format_only"]["accuracy"]["value"] == 1
    (line,) = [one for one in found["warnings"] if "format_only" in one]
    assert "of held-out train pairs right" in line


def test_one_val_user_is_not_enough_to_score_on() -> None:
    parts = splits((90, 40, 5), of_chosen=lambda text: f"**{text}**")
    val = [row("u1", f"v{n}", "**A sea.**", "A boat.") for n in range(7)]
    found = probes.probe(Splits(parts.train, val, parts.test, users=parts.users, dropped={}))
    assert found["format_only"]["scored_on"] == "held-out train pairs"
    assert "probe format_only" in " ".join(found["warnings"])


def test_what_cannot_be_scored_is_said_and_without_train_nothing_is_probed() -> None:
    train = [row("ann", f"p{n}", "a sea", "b") for n in range(20)]
    found = probes.probe(Splits(train, [], [], users=("ann",), dropped={}))
    assert found["warnings"] == [
        f"probe {name}: not run, as 0 of the two users that an interval needs could be scored"
        for name in ("format_only", "length_only")
    ]
    assert found["format_only"]["accuracy"] == {"value": None, "ci95": None}
    assert probes.probe(splits((0, 0, 9))) == {}


def test_many_pairs_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = splits((100, 0, 0)).train
    assert probes._spread(rows) == rows
    monkeypatch.setattr(probes, "MOST_PAIRS", 30)
    assert [one.prompt_id for one in probes._spread(rows)] == [f"0-{n}" for n in range(0, 100, 4)]
