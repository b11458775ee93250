"""Survey opinions: which option a person chooses, by reward models and by a library.

    python benchmarks/survey.py rows anes96.csv survey.jsonl
    python benchmarks/survey.py judge anes96.csv survey.jsonl RUN ...

of the American National Election Study of 1996, 944 people, that the library statsmodels has
(``statsmodels/datasets/anes96/anes96.csv``, in the public domain). `rows` writes the five questions about
politics as choices among options, and draws for each person one question for test, one for val and three
for train. `judge` prints how often each run's most rewarded option is the one that was chosen, and the mean
log-loss of the choices, beside the shares of options in train and scikit-learn's logistic regression on
age, education, income, place and television.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import plrhf
from plrhf.core.bootstrap import bootstrap
from plrhf.models.reward import PersonalRewardModel

Array = NDArray[np.float64]

SCALE = ["extremely liberal", "liberal", "slightly liberal", "moderate", "slightly conservative"]
SCALE += ["conservative", "extremely conservative"]
PARTIES = ["a strong Democrat", "a weak Democrat", "an independent, closer to the Democrats"]
PARTIES += ["an independent", "an independent, closer to the Republicans"]
PARTIES += ["a weak Republican", "a strong Republican"]
QUESTIONS: dict[str, tuple[str, list[str], int]] = {
    "selfLR": ("Where would you place yourself?", SCALE, 1),
    "ClinLR": ("Where would you place Bill Clinton?", SCALE, 1),
    "DoleLR": ("Where would you place Bob Dole?", SCALE, 1),
    "PID": ("What do you consider yourself?", PARTIES, 0),
    "vote": ("Whom do you expect to vote for?", ["Bill Clinton", "Bob Dole"], 0),
}
"""Question, options, and the number of the first option in the file, by its column."""

KNOWN = ["age", "educ", "income", "popul", "TVnews"]
SPLITS = ["test", "val", "train", "train", "train"]


def read_people(path: Path) -> list[dict[str, float]]:
    """Read the people of the file, a mapping of columns each."""
    with path.open() as file:
        return [
            {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file, delimiter="\t", quotechar="'")
        ]


def make_rows(people: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Make a row of each answer; each person's questions are divided at random."""
    rng, rows = np.random.default_rng(0), []
    for number, person in enumerate(people):
        splits = rng.permutation(SPLITS)
        for (name, (question, options, first)), split in zip(
            QUESTIONS.items(), splits, strict=True
        ):
            chosen = options[int(person[name]) - first]
            features = {one: person[one] for one in KNOWN}
            one = {"user_id": f"p{number}", "question": question, "options": options}
            rows.append({**one, "choice": chosen, "split": str(split), "user_features": features})
    return rows


def summary(name: str, chances: list[Array], rows: list[dict[str, Any]]) -> str:
    """Write accuracy in per cent and log-loss in nats of test choices, with 95% intervals over people."""
    places = [row["options"].index(row["choice"]) for row in rows]
    right = np.array([one.argmax() == place for one, place in zip(chances, places, strict=True)])
    loss = -np.log([one[place] for one, place in zip(chances, places, strict=True)])
    each = np.ones(len(rows))  # choices of one person
    found = bootstrap(
        {
            "accuracy": lambda weights: 100 * (weights @ right) / (weights @ each),
            "loss": lambda weights: weights @ loss / (weights @ each),
        },
        n_users=len(rows),
    )
    shown = []
    for kind, digits in (("accuracy", 1), ("loss", 3)):
        low, high = found[kind]["ci95"] or (float("nan"), float("nan"))
        shown.append(
            f"{kind} {found[kind]['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        )
    return f"{name}: {', '.join(shown)}"


def shares_in_train(rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Return the shares of each question's options in train, with half a choice of each besides."""
    found = {}
    for question, options, _ in QUESTIONS.values():
        train = [row for row in rows if row["split"] == "train" and row["question"] == question]
        places = [options.index(row["choice"]) for row in train]
        counts = np.bincount(np.array(places, dtype=np.int64), minlength=len(options)) + 0.5
        found[question] = counts / counts.sum()
    return found


def baselines(rows: list[dict[str, Any]]) -> dict[str, list[Array]]:
    """Return chances of the options of test choices by shares in train, and by logistic regression."""
    test = [row for row in rows if row["split"] == "test"]
    shares = shares_in_train(rows)
    models: dict[str, Any] = {}
    for question, options, _ in QUESTIONS.values():
        train = [row for row in rows if row["split"] == "train" and row["question"] == question]
        y = np.array([options.index(row["choice"]) for row in train])
        x = np.array([[row["user_features"][one] for one in KNOWN] for row in train])
        models[question] = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    regression = []
    for row in test:
        model, chances = models[row["question"]], np.full(len(row["options"]), 1e-6)
        x = np.array([[row["user_features"][one] for one in KNOWN]])
        chances[model.classes_] = model.predict_proba(x)[0]
        regression.append(chances)
    return {
        "shares": [shares[row["question"]] for row in test],
        "logistic regression": regression,
    }


def of_run(run: str, rows: list[dict[str, Any]]) -> list[Array]:
    """Return a run's chances of the options of choices."""
    model = plrhf.load(run)
    assert isinstance(model, PersonalRewardModel)
    asked = [
        {"user_id": row["user_id"], "prompt": row["question"], "response": one}
        | ({"user_features": row["user_features"]} if model.card.features else {})
        for row in rows
        for one in row["options"]
    ]
    rewards = model.score(asked, batch_size=512).double().numpy()
    ends = np.cumsum([len(row["options"]) for row in rows])[:-1]
    return [
        np.exp(own - own.max()) / np.exp(own - own.max()).sum() for own in np.split(rewards, ends)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["rows", "judge"])
    parser.add_argument("people", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("runs", nargs="*")
    given = parser.parse_args()
    rows = make_rows(read_people(given.people))
    if given.task == "rows":
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    test = [row for row in rows if row["split"] == "test"]
    for name, chances in baselines(rows).items():
        print(summary(name, chances, test))
    for run in given.runs:
        print(summary(run, of_run(run, test), test), flush=True)


if __name__ == "__main__":
    main()
