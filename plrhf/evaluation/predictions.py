"""A trained model on val and test pairs: predictions, results, texts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.stats import correctness
from plrhf.core.types import PreferenceBatch, UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData, people_in
from plrhf.data.rows import Features, Message, Person, Row, content_hash
from plrhf.data.splits import Splits, prompt_kinds
from plrhf.data.text_value_cache import TextValueCache
from plrhf.evaluation.metrics import choose_length_rule, summarise
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card
from plrhf.models.generation import check_options, check_room, generate
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

RESULTS_SCHEMA = 1


class Prepare(Callback):
    """Prepares the data once the model is where it will train, and before it does."""

    def __init__(self, data: PreferenceData, *, cache_dir: Path) -> None:
        self.data, self.cache_dir = data, cache_dir

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PersonalModule)
        prepare(pl_module, self.data, trainer, cache_dir=self.cache_dir)


def prepare(
    model: PersonalModule, data: PreferenceData, trainer: Trainer, *, cache_dir: Path | None = None
) -> None:
    """Compute once what would be computed again and again: reference, or frozen trunk.

    Args:
        cache_dir: keeps it for other runs too: neither depends on user model, seed or loss.
    """
    ask = _asker(model, trainer)

    def known(*what: str) -> TextValueCache | None:
        if cache_dir is None:
            return None
        key = content_hash(model.backbone.digest, trainer.precision, *what)  # of all processes
        # The first alone reads and writes, and the others are told.
        return TextValueCache(cache_dir / f"texts-{key}") if trainer.is_global_zero else None

    with evaluating(model, trainer):
        if isinstance(model, PersonalDPOPolicy):
            data.precompute_reference(ask(model.reference_logps), known("reference"))
        elif isinstance(model, PersonalRewardModel) and model.pooled_suffices:
            data.precompute_hidden(ask(model.pooled_trunk), known("pooled", model.pooling))
    model.train()


@contextlib.contextmanager
def evaluating(model: PersonalModule, trainer: Trainer) -> Iterator[None]:
    """Within it the model is on the trainer's device, without dropout or gradient."""
    model.to(trainer.strategy.root_device)
    model.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


def engine(model: PersonalModule, trainer: Trainer) -> Callable[..., Any]:
    """A callable that runs ``(function, *arguments)`` where the model's weights can be used.

    A strategy that wraps the model (ZeRO-3) gathers sharded weights while its wrapper runs, so the
    call goes through the wrapper, as Lightning's own steps do.
    """
    wrapper = trainer.model
    if wrapper is None or wrapper is model:
        return model.run_with_weights
    redirect: Any = trainer.strategy._forward_redirection
    return partial(redirect, wrapper, model, "run_with_weights")


def _asker(model: PersonalModule, trainer: Trainer) -> Callable[..., Any]:
    """A function of a batch -> the same on CPU tensors, asked by way of the `engine`."""
    device = trainer.strategy.root_device
    through = engine(model, trainer)

    def ask(function: Callable[[PreferenceBatch], Tensor]) -> Callable[[PreferenceBatch], Tensor]:
        return lambda batch: through(function, move_data_to_device(batch, device)).cpu()

    return ask


def predict(model: PersonalModule, data: PreferenceData, trainer: Trainer) -> pd.DataFrame:
    """predictions.parquet: one row a val or test pair and context, oracle included where known."""
    ask = _asker(model, trainer)
    oracle = data.source.oracle_margins()
    frames = []
    for split in ("val", "test"):
        dataset = data.datasets[split]
        margins: dict[str, Tensor] = {}
        if len(dataset) > 0:
            with evaluating(model, trainer):
                found = data.values_per_pair(split, ask(partial(_margins_of_contexts, model)))
            margins = dict(zip(("user", "generic"), found.double().T, strict=True))
        if oracle is not None:
            true = [oracle[row.pair_id] for row in dataset.rows]
            margins["oracle"] = torch.tensor(true, dtype=torch.float64)
        pairs = _columns(dataset, split, data.splits)
        frames += [
            pd.DataFrame(
                {
                    **pairs,
                    "context": context,
                    "margin": values.numpy(),
                    "correct": correctness(values.numpy()),
                }
            )
            for context, values in margins.items()
        ]
    return pd.concat(frames, ignore_index=True)[list(PREDICTION)]


def _margins_of_contexts(model: PersonalModule, batch: PreferenceBatch) -> Tensor:
    """What `predict_step` says of a batch, [B, 2]: margins in the user's and the generic context."""
    found = model.predict_step(batch, 0)
    return torch.stack([found["user"], found["generic"]], dim=1)


PREDICTION = (
    *("split", "user_kind", "prompt_kind", "context", "user_id", "pair_id", "prompt_id"),
    *("margin", "correct", "chosen_tokens", "rejected_tokens"),
)
"""Columns of predictions.parquet."""


def _columns(dataset: PairDataset, split: str, splits: Splits) -> dict[str, Any]:
    """What predictions.parquet says of pairs in every context."""
    rows, seen = dataset.rows, set(splits.users)
    ids = [(row.user_id, row.pair_id, row.prompt_id) for row in rows]
    user_id, pair_id, prompt_id = zip(*ids, strict=True) if len(ids) > 0 else ((), (), ())
    return {
        "split": split,
        "user_kind": ["seen" if user in seen else "unseen" for user in user_id],
        "prompt_kind": prompt_kinds(rows, splits),
        "user_id": user_id,
        "pair_id": pair_id,
        "prompt_id": prompt_id,
        "chosen_tokens": dataset.lengths[:, 1].astype(int),
        "rejected_tokens": dataset.lengths[:, 2].astype(int),
    }


