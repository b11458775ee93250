"""Generates texts of a policy and its reference for users: generations.jsonl, one text on each line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.digests import json_text
from plrhf.data.module import PreferenceData
from plrhf.data.packing import LAYOUTS
from plrhf.data.rows import Features, Message, Row
from plrhf.data.text_values import compute_text_values
from plrhf.evaluation.best_of import (
    BestOf,
    BestOfPoint,
    best_of_curve,
    best_texts,
    candidate_rewards,
)
from plrhf.evaluation.people import evenly, features_of, first_people, first_prompts
from plrhf.evaluation.records import Record, read_lines, write_text
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card
from plrhf.models.generation import check_options, check_room, generate
from plrhf.models.policy import PersonalPolicy


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Which texts to generate, and how.

    Args:
        users: ids of train users, or the number of users to choose evenly from all.
        prompts: number of distinct prompts, the first ones of the test rows.
        max_new_tokens, temperature, top_p: see `generate`.
        generic: generate a text for the generic user too, one for each prompt, which every user scores.
        reference: the same with the reference.
        best_of: write the best of several texts too; None: do not.
        origin: the setting that these options come from, for messages.
    """

    users: int | list[str | int]
    prompts: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    generic: bool = False
    reference: bool = False
    best_of: BestOf | None = None
    origin: str = "eval"

    def __post_init__(self) -> None:
        n_users = self.users if isinstance(self.users, int) else len(self.users)
        whole = "a whole number from 1"
        for name, good, allowed in (
            ("users", n_users >= 1, f"{whole}, or ids of train users"),
            ("prompts", self.prompts >= 1, whole),
        ):
            if not good:
                field = f"{self.origin}.{name}"
                raise bad_value(field, getattr(self, name), allowed, f"Set {field}=1")
        check_options(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            field=self.origin,
        )


class GeneratedText(Record):
    """A line of generations.jsonl: a text, its writer, and the user it was written for.

    Attributes:
        profile: a description of the user for people to read: the source's or else the user text.
        writer: "policy", "generic" (the policy for nobody in particular), "reference", or
            "best_of_policy" or "best_of_reference", the best of several sampled texts.
        score: how much the user likes the text, in log odds; None if unknown.
        style: what is measured on the text, by attribute, in standard deviations; None if nothing is.
        taste: how much the user likes more of each attribute; None if unknown.
        reference_logp: mean log-probability of a token under the reference, in nats; None if not asked.
        fingerprint: fingerprint of the model.
    """

    prompt: str | tuple[Message, ...]
    prompt_id: str
    user_id: str
    profile: str | None
    user_features: Features | None
    writer: str
    response: str
    score: float | None
    style: dict[str, float] | None = None
    taste: dict[str, float] | None = None
    reference_logp: float | None = None
    fingerprint: str | None = None


def read_generations(path: Path) -> list[GeneratedText]:
    """Read the texts that `write_generations` wrote.

    Raises:
        ValueError: a line holds no such text.
    """
    return list(read_lines(path, GeneratedText))


def requested_users(card: Card, texts: GenerationOptions) -> list[str]:
    """Return the ids of the users that `write_generations` will write for.

    Raises:
        ValueError: a user the model was not trained on.
    """
    if isinstance(texts.users, int):
        return evenly(card.users, texts.users)
    ids = [str(user) for user in texts.users]
    for user in ids:
        card.user_index(user, f"{texts.origin}.users")
    return ids


def requested_rows(
    model: PersonalModule, data: PreferenceData, texts: GenerationOptions
) -> list[Row]:
    """Return the rows that `write_generations` will answer: one for each prompt and user.

    Raises:
        ValueError: a user the model was not trained on, or no room for so many tokens.
    """
    first = first_people(data)
    own = {user: first.get(user) for user in requested_users(model.card, texts)}
    asked = [
        replace(
            row,
            user_id=user,
            user_text=None if said is None else said.user_text,
            user_features=None if said is None else said.user_features,
        )
        for row in first_prompts(data.splits.test, texts.prompts)
        for user, said in own.items()
    ]
    check_room(
        model,
        [data.row_tokenizer.prompt(row) for row in asked],
        max_new_tokens=texts.max_new_tokens,
        field=texts.origin,
    )
    return asked


