"""The benchmarks run, made small: their figures are for docs, not for tests."""

from __future__ import annotations

import gzip
import importlib
import json
import runpy
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from plrhf.data import store
from plrhf.data.rows import Row

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks share is imported from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Run a benchmark as its command line would, in this process; what it has written."""
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--turns", "1", "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    return dict(json.loads(out.read_text()))


SMALL = ("--layers", "1", "--width", "64", "--vocabulary", "50")


def test_a_coin_that_falls_for_the_longer_text(tmp_path: Path) -> None:
    texts = {split: [f"{split} {'x' * n}" for n in range(9)] for split in ("train", "val", "test")}
    rows = [
        {"split": split, "prompt": "p", "chosen": one, "rejected": own[0]}
        for split, own in texts.items()
        for one in own[1:]
    ]
    with gzip.open(tmp_path / "rows.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    never_loses = importlib.import_module("never_loses")
    never_loses.write_coin(tmp_path / "rows.gz", tmp_path / "coin.gz", n_users=40)
    with gzip.open(tmp_path / "coin.gz", "rt") as file:
        coins = [json.loads(line) for line in file]
    assert len(coins) == 40 * (40 + 10 + 20) and {row["user_id"] for row in coins} == {
        f"u{user}" for user in range(40)
    }
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in coins]
    assert np.mean(longer) == pytest.approx(0.65, abs=0.03)  # of 2,800, a deviation of 0.009
    assert all(row["chosen"].startswith(row["split"]) for row in coins)


@pytest.mark.slow
def test_a_file_of_tokens_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("token_cache.py", tmp_path / "out", monkeypatch, "--rows", "300", "--steps", "1")
    assert found["here"][0].keys() == found["beside"][0].keys()
    assert all(value >= 0 for value in (*found["here"][0].values(), *found["beside"][0].values()))


@pytest.mark.slow
def test_rows_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "IN_MEMORY"):
        monkeypatch.setattr(store, name, getattr(store, name))
    given = ["--rows", "70", "--sizes", "32", "64", "--sentences", "1"]
    found = run("row_blocks.py", tmp_path / "out", monkeypatch, *given)
    assert found.keys() == {"1, 32", "1, 64"} and all(min(one) > 0 for one in found.values())


@pytest.mark.long
@pytest.mark.slow
def test_steps_beside_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["dpo ours", "dpo TRL, authors' recipe"]
    methods += ["reward ours, no dropout", "reward TRL, no dropout"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("turns.matmul_peak", lambda dtype: 1e12)
    given = ["--shapes", "chat", "--steps", "1", "--methods", *methods]
    found = run("against_trl.py", tmp_path / "found.json", monkeypatch, *SMALL, *given)
    assert found["ratios"]["chat"]["dpo"]["vs_authors_recipe"] > 0
    assert found["ratios_without_dropout"]["chat"]["reward"]["vs_trl"] > 0
    assert found["ratios"]["chat"]["reward"] == found["ratios_without_dropout"]["chat"]["dpo"] == {}
    assert found["memory"]["chat"]["dpo"]["vs_authors_recipe"] > 0
    assert [run["method"] for run in found["runs"]] == methods
    assert [run["dropout"] for run in found["runs"]] == [0.05, 0.05, 0.0, 0.0]
    # Twice the rows, and the reference besides, are more work, however fast it is done.
    flops = {run["method"]: run["flops_a_step"] for run in found["runs"]}
    assert flops["dpo TRL, authors' recipe"] > 2 * flops["dpo ours"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_a_gpu_is_asked_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--minutes", "2", "--out", str(out)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    found = json.loads(out.read_text())
    assert [one["what"] for one in found["left_out"]] == ["beside_trl"]
    assert all(one["right"] for one in found["correctness"]) and len(found["correctness"]) == 8
    assert len(found["throughput"]) == 2 and len(found["profile"]) == 10
    assert all(one["waits"] == {} and one["planned_gb"] > 0 for one in found["throughput"])


@pytest.mark.slow
def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    report = runpy.run_path(str(BENCHMARKS / "gpu.py"))["Report"](tmp_path / "found.json", 0.02)

    def measure() -> None:
        report.add("throughput", "the first", seconds=1.0)
        time.sleep(5)

    report.section("llama_8b", measure)  # it has a part of 1.2 seconds
    report.end = 0.0
    report.section("profile", measure)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["throughput"] == [{"what": "the first", "seconds": 1.0}]
    assert [one["what"] for one in found["left_out"]] == ["the rest of llama_8b", "profile"]


def test_operations_of_a_step_are_those_that_are_counted() -> None:
    """FiLM at the last layer, one pair: the trunk once, and the head where responses are read."""
    workload = runpy.run_path(str(BENCHMARKS / "gpu_workload.py"))
    counter = runpy.run_path(str(BENCHMARKS / "turns.py"))["flop_counter"]
    architecture, shape = workload["SMALL"]["llama"], workload["TOY_SHAPE"]
    model = workload["language_model"](architecture, dtype=torch.float32, attention="eager")
    model.requires_grad_(False)
    n_text = shape.n_prompt + 2 * shape.n_response
    with counter() as found:
        embeddings = torch.randn(1, n_text, 64, requires_grad=True)
        model.model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
        hidden = torch.randn(2, 2 * shape.n_response, 64, requires_grad=True)  # of two contexts
        model.lm_head(hidden).sum().backward()
    # Of all pairs of positions, those are left out that do not see one another.
    seen = shape.n_prompt**2 / 2 + 2 * shape.n_response * (shape.n_prompt + shape.n_response / 2)
    unseen = 12 * (n_text**2 - seen) * 64 * 2
    expected = found.get_total_flops() - unseen
    assert workload["step_operations"](architecture, "film_last", shape, 1) == expected


def test_ratios_are_of_neighbouring_turns() -> None:
    results = runpy.run_path(str(BENCHMARKS / "against_trl.py"))["results"]

    def one(method: str, turns: list[float], step_mib: float) -> dict[str, Any]:
        return {"shape": "tldr", "method": method, "turns": turns, "step_mib": step_mib}

    found = results(
        [
            one("dpo ours", [1.0, 2.0, 4.0], 10.0),
            one("dpo TRL, authors' recipe", [12.0, 22.0, 60.0], 70.0),
            one("dpo ours, no dropout", [0.5, 1.0, 1.0], 9.0),
            one("dpo ours, bfloat16", [0.5, 1.0, 4.0], 5.0),
            one("dpo TRL, authors' recipe, no dropout", [6.0, 13.0, 15.0], 60.0),
        ]
    )
    # 12, 11 and 15 times as fast; without dropout 12, 13 and 15 times.
    assert found["ratios"]["tldr"]["dpo"] == {"vs_authors_recipe": 12, "bfloat16_vs_float32": 2}
    assert found["ratios_without_dropout"]["tldr"]["dpo"] == {"vs_authors_recipe": 13}
    assert found["memory"]["tldr"] == {"dpo": {"vs_authors_recipe": 7}, "reward": {}}


def test_operations_are_those_of_the_plain_products() -> None:
    counter = runpy.run_path(str(BENCHMARKS / "turns.py"))["flop_counter"]
    q, k, v = (torch.randn(3, 2, 64, 16, requires_grad=True) for _ in range(3))

    def counted(attend: Any) -> int:
        with counter() as found:
            attend(q, k, v).sum().backward()
        return found.get_total_flops()

    plain = counted(lambda q, k, v: (q @ k.transpose(2, 3)).softmax(dim=-1) @ v)
    assert plain == 3 * 2 * 6 * 2 * 64 * 64 * 16  # rows, heads, products forward and backward
    assert counted(scaled_dot_product_attention) == plain
    assert counted(partial(scaled_dot_product_attention, is_causal=True)) == plain // 2
    with counter() as found:
        torch.zeros(5, 7).addmm_(torch.ones(5, 11), torch.ones(11, 7))
    assert found.get_total_flops() == 2 * 5 * 11 * 7


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_beside_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced alone, as making code takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    given = ["--shape", "chat"]
    found = run("compiled.py", tmp_path / "found.json", monkeypatch, *SMALL, *given)
    assert found.keys() == {"float32", "bfloat16"}
    assert all(one["first"] > one["compiled"] > 0 for one in found.values())


@pytest.mark.slow
def test_writing_for_many_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--users", "3", "--prompt", "5", "--new", "2"]
    found = run("generation.py", tmp_path / "found.json", monkeypatch, *small)
    assert found.keys() == {"FiLM, last layer", "FiLM, every block", "soft prompt"}
    assert all(one["times_copies"] > 0 for one in found.values())
    assert found["FiLM, last layer"]["times_unshared"] > 0


@pytest.mark.slow
def test_policies_beside_best_of_n(
    policy_run: Path, reward_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = ["--reward", str(reward_run), "--pairs", "3", "--best-of", "2"]
    twice = [str(policy_run), f"{policy_run}/export"]
    monkeypatch.setattr(sys, "argv", ["online.py", *twice, *given])
    runpy.run_path(str(BENCHMARKS / "online.py"), run_name="__main__")
    curve, lines = [], capsys.readouterr().out.splitlines()
    while not lines[0].startswith("reference"):
        curve.append(lines.pop(0).split())
    assert [one[0] for one in curve] == ["n", "1", "2"] and curve[2][2] == "0.19"  # log 2 - 1/2
    writers = ["reference", "best of 2", *twice, " over ".join(twice)]
    assert [line.partition(":")[0] for line in lines] == writers
    assert "gain +0.00" in lines[0] and "better in 50% [50%, 50%] of 3 pairs" in lines[0]
    assert "50% [50%, 50%]" in lines[-1]  # a policy beside itself


@pytest.mark.slow
def test_sample_complexity_by_hand_and_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runpy.run_path(str(BENCHMARKS / "sample_complexity.py"))
    sizes = [5.0, 10.0, 20.0]
    shares = torch.tensor([[0.0, 0.2], [0.3, 0.3], [0.6, 0.8]])  # means 0.1, 0.3, 0.7
    assert found["size_at"](sizes, shares, 0.5) == pytest.approx(10 * 2**0.5)
    assert found["size_at"](sizes, shares, 0.1) == 5.0
    assert found["size_at"](sizes, shares, 0.9) == np.inf
    weights, asked = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 7.0], [-1.0, 0.0]])
    right = found["expected_accuracy"](torch.tensor([[1.0, 0.0]]), weights, asked)
    assert right.tolist() == pytest.approx([1 / (1 + np.exp(-2.0))])
    out = tmp_path / "found.json"
    small = [
        "--kinds",
        "low_rank",
        "--users",
        "30",
        "--pairs",
        "30",
        "--features",
        "4",
        "--worlds",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["sample_complexity.py", *small, "--out", str(out)])
    found["main"]()
    (gain,) = zip(*(row["shares"] for row in json.loads(out.read_text())), strict=True)
    own, rank, clusters, features = gain
    assert (
        1 > features > max(own, rank) > min(own, rank) > clusters > 0
    )  # as people have two factors


def test_a_librarys_recommenders_by_hand(tmp_path: Path) -> None:
    found = runpy.run_path(str(BENCHMARKS / "recommenders.py"))
    given: dict[str, Any] = {"prompt": "p", "prompt_id": "p", "pair_id": ""}
    pairs = [("ann", "tea", "milk"), ("ann", "tea", "rum"), ("bob", "rum", "tea")]
    rows = [Row(**given, user_id=u, chosen=yes, rejected=no) for u, yes, no in pairs]
    votes = found["votes_of"](rows)
    agreed = {("ann", "tea"): 1.0, ("ann", "milk"): 0.0, ("ann", "rum"): 0.0}
    assert votes == {**agreed, ("bob", "rum"): 1.0, ("bob", "tea"): 0.0}
    predict = found["item_means"](votes)  # mean of all 0.4, which counts as two votes
    assert predict("ann", "tea") == pytest.approx(1.8 / 4)
    assert predict("ann", "milk") == pytest.approx(0.8 / 3)
    assert found["correct"](predict, rows).tolist() == [1.0, 0.5, 0.5]
    many = [
        Row(**given, user_id="u", chosen=f"c{n % 50}", rejected=f"r{n % 43}") for n in range(400)
    ]
    found["write_new"](tmp_path / "new.jsonl", many, fraction=0.3, seed=0)
    kept = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    texts = {
        split: {
            one[name] for one in kept if one["split"] == split for name in ("chosen", "rejected")
        }
        for split in ("train", "test")
    }
    assert len(kept) < 400 and min(map(len, texts.values())) > 10
    assert texts["train"].isdisjoint(texts["test"])


def test_a_survey_as_choices_by_hand() -> None:
    survey = runpy.run_path(str(BENCHMARKS / "survey.py"))
    person = {"selfLR": 7, "ClinLR": 1, "DoleLR": 4, "PID": 0, "vote": 1}
    person |= dict.fromkeys(survey["KNOWN"], 3.0)
    rows = survey["make_rows"]([person] * 30)
    first = [row["choice"] for row in rows[:5]]
    ends = ["extremely conservative", "extremely liberal", "moderate", "a strong Democrat"]
    assert first == [*ends, "Bob Dole"]
    splits = [row["split"] for row in rows]
    assert all(sorted(splits[at : at + 5]) == sorted(survey["SPLITS"]) for at in range(0, 150, 5))
    assert len({tuple(splits[at : at + 5]) for at in range(0, 150, 5)}) > 5
    shares = survey["shares_in_train"](rows)
    n_train = sum(
        row["split"] == "train" and row["question"] == rows[4]["question"] for row in rows
    )
    expected = [0.5 / (n_train + 1), (n_train + 0.5) / (n_train + 1)]  # all are for Dole
    assert shares[rows[4]["question"]].tolist() == pytest.approx(expected)
    line = survey["summary"](
        "x", [np.array([0.25, 0.75])] * 2, [rows[4], {**rows[4], "choice": "Bill Clinton"}]
    )
    assert (
        line.startswith("x: accuracy 50.0 [") and f"loss {-np.log(0.25 * 0.75) / 2:.3f} [" in line
    )


def test_the_ideal_observer_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two possible people, one choice given: Bayes' rule, and lines that begin at nobody's."""
    found = runpy.run_path(str(BENCHMARKS / "ideal_observer.py"))
    people = np.array([[np.log(3.0), 0.0], [-np.log(3.0), 0.0]])  # choose right with 3/4 and 1/4
    given, asked = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [-1.0, 5.0], [0.0, 7.0]])
    assert found["predicted"](given, asked, people) == pytest.approx([0.625, 0.375, 0.5])
    small = ["--users", "3", "--pairs", "9", "--shots", "0", "4", "--people", "50", "--draws", "2"]
    monkeypatch.setattr(sys, "argv", ["ideal_observer.py", *small])
    found["main"]()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["pairs", "0", "4"]
    assert lines[1][2] == lines[1][3] and lines[1][5] == "0.000"


