"""Rows of a source as batches: read, divided, tokenised, and served in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from plrhf.core.components import NOT_FOR_THE_CONSTRUCTOR, build, locate, parameters, unknown_key
from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, PreferenceBatch
from plrhf.data.features import FeatureSchema
from plrhf.data.known import KnownTexts, Text, keys_of
from plrhf.data.packing import Layout, RowTokenizer, Tokenizer, TokenPair, packed, two_rows
from plrhf.data.rows import Person, Row, Rows, read_rows
from plrhf.data.sources.base import Source
from plrhf.data.splits import Splits, shuffle_users, split_rows
from plrhf.data.store import LazySequence, Places
from plrhf.data.tokens import TokenFile, tokenised

TEXTS_AT_ONCE = 65_536
"""Texts whose values are computed and kept before the next ones are looked at."""

LENGTH_SPREAD = 0.1
"""How much shorter than the longest pair of a batch of like length another may be, as a share."""


def as_they_are(value: Any) -> Any:
    """The sum over processes, or what the first one says, where there is one."""
    return value


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of every batch, and how results of all come together.

    Args:
        total: the sum of a CPU tensor over all processes.
        first: what the first process has of something small, on all of them.
        n_summed: batches whose gradients are summed to one optimiser step.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = as_they_are
    first: Callable[[Any], Any] = as_they_are
    n_summed: int = 1


EVERYTHING = Share()  # of the only process

Drawn = tuple[list[int], float]
"""Places of a batch's pairs, and its weight in the optimiser step."""


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
        people: Sequence[Row | Person] = rows
        person = np.arange(len(rows))
        if isinstance(rows, Rows):
            known, person = np.unique(rows.person, return_inverse=True)
            people = [rows.people[number] for number in known]
        index = [user_index.get(one.user_id, GENERIC_USER) for one in people]
        of_people = schema.table([one.user_features for one in people])
        self.user_id = torch.tensor(index, dtype=torch.int64)[person]
        self.features = of_people[person]
        self.ref_logps: OfTexts | None = None
        self.hidden: OfTexts | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected response of every pair, [N, 3]."""
        if isinstance(self.pairs, TokenFile):
            return self.pairs.lengths
        of_pairs = [(len(one.prompt), len(one.chosen), len(one.rejected)) for one in self.pairs]
        return np.array(of_pairs, dtype=np.int32).reshape(-1, 3)

    def row_lengths(self) -> NDArray[np.int64]:
        """Tokens of each pair's row, or of its rows where the layout gives it two, [N, R]."""
        prompt, chosen, rejected = self.lengths.T.astype(np.int64)
        if self.layout is packed:
            return (prompt + chosen + rejected)[:, None]
        return np.stack([prompt + chosen, prompt + rejected], axis=1)

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

    def texts(self) -> tuple[Sequence[Text], Tensor]:
        """Distinct (prompt, response) texts, and which of them each pair's two are, [N, 2]."""
        every = Texts(self.pairs, np.arange(2 * len(self.pairs)))
        _, first, which = np.unique(keys_of(every), return_index=True, return_inverse=True)
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))
        return Texts(self.pairs, np.sort(first)), torch.from_numpy(rank[which]).view(-1, 2)

    @classmethod
    def of_tokens(cls, pairs: Sequence[TokenPair]) -> Self:
        """Pairs in one row each, for what concerns their text alone: every user is the generic one."""
        row = Row(prompt="", chosen="", rejected="", user_id="", prompt_id="", pair_id="")
        rows = Rows.of([row]).at(np.zeros(len(pairs), dtype=np.int64))
        schema = FeatureSchema.fit(())
        return cls(rows, pairs, layout=packed, user_index={}, schema=schema)


class Texts(LazySequence[Text]):
    """Texts of pairs: text 2 i is the chosen response of pair i with its prompt, 2 i + 1 the rejected.

    Args:
        numbers: of the texts to be had, in their order.
    """

    def __init__(self, pairs: Sequence[TokenPair], numbers: Places) -> None:
        self.pairs, self._numbers = pairs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, places: Places) -> Self:
        """The texts at these places."""
        return type(self)(self.pairs, self._numbers[places])

    def item(self, place: int) -> Text:
        """The text at a place."""
        of_pair, is_rejected = divmod(int(self._numbers[place]), 2)
        pair = self.pairs[of_pair]
        return pair.prompt, pair.rejected if is_rejected == 1 else pair.chosen


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


