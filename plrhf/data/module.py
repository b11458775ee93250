"""The data module: it reads, splits and tokenises the rows of a source and serves batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from plrhf.core.errors import bad_value
from plrhf.core.progress import with_progress
from plrhf.core.row_packing import NO_USER, UserSlots
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import (
    SINGLE_PROCESS,
    PairDataset,
    RankShard,
    RestrictedDatasets,
    batches_by_length,
)
from plrhf.data.features import FeatureSchema
from plrhf.data.groups import groups_of, n_turns_apart
from plrhf.data.in_context import InContextTokenizer, OwnPairs, put_in_context, row_tokenizer
from plrhf.data.packing import LAYOUTS, Layout, LayoutName
from plrhf.data.parsing import LONGEST_ROW
from plrhf.data.reading import read_ids, read_rows
from plrhf.data.reasons import Reason, RefusedRow
from plrhf.data.rows import SPLITS, Rows, Ties, people_in
from plrhf.data.samplers import (
    BatchIndices,
    ResumableBatchSampler,
    ResumableLoader,
    ShardedBatches,
    make_sampler,
)
from plrhf.data.sources.base import Source
from plrhf.data.split_by import SplitBy
from plrhf.data.splits import all_as_test, split_rows, with_shuffled_users
from plrhf.data.text_value_cache import TextValueCache
from plrhf.data.text_values import compute_text_values
from plrhf.data.tokenizer import Tokenizer
from plrhf.data.tokens import TokenFile, load_or_tokenize
from plrhf.data.usable_rows import (
    CURES,
    MOST_TOKENS,
    check_some_fit,
    choose_lengths,
    tokenizing_notes,
)

FRACTIONS = ("val_fraction", "test_fraction")
"""Fractions by which either the source or `split_rows` divides the rows."""


class PreferenceData:
    """Reads the rows of a source, splits and tokenises them, and serves them as batches.

    Rows are read and split on construction, so that a tokenizer can be trained on the train rows.
    `tokenize` leaves out rows that are too long and splits the others again. Call it before asking for
    users or loaders.

    Args:
        source: where rows come from.
        seed: of splits and batch order.
        batch_size, eval_batch_size: pairs in a batch, over all processes.
        batch_tokens, users_per_batch: of train batches, see `samplers.make_sampler`.
        without_users: file of user ids, one a line, whose rows are left out.
        shuffle_users: permute users over the train rows and over the val rows, as a control.
        users, schema: of a trained model that is evaluated on these rows. All rows (of split "test", if
            rows have a split) are then test rows. None: both come from the train rows.
        context_pairs, min_context_pairs: `most` and `least` of `in_context.put_in_context`.
        ties: the model's tie parameter; with ``none``, rows without a preferred response are left out.
        others: see `reading.read_rows`, `splits.split_rows`, `tokenizer.RowTokenizer`.

    Attributes:
        datasets: tokenised pairs by split.
        own_pairs: pairs that are put in front of users' prompts; set before `tokenize` if not drawn from
            these rows. None without `context_pairs`.
        shard: this process's part of each batch.
    """

    own_pairs: OwnPairs | None = None
    _content_hash: str | None = None
    secret_sampling: bool = False  # of users, see `make_sampler`

    def __init__(
        self,
        *,
        source: Source,
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        batch_tokens: int | None = None,
        users_per_batch: int | None = None,
        on_bad_row: str = "refuse",
        max_row_bytes: int = LONGEST_ROW,
        without_users: str | None = None,
        ties: Ties = "none",
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        seen_prompt_test_fraction: float = 0.0,
        split_by: SplitBy = "prompt",
        unseen_fraction: float = 0.0,
        min_pairs_per_user: int = 1,
        max_users: int | None = None,
        shuffle_users: bool = False,
        max_prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        on_long_prompt: str = "truncate",
        on_long_response: str = "drop",
        separator: str = "\n",
        use_user_text: bool = False,
        use_user_features: bool = False,
        history_turns: int | None = None,
        context_pairs: int = 0,
        min_context_pairs: int = 1,
        users: Sequence[str] | None = None,
        schema: FeatureSchema | None = None,
    ) -> None:
        _check_sizes(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
        )
        self.source, self.seed, self.shuffle_users = source, seed, shuffle_users
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batch_tokens, self.users_per_batch = batch_tokens, users_per_batch
        kinds = None if schema is None else schema.kinds()
        if ties != "none" and context_pairs > 0:
            allowed = "none with data.context_pairs, which shows which response was chosen"
            raise bad_value("model.ties", ties, allowed, "Set model.ties=none")
        how: dict[str, Any] = {"on_bad_row": on_bad_row, "ties": ties != "none"}
        how |= {"without": read_ids(without_users), "max_row_bytes": max_row_bytes}
        self._rows, self.report = read_rows(source.records(), **how, feature_kinds=kinds)
        self.report.form = source.form
        self.report.check_some_left()
        self.on_bad_row = on_bad_row
        self._split_settings: dict[str, Any] = {
            "seed": seed,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "seen_prompt_test_fraction": seen_prompt_test_fraction,
            "split_by": split_by,
            "unseen_fraction": unseen_fraction,
            "min_pairs_per_user": min_pairs_per_user,
            "max_users": max_users,
            "applied_by_source": {name for name in FRACTIONS if hasattr(source, name)},
        }
        self._trained_users, self._trained_schema = users, schema
        self._split()
        self._counted = self.splits.counted
        self.tokenizer_options = {
            "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max_tokens,
            "on_long_prompt": on_long_prompt,
            "on_long_response": on_long_response,
            "separator": separator,
            "use_user_text": use_user_text,
            "use_user_features": use_user_features,
            "history_turns": history_turns,
            **({"context_pairs": context_pairs} if context_pairs > 0 else {}),
        }
        self.context_pairs = {"least": min_context_pairs, "most": context_pairs, "seed": seed}
        self.max_tokens = MOST_TOKENS if max_tokens is None else max_tokens
        self.datasets: dict[str, PairDataset] = {}
        self.truncated: dict[str, int] = {}
        self.fitted: list[str] = []  # notes on settings that were fitted to the backbone
        self.shard = SINGLE_PROCESS

    @property
    def rows(self) -> Rows:
        """All rows that were read, including those that are in no split."""
        return self._rows

    @property
    def n_users(self) -> int:
        """Number of train users, whose indices start at 1."""
        return len(self.splits.users)

    def _split(self, fits: NDArray[np.bool_] | None = None) -> None:
        """Split the rows that fit; set users and features from the train rows."""
        if self._trained_users is None:
            self.splits = split_rows(self._rows, fits=fits, **self._split_settings)
        else:
            self.splits = all_as_test(self._rows, self._trained_users, fits=fits)
        if self.shuffle_users:
            self.splits = with_shuffled_users(self.splits, seed=self.seed)
        people = people_in(self.splits.train)
        self.schema = (
            FeatureSchema.fit(people) if self._trained_schema is None else self._trained_schema
        )
        self.user_index = {user: place + 1 for place, user in enumerate(self.splits.users)}

    def tokenize(
        self,
        tokenizer: Tokenizer,
        *,
        layout: LayoutName,
        max_positions: int | None = None,
        user_slots: UserSlots = NO_USER,
        cache_dir: Path | None = None,
    ) -> None:
        """Tokenise the rows, leave out those that are too long, and split the others.

        Users are counted over the remaining rows, so use `splits`, `n_users` and `schema` afterwards.
        Only a tokenizer that is trained on the train rows needs them before.

        Args:
            layout: the backbone's: one row a pair, or two.
            max_positions, user_slots: see `fit_to_model`.
            cache_dir: where tokens are kept for other runs, see `load_or_tokenize`.

        Raises:
            ValueError: a split has rows of which none fits.
        """
        options: dict[str, Any] = self.tokenizer_options
        self.fitted += choose_lengths(options, max_positions)
        self.max_tokens = options["max_tokens"]
        self.fit_to_model(max_positions=max_positions, user_slots=user_slots)
        self.row_tokenizer = row_tokenizer(tokenizer, self.tokenizer_options)
        tokens = load_or_tokenize(
            self._rows.select(self._counted), self.row_tokenizer, cache_dir=cache_dir
        )
        self.report.refused.pop(Reason.CHAT_TEMPLATE.value, None)
        self._count_refused(list(tokens.refused.values()))
        fits = np.ones(len(self._rows), dtype=np.bool_)
        fits[self._counted] = self._fitting(tokens)
        n_too_long = int((~fits).sum()) - len(tokens.refused)
        limits = {"n_too_long": n_too_long, "max_tokens": self.max_tokens}
        check_some_fit(self.splits, fits, self.report, **limits)
        if not fits.all():
            self._split(fits)
        self.truncated = {**dict.fromkeys(CURES, 0), "response too long": n_too_long}
        for split in SPLITS:
            rows: Any = getattr(self.splits, split)
            if self.shuffle_users and self.row_tokenizer.reads_people:
                # What is said of users was permuted with them, so that these are other prompts.
                pairs = load_or_tokenize(rows, self.row_tokenizer, cache_dir=cache_dir)
            else:
                pairs = tokens.select(np.searchsorted(self._counted, self.splits.indices[split]))
            self._keep(split, rows, pairs, LAYOUTS[layout])
        if isinstance(self.row_tokenizer, InContextTokenizer):
            self.row_tokenizer.own_pairs = self.own_pairs or {}
            put_in_context(self.datasets, self.row_tokenizer, cache_dir, **self.context_pairs)
            self.own_pairs = self.row_tokenizer.own_pairs

    def _keep(self, split: str, rows: Rows, pairs: TokenFile, layout: Layout) -> None:
        """Make the dataset of a split, and count the rows that were truncated."""
        fits = self._fitting(pairs)
        self.truncated["response too long"] += int((~fits).sum())
        self.truncated["prompt truncated"] += int((pairs.cut & fits).sum())
        self.truncated["response truncated"] += int((pairs.response_cut & fits).sum())
        self.truncated["earlier turns left out"] += int((pairs.history_cut & fits).sum())
        rows, pairs = rows.select(np.flatnonzero(fits)), pairs.select(np.flatnonzero(fits))
        self.truncated["turn computed apart"] += n_turns_apart(rows, pairs)
        self.datasets[split] = PairDataset(
            rows,
            pairs,
            layout=layout,
            user_index=self.user_index,
            schema=self.schema,
            user_slots=self.user_slots,
        )

    def _fitting(self, pairs: TokenFile) -> NDArray[np.bool_]:
        """Return whether prompt and longer response of each pair have at most `max_tokens` tokens, [N].

        Rows that the chat template refuses do not fit.
        """
        prompt, *responses = pairs.lengths.T
        fits: NDArray[np.bool_] = prompt + np.maximum(*responses) <= self.max_tokens
        fits[list(pairs.refused)] = False
        return fits

    def set_known_users(self, users: Sequence[str]) -> None:
        """Set the users to those of a trained model now, as users may have been forgotten or enrolled.

        Args:
            users: ids in the model's order.
        """
        self.splits = replace(self.splits, users=tuple(users))
        self.user_index = {user: place + 1 for place, user in enumerate(users)}
        for dataset in self.datasets.values():
            dataset.number_users(self.user_index)

    def fit_to_model(self, *, max_positions: int | None, user_slots: UserSlots) -> None:
        """Adapt batches to a model that was built after the rows were tokenised.

        Args:
            max_positions: positions of the model without its user vectors; None: no limit.
            user_slots: see `PairDataset`.

        Raises:
            ValueError: `max_tokens` is larger than the positions of the model.
        """
        self.user_slots = user_slots
        for dataset in self.datasets.values():
            dataset.user_slots = user_slots
        if max_positions is not None and self.max_tokens > max_positions:
            raise bad_value(
                "data.max_tokens",
                self.max_tokens,
                f"at most the backbone's {max_positions} positions",
                f"Set data.max_tokens={max_positions}",
            )

    def _count_refused(self, refused: Sequence[str]) -> None:
        """Count rows that the chat template refuses; with on_bad_row=error raise the first one's error."""
        if len(refused) == 0:
            return
        if self.on_bad_row == "error":
            raise RefusedRow(Reason.CHAT_TEMPLATE, refused[0])
        self.report.refuse(Reason.CHAT_TEMPLATE, refused[0], len(refused))

    def tokenizing_notes(self) -> list[str]:
        """Return lines for the terminal on rows that were truncated or left out in tokenising."""
        return [*self.fitted, *tokenizing_notes(self.report, self.truncated, len(self._counted))]

    def content_hash(self) -> str:
        """Hash every field and the order of all rows read, including rows that are dropped later.

        With it, resumed or compared runs detect whether the rows are the same, whatever file they came
        from. It is the same before and after `tokenize`. It takes a few seconds for a million rows and
        is computed once. For one split see `Splits.content_hash`.
        """
        if self._content_hash is None:
            self._content_hash = self._rows.content_hash()
        return self._content_hash

    def restrict_to(self, *splits: str) -> Self:
        """Return a copy that has the tokenised pairs of these splits only."""
        part = copy(self)
        part.datasets = RestrictedDatasets({split: self.datasets[split] for split in splits})
        for name in ("splits", "source", "_rows"):  # all rows, and where they come from
            vars(part).pop(name, None)
        return part

    def counts(self) -> dict[str, Any]:
        """Return the numbers of rows read, dropped and used: the "data" part of results.json."""
        return {
            "read": self.report.read,
            "refused": dict(self.report.refused),
            "dropped": self.splits.dropped,
            "truncated": self.truncated,
            "rows": {split: len(dataset) for split, dataset in self.datasets.items()},
            "users": {"seen": self.n_users, "unseen": len(self.unseen_users())},
            "padding": self.padding(),
        }

    def unseen_users(self) -> set[str]:
        """Return the ids of test users without train rows."""
        return {one.user_id for one in people_in(self.splits.test)} - set(self.splits.users)

    def padding(self) -> float | None:
        """Return the fraction of padding among the tokens of train batches; None without pairs."""
        return self._train_sampler().padding()

    def set_shard(self, shard: RankShard) -> None:
        """Make loaders serve this shard of every batch; the order of pairs does not change."""
        self.shard = shard

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self._train_sampler(), kind=ResumableLoader)

    def _train_sampler(self) -> ResumableBatchSampler:
        """Make the sampler of train batches."""
        return make_sampler(
            self.datasets["train"],
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            users_per_batch=self.users_per_batch,
            secret=self.secret_sampling,
            seed=self.seed,
            accumulated_batches=self.shard.accumulated_batches,
        )

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("val")

    def evaluation_loader(self, split: str) -> DataLoader:
        """Return a loader of all pairs of a split, sorted by length to avoid padding, longest first.

        If memory is too small for the longest pairs, it fails at once and not at the end.
        """
        batches = batches_by_length(self.datasets[split], self.eval_batch_size)
        return self._loader(split, [BatchIndices(one) for one in batches])

    def _loader(self, split: str, batches: Any, kind: type[DataLoader] = DataLoader) -> DataLoader:
        """Make a loader of this process's shards of batches."""
        # Without a generator of its own a loader draws from the global one, which resuming must not.
        return kind(
            ShardedBatches(self.datasets[split], self.shard),
            sampler=batches,
            batch_size=None,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def values_per_pair(self, split: str, compute: Callable[[PreferenceBatch], Tensor]) -> Tensor:
        """Compute `compute(batch)` [B, ...] for every pair of a split, over all processes.

        Returns:
            The values [N, ...] in the split's order.
        """
        own = None
        for batch in with_progress(self.evaluation_loader(split), f"reading {split} pairs"):
            values, counted = compute(batch), batch.counted()
            if own is None:
                own = values.new_zeros(len(self.datasets[split]), *values.shape[1:])
            own[batch.row[counted]] = values[counted]
        assert own is not None
        return self.shard.sum_over_ranks(own)

    def precompute_reference(
        self,
        reference: Callable[[PreferenceBatch], Tensor],
        cache: TextValueCache | None = None,
    ) -> None:
        """Store the reference log-probabilities `reference(batch)` [B, 2] of all pairs."""
        for dataset in self.datasets.values():
            dataset.ref_logps = compute_text_values(
                dataset, reference, self.eval_batch_size, cache, shard=self.shard, what="reference"
            )

    def precompute_hidden(
        self, pool: Callable[[PreferenceBatch], Tensor], cache: TextValueCache | None = None
    ) -> None:
        """Store the pooled hidden states `pool(batch)` [B, 2, d] of all pairs."""
        for dataset in self.datasets.values():
            dataset.hidden = compute_text_values(
                dataset, pool, self.eval_batch_size, cache, shard=self.shard, what="features"
            )
            dataset.groups = groups_of(dataset.rows, conversations=False)


def _check_sizes(**sizes: int | None) -> None:
    """Raise a ValueError if a size is below 1."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            good = {"max_tokens": 1024, "batch_tokens": 4096}.get(name, 32)
            cure = f"Set data.{name}={good}"
            raise bad_value(f"data.{name}", value, "a whole number from 1", cure)
