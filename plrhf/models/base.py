"""The base of reward model and policy: two contexts, a mixed loss, optimiser groups, exact metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from plrhf.aggregators import Aggregator
from plrhf.backbone.model import Backbone
from plrhf.backbone.saving import without_frozen
from plrhf.core import losses
from plrhf.core.checks import Fraction, check_arguments
from plrhf.core.components import construct
from plrhf.core.errors import bad_value
from plrhf.core.row_packing import NO_USER
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.in_context import OwnPairs
from plrhf.data.module import PreferenceData
from plrhf.data.tokenizer import Tokenizer
from plrhf.encoders import UserEncoder
from plrhf.models.adaptation import Adaptation, NewUser, adapt
from plrhf.models.card import Card
from plrhf.models.context import check_context
from plrhf.models.enrolment import enrol, forget
from plrhf.models.inner import InnerLoop, task_vectors
from plrhf.models.loading import load_checkpoint, load_export, reload_users
from plrhf.models.metrics import ExactMean, UserAccuracy, correct
from plrhf.models.optim import Optim, RowAdamW, clip_gradients
from plrhf.models.parts import count_pairs, divide_parameters, user_maps, weigh_priors
from plrhf.models.privacy import PrivateGradient
from plrhf.models.reduction import Reduce, Reduction
from plrhf.models.train_users import find_train_users, has_found_users

T = TypeVar("T")

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Autocast dtype of each precision of the trainer; with others there is no autocast."""


