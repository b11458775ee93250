"""What shared weights keep of a forgotten person: membership inference on simulated people.

    python benchmarks/membership.py --steps 25 200    # 64 models each, some two minutes

In each world half of the users, drawn by lot, are trained on, and half of these are then forgotten. An
attacker who knows all pairs of a person wants to know whether that person was forgotten or never there,
given the export before (`full`), after `plrhf forget` (`forgotten`), or of a training without the
forgotten ones (`retrained`).

* `threshold`: people whose pairs are likely under the best vector count as trained on. The best vector is
  a row of the full export, or else is fitted to the pairs, with a prior from the rows that are left.
* `shadow`: the attacker also trains models on other draws of the same people, and compares the
  likelihoods (under the best and the generic vector) of each person with those in models with and
  without that person (LiRA, Carlini et al. 2022, arXiv 2112.03570).

`auc` is the area under the curve of true by false positive rates (0.5: no better than chance), `tpr` the
true positive rate at a false positive rate of 1%; each with a 95% interval by resampling people and worlds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import logsigmoid

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.types import PreferenceBatch
from plrhf.data.sources.personas import PersonasSource
from plrhf.encoders import LookupEncoder
from plrhf.models.functional import call_method
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel

FEATURES, USER_DIM, TOGETHER = 48, 4, 8  # width of texts and of users; models in one call
OPTIM = Optim(
    user_lr=1e-2, head_lr=1e-3, weight_decay=1.0, user_weight_decay=2.0, schedule="constant"
)
FALSE_POSITIVES = 0.01
Array = NDArray[np.float64]


@dataclass(frozen=True)
class People:
    """Pairs of N users, the same number each, user after user, as one batch of pooled texts."""

    batch: PreferenceBatch
    n_users: int


def simulate(n_users: int, n_pairs: int, seed: int) -> People:
    """Draw users of the embedded world; a text's features are a sum of random vectors of its words."""
    source = PersonasSource(
        kind="individual",
        n_users=n_users,
        n_unseen_users=0,
        pairs_per_user=n_pairs,
        val_pairs_per_user=0,
        test_pairs_per_user=0,
        seed=seed,
    )
    rows = [row for _, row in source.records()]
    texts = [str(row[side]).lower().split() for row in rows for side in ("chosen", "rejected")]
    place = {word: at for at, word in enumerate(sorted({word for text in texts for word in text}))}
    vectors = np.random.default_rng(seed).standard_normal((len(place), FEATURES))
    pooled = [vectors[[place[word] for word in text]].sum(0) / len(text) ** 0.5 for text in texts]
    blank = torch.zeros(len(rows), 2, dtype=torch.int64)
    batch = PreferenceBatch(
        user_id=torch.arange(1, n_users + 1).repeat_interleave(n_pairs),
        features=torch.zeros(len(rows), 0),
        input_ids=blank,
        segment=blank,
        position_ids=blank,
        row=torch.arange(len(rows)),
    )
    of_pair = torch.arange(len(texts)).view(-1, 2)
    return People(batch.pooled(torch.tensor(np.array(pooled)).float(), of_pair), n_users)


@cache
def backbone() -> Backbone:
    """Return a frozen language model of the features' width; none of its outputs is used."""
    shape: dict[str, int] = {"vocab_size": 97, "n_layers": 1, "n_heads": 1, "max_positions": 128}
    language_model = tiny_gptj(**shape, width=FEATURES, eos_token_id=0)
    return Backbone(model=language_model, trainable="frozen")


def make_model(n_users: int, width: int, seed: int) -> PersonalRewardModel:
    """Build a personalised reward model on frozen features, as `experiment=frozen_features` does."""
    shared = backbone()
    torch.manual_seed(seed)
    return PersonalRewardModel(
        backbone=shared,
        encoder=LookupEncoder(
            n_users=n_users, user_dim=USER_DIM, vocabulary=torch.empty(1, 1), init="normal"
        ),
        aggregator=FiLM(
            hidden_size=FEATURES, n_blocks=1, user_dim=USER_DIM, layer_width=width, shift=False
        ),
        n_users=n_users + 1,
        optim=OPTIM,
    )


