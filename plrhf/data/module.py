"""Rows of a source as batches: read, divided, tokenised, and served in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from plrhf.config import NOT_FOR_THE_CONSTRUCTOR, build, locate, parameters, unknown_key
from plrhf.data.features import FeatureSchema
from plrhf.data.known import KnownTexts, Text
from plrhf.data.packing import Layout, RowTokenizer, Tokenizer, TokenPair, packed, two_rows
from plrhf.data.rows import Row, read_rows
from plrhf.data.sources.base import Source
from plrhf.data.splits import Splits, shuffle_users, split_rows
from plrhf.errors import bad_value
from plrhf.types import GENERIC_USER, PreferenceBatch


def as_they_are(value: Any) -> Any:
    """The sum over processes, or what the first one says, where there is one."""
    return value


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of every batch, and how results of all come together.

    Args:
        total: the sum of a CPU tensor over all processes.
        first: what the first process has of something small, on all of them.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = as_they_are
    first: Callable[[Any], Any] = as_they_are


EVERYTHING = Share()  # of the only process


@dataclass
class OfTexts:
    """A value of each pair's two texts, kept once a distinct text."""

    values: Tensor  # [M, ...] float32
    places: Tensor  # [N, 2] int64: chosen, rejected

    def __getitem__(self, at: Tensor) -> Tensor:
        """Values [B, 2, ...] of the pairs at places [B]."""
        return self.values[self.places[at]]


class PairDataset:
    """Tokenised pairs of one split, and what was computed for them beforehand.

    Attributes:
        ref_logps: reference log-probabilities of chosen and rejected, [N, 2], or None.
        hidden: pooled trunk outputs, [N, 2, d], or None.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        pairs: Sequence[TokenPair],
        *,
        layout: Layout,
        user_index: dict[str, int],
        schema: FeatureSchema,
    ) -> None:
        self.rows, self.pairs, self.layout = rows, pairs, layout
        self.user_id = torch.tensor([user_index.get(r.user_id, GENERIC_USER) for r in rows]).long()
        encoded = {id(row.user_features): schema.encode(row.user_features) for row in rows}
        features = [encoded[id(row.user_features)] for row in rows]
        self.features = torch.tensor(features, dtype=torch.float32).view(
            len(rows), schema.n_features
        )
        self.ref_logps: OfTexts | None = None
        self.hidden: OfTexts | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: Sequence[int]) -> PreferenceBatch:
        """The pairs at these places as one batch."""
        at = torch.tensor(places, dtype=torch.int64)
        pairs = [] if self.hidden is not None else [self.pairs[place] for place in places]
        input_ids, segment, positions = self.layout(pairs)
        batch = PreferenceBatch(
            user_id=self.user_id[at],
            features=self.features[at],
            input_ids=input_ids,
            segment=segment,
            position_ids=positions,
            row=at,
            ref_logps=None if self.ref_logps is None else self.ref_logps[at],
        )
        if self.hidden is None:
            return batch
        distinct, texts = self.hidden.places[at].unique(return_inverse=True)
        return batch.pooled(self.hidden.values[distinct], texts)

    def share(self, places: Sequence[int], share: Share) -> PreferenceBatch:
        """What a process takes of the batch at these places.

        Weights make the mean over processes of weighted sums the mean over the whole batch. Where
        there are fewer pairs than processes, some take one of weight 0, as all must take part.
        """
        if share.world_size == 1:
            return self.batch(places)
        own = places[share.rank :: share.world_size]
        weight = share.world_size / len(places) if len(own) > 0 else 0.0
        batch = self.batch(own if len(own) > 0 else places[:1])
        return replace(batch, weight=torch.full((len(batch),), weight))

    def texts(self) -> tuple[list[Text], Tensor]:
        """Distinct (prompt, response) texts, and which of them each pair's two are, [N, 2]."""
        places: dict[Text, int] = {}
        of_pair = [
            [
                places.setdefault((pair.prompt, text), len(places))
                for text in (pair.chosen, pair.rejected)
            ]
            for pair in self.pairs
        ]
        return list(places), torch.tensor(of_pair, dtype=torch.int64).view(-1, 2)

    @classmethod
    def of_tokens(cls, pairs: Sequence[TokenPair]) -> Self:
        """Pairs in one row each, for what concerns their text alone: every user is the generic one."""
        row = Row(prompt="", chosen="", rejected="", user_id="", prompt_id="", pair_id="")
        schema = FeatureSchema.fit(())
        return cls([row] * len(pairs), pairs, layout=packed, user_index={}, schema=schema)


