"""What a user model has learned, for the report: users.json of a run directory.

It holds a 2-D projection of the user vectors, cluster weights, and the tokens nearest to soft prompts,
so that pages need neither model nor data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from plrhf.core.bootstrap import Array
from plrhf.core.types import GENERIC_USER, UserBatch
from plrhf.data.module import PreferenceData
from plrhf.encoders import ClusterMixtureEncoder
from plrhf.evaluation.metrics import UserKind
from plrhf.evaluation.people import evenly, features_of, first_people
from plrhf.evaluation.records import Record, write_record
from plrhf.models.base import PersonalModule

MOST_USERS = 1000  # described; more would crowd the map
N_OWNERS, N_NEAREST = 3, 3


class Place(TypedDict):
    """A user's vector on the first two principal components, and the user's cluster weights."""

    at: list[float]
    weights: list[float] | None


class LearnedUser(Place):
    """A user and their description for people to read."""

    user_id: str
    user_kind: UserKind
    profile: str | None
    group: str | None


class NearestTokens(TypedDict):
    """The nearest tokens of each soft prompt vector of an owner, with their cosines."""

    owner: str
    vectors: list[list[tuple[str, float]]]


class LearnedUsers(Record):
    """users.json, schema 1.

    Attributes:
        fingerprint: of the model. n_users: number of train users, also of those not listed here.
        explained: fractions of the variance that the two components explain.
        generic: the generic user.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    fingerprint: str | None = None
    n_users: int
    explained: list[float]
    generic: Place
    users: list[LearnedUser]
    nearest_tokens: list[NearestTokens]


@torch.no_grad()
def write_users(
    path: Path, model: PersonalModule, data: PreferenceData, fingerprint: str | None
) -> None:
    """Write users.json; nothing is written if the encoder does not distinguish users.

    Users whose vector is the generic user's are left out.

    Args:
        path: of users.json. data: tokenised. fingerprint: of the model.
    """
    if not model.encoder.personal:
        return
    model.eval()
    names, batch = _users(model, data)
    vectors = model.encode(batch)[0].float()  # [U, user_dim]
    generic = model.encoder.generic(1).float()  # [1, user_dim]
    own = [at for at in range(len(names)) if not torch.allclose(vectors[at], generic[0])]
    names, index = [names[at] for at in own], batch.user_id[own]
    vectors = vectors[own]
    places, explained = principal_components(torch.cat([vectors, generic]).double().cpu().numpy())
    weights = _cluster_weights(model, torch.cat([index, index.new_tensor([GENERIC_USER])]))
    learned: list[Place] = [
        {"at": place, "weights": weight} for place, weight in zip(places, weights, strict=True)
    ]
    people = _descriptions(names, data)
    users: list[Any] = [{**who, **fact} for who, fact in zip(people, learned, strict=False)]
    record = LearnedUsers(
        fingerprint=fingerprint,
        n_users=data.n_users,
        explained=explained,
        generic=learned[-1],
        users=users,
        nearest_tokens=_nearest_tokens(model, data, names, vectors, generic),
    )
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        write_record(path, record)


def principal_components(vectors: Array) -> tuple[list[list[float]], list[float]]:
    """Project vectors [U, D] on their first two principal components.

    The sign of a component makes its largest coordinate positive. Missing components are 0. The smaller
    of the two Gram matrices is decomposed.

    Returns:
        Coordinates [U, 2], and the fraction of variance that each component explains.
    """
    centred = vectors - vectors.mean(axis=0)
    n_users, width = centred.shape
    if n_users <= width:
        values, left = np.linalg.eigh(centred @ centred.T)
        places = left[:, ::-1] * np.sqrt(values[::-1].clip(min=0))
    else:
        values, right = np.linalg.eigh(centred.T @ centred)
        places = centred @ right[:, ::-1]
    total = float(values.sum())
    shares = values[::-1] / total if total > 0 else np.zeros_like(values)
    places = np.pad(places, ((0, 0), (0, 2)))[:, :2]
    largest = np.abs(places).argmax(axis=0)
    places = places * np.where(places[largest, [0, 1]] < 0, -1, 1)
    return np.round(places, 5).tolist(), np.pad(shares, (0, 2))[:2].tolist()


