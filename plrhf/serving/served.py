"""A model that is served: its engine, what it knows about people, and the vectors it keeps of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from plrhf.serving.engine import Engine
from plrhf.serving.store import Known, People
from plrhf.serving.user_model import Fit, UserModel

MOST_FITS = 1000  # kept in memory
SWEEP_SECONDS = 60.0  # after which fits of people whom another server deleted leave memory


class ServedModel:
    """A model, its engine, and the people it was fitted to.

    Args:
        name: that clients call it by. people: the store that vectors are kept in.
    """

    def __init__(self, name: str, users: UserModel, engine: Engine, people: People) -> None:
        self.name, self.users, self.engine, self.people = name, users, engine, people
        self.lock = threading.Lock()
        self.fits: OrderedDict[str, tuple[int, Fit]] = OrderedDict()
        self._swept = time.monotonic()

    def fit(self, user_id: str, known: Known) -> Fit:
        """Fit a person to their judgments, and store the vector; a fit is made once for each change."""
        with self.lock:
            revision, fit = self.fits.get(user_id, (-1, None))
            if fit is not None and revision == known.revision:
                self.fits.move_to_end(user_id)
                return fit
        fit = self.engine.compute(self.users.fit, known.pairs())
        if fit.n_pairs > 0:  # otherwise it is the generic user
            self._remember(user_id, known.revision, fit)
        return fit

    def vector(self, user_id: str | None) -> Tensor:
        """Return the vector [user_dim] to serve a person with: fitted, of training, or the generic one."""
        self._sweep()
        if user_id is None:
            return self.users.generic
        stored = self.people.vector(user_id, self.users.fingerprint)
        if stored is not None:
            return torch.from_numpy(np.frombuffer(stored, dtype="<f4").copy())
        known = self.people.get(user_id)
        if known is not None and len(known.pairs()) > 0:
            return self.fit(user_id, known).users.vectors[0]
        if self.is_train_user(user_id) and self.people.is_forgotten(user_id):
            with contextlib.suppress(OSError):  # an export that cannot be written is not read again
                self.forget(user_id)
            return self.users.generic
        found = self.engine.compute(self.users.train_user, user_id)
        return self.users.generic if found is None else found

    def _sweep(self) -> None:
        """Remove fits from memory, now and then, that no longer fit what the store has."""
        if time.monotonic() - self._swept < SWEEP_SECONDS:
            return
        self._swept = time.monotonic()
        with self.lock:
            kept = {user_id: revision for user_id, (revision, _) in self.fits.items()}
        present = self.people.revisions(kept)
        for user_id, revision in kept.items():
            if present.get(user_id) != revision:
                self.drop(user_id)

    def is_train_user(self, user_id: str) -> bool:
        """Whether the model was trained on this person."""
        return user_id in self.users.model.card.places

    def drop(self, user_id: str) -> None:
        """Remove a person from memory."""
        with self.lock:
            self.fits.pop(user_id, None)

    def forget(self, user_id: str) -> None:
        """Remove a person from memory, and a train user from the export too.

        Raises:
            OSError: the export cannot be written.
        """
        self.drop(user_id)
        if self.is_train_user(user_id):
            self.engine.compute(self.users.forget, user_id)
            with self.lock:
                self.fits.clear()  # the prior has changed

    def _remember(self, user_id: str, revision: int, fit: Fit) -> None:
        """Keep a fit in memory and in the store, unless the person is gone or has judged anew."""
        with self.lock:
            self.fits[user_id] = (revision, fit)
            while len(self.fits) > MOST_FITS:
                self.fits.popitem(last=False)
        # Only now: whoever deletes the person meanwhile drops both.
        vector = fit.users.vectors[0].float().cpu().numpy().astype("<f4").tobytes()
        if not self.people.save_vector(user_id, self.users.fingerprint, revision, vector):
            self.drop(user_id)