@check_arguments("model")
class PersonalModule(LightningModule):
    """Predicts which of two responses a user prefers, learned from pairs and the users who chose.

    Subclasses compute margins from hidden states, and losses from margins. Each pair is computed in two
    contexts, for its user and for the generic user, in one forward pass. The loss therefore depends
    neither on the batch size nor on gradient accumulation.

    Args:
        backbone, encoder, aggregator: the parts; the encoder's vectors have width
            `aggregator.user_dim`.
        n_users: number of user indices, including the generic user's.
        optim: learning rates, decay, schedule.
        alpha: weight of the user-specific loss; the generic loss has weight 1 - alpha.
        reduce: see `reduction.Reduction`. inner: arguments of `inner.InnerLoop`; None: the users'
            parameters are trained like all others.

    Attributes:
        pooling: how responses are pooled, see `core.pooling.pool_responses`.
        card: settings that the model was built from; missing if it was built from its parts.
        enrolled: vectors [n, user_dim] of the card's last n users, who have no rows in the encoder.
        logistic_target: m if the loss of a pair is -log sigma(margin - m); None for other losses.
        own_pairs: pairs of users that are put in front of their prompts; None: not known.
        private: computes private gradients of the training loss; None: they are not private.
        tokenizer, directory: of the export that the model was loaded from; missing otherwise.
    """

    pooling: str = "mean"
    card: Card
    enrolled: Tensor
    logistic_target: float | None = None
    own_pairs: OwnPairs | None = None
    private: PrivateGradient | None = None
    tokenizer: Tokenizer
    directory: Path

    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: UserEncoder,
        aggregator: Aggregator,
        n_users: int,
        optim: Optim | None = None,
        alpha: Fraction = 0.5,
        reduce: Reduce = "pairs",
        inner: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.aggregator = aggregator
        if aggregator.needs_causal and not backbone.causal:
            raise bad_value(
                "aggregator.position",
                "after_prompt",
                f"before with {backbone.config.model_type}, which reads a whole row at once",
                "Set aggregator.position=before",
            )
        self.optim = Optim() if optim is None else optim
        self.has_user_vectors = encoder.generic(1).shape[1] > 0
        if not self.has_user_vectors:  # what maps user vectors would never learn
            for parameter in user_maps(aggregator):
                parameter.requires_grad_(False)
        # An encoder that does not tell users apart gives both contexts the same vectors.
        self.alpha = alpha if encoder.personal else 1.0
        n_contexts = len(losses.contexts(self.alpha))
        self.user_slots = NO_USER
        if self.has_user_vectors:
            slots = aggregator.user_slots(n_contexts)
            self.user_slots = replace(slots, same_for_user=encoder.same_for_user)
        self.reduction = Reduction(reduce, n_users=n_users)
        self.inner = None if inner is None else construct(InnerLoop, inner, "model.inner")
        check_context(encoder, backbone)
        self.strict_loading = False  # checkpoints leave out frozen weights
        none_enrolled = torch.empty(0, aggregator.user_dim)
        self.register_buffer("enrolled", none_enrolled, persistent=False)
        self.val_accuracy = UserAccuracy(n_users=n_users)
        self.val_loss = ExactMean()

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> Self:
        """Load the model in a run's ``export/``, in eval mode; `options` are of `loading.load_export`."""
        return load_export(cls, directory, **options)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, **options: Any
    ) -> Self:
        """Load the model of a checkpoint of train.py, in eval mode; nothing is unpickled.

        Args:
            checkpoint_path: e.g. ``RUN_DIR/checkpoints/best.ckpt``. map_location: device of the model.
            options: `backbone_path`, `trust_remote_code`, `trust_components` of
                `loading.load_checkpoint`.
        """
        model = load_checkpoint(cls, checkpoint_path, **options)
        return model if map_location is None else model.to(map_location)

    @abstractmethod
    def margins(
        self, hidden: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute margins [C, B] in nats from hidden states [C, R, L, d], and extra values for `pair_loss`.

        Args:
            user: user vectors [C * B, user_dim] that the hidden states were computed with.
        """

    def margins_for(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `margins` of the batch for user vectors [C * B, user_dim]."""
        return self.margins(self.hidden_for(batch, user), batch, user)

    def margins_in_contexts(
        self, batch: PreferenceBatch, names: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Compute `margins` of the batch in the named contexts, "user", "generic" or both."""
        user, _ = self.user_vectors(batch, names)
        return self.margins_for(batch, user)

    @abstractmethod
    def pair_loss(
        self, margins: Tensor, extra: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> Tensor:
        """Compute the loss of each pair and context, [C, B] -> [C, B]; arguments as of `margins`."""

    def pair_losses(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        """Compute margins and weighted losses [C, B] for user vectors [C * B, user_dim]."""
        margins, extra = self.margins_for(batch, user)
        found = self.pair_loss(margins, extra, batch, user)
        return margins, found if batch.feedback is None else found * batch.feedback.weight

    @property
    def max_positions(self) -> int | None:
        """How many positions the backbone has for text; None for no limit."""
        limit = self.backbone.max_positions
        return None if limit is None else limit - self.aggregator.n_positions

    def values_without_user(self) -> dict[str, Callable[[PreferenceBatch], Tensor]]:
        """Return the values of a pair that do not depend on any user, so that they are computed only once.

        Returns:
            Names of `PairDataset` fields, and functions that compute them from a batch.
        """
        return {}

    def without_user(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Add all that does not depend on the user to a batch, for calls with many user vectors."""
        return self.aggregator.without_user(self.backbone, batch)

    def precomputed(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Do as `without_user`, and add what stays the same as long as the weights do."""
        return self.without_user(batch)

    @property
    def needs_only_pooled(self) -> bool:
        """Whether training needs only the trunk's pooled outputs, which are then computed once."""
        return False

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong neither to the language model nor to the user model."""
        return []

    def user_vectors(
        self, batch: PreferenceBatch, names: tuple[str, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the user vectors of a batch in the named contexts, "user", "generic" or both.

        Autocast is off, so user vectors keep their precision. They are moved to the batch's device,
        since an encoder may create some of them on the CPU.

        Returns:
            [C * B, user_dim], and the encoder's penalty [B] in the context "user" or None.
        """
        penalty, found = None, []
        with torch.autocast(batch.user_id.device.type, enabled=False):
            for name in names:
                if name == "user":
                    vectors, penalty = self.encode(batch.users)
                else:
                    vectors = self.encoder.generic(len(batch))
                found.append(vectors.to(batch.user_id.device))
        return torch.cat(found), penalty

    def hidden(self, batch: PreferenceBatch, names: tuple[str, ...]) -> Tensor:
        """Compute the hidden states of the batch in the named contexts, [C, R, L, d]."""
        user, _ = self.user_vectors(batch, names)
        return self.hidden_for(batch, user)

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        """Compute user vectors [B, user_dim] and the encoder's penalty [B] or None.

        Enrolled users without rows in the encoder have stored vectors.
        """
        if len(self.enrolled) == 0:
            return self.encoder.encode(users)
        place = users.user_id - 1 - self.card.n_in_tables
        is_enrolled = place >= 0
        by_encoder = replace(users, user_id=users.user_id.masked_fill(is_enrolled, GENERIC_USER))
        vectors, penalty = self.encoder.encode(by_encoder)
        known = self.enrolled[place.clamp(min=0)].to(vectors)
        return torch.where(is_enrolled[:, None], known, vectors), penalty

    def hidden_for(self, batch: PreferenceBatch, user: Tensor) -> Tensor:
        """Compute the hidden states [C, R, L, d] of the batch for user vectors [C * B, user_dim]."""
        return self.aggregator(self.backbone, batch, user)

    def loss(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Compute each pair's mixed loss [B] and margin [B], the user's if alpha is above 0."""
        user, _ = self.user_vectors(batch, self.context_names)
        return self._loss_for(batch, user)

    @property
    def context_names(self) -> tuple[str, ...]:
        """The contexts that the loss is computed in."""
        return tuple(name for name, _ in losses.contexts(self.alpha))

    def _loss_for(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `loss` for given user vectors."""
        margins, per_context = self.pair_losses(batch, user)
        return losses.mixed(per_context, alpha=self.alpha), margins[0]

    def training_loss(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Compute the training loss of a batch, with penalties, and its accuracy; both scalars."""
        user, user_penalty = self.user_vectors(batch, self.context_names)
        weights = self.reduction.weights(batch.user_id)
        if self.inner is not None and self.context_names[0] == "user":
            vectors, asked = task_vectors(self, batch, self.inner)
            user = torch.cat([vectors, user[len(batch) :]])
            weights = asked if weights is None else weights * asked
        pair_losses, margins = self._loss_for(batch, user)
        self.reduction.record(batch.user_id, pair_losses)
        loss = batch.mean(pair_losses if weights is None else weights * pair_losses)
        return loss + self.penalties(batch, user_penalty), batch.mean(correct(margins, batch))

    def penalties(self, batch: PreferenceBatch, of_users: Tensor | None) -> Tensor | float:
        """Sum the penalties of encoder, [B], and aggregator, with the weight of the user-specific loss."""
        alpha, of_texts = self.alpha, self.aggregator.penalty()
        weight = alpha * self.encoder.penalty_weight
        total = 0.0 if of_users is None else weight * batch.mean(of_users)
        weight = alpha * self.aggregator.penalty_weight
        return total if of_texts is None else total + weight * of_texts

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        private = self.private
        loss, accuracy = self.training_loss(batch) if private is None else private(self, batch)
        for name, value in (("train/loss", loss), ("train/accuracy", accuracy)):
            self.log(  # loggers are told by `training.StepMetrics`
                name, value, prog_bar=True, logger=False, batch_size=len(batch), sync_dist=True
            )
        return batch.step_weight * loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        loss, margins = self.loss(batch)
        counted = batch.counted()
        # In one process all pairs count: no GPU is asked which ones do.
        kept = slice(None) if batch.weight is None else counted
        self.val_accuracy.update(margins[kept], batch.user_id[kept])
        self.val_loss.update((loss.double() * counted).sum(), counted.sum())

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute().float(), prog_bar=True)
        for name, value in self.val_accuracy.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "accuracy_micro")
        self.val_loss.reset()
        self.val_accuracy.reset()

    @torch.no_grad()
    def context_margins(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Compute the margins [B] in both contexts, as a dict with the keys "user" and "generic"."""
        names = ("user", "generic") if self.encoder.personal else ("user",)
        margins, _ = self.margins_in_contexts(batch, names)
        return {"user": margins[0], "generic": margins[-1]}

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Compute margins [B] in nats for the users who chose; positive if the model agrees."""
        return self.margins_in_contexts(batch, ("user",))[0][0]

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Compute margins [B] by context ("user", "generic"), and "row", indices in the split."""
        return {"row": batch.row, **self.context_margins(batch)}

    def run_with_weights(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function(*arguments)` while sharded weights are whole.

        DeepSpeed's engine gathers them while its `forward` runs, and `predictions.runner_with_weights`
        redirects that `forward` to this method.
        """
        return function(*arguments)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the precision used in training, see `Card.precision`."""
        kind = AUTOCAST.get(self.card.precision) if hasattr(self, "card") else None
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def adapt(
        self,
        pairs: Sequence[Mapping[str, Any]],
        rule: Adaptation | None = None,
        *,
        user_features: Mapping[str, Any] | None = None,
    ) -> NewUser:
        """Fit a new user to a few of their pairs; see `adaptation.adapt`."""
        return adapt(self, pairs, rule, user_features=user_features)

    def enrol(self, user_id: str, user: NewUser) -> None:
        """Add an adapted user to this model and to the export it was loaded from."""
        enrol(self.directory, user_id, user)
        reload_users(self, self.directory)

    def forget(self, user_id: str) -> None:
        """Take a user out of this model and out of the export it was loaded from."""
        forget(self.directory, user_id)
        reload_users(self, self.directory)

    def set_card(self, card: Card) -> None:
        """Store the settings that the model was built from, and save them as its hyperparameters."""
        self.card = card
        settings = {name: vars(card)[name] for name in ("model", "encoder", "aggregator")}
        settings |= {"backbone": card.backbone, "text": card.text, "optim": asdict(self.optim)}
        self.save_hyperparameters({**settings, "n_users": len(card.users)}, logger=False)

    def trainable_parts(self) -> dict[str, list[nn.Parameter]]:
        """Group the parameters by learning rate: "backbone", "user", "shrinkage" and "head"."""
        return divide_parameters(self)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(
            **self.trainable_parts(), total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def initialise(self, data: PreferenceData, *, total_steps: int) -> None:
        """Set start values that depend on the train pairs, once `values_without_user` are computed."""

    def on_fit_start(self) -> None:
        count_pairs(self, getattr(self.trainer.datamodule, "data", None))  # type: ignore[attr-defined]
        if self.reduction.kind != "pairs":
            self.reduction.count(self._train_pairs().user_id)

    def _train_pairs(self) -> PairDataset:
        data: Any = self.trainer.datamodule.data  # type: ignore[attr-defined]
        pairs: PairDataset = data.datasets["train"]
        return pairs

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.reduction.step()

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._apply_delayed_decay(batch.user_id)
        weigh_priors(self, self.global_step)

    def on_validation_start(self) -> None:
        self._apply_delayed_decay()
        self.finish_users(self._train_pairs)

    def on_train_end(self) -> None:
        self._apply_delayed_decay()
        self.finish_users(self._train_pairs)

    def finish_users(self, train: Callable[[], PairDataset]) -> None:
        """Set rows of train users that the optimiser does not learn; `train` returns the train pairs."""
        if has_found_users(self):
            find_train_users(self, train())

    def _apply_delayed_decay(self, rows: Tensor | None = None) -> None:
        """Apply the weight decay that sparse tables still owe: to all rows, or to those of a batch."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, RowAdamW):
                optimizer.apply_delayed_decay(rows)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        own = [one for one in self.parameters() if one.grad is not None]
        if gradient_clip_val is not None and any(one.grad.is_sparse for one in own):  # type: ignore[union-attr]
            clip_gradients(own, gradient_clip_val)  # which torch's own cannot
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only learned weights, and add what the model was made for."""
        checkpoint["state_dict"] = without_frozen(self, checkpoint["state_dict"])
        checkpoint["made_for"] = self.card.made_for() if hasattr(self, "card") else {}
        if self.reduction.kind == "tail":
            checkpoint["user_losses"] = self.reduction.losses.cpu()
        if hasattr(self, "card"):  # plain data, from which `load_from_checkpoint` builds the model
            checkpoint["hyper_parameters"] = {
                "card": asdict(self.card),
                "optim": asdict(self.optim),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise a ValueError if the checkpoint belongs to another model, naming the difference."""
        self.reduction.losses = checkpoint.get("user_losses", self.reduction.losses)
        if hasattr(self, "card"):
            self.card.check_made_for(checkpoint.get("made_for", {}))