class OrderedBatches(Sampler[Drawn]):
    """Batches in an order fixed by seed and epoch alone, which can start in the middle.

    With `batch_tokens` pairs of like length stand together: they are divided once into classes,
    within which each epoch draws its batches at random, and batches of all classes are mixed. So
    every epoch has as many.

    Each batch comes with its weight in the optimiser step, k n / sum n over the k batches whose
    gradients are summed to one, n pairs in each: with it the mean of their losses is the mean over
    the step's pairs.

    Args:
        lengths: tokens of every pair's rows, [N, R]. seed: any integer.
        batch_size: pairs a batch, at most. batch_tokens: tokens a batch, padding among them, at most
            (a longer pair is a batch of its own); None: any number, pairs in random order.
        n_summed: see `Share`.

    Attributes:
        served: batches given out since training began. It alone says where an epoch's next batch
            lies, as Lightning neither exhausts this iterator nor tells a batch sampler the epoch.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        batch_tokens: int | None = None,
        n_summed: int = 1,
    ) -> None:
        self.lengths, self.seed, self.n_summed = lengths, seed, n_summed
        self.longest = lengths.max(axis=1)
        self.of_class, sizes = np.zeros(len(lengths), dtype=np.int32), [batch_size]
        if batch_tokens is not None:
            most = batch_tokens // lengths.shape[1]
            self.of_class, sizes = length_classes(self.longest, batch_size, most)
        # Batches as slices of the pairs in order of their classes.
        starts, end = [], 0
        for size, n_pairs in zip(sizes, np.bincount(self.of_class, minlength=1), strict=True):
            starts.append(np.arange(end, end + n_pairs, size))
            end += int(n_pairs)
        self.starts = np.concatenate(starts)
        self.ends = np.append(self.starts[1:], end)
        self.served = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Drawn]:
        epoch, first = divmod(self.served, max(1, len(self)))
        order, turn = self.epoch(epoch)
        sizes = (self.ends - self.starts)[turn]
        of_step = np.add.reduceat(sizes, np.arange(0, len(sizes), self.n_summed))
        for batch in range(first, len(self)):
            self.served += 1
            places = order[self.starts[turn[batch]] : self.ends[turn[batch]]].tolist()
            yield places, self.n_summed * len(places) / int(of_step[batch // self.n_summed])

    def epoch(self, number: int) -> tuple[Places, Places]:
        """Pairs in the order of their classes, [N], and batches in the order they are served."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self.of_class.max(initial=0) == 0:
            return order, np.arange(len(self))
        order = order[np.argsort(self.of_class[order], kind="stable")]
        return order, torch.randperm(len(self), generator=generator).numpy()

    def padding(self) -> float | None:
        """Share of padding among the tokens of the first epoch; None without pairs."""
        if len(self.lengths) == 0:
            return None
        order, _ = self.epoch(0)
        longest = np.maximum.reduceat(self.longest[order], self.starts)
        padded = self.lengths.shape[1] * (longest * (self.ends - self.starts)).sum()
        return 1 - float(self.lengths.sum() / padded)


def length_classes(
    lengths: NDArray[np.int64], batch_size: int, batch_tokens: int
) -> tuple[NDArray[np.int32], list[int]]:
    """Which class of like length each pair is in [N], longest first, and each class's batch size.

    A class has pairs at least `LENGTH_SPREAD` as long as its longest, and enough for one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    shortening = -lengths[order]  # ascends
    of_class = np.zeros(len(lengths), dtype=np.int32)
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        longest = -int(shortening[start])
        size = max(1, min(batch_size, batch_tokens // longest))
        like = int(np.searchsorted(shortening, -(1 - LENGTH_SPREAD) * longest, side="right"))
        end = max(like, start + size)
        of_class[order[start:end]] = len(sizes)
        sizes.append(size)
        start = end
    return of_class, sizes if len(sizes) > 0 else [batch_size]


class Dealt(Dataset[PreferenceBatch]):
    """A dataset of which whole batches are taken, or this process's share of them."""

    def __init__(self, pairs: PairDataset, share: Share) -> None:
        self.pairs, self.share = pairs, share

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, drawn: Drawn) -> PreferenceBatch:
        places, step_weight = drawn
        return replace(self.pairs.share(places, self.share), step_weight=step_weight)


