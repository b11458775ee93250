"""A judge that compares the rewards of a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.stats import correctness
from plrhf.data.dataset import PairDataset
from plrhf.data.packing import LAYOUTS, TokenPair
from plrhf.data.rows import Row
from plrhf.evaluation.judges import Contest, Judge, Verdicts
from plrhf.models.pair_batches import row_tokenizer_of
from plrhf.models.reward import load_reward


@check_arguments("eval.judge")
class RewardJudge(Judge):
    """Judges by the rewards of a trained reward model.

    The reward model should have been trained on other pairs than the policies it judges. Otherwise
    it prefers what both have learned from the same noise.

    Args:
        export: a run's export, or the run.
        users: ``own`` uses the vector that the model learned for each user, and the user's pairs where
            they stand in front of prompts. ``held_out`` treats all as unseen users, by the generic user's
            vector and (if they are read) features.
        batch_size: contests that are judged at once.
        trust_remote_code: let the backbone's repository bring its own code.
        trust_components: import classes from outside plrhf that the export names.

    Raises:
        ValueError: no reward model there, or one that reads texts about users.
    """

    def __init__(
        self,
        *,
        export: Path,
        users: Literal["own", "held_out"] = "own",
        batch_size: PositiveInt = 32,
        trust_remote_code: bool = False,
        trust_components: bool = False,
    ) -> None:
        self.users, self.batch_size = users, batch_size
        trust = {"trust_remote_code": trust_remote_code, "trust_components": trust_components}
        self.model = load_reward(export, "eval.judge.export", **trust)
        if self.model.card.text.get("use_user_text"):
            raise bad_value(
                "eval.judge.export",
                str(export),
                "a reward model trained without data.use_user_text",
                "Train one, as generated texts come without their users' own",
            )
        if users == "held_out" and self.model.own_pairs is not None:
            self.model.own_pairs = {}  # prompts then have nobody's pairs in front
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.row_tokenizer = row_tokenizer_of(self.model)

    @torch.no_grad()
    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: a user the model was not trained on, though `users` is `own`; a text longer
                than its backbone allows; or a reward that is not finite.
        """
        pairs = self._pairs(contests)
        length = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs.pairs]
        order = sorted(range(len(pairs)), key=length.__getitem__)
        margin = np.zeros(len(pairs))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = move_data_to_device(pairs.batch(places), self.model.device)
            with self.model.autocast():
                found = self.model(batch)
            margin[places] = found.double().cpu().numpy()
        if not np.isfinite(margin).all():
            worst = float(margin[~np.isfinite(margin)][0])
            raise bad_value(
                "reward", worst, "finite numbers", "Judge by a model whose training went well"
            )
        same = [contest.ours.response == contest.theirs.response for contest in contests]
        margin[same] = 0.0  # computed side by side they differ by rounding
        return Verdicts(wins=correctness(margin)[:, None])

    def _pairs(self, contests: Sequence[Contest]) -> PairDataset:
        """Turn each contest into a pair, with our text as the chosen response."""
        card = self.model.card
        index = {user: place + 1 for place, user in enumerate(card.users)}
        rows, tokens = [], []
        for contest in contests:
            ours = contest.ours
            row = Row(
                prompt=ours.prompt,
                chosen=ours.response,
                rejected=contest.theirs.response,
                user_id=ours.user_id,
                user_features=ours.user_features,
                prompt_id=ours.prompt_id,
                pair_id=f"{ours.user_id} {ours.prompt_id}",
            )
            if self.users == "own" and row.user_id not in index:
                raise bad_value(
                    "eval.judge.users",
                    "own",
                    f"users the reward model was trained on (it does not know {row.user_id})",
                    "Set eval.judge.users=held_out, or judge by a model of these users",
                )
            rows.append(row)
            tokens.append(self._tokens(row))
        return PairDataset(
            rows,
            tokens,
            layout=LAYOUTS[self.model.backbone.layout],
            user_index=index if self.users == "own" else {},
            schema=card.feature_schema(),
            user_slots=self.model.user_slots,
        )

    def _tokens(self, row: Row) -> TokenPair:
        """Tokenise a contest's row; raise a ValueError if it is too long for the judge."""
        pair = self.row_tokenizer.pair(row)
        room, needed = self.model.max_positions, pair.longest
        if room is not None and needed > room:
            raise bad_value(
                "eval.judge.export",
                f"{needed} tokens (user {row.user_id}, prompt {row.prompt_id})",
                f"at most the reward model's {room} positions",
                "Write shorter texts with eval=generate eval.max_new_tokens",
            )
        return pair
