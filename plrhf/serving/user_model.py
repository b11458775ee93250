"""What one model knows about people: it fits them, and says how sure it is and what to ask next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.digests import content_hash
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.data.tokenizer import RowTokenizer
from plrhf.evaluation.elicitation import Candidates, Rule, candidates_of, choose
from plrhf.evaluation.people import evenly
from plrhf.evaluation.trials import judgment_key
from plrhf.models.adaptation import Adaptation, AdaptedUsers, Encode, Mixture
from plrhf.models.adaptation.base import with_precomputed
from plrhf.models.adaptation.encode import reads_own_text
from plrhf.models.adaptation.fitting import user_tables
from plrhf.models.adaptation.new_user import fit_pairs
from plrhf.models.base import PersonalModule
from plrhf.models.card import read_card
from plrhf.models.loading import reload_users
from plrhf.models.pair_batches import batches_of, dataset_of, row_tokenizer_of
from plrhf.serving.people_map import PeopleMap

BATCH_SIZE = 64
MOST_ON_MAP = 1000
PRIORS = ("people", "strangers")
"""Names of the two priors of `Mixture`."""


@dataclass(frozen=True)
class Fit:
    """A person as a model knows them after their judgments.

    Attributes:
        users: the person, N = 1. n_pairs: number of judgments used.
    """

    users: AdaptedUsers
    n_pairs: int

    @property
    def certainty(self) -> float | None:
        """Share of the prior's variance that the judgments have removed, 0 to 1; None if unknown."""
        resolved = self.users.resolved
        return None if resolved is None else min(1.0, max(0.0, float(resolved[0])))

    @property
    def priors(self) -> dict[str, float] | None:
        """Probability of each prior of `Mixture`; None if the rule has one prior."""
        shares = self.users.shares
        if shares is None:
            return None
        return dict(zip(PRIORS, (round(one, 4) for one in shares[0].tolist()), strict=True))

    @property
    def is_stranger(self) -> bool:
        """Whether the person is probably unlike those of training."""
        return self.priors is not None and self.priors["people"] < 0.5


