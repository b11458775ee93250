"""What the server does, apart from HTTP: people, their judgments, and what models make of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from plrhf.evaluation.elicitation import Rule
from plrhf.models.inference import score_for
from plrhf.serving.errors import ApiError
from plrhf.serving.metrics import Metrics
from plrhf.serving.served import ServedModel
from plrhf.serving.store import Judgment, Known, NoConsent, People, TooMany

T = TypeVar("T")

STAYS = (
    "Weights that all people share were learned from this person's training pairs too. "
    "They stay, as do the files of the training run."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Limits of a server.

    Args:
        max_tokens: most tokens of one answer; also the default. ask: how the next pair is chosen.
    """

    max_tokens: int
    ask: Rule


class Service:
    """People and models of one server.

    Args:
        people: the store. policy: writes texts. reward: scores them. At least one of both is there.
    """

    def __init__(
        self,
        people: People,
        policy: ServedModel | None,
        reward: ServedModel | None,
        options: Options,
    ) -> None:
        self.people, self.policy, self.reward, self.options = people, policy, reward, options
        self.metrics = Metrics()
        self.metrics.waiting.set_function(
            lambda: sum(model.engine.n_waiting for model in self.models)
        )
        self.models = [one for one in (policy, reward) if one is not None]
        # A reward model learns people in its own thread, also while the policy writes.
        self.asker = self.models[-1]

    def close(self) -> None:
        """End all engines after what they have to do, and close the database."""
        for model in self.models:
            model.engine.close()
        self.people.close()

    def person(self, user_id: str) -> Known:
        """Return what is known about a person.

        Raises:
            ApiError: 404, nothing is.
        """
        known = self.people.get(user_id)
        if known is None:
            raise _unknown()
        return known

    def put(self, user_id: str, *, consent: bool) -> Known:
        """Add a person or change their consent; return what is known about them."""
        self.people.put(user_id, consent=consent)
        if not consent:
            for model in self.models:
                model.drop(user_id)
        return self.person(user_id)

    def add_judgments(self, user_id: str, judgments: Sequence[Judgment]) -> dict[str, Any]:
        """Store judgments and fit the person anew; return their ids and the certainty.

        Raises:
            ApiError: the person is unknown, has not agreed, or has as many as are kept. ValueError: a pair
                cannot be read.
        """
        for judgment in judgments:
            self.asker.users.check(judgment.pair())
        ids = self._change(lambda: self.people.add(user_id, judgments))
        return {"ids": ids, **self.certainty(user_id)}

    def remove_judgment(self, user_id: str, judgment_id: int) -> dict[str, Any]:
        """Remove one judgment and fit the person anew; return the certainty."""
        if not self._change(lambda: self.people.remove(user_id, judgment_id)):
            raise ApiError(404, "This person has no such judgment.")
        return self.certainty(user_id)

    def certainty(self, user_id: str) -> dict[str, Any]:
        """Return how sure the model is about a person."""
        known = self.person(user_id)
        fit = self.asker.fit(user_id, known)
        vector, people = fit.users.vectors[0], self.asker.users.map
        return {
            "model": self.asker.name,
            "judgments": len(known.judgments),
            "used": fit.n_pairs,
            "certainty": fit.certainty,
            "priors": fit.priors,
            "stranger": fit.is_stranger,
            "place": None if people is None else people.place(vector),
            "traits": [] if people is None or fit.n_pairs == 0 else people.traits(vector),
        }

    def map(self) -> dict[str, Any]:
        """Return the map of the train users, without their names."""
        people = self.asker.users.map
        nobody = {"people": [], "words": [], "generic": [0.0, 0.0], "size": 1.0}
        return nobody if people is None else people.shown()

    def next_pair(self, user_id: str) -> dict[str, Any]:
        """Return the pair to ask a person next, its responses in random order."""
        known = self.person(user_id)
        fit = self.asker.fit(user_id, known)
        seed = secrets.randbits(63)
        row = self.asker.engine.compute(
            self.asker.users.next_pair,
            fit,
            [one.pair() for one in known.judgments],
            self.options.ask,
            np.random.default_rng(seed),
        )
        if row is None:
            raise ApiError(404, "There is no pair left to ask.", code="no_pair_left")
        texts = [row.chosen, row.rejected]
        if seed % 2 == 1:
            texts.reverse()
        return {"prompt": row.prompt, "responses": texts}

    def score(self, inputs: Sequence[dict[str, Any]]) -> list[float]:
        """Compute the rewards of responses, each for its user."""
        if self.reward is None:
            message = "This server has no reward model. Start it with reward=DIR."
            raise ApiError(404, message, code="model_not_found")
        reward = self.reward
        vectors = {user: reward.vector(user) for user in {one["user"] for one in inputs}}
        stacked = torch.stack([vectors[one["user"]].cpu() for one in inputs])
        asked = [{"prompt": one["prompt"], "response": one["response"]} for one in inputs]
        found = reward.engine.compute(score_for, reward.users.model, asked, stacked)
        return [float(value) for value in found]

    def delete(self, user_id: str) -> dict[str, Any]:
        """Remove everything of a person; say what could not be removed.

        Raises:
            ApiError: 404, nothing is known of them.
        """
        trained = [model for model in self.models if model.is_train_user(user_id)]
        removed = self.people.delete(user_id, trained=len(trained) > 0)
        if removed is None and len(trained) == 0:
            raise _unknown()
        kept = [STAYS] if len(trained) > 0 else []
        from_exports = 0
        for model in self.models:
            try:
                model.forget(user_id)
                from_exports += model in trained
            except OSError:
                kept.append(f"The export of {model.name} cannot be written and keeps its vector.")
        found = removed or {"judgments": 0, "vectors": 0}
        return {"removed": {**found, "from_exports": from_exports}, "kept": kept}

    def _change(self, change: Callable[[], T]) -> T:
        """Make a change that needs a person's consent."""
        try:
            return change()
        except NoConsent:
            raise ApiError(
                403,
                "Judgments are kept of people who have agreed. "
                'Send PUT /v1/users/{id} with {"consent": true} first.',
            ) from None
        except TooMany:
            raise ApiError(
                403,
                f"At most {self.people.max_judgments:,} judgments of a person are kept. Take some back "
                "with DELETE /v1/users/{id}/pairs/{pair}, or raise max_judgments of the server.",
                code="too_many_judgments",
            ) from None


def _unknown() -> ApiError:
    return ApiError(404, "Nothing is known about this person.", code="user_not_found")