def write_generations(
    path: Path,
    model: PersonalPolicy,
    data: PreferenceData,
    texts: GenerationOptions,
    fingerprint: str | None = None,
) -> dict[str, list[BestOfPoint]]:
    """Write generations.jsonl: texts of the policy (and of others asked) for all prompts and users.

    The generic user and the reference have one text for all users with the same prompt text. Prompt
    texts differ only if user texts are part of them.

    Args:
        path: path of generations.jsonl. data: tokenised data. fingerprint: fingerprint of the model.

    Returns:
        Curves of the best of several texts, by who sampled them.
    """
    asked = requested_rows(model, data, texts)
    written, curves = _responses(model, data, texts, asked)
    likely = {
        writer: reference_logps(model, data, asked, responses) if texts.reference else None
        for writer, responses in written.items()
    }
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return curves
    lines = []
    for writer, responses in written.items():
        of_tokens = likely[writer]
        for place, (row, text) in enumerate(zip(asked, responses, strict=True)):
            profile = data.source.profile(row.user_id)
            one = GeneratedText(
                prompt=row.prompt,
                prompt_id=row.prompt_id,
                user_id=row.user_id,
                profile=row.user_text if profile is None else profile,
                user_features=row.user_features,
                writer=writer,
                response=text,
                score=data.source.true_score(row.user_id, text),
                style=data.source.measured_style(text),
                taste=data.source.taste(row.user_id),
                reference_logp=None if of_tokens is None else of_tokens[place],
                fingerprint=fingerprint,
            )
            lines.append(json_text(one.to_json()))
    write_text(path, "".join(lines))
    return curves


@torch.no_grad()
def reference_logps(
    model: PersonalPolicy, data: PreferenceData, rows: Sequence[Row], responses: Sequence[str]
) -> list[float]:
    """Return the mean log-probability of a token of each response under the reference, in nats.

    The end token counts. Fluent text has a high value.
    """
    tokenizer = data.row_tokenizer
    pairs = [
        replace(tokenizer.pair(replace(row, chosen=text, rejected="")), rejected=())
        for row, text in zip(rows, responses, strict=True)
    ]
    dataset = PairDataset.from_tokens(pairs, layout=LAYOUTS[model.backbone.layout])
    device = next(model.parameters()).device

    def compute(batch: PreferenceBatch) -> Tensor:
        return model.reference_logps(move_data_to_device(batch, device)).cpu()

    with model.autocast():
        sums = compute_text_values(dataset, compute, data.eval_batch_size)
    assert sums is not None
    n_tokens = torch.tensor([len(pair.chosen) for pair in pairs])
    return (sums.values[sums.of_pair[:, 0]] / n_tokens).tolist()


def _responses(
    model: PersonalPolicy, data: PreferenceData, texts: GenerationOptions, asked: Sequence[Row]
) -> tuple[dict[str, list[str]], dict[str, list[BestOfPoint]]]:
    """Return the responses to the rows asked, by writer, and curves of the best of several texts."""
    how: dict[str, Any] = {
        "max_new_tokens": texts.max_new_tokens,
        "temperature": texts.temperature,
        "top_p": texts.top_p,
    }
    tokenizer = data.row_tokenizer.tokenizer
    prompts = [data.row_tokenizer.prompt(row) for row in asked]
    ids = [row.user_id for row in asked]
    index = torch.tensor([model.card.user_index(user) for user in ids])
    users = UserBatch(user_id=index, features=features_of(data, ids))
    distinct = list(dict.fromkeys(prompts))
    nobody = UserBatch(
        user_id=torch.full((len(distinct),), GENERIC_USER),
        features=data.schema.table([None] * len(distinct)),
    )
    # Without sampling, a policy that does not tell users apart has one text for all of them.
    is_personal = model.encoder.personal
    for_all = not is_personal and texts.temperature == 0
    written = {} if for_all else {"policy": generate(model, tokenizer, prompts, users, **how)}
    for writer, is_asked, user in (
        ("policy", for_all, nobody),
        ("generic", texts.generic and is_personal, nobody),
        ("reference", texts.reference, None),
    ):
        if is_asked:
            found = generate(model, tokenizer, distinct, user, **how)
            once = dict(zip(distinct, found, strict=True))
            written[writer] = [once[prompt] for prompt in prompts]
    curves: dict[str, list[BestOfPoint]] = {}
    if texts.best_of is not None:
        reward = texts.best_of.load_reward(ids)
        how["temperature"], n = texts.best_of.temperature, texts.best_of.n
        for writer in texts.best_of.writers:
            if writer == "reference":
                found = generate(model, tokenizer, [*distinct] * n, None, **how)
                sampled = {one: found[place :: len(distinct)] for place, one in enumerate(distinct)}
                candidates = [sampled[prompt] for prompt in prompts]
            else:
                everybody = UserBatch(index.repeat(n), users.features.repeat(n, 1))
                found = generate(model, tokenizer, [*prompts] * n, everybody, **how)
                candidates = [found[place :: len(prompts)] for place in range(len(prompts))]
            rewards = candidate_rewards(reward, asked, candidates)
            written[f"best_of_{writer}"] = best_texts(candidates, rewards)
            of_users = zip(ids, candidates, strict=True)
            true = [[data.source.true_score(user, one) for one in own] for user, own in of_users]
            curves[writer] = best_of_curve(rewards, true)
    return written, curves