class UserModel:
    """A model, and how it learns people.

    Its methods must run in the thread that owns the model.

    Args:
        model: loaded from an export. pool: pairs that people may be asked, as rows of preference data.
        words: about train users, by id, which people like them are told.

    Attributes:
        rule: how people are fitted; None if the model has no parameters of single users.
        generic: vector of the generic user, [user_dim].
        fingerprint: of all that fitted vectors depend on. map: of the train users; None without any.
    """

    def __init__(
        self,
        model: PersonalModule,
        pool: Sequence[Mapping[str, Any]] = (),
        words: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.words = model, {} if words is None else words
        if reads_own_text(model):
            allowed = "a model that knows people by vectors, which the server keeps, and no texts of theirs"
            cure = "Serve one that was trained with data.context_pairs=0"
            raise bad_value("export", "one with data.context_pairs", allowed, cure)
        self.rule: Adaptation | None = None
        if model.encoder.reads_context:
            self.rule = Encode()
        elif len(user_tables(model.encoder)) > 0:
            self.rule = Mixture()
        self.refresh()
        rows = [parse_row({"user_id": "pool", **row}, f"pool[{n}]") for n, row in enumerate(pool)]
        self.pool: list[Row] = []
        self.known: PairDataset | None = None  # of the pool, so that its texts are read once
        with model.autocast():
            if len(rows) > 0:
                self.known = dataset_of(model, self.row_tokenizer(), rows, batch_size=BATCH_SIZE)
                self.pool = list(self.known.rows)
                places = range(len(self.pool))
                batches = batches_of(self.known, places, [0] * len(places), batch_size=BATCH_SIZE)
                self.batches = with_precomputed(model, batches)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute anew what depends on the train users, as after one was forgotten."""
        # Of a text that is longer than those of training, the first tokens are read. Even a text that the
        # server wrote may be: what a model writes is often more tokens when it is read.
        text = {**self.model.card.text, "on_long_response": "truncate"}
        self.model.card = replace(self.model.card, text=text)
        self.generic = self.model.encoder.generic(1)[0].detach()
        self.fingerprint = content_hash(asdict(self.model.card))  # it has hashes of all files
        self.map: PeopleMap | None = None
        shown = evenly(self.model.card.users, MOST_ON_MAP)
        vectors = [vector for user in shown if (vector := self.train_user(user)) is not None]
        if len(vectors) > 0 and self.model.has_user_vectors and self.model.encoder.personal:
            words = [self.words.get(user) for user in shown]
            self.map = PeopleMap(torch.stack(vectors), self.generic, words)

    def forget(self, user_id: str) -> None:
        """Take a train user out of the model, and of its export unless another server has done so.

        Raises:
            OSError: the export cannot be written.
        """
        if user_id in read_card(self.model.directory).places:
            self.model.forget(user_id)
        else:
            reload_users(self.model, self.model.directory)
        self.refresh()

    @torch.no_grad()
    def train_user(self, user_id: str) -> Tensor | None:
        """Return the vector [user_dim] that training learned for a user; None for others."""
        index = self.model.card.places.get(user_id)
        if index is None:
            return None
        features = self.model.card.feature_schema().table([None])
        users = UserBatch(user_id=torch.tensor([index]), features=features)
        return self.model.encode(move_data_to_device(users, self.model.device))[0][0].detach()

    def check(self, pair: Mapping[str, Any]) -> None:
        """Raise a ValueError if a pair cannot be read."""
        self.row_tokenizer()([parse_row({"user_id": "new", **pair}, "pair")])

    def prompt(self, prompt: Any) -> tuple[int, ...]:
        """Return the tokens of a prompt, text or messages.

        Raises:
            ValueError: the prompt cannot be read or is too long, or it is a conversation and the model
                has no chat template.
        """
        if not isinstance(prompt, str) and not self.has_template:
            if [one["role"] for one in prompt] != ["user"]:
                raise bad_value(
                    "messages",
                    f"{len(prompt)} messages",
                    "one message of role user, as this model has no chat template",
                    "Send the text in one message",
                )
            prompt = prompt[0]["content"]
        nobody = {"user_id": "nobody", "chosen": "A", "rejected": "B"}
        tokenizer = self.row_tokenizer()
        tokens = tokenizer.prompt(parse_row({**nobody, "prompt": prompt}, "messages"))
        if tokenizer.counts["prompt truncated"] > 0:
            allowed = f"at most {tokenizer.max_prompt_tokens} tokens"
            raise bad_value("messages", "too long", allowed, "Send a shorter prompt")
        return tuple(tokens)

    @property
    def has_template(self) -> bool:
        """Whether the model's tokenizer can write conversations."""
        return getattr(self.model.tokenizer, "chat_template", None) is not None

    def row_tokenizer(self) -> RowTokenizer:
        """Return a new tokenizer of rows, as one that is kept would remember people's texts."""
        return row_tokenizer_of(self.model)

    def fit(self, pairs: Sequence[Mapping[str, Any]]) -> Fit:
        """Fit a person to their pairs. Without any, or without a rule, it is the generic user.

        Pairs whose responses begin with the same tokens, as many as are read, are not used.
        """
        if self.rule is None:
            return Fit(AdaptedUsers(vectors=self.generic[None]), n_pairs=0)
        found = fit_pairs(self.model, pairs, self.rule, known=self.known)
        return Fit(found.users, found.n_pairs)

    def next_pair(
        self,
        fit: Fit,
        judged: Sequence[Mapping[str, Any]],
        rule: Rule,
        generator: np.random.Generator,
    ) -> Row | None:
        """Return the pair of the pool to ask next; None if all were judged.

        Args:
            judged: the pairs that the person has judged or skipped. rule: see `choose`; `random` is
                used for models that do not say how sure they are.
        """
        before = {judgment_key(parse_row({"user_id": "pool", **pair}, "judged")) for pair in judged}
        is_new = [judgment_key(row) not in before for row in self.pool]
        left = np.flatnonzero(is_new)
        if len(left) == 0:
            return None
        if fit.users.covariance is None:
            return self.pool[left[generator.integers(len(left))]]
        with self.model.autocast():
            found = candidates_of(self.model, self.batches, fit.users)
        some = Candidates(found.margins[left], found.slopes[left], found.variances[left])
        asked = found.slopes[~np.array(is_new)]
        return self.pool[left[choose(rule, some, generator, asked=asked)]]