class ResumableLoader(DataLoader):
    """A loader whose place Lightning stores in checkpoints and puts back."""

    def state_dict(self) -> dict[str, int]:
        """How many batches have been served."""
        sampler: Any = self.sampler
        return {"served": sampler.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many batches."""
        sampler: Any = self.sampler
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
        batch_size, eval_batch_size: pairs a batch, over all processes.
        batch_tokens: see `OrderedBatches`; of train batches.
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
        batch_tokens: int | None = None,
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
        for name, value, good in (
            ("batch_size", batch_size, 32),
            ("eval_batch_size", eval_batch_size, 32),
            ("batch_tokens", batch_tokens, 4096),
            ("max_tokens", max_tokens, 1024),
        ):
            if value is not None and value < 1:
                raise bad_value(
                    f"data.{name}", value, "a whole number from 1", f"Set data.{name}={good}"
                )
        self.source, self.seed = source, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.batch_tokens = batch_tokens
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
        self.schema = FeatureSchema.fit(everybody(self.splits.train)) if schema is None else schema
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
        self,
        tokenizer: Tokenizer,
        *,
        causal: bool,
        max_positions: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Turn the rows of every split into tokens, packed for causal models, else in two rows.

        Args:
            cache_dir: keeps them for other runs too, see `tokenised`.

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
        self.to_tokens = RowTokenizer(tokenizer, **self.tokenizer_options)  # type: ignore[arg-type]
        self.truncated = {"prompt truncated": 0, "response too long": 0}
        for split in ("train", "val", "test"):
            rows: Any = getattr(self.splits, split)
            pairs = tokenised(rows, self.to_tokens, cache_dir=cache_dir)
            prompt, *responses = pairs.lengths.T
            fits = prompt + np.maximum(*responses) <= self.max_tokens
            self.truncated["prompt truncated"] += int(pairs.cut.sum())
            self.truncated["response too long"] += int((~fits).sum())
            self.datasets[split] = PairDataset(
                rows.at(np.flatnonzero(fits)),
                pairs.at(np.flatnonzero(fits)),
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
            "padding": self.padding(),
        }

    def unseen_users(self) -> set[str]:
        """Users of test rows that the train rows do not have."""
        return {one.user_id for one in everybody(self.splits.test)} - set(self.splits.users)

    def padding(self) -> float | None:
        """Share of padding among the tokens of train batches, None without train pairs."""
        return self._train_batches().padding()

    def deal(self, share: Share) -> None:
        """Let this process's loaders give its share of every batch; the order of pairs stays."""
        self.share = share

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self._train_batches(), kind=ResumableLoader)

    def _train_batches(self) -> OrderedBatches:
        return OrderedBatches(
            self.datasets["train"].row_lengths(),
            batch_size=self.batch_size,
            seed=self.seed,
            batch_tokens=self.batch_tokens,
            n_summed=self.share.n_summed,
        )

    def val_dataloader(self) -> DataLoader:
        return self.ordered_loader("val")

    def ordered_loader(self, split: str) -> DataLoader:
        """All pairs of a split, shortest first so that little is padding; always the same order."""
        order = np.argsort(self.datasets[split].lengths.sum(axis=1), kind="stable")
        size = self.eval_batch_size
        starts = range(0, len(order), size)
        batches = [(order[start : start + size].tolist(), 1.0) for start in starts]
        return self._loader(split, batches)

    def _loader(self, split: str, batches: Any, kind: type[DataLoader] = DataLoader) -> DataLoader:
        # A generator of its own: a loader otherwise draws from the global one, which resuming must not.
        return kind(
            Dealt(self.datasets[split], self.share),
            sampler=batches,
            batch_size=None,
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
    for start in range(0, len(missing), TEXTS_AT_ONCE):
        wanted = missing[start : start + TEXTS_AT_ONCE]
        new = [texts[place] for place in wanted]
        together = dataset.layout is packed
        found = share.total(_computed(new, compute, batch_size, share, together=together))
        if known is not None:
            known.add(new, found)
        values = torch.zeros(len(texts), *found.shape[1:]) if values is None else values
        values[wanted] = found
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
    order = np.argsort(blank.lengths.sum(axis=1), kind="stable").tolist()
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


def everybody(rows: Sequence[Row]) -> Sequence[Row | Person]:
    """Who rows are of, by first appearance, some perhaps more than once."""
    return rows.everybody() if isinstance(rows, Rows) else rows


def as_test(rows: Rows, users: Sequence[str]) -> Splits:
    """All rows, or those of split "test" where rows have one, as test rows of a trained model."""
    is_test = np.array([split in (None, "test") for split in rows.texts("split")], dtype=np.bool_)
    test = rows.at(np.flatnonzero(is_test))
    if len(test) == 0:
        raise bad_value("test rows", 0, "1 or more", "Give rows without split, or with split=test")
    dropped = {} if len(test) == len(rows) else {"row outside test": len(rows) - len(test)}
    none = rows.at(np.empty(0, dtype=np.int64))
    return Splits(train=none, val=none, test=test, users=tuple(users), dropped=dropped)


def shuffled(splits: Splits, *, seed: int) -> Splits:
    """The same splits with users permuted over train rows and over val rows; test keeps the truth."""
    train, val = splits.train, splits.val
    assert isinstance(train, Rows) and isinstance(val, Rows)
    return replace(
        splits, train=shuffle_users(train, seed=seed), val=shuffle_users(val, seed=seed + 1)
    )