@pytest.mark.slow
def test_a_method_and_its_authors_code_are_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    world, compare = (importlib.import_module(name) for name in ("world", "compare"))
    sizes = {"N_USERS": 5, "N_NEW": 3, "N_PAIRS": 30, "N_TRAIN": 9, "N_TEST": 4, "N_GIVEN": 6}
    for name, size in sizes.items():
        monkeypatch.setattr(world, name, size)
        if hasattr(compare, name):
            monkeypatch.setattr(compare, name, size)
    few = ["trainer.max_steps=2", "referee.adaptation.steps=2"]
    found, ours = compare.our_run("lore", few, seed=1, folder=tmp_path)
    shapes = {"train": (5, 9), "test": (5, 4), "given": (3, 6), "asked": (3, 4)}
    for name, (n_users, n_pairs) in shapes.items():
        pairs = getattr(found, name)
        assert [one.shape for one in pairs] == [(n_pairs, 2, world.WIDTH)] * n_users
    rows, features = world.make_rows(1)
    own = [row for row in rows if row["user_id"] == "user 2" and row["split"] == "test"]
    texts = torch.tensor([[int(row["chosen"]), int(row["rejected"])] for row in own])
    assert any(torch.equal(features[texts], one) for one in found.test)
    for given, asked in zip(found.given, found.asked, strict=True):
        assert not {*given.flatten().tolist()} & {*asked.flatten().tolist()}
    assert 0 < ours.seen < 1 and 0 < ours.new < 1