def train(people: People, is_in: Tensor, *, steps: int, width: int, seed: int) -> Named:
    """Train one model for each world on the pairs of its users, all pairs in each step.

    Args:
        is_in: whether each user is trained on, [W, N] bool.

    Returns:
        The weights [W, ...] by name.
    """
    models = [make_model(people.n_users, width, seed + world) for world in range(len(is_in))]
    weight = is_in.float().repeat_interleave(len(people.batch) // people.n_users, dim=1)
    weight = weight / weight.sum(dim=1, keepdim=True)
    model = models[0]
    part_of = {id(one): part for part, some in model.trainable_parts().items() for one in some}
    learned = {name: one for name, one in model.named_parameters() if one.requires_grad}
    states = [dict(one.named_parameters()) for one in models]
    weights = {
        name: torch.stack([one[name].detach() for one in states]).requires_grad_()
        for name in learned
    }
    groups = []
    for name, one in learned.items():
        rate, decay = OPTIM.rate_and_decay(part_of[id(one)])
        groups.append({"params": [weights[name]], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)

    def loss(own: Named, share: Tensor) -> Tensor:
        batch = replace(people.batch, weight=share)
        found: Tensor = call_method(model, own, "training_loss", batch)[0]
        return found

    for _ in range(steps):
        optimizer.zero_grad()
        vmap(loss)(weights, weight).sum().backward()
        optimizer.step()
    return {name: one.detach() for name, one in weights.items()}


Named = dict[str, Tensor]


def margin_terms(people: People, weights: Named, width: int) -> Tensor:
    """Return each pair's margin for the zero vector, and its slopes in the user vector, [W, N, P, 1 + D].

    Margins are affine in the user vector, as FiLM scales the features of a linear head.
    """
    model, n_pairs = make_model(people.n_users, width, 0), len(people.batch)
    points = torch.cat([torch.zeros(1, USER_DIM), torch.eye(USER_DIM)])

    def margins(own: Named, point: Tensor) -> Tensor:
        user = point.expand(n_pairs, USER_DIM)
        found: Tensor = call_method(model, own, "margins_for", people.batch, user)[0][0]
        return found

    with torch.no_grad():
        at = torch.stack([vmap(margins, in_dims=(0, None))(weights, one) for one in points], -1)
    terms = torch.cat([at[..., :1], at[..., 1:] - at[..., :1]], dim=-1)
    return terms.unflatten(1, (people.n_users, -1))


def fit(terms: Tensor, rows: Tensor, known: Tensor, *, steps: int = 8) -> Tensor:
    """Fit a vector to each person's pairs, [W, N, D], with the normal prior of the known rows [W, N, D].

    Newton's method, with the largest curvature of the logistic loss, so that no step overshoots.
    """
    share = known.float()[..., None] / known.sum(dim=1)[:, None, None]
    mean = (rows * share).sum(dim=1)  # [W, D]
    apart = rows - mean[:, None]
    covariance = (apart * share).mT @ apart + 1e-4 * torch.eye(USER_DIM)
    precision = torch.linalg.inv(covariance)[:, None]  # [W, 1, D, D]
    slopes = terms[..., 1:]
    inverse = torch.linalg.inv(precision + 0.25 * slopes.mT @ slopes)
    found = mean[:, None].expand(*terms.shape[:2], USER_DIM)
    for _ in range(steps):
        margin = terms[..., 0] + (slopes @ found[..., None]).squeeze(-1)
        pull = (precision @ (found - mean[:, None])[..., None]).squeeze(-1)
        gradient = ((-margin).sigmoid()[..., None] * slopes).sum(dim=2) - pull
        found = found + (inverse @ gradient[..., None]).squeeze(-1)
    return found


def likelihood(terms: Tensor, vectors: Tensor) -> Tensor:
    """Return each person's mean log-likelihood of a pair under vectors [W, N, D] of their own, [W, N]."""
    margins = terms[..., 0] + (terms[..., 1:] @ vectors[..., None]).squeeze(-1)
    return logsigmoid(margins).mean(dim=-1)


def best_of_rows(terms: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """Return the largest mean log-likelihood of each person's pairs under any known row, [W, N]."""
    best = torch.full(terms.shape[:2], -torch.inf)
    for row, there in zip(rows.unbind(dim=1), known.unbind(dim=1), strict=True):
        found = likelihood(terms, row[:, None].expand(*terms.shape[:2], USER_DIM))
        best = torch.where(there[:, None], torch.maximum(best, found), best)
    return best


def log_likelihood_ratio(asked: Tensor, shadows: Tensor, is_in: Tensor) -> Tensor:
    """Compare what is asked of a world with the same person in the other worlds, [W, N].

    Args:
        asked, shadows: statistics [W, N, S]. is_in: whether the shadow was trained on the person, [W, N].
    """
    ratio = torch.zeros(asked.shape[:2])
    for sign, member in ((1.0, is_in), (-1.0, ~is_in)):
        share = member.float()[..., None]
        counts, sums = share.sum(dim=0), (share * shadows).sum(dim=0)
        left = (sums - share * shadows) / (counts - share).clamp(min=1)  # without the world itself
        apart = (shadows - sums / counts.clamp(min=1))[member]
        covariance = apart.T @ apart / len(apart) + 1e-8 * torch.eye(asked.shape[-1])
        distance = asked - left
        squared = ((distance @ torch.linalg.inv(covariance)) * distance).sum(dim=-1)
        ratio += sign * -0.5 * (squared + torch.logdet(covariance))
    return ratio


def auc_and_tpr(score: Array, positive: NDArray[np.bool_], weight: Array) -> tuple[float, float]:
    """Return the area under the curve, and the true positive rate at `FALSE_POSITIVES`; all [n]."""
    order = np.argsort(-score, kind="stable")
    of_positives = (weight * positive)[order]
    of_negatives = (weight * ~positive)[order]
    true = of_positives.cumsum() / of_positives.sum()
    false = of_negatives.cumsum() / of_negatives.sum()
    area = float((of_negatives / of_negatives.sum() * true).sum())
    allowed = np.flatnonzero(false <= FALSE_POSITIVES)
    return area, float(true[allowed[-1]]) if len(allowed) > 0 else 0.0


def with_intervals(
    score: Tensor, positive: Tensor, asked: Tensor, *, n_resamples: int = 500
) -> dict[str, list[float]]:
    """Return value, low and high end of both measures; all arguments [W, N]."""
    worlds, users = (one.numpy() for one in asked.nonzero(as_tuple=True))
    values, labels = score[asked].double().numpy(), positive[asked].numpy()
    rng = np.random.default_rng(0)
    n_worlds, n_users = asked.shape
    samples = []
    for _ in range(n_resamples):
        of_worlds = rng.multinomial(n_worlds, [1 / n_worlds] * n_worlds)
        of_users = rng.multinomial(n_users, [1 / n_users] * n_users)
        samples.append(auc_and_tpr(values, labels, of_worlds[worlds] * of_users[users] * 1.0))
    ends = np.nanquantile(np.array(samples), [0.025, 0.975], axis=0)
    found = auc_and_tpr(values, labels, np.ones(len(values)))
    return {
        name: [round(float(one), 4) for one in (found[place], *ends[:, place])]
        for place, name in enumerate(("auc", "tpr"))
    }


def measure(
    people: People, *, n_worlds: int, steps: int, width: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Train the models of all worlds, attack them, and return both measures by export and attack."""
    lots = torch.rand(n_worlds, people.n_users, generator=torch.Generator().manual_seed(seed))
    place = lots.argsort(dim=1).argsort(dim=1)
    is_in, is_forgotten = place < people.n_users // 2, place < people.n_users // 4
    kept = is_in & ~is_forgotten
    found: dict[str, list[Tensor]] = {"full": [], "forgotten": [], "retrained": []}
    own = []
    for first in range(0, n_worlds, TOGETHER):
        some = slice(first, first + TOGETHER)
        for name, trained in (("forgotten", is_in[some]), ("retrained", kept[some])):
            start = seed + first + (0 if name == "forgotten" else n_worlds)
            weights = train(people, trained, steps=steps, width=width, seed=start)
            terms = margin_terms(people, weights, width)
            e_0 = weights["encoder.generic_vector"][:, None]
            rows = e_0 + weights["encoder.offsets.weight"][:, 1:]
            generic = likelihood(terms, e_0.expand_as(rows))
            fitted = likelihood(terms, fit(terms, rows, kept[some]))
            found[name].append(torch.stack([fitted, generic], dim=-1))
            if name == "forgotten":
                best = best_of_rows(terms, rows, trained)
                found["full"].append(torch.stack([best, generic], dim=-1))
                own.append(likelihood(terms, rows)[trained].mean())
    exports = {name: torch.cat(parts) for name, parts in found.items()}
    asked = is_forgotten | ~is_in
    results: dict[str, dict[str, Any]] = {}
    for name, statistics in exports.items():
        shadows = exports["full" if name == "full" else "forgotten"]
        attacks = {
            "threshold": statistics[..., 0],
            "shadow": log_likelihood_ratio(statistics, shadows, is_in),
        }
        results[name] = {
            attack: with_intervals(score, is_forgotten, asked) for attack, score in attacks.items()
        }
    others = exports["forgotten"][..., 1][~is_in].mean()
    results["log_likelihood"] = {"own_train_pairs": float(torch.stack(own).mean())}
    results["log_likelihood"]["generic_on_strangers"] = float(others)
    return results


def main() -> None:
    """Measure for each number of steps, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--worlds", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 200])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    people = simulate(given.users, given.pairs, given.seed)
    results: dict[str, Any] = {"settings": {**vars(given), "out": str(given.out)}, "steps": {}}
    for steps in given.steps:
        how = {"n_worlds": given.worlds, "width": given.width, "seed": given.seed}
        found = measure(people, steps=steps, **how)
        results["steps"][str(steps)] = found
        print(f"{steps} steps: {found.pop('log_likelihood')}", flush=True)
        for name, attacks in found.items():
            for attack, measures in attacks.items():
                print(f"  {name:10} {attack:10} auc {measures['auc']} tpr {measures['tpr']}")
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