def summarise_run(
    predictions: pd.DataFrame,
    settings: Settings,
    data: PreferenceData,
    probes: dict[str, Any],
    how: dict[str, Any],
) -> dict[str, Any]:
    """results.json from predictions; the length rule's direction is read off val, never off test."""
    longer_wins = choose_length_rule(predictions[predictions["split"] == "val"])
    return {
        "schema": RESULTS_SCHEMA,
        "config": settings,
        **summarise(predictions, longer_wins=longer_wins),
        "data": data.counts(),
        "probes": probes,
        "run": how,
    }


def write_evaluation(directory: Path, results: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Write predictions.parquet and results.json."""
    directory.mkdir(parents=True, exist_ok=True)
    predictions.to_parquet(directory / "predictions.parquet", index=False)
    (directory / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Which texts to write, and how.

    Args:
        users: ids of train users, or how many to take, evenly from all.
        prompts: how many distinct test prompts, the first ones of the test rows.
        max_new_tokens, temperature, top_p: see `generate`.
        reference: let the reference write too; it writes once a prompt and each user judges it.
        origin: the setting these come from, for messages.
    """

    users: int | list[str | int]
    prompts: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    reference: bool = False
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


@dataclass(frozen=True, kw_only=True)
class Written:
    """One line of generations.jsonl: a text, who wrote it, and for whom.

    Attributes:
        profile: what a person may read about the user; what the user says of themselves where the
            source has no better.
        writer: "policy" or "reference".
        score: how much the user likes the text, in log odds; None where nobody knows.
    """

    prompt: str | tuple[Message, ...]
    prompt_id: str
    user_id: str
    profile: str | None
    user_features: Features | None
    writer: str
    response: str
    score: float | None


def read_texts(path: Path) -> list[Written]:
    """The texts that `write_texts` left.

    Raises:
        ValueError: a line holds no such text.
    """
    line_of = TypeAdapter(Written)
    texts = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                texts.append(line_of.validate_json(line, strict=True))
            except ValidationError as error:
                first = error.errors()[0]
                reason = ": ".join([*map(str, first["loc"]), first["msg"]])
                raise bad_value(
                    f"{path.name}:{number}",
                    line.strip(),
                    f"a line as eval=generate writes it ({reason})",
                    "Write the texts anew",
                ) from error
    return texts


def users_wanted(card: Card, texts: Texts) -> list[str]:
    """Ids of the users that `write_texts` will write for.

    Raises:
        ValueError: a user the model was not trained on.
    """
    if isinstance(texts.users, int):
        return evenly(card.users, texts.users)
    ids = [str(user) for user in texts.users]
    for user in ids:
        card.user_index(user, f"{texts.origin}.users")
    return ids


def texts_wanted(model: PersonalModule, data: PreferenceData, texts: Texts) -> list[Row]:
    """What `write_texts` will answer: a row a prompt and user, each with what its user says.

    Raises:
        ValueError: a user the model was not trained on, or no room for so many tokens.
    """
    first = first_people(data)
    own = {user: first.get(user) for user in users_wanted(model.card, texts)}
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


def write_texts(path: Path, model: PersonalDPOPolicy, data: PreferenceData, texts: Texts) -> None:
    """Write prompts x users x responses as JSONL, true scores with them where the source knows.

    The reference writes once for all who would ask it the same: everybody, unless users speak.
    """
    asked = texts_wanted(model, data, texts)
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
    written = {"policy": generate(model, tokenizer, prompts, users, **how)}
    if texts.reference:
        distinct = list(dict.fromkeys(prompts))
        once = dict(zip(distinct, generate(model, tokenizer, distinct, None, **how), strict=True))
        written["reference"] = [once[prompt] for prompt in prompts]
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return
    with path.open("w") as file:
        for writer, responses in written.items():
            for row, text in zip(asked, responses, strict=True):
                profile = data.source.profile(row.user_id)
                one = Written(
                    prompt=row.prompt,
                    prompt_id=row.prompt_id,
                    user_id=row.user_id,
                    profile=row.user_text if profile is None else profile,
                    user_features=row.user_features,
                    writer=writer,
                    response=text,
                    score=data.source.true_score(row.user_id, text),
                )
                file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")


def evenly(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items (all, if fewer), spread evenly over them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def first_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """The first row of each of the first `count` distinct prompts."""
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.prompt_id, row)
        if len(distinct) == count:
            break
    return list(distinct.values())


def first_people(data: PreferenceData) -> dict[str, Row | Person]:
    """What the first row of each user says of them."""
    people = [*people_in(data.splits.train), *people_in(data.splits.test)]
    return {one.user_id: one for one in reversed(people)}


def features_of(data: PreferenceData, users: Sequence[str]) -> Tensor:
    """Encoded features of users, [N, F], from their first rows."""
    first = first_people(data)
    return data.schema.table([first[one].user_features if one in first else None for one in users])