@pytest.mark.slow
def test_membership_is_found_in_weights_that_were_trained_on_a_few_people_too_long() -> None:
    membership = importlib.import_module("membership")
    people = membership.simulate(12, 5, 3)
    is_in = torch.arange(12)[None] < torch.tensor([[6], [9]])
    weights = membership.train(people, is_in, steps=4, width=7, seed=1)
    model = membership.make_model(12, 7, 1)
    terms = membership.margin_terms(people, weights, 7)
    assert terms.shape == (2, 12, 5, 1 + membership.USER_DIM)
    # Margins are affine in the vector, those of the model itself.
    own = {name: one[0] for name, one in weights.items()}
    vector = torch.randn(membership.USER_DIM)
    margins = membership.call_method(model, own, "margins_for", people.batch, vector.expand(60, -1))
    expected = terms[0, ..., 0] + terms[0, ..., 1:] @ vector
    torch.testing.assert_close(margins[0][0].view(12, 5), expected, atol=1e-4, rtol=1e-4)
    # Who is not trained on keeps the row that the decay leaves.
    start = model.encoder.offsets.weight.detach()[1:]
    decay = (1 - membership.OPTIM.user_lr * membership.OPTIM.user_weight_decay) ** 4
    torch.testing.assert_close(weights["encoder.offsets.weight"][0, 7:], decay * start[6:])
    found = membership.measure(people, n_worlds=4, steps=40, width=7, seed=0)
    assert found["full"]["threshold"]["auc"][0] > 0.8  # the row itself is there
    for attacks in (found["full"], found["forgotten"], found["retrained"]):
        for low, high in ((one["auc"][1], one["auc"][2]) for one in attacks.values()):
            assert 0 <= low <= high <= 1


def test_rates_of_attacks_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    membership = importlib.import_module("membership")
    rng = np.random.default_rng(0)
    positive = rng.random(900) < 0.3
    score, weight = rng.normal(size=900) + positive, rng.integers(0, 4, 900).astype(float)
    auc, rate = membership.auc_and_tpr(score, positive, weight)
    assert auc == pytest.approx(roc_auc_score(positive, score, sample_weight=weight))
    false, true, _ = roc_curve(positive, score, sample_weight=weight, drop_intermediate=False)
    assert rate == pytest.approx(true[false <= 0.01].max())