def _users(model: PersonalModule, data: PreferenceData) -> tuple[list[str], UserBatch]:
    """Choose up to `MOST_USERS` train users, then unseen users, and return their ids and encoder inputs."""
    seen = evenly(model.card.users, MOST_USERS)
    unseen = (
        evenly(sorted(data.unseen_users()), MOST_USERS - len(seen))
        if len(seen) < MOST_USERS
        else []
    )
    names = [*seen, *unseen]
    index = [model.card.user_index(name) for name in seen] + [GENERIC_USER] * len(unseen)
    device = next(model.parameters()).device
    users = UserBatch(user_id=torch.tensor(index), features=features_of(data, names))
    draw = data.datasets["train"].context
    if draw is not None:
        users.context = draw.context_of_users(users.user_id)
    return names, move_data_to_device(users, device)


def _descriptions(names: Sequence[str], data: PreferenceData) -> list[dict[str, Any]]:
    """Describe users for people to read; profile and group are None for users without rows."""
    seen = set(data.splits.users)
    known = set(first_people(data))
    return [
        {
            "user_id": name,
            "user_kind": "seen" if name in seen else "unseen",
            "profile": data.source.profile(name) if name in known else None,
            "group": data.source.group(name) if name in known else None,
        }
        for name in names
    ]


def _cluster_weights(model: PersonalModule, index: Tensor) -> list[list[float] | None]:
    """Return the cluster weights of users by index; None for users or encoders without any."""
    if not isinstance(model.encoder, ClusterMixtureEncoder):
        return [None] * len(index)
    has_weights = index <= model.card.n_in_tables
    weights = model.encoder.mixture(index.where(has_weights, GENERIC_USER)).tolist()
    return [
        [round(one, 5) for one in row] if known else None
        for row, known in zip(weights, has_weights.tolist(), strict=True)
    ]


def _nearest_tokens(
    model: PersonalModule,
    data: PreferenceData,
    names: Sequence[str],
    vectors: Tensor,
    generic: Tensor,
) -> list[NearestTokens]:
    """Find the tokens nearest (by cosine) to each soft prompt vector of a few owners.

    Owners are the generic user, and the clusters of largest weight or else a few users.
    """
    n_tokens = model.aggregator.n_positions
    if n_tokens == 0:
        return []
    if isinstance(model.encoder, ClusterMixtureEncoder):
        everyone = torch.arange(model.card.n_in_tables + 1, device=vectors.device)
        order = model.encoder.mixture(everyone).mean(dim=0).argsort(descending=True)[:N_OWNERS]
        own = {f"cluster {at}": model.encoder.clusters[at] for at in order.tolist()}
    else:
        own = {name: vectors[names.index(name)] for name in evenly(names, N_OWNERS)}
    owners = {"generic user": generic[0], **own}
    # By the layer, as its weights, where they are sharded, may be on their way already.
    tokens = torch.arange(model.backbone.vocabulary_size, device=vectors.device)
    table = torch.nn.functional.normalize(model.backbone.embed(tokens).float(), dim=1)  # [V, d]
    tokenizer = data.row_tokenizer.tokenizer
    found: list[NearestTokens] = []
    for owner, vector in owners.items():
        each = torch.nn.functional.normalize(vector.float().view(n_tokens, -1), dim=1)  # [T, d]
        cosine, token = (each @ table.T).topk(N_NEAREST, dim=1)
        found.append(
            {
                "owner": owner,
                "vectors": [
                    [
                        (_token_text(tokenizer, place), round(value, 4))
                        for place, value in zip(*row, strict=True)
                    ]
                    for row in zip(token.tolist(), cosine.tolist(), strict=True)
                ],
            }
        )
    return found


def _token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text, or its name if it is only a part of a character."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens([token])[0] if "\ufffd" in text else text