def coupled(texts: Sequence[Text], *, together: bool) -> tuple[list[TokenPair], Tensor]:
    """Texts as pairs: two of one prompt in each if `together`, else one and an empty response.

    Returns:
        The pairs, and the places [P, 2] of their responses in `texts`, N for an empty one.
    """
    pairs, places = [], []
    waiting: dict[tuple[int, ...], int] = {}
    for place, (prompt, response) in enumerate(texts):
        if together and prompt in waiting:
            first = waiting.pop(prompt)
            pairs.append(TokenPair(prompt, texts[first][1], response))
            places.append([first, place])
        elif together:
            waiting[prompt] = place
        else:
            waiting[(place,)] = place
    for place in waiting.values():
        pairs.append(TokenPair(*texts[place], ()))
        places.append([place, len(texts)])
    return pairs, torch.tensor(places, dtype=torch.int64).view(-1, 2)


class OrderedBatches(Sampler[list[int]]):
    """Batches in an order fixed by seed and epoch alone, which can start in the middle.

    Args:
        n_rows: rows in all. batch_size: rows a batch (the last may hold fewer). seed: any integer.

    Attributes:
        served: batches given out since training began. It alone says where an epoch's next batch
            lies, as Lightning neither exhausts this iterator nor tells a batch sampler the epoch.
    """

    def __init__(self, n_rows: int, *, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.served = 0

    def __len__(self) -> int:
        return -(-self.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.served, max(1, len(self)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.n_rows, generator=generator).tolist()
        for batch in range(first, len(self)):
            self.served += 1
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class ResumableLoader(DataLoader):
    """A loader whose place Lightning stores in checkpoints and puts back."""

    def state_dict(self) -> dict[str, int]:
        """How many batches have been served."""
        sampler: Any = self.batch_sampler
        return {"served": sampler.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many batches."""
        sampler: Any = self.batch_sampler
        sampler.served = state["served"]


class OpenSplits(dict[str, PairDataset]):
    """Datasets by split; a split that is not among them says why it cannot be had."""

    def __missing__(self, split: str) -> PairDataset:
        raise LookupError(
            f"{split} pairs are closed here: only {', '.join(self)} may be looked at while a model "
            "is trained and its best checkpoint chosen"
        )


class PreferenceData(LightningDataModule):
    """Train, val and test pairs of a source.

    Reading and splitting happen on construction, so that a tokenizer can be learned from the train
    rows; `tokenize` must be called before loaders are asked for.

    Args:
        source: where rows come from.
        seed: of splits and batch order.
        batch_size, eval_batch_size: pairs a step, over all processes.
        users, schema: those of a trained model, to evaluate it on other rows: all rows (of split
            "test", where rows have one) are then test rows. None: both are taken from the train rows.
        shuffle_users: permute users over train rows and over val rows, the control that must lose.
        others: see `rows.read_rows`, `splits.split_rows`, `packing.RowTokenizer`.
    """

    def __init__(
        self,
        *,
        source: Source,
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        on_bad_row: str = "refuse",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seen_prompt_test_fraction: float = 0.0,
        unseen_fraction: float = 0.0,
        min_pairs_per_user: int = 1,
        max_users: int | None = None,
        shuffle_users: bool = False,
        max_prompt_tokens: int = 512,
        max_tokens: int = 1024,
        on_long_prompt: str = "truncate",
        separator: str = "\n",
        use_user_text: bool = False,
        users: Sequence[str] | None = None,
        schema: FeatureSchema | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_tokens", max_tokens),
        ):
            if value < 1:
                raise bad_value(
                    f"data.{name}", value, "a whole number from 1", f"Set data.{name}=32"
                )
        self.source, self.seed = source, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        rows, self.report = read_rows(source.records(), on_bad_row=on_bad_row)
        if users is None:
            self.splits = split_rows(
                rows,
                seed=seed,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
                seen_prompt_test_fraction=seen_prompt_test_fraction,
                unseen_fraction=unseen_fraction,
                min_pairs_per_user=min_pairs_per_user,
                max_users=max_users,
            )
        else:
            self.splits = as_test(rows, users)
        if shuffle_users:
            self.splits = shuffled(self.splits, seed=seed)
        self.schema = FeatureSchema.fit(self.splits.train) if schema is None else schema
        self.user_index = {user: place + 1 for place, user in enumerate(self.splits.users)}
        self.tokenizer_options = {
            "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max_tokens,
            "on_long_prompt": on_long_prompt,
            "separator": separator,
            "use_user_text": use_user_text,
        }
        self.max_tokens = max_tokens
        self.datasets: dict[str, PairDataset] = {}
        self.truncated: dict[str, int] = {}
        self.share = EVERYTHING

    @property
    def n_users(self) -> int:
        """Users of the train rows; they are numbered from 1."""
        return len(self.splits.users)

    def tokenize(
        self, tokenizer: Tokenizer, *, causal: bool, max_positions: int | None = None
    ) -> None:
        """Turn the rows of every split into tokens, packed for causal models, else in two rows.

        Raises:
            ValueError: the model has fewer positions than `max_tokens`, or no train row fits.
        """
        if max_positions is not None and self.max_tokens > max_positions:
            raise bad_value(
                "data.max_tokens",
                self.max_tokens,
                f"at most the backbone's {max_positions} positions",
                f"Set data.max_tokens={max_positions}",
            )
        to_tokens = RowTokenizer(tokenizer, **self.tokenizer_options)  # type: ignore[arg-type]
        for split in ("train", "val", "test"):
            rows, pairs = to_tokens(getattr(self.splits, split))
            self.datasets[split] = PairDataset(
                rows,
                pairs,
                layout=packed if causal else two_rows,
                user_index=self.user_index,
                schema=self.schema,
            )
        if len(self.splits.train) > 0 and len(self.datasets["train"]) == 0:
            raise bad_value(
                "data.max_tokens",
                self.max_tokens,
                f"room for some of the {len(self.splits.train)} train rows, and none fits",
                "Raise data.max_tokens",
            )
        self.truncated = dict(to_tokens.counts)
        self.to_tokens = to_tokens

    def part(self, *splits: str) -> Self:
        """The tokenised pairs of these splits alone: who is given it cannot reach the others."""
        part = copy(self)
        part.datasets = OpenSplits({split: self.datasets[split] for split in splits})
        for name in ("splits", "source"):  # the rows of all splits, and where they come from
            vars(part).pop(name, None)
        return part

    def counts(self) -> dict[str, Any]:
        """What became of every row read: the "data" part of results.json."""
        return {
            "read": self.report.read,
            "refused": dict(self.report.refused),
            "dropped": self.splits.dropped,
            "truncated": self.truncated,
            "rows": {split: len(dataset) for split, dataset in self.datasets.items()},
            "users": {"seen": self.n_users, "unseen": len(self.unseen_users())},
        }

    def unseen_users(self) -> set[str]:
        """Users of test rows that the train rows do not have."""
        return {row.user_id for row in self.splits.test} - set(self.splits.users)

    def deal(self, share: Share) -> None:
        """Let this process's loaders give its share of every batch; the order of pairs stays."""
        self.share = share

    def train_dataloader(self) -> DataLoader:
        dataset = self.datasets["train"]
        batches = OrderedBatches(len(dataset), batch_size=self.batch_size, seed=self.seed)
        return self._loader(dataset, batches, kind=ResumableLoader)

    def val_dataloader(self) -> DataLoader:
        return self.ordered_loader("val")

    def ordered_loader(self, split: str) -> DataLoader:
        """All pairs of a split, shortest first so that little is padding; always the same order."""
        dataset = self.datasets[split]
        by_length = sorted(range(len(dataset)), key=lambda place: _length(dataset.pairs[place]))
        size = self.eval_batch_size
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        return self._loader(dataset, batches)

    def _loader(
        self, dataset: PairDataset, batches: Any, kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        # A generator of its own: a loader otherwise draws from the global one, which resuming must not.
        return kind(
            range(len(dataset)),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=partial(dataset.share, share=self.share),
            generator=torch.Generator(),
        )

    def collect(self, split: str, ask: Callable[[PreferenceBatch], Tensor]) -> Tensor:
        """`ask(batch)` [B, ...] of every pair of a split, [N, ...], over all processes."""
        dataset = self.datasets[split]
        return self.share.total(_placed(len(dataset), self.ordered_loader(split), ask))

    def precompute_reference(
        self, reference: Callable[[PreferenceBatch], Tensor], known: KnownTexts | None = None
    ) -> None:
        """Keep `reference(batch)` [B, 2] of every pair: the reference never changes."""
        for dataset in self.datasets.values():
            size = self.eval_batch_size
            dataset.ref_logps = of_texts(dataset, reference, size, known, share=self.share)

    def precompute_hidden(
        self, pool: Callable[[PreferenceBatch], Tensor], known: KnownTexts | None = None
    ) -> None:
        """Keep `pool(batch)` [B, 2, d] of every pair."""
        for dataset in self.datasets.values():
            size = self.eval_batch_size
            dataset.hidden = of_texts(dataset, pool, size, known, share=self.share)


def of_texts(
    dataset: PairDataset,
    compute: Callable[[PreferenceBatch], Tensor],
    batch_size: int,
    known: KnownTexts | None = None,
    *,
    share: Share = EVERYTHING,
) -> OfTexts | None:
    """`compute` [B, 2, ...] of every pair, each text that is not known computed once.

    Args:
        known: values from before, of the first process; others have None and are told.
    """
    texts, places = dataset.texts()
    values, missing = (None, [*range(len(texts))]) if known is None else known.find(texts)
    missing, shape = share.first((missing, None if values is None else values.shape))
    if shape is not None:
        values = share.total(torch.zeros(shape) if values is None else values)
    if len(missing) > 0:
        new = [texts[place] for place in missing]
        together = dataset.layout is packed
        found = share.total(_computed(new, compute, batch_size, share, together=together))
        if known is not None:
            known.add(new, found)
        values = torch.zeros(len(texts), *found.shape[1:]) if values is None else values
        values[missing] = found
    return None if values is None else OfTexts(values, places)


def _computed(
    texts: Sequence[Text],
    compute: Callable[[PreferenceBatch], Tensor],
    batch_size: int,
    share: Share,
    *,
    together: bool,
) -> Tensor:
    """`compute` of every text [N, ...], two of one prompt in a row if `together`.

    Zero for those of other processes' shares.
    """
    pairs, places = coupled(texts, together=together)
    blank = PairDataset.of_tokens(pairs)
    order = sorted(range(len(pairs)), key=lambda place: _length(pairs[place]))
    values: Tensor | None = None
    for start in range(0, len(order), batch_size):
        batch = blank.share(order[start : start + batch_size], share)
        found, counted = compute(batch), batch.counted()  # [B, 2, ...]
        if values is None:
            values = torch.zeros(len(texts) + 1, *found.shape[2:])
        values[places[batch.row[counted]]] = found[counted].float()
    assert values is not None
    return values[: len(texts)]


def _placed(n_pairs: int, loader: DataLoader, ask: Callable[[PreferenceBatch], Tensor]) -> Tensor:
    """`ask(batch)` put at the batch's places in [n_pairs, ...]; zero where this process has no pair."""
    found: Tensor | None = None
    for batch in loader:
        values, counted = ask(batch), batch.counted()
        if found is None:
            found = values.new_zeros(n_pairs, *values.shape[1:])
        found[batch.row[counted]] = values[counted]
    assert found is not None
    return found


def build_data(
    node: dict[str, Any], *, users: Sequence[str] | None = None, schema: FeatureSchema | None = None
) -> PreferenceData:
    """The data module of a config's ``data``: its source gets the settings its constructor names."""
    own, of_source = parameters(PreferenceData), parameters(locate(node.get("_target_"), "data"))
    allowed = {*own, *of_source, *NOT_FOR_THE_CONSTRUCTOR} - {"source", "users", "schema"}
    for name, value in node.items():
        if name not in allowed:
            raise unknown_key(f"data.{name}", value, sorted(allowed))
    source = build({k: v for k, v in node.items() if k not in own or k in of_source}, "data")
    target = f"{PreferenceData.__module__}.{PreferenceData.__qualname__}"
    settings = {k: v for k, v in node.items() if k in own}
    return build(
        {"_target_": target, **settings}, "data", source=source, users=users, schema=schema
    )


def _length(pair: TokenPair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def as_test(rows: Sequence[Row], users: Sequence[str]) -> Splits:
    """All rows, or those of split "test" where rows have one, as test rows of a trained model."""
    test = [row for row in rows if row.split in (None, "test")]
    if len(test) == 0:
        raise bad_value("test rows", 0, "1 or more", "Give rows without split, or with split=test")
    dropped = {} if len(test) == len(rows) else {"row outside test": len(rows) - len(test)}
    return Splits(train=[], val=[], test=test, users=tuple(users), dropped=dropped)


def shuffled(splits: Splits, *, seed: int) -> Splits:
    """The same splits with users permuted over train rows and over val rows; test keeps the truth."""
    return replace(
        splits,
        train=shuffle_users(splits.train, seed=seed),
        val=shuffle_users(splits.val, seed=seed + 1),
    )
