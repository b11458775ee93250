"""What reward model and policy share: two contexts, one mixed loss, two learning rates, exact metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from plrhf.aggregators import Aggregator
from plrhf.backbone.model import Backbone
from plrhf.core import losses
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.data.rows import content_hash
from plrhf.encoders import UserEncoder
from plrhf.models.card import Card
from plrhf.models.loading import load_export
from plrhf.models.metrics import ExactMean, UserAccuracy
from plrhf.models.optim import Optim, RowAdamW, clip_gradients

T = TypeVar("T")


class PersonalModule(LightningModule):
    """A model of which answer a user prefers, learned from pairs and who chose.

    Subclasses turn hidden states into margins and margins into a loss a pair; here stands what does
    not depend on which. Both contexts of a pair are taken in one forward, so that the loss depends
    neither on batch size nor on gradient accumulation.

    Args:
        backbone, encoder, aggregator: the parts; the encoder is built to `aggregator.user_dim`.
        n_users: user indices, the generic user's among them.
        optim: learning rates, decay, schedule.
        alpha: weight of the user-specific against the generic loss, in [0, 1].
    """

    card: Card  # what the model was made from, set by whoever builds it from settings

    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: UserEncoder,
        aggregator: Aggregator,
        n_users: int,
        optim: Optim | None = None,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise bad_value("model.alpha", alpha, "a number from 0 to 1", "Set model.alpha=0.5")
        self.backbone = backbone
        self.encoder = encoder
        self.aggregator = aggregator
        self.optim = Optim() if optim is None else optim
        # Where the encoder does not tell users apart both contexts are one and the same.
        self.alpha = alpha if encoder.personal else 1.0
        self.strict_loading = False  # checkpoints leave out frozen weights
        self.val_accuracy = UserAccuracy(n_users=n_users)
        self.val_loss = ExactMean()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        backbone_path: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """The model of a run's ``export/``; see `plrhf.models.export.load_export`."""
        return load_export(
            cls, directory, backbone_path=backbone_path, trust_remote_code=trust_remote_code
        )

    @abstractmethod
    def margins(self, hidden: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """From hidden states [C, R, L, d] to margins [C, B], in nats, and what else the loss needs."""

    @abstractmethod
    def pair_loss(self, margins: Tensor, extra: Tensor) -> Tensor:
        """Loss of each pair and context, [C, B] -> [C, B]."""

    @property
    def max_positions(self) -> int | None:
        """Text positions the backbone has beside the user vectors, None for no limit."""
        limit = self.backbone.max_positions
        return None if limit is None else limit - self.aggregator.n_positions

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters that are neither language model nor user model."""
        return []

    def hidden(self, batch: PreferenceBatch, names: tuple[str, ...]) -> Tensor:
        """Hidden states of the batch in the named contexts ("user", "generic"), [C, R, L, d].

        User vectors keep their precision, whatever products of text are computed in.
        """
        vectors = {
            "user": lambda: self.encoder(batch.users),
            "generic": lambda: self.encoder.generic(len(batch)),
        }
        with torch.autocast(batch.user_id.device.type, enabled=False):
            user = torch.cat([vectors[name]() for name in names])
        return self.hidden_for(batch, user)

    def hidden_for(self, batch: PreferenceBatch, user: Tensor) -> Tensor:
        """Hidden states of the batch for user vectors [C * B, user_dim], [C, R, L, d]."""
        return self.aggregator(self.backbone, batch, user)

    def loss(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Mixed loss of each pair [B], and the margins [B] of the first context taken."""
        names = tuple(name for name, _ in losses.contexts(self.alpha))
        margins, extra = self.margins(self.hidden(batch, names), batch)
        return losses.mixed(self.pair_loss(margins, extra), alpha=self.alpha), margins[0]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        pair_losses, margins = self.loss(batch)
        loss, accuracy = batch.mean(pair_losses), batch.mean((margins.detach() > 0).float())
        for name, value in (("train/loss", loss), ("train/accuracy", accuracy)):
            self.log(  # loggers are told by `training.StepMetrics`
                name, value, prog_bar=True, logger=False, batch_size=len(batch), sync_dist=True
            )
        return batch.step_weight * loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        loss, margins = self.loss(batch)
        counted = batch.counted()
        self.val_accuracy.update(margins[counted], batch.user_id[counted])
        self.val_loss.update(loss, counted)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute().float(), prog_bar=True)
        for name, value in self.val_accuracy.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "accuracy_micro")
        self.val_loss.reset()
        self.val_accuracy.reset()

    @torch.no_grad()
    def context_margins(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Margins [B] of each pair in the user's and in the generic context."""
        names = ("user", "generic") if self.encoder.personal else ("user",)
        margins, _ = self.margins(self.hidden(batch, names), batch)
        return {"user": margins[0], "generic": margins[-1]}

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Margins [B], in nats, of the pairs for the users who chose; above 0 where the model agrees."""
        margins, _ = self.margins(self.hidden(batch, ("user",)), batch)
        return margins[0]

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Margins [B] in the contexts "user" and "generic", and "row", the pairs' places in their split."""
        return {"row": batch.row, **self.context_margins(batch)}

    def run_with_weights(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)`, called from within the strategy's wrapper of this module.

        A wrapper such as DeepSpeed's engine gathers sharded weights while its own `forward` runs.
        `plrhf.evaluation.predictions.engine` redirects that `forward` here.
        """
        return function(*arguments)

    def configure_optimizers(self) -> Any:
        of_text = self.aggregator.text_parameters()
        user = [*self.encoder.parameters(), *self.aggregator.parameters()]
        optimizer, schedule = self.optim.build(
            backbone=self.backbone.parameters(),
            user=[one for one in user if all(one is not other for other in of_text)],
            head=[*self.head_parameters(), *of_text],
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._catch_up(batch.user_id)

    def on_validation_start(self) -> None:
        self._catch_up()

    def on_train_end(self) -> None:
        self._catch_up()

    def _catch_up(self, rows: Tensor | None = None) -> None:
        """Let rows of sparse tables, all or those of a batch, be what they should be by now."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, RowAdamW):
                optimizer.catch_up(rows)

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
        """Keep what is learned only: frozen weights are the backbone's and lie where it came from."""
        frozen = {name for name, value in self.named_parameters() if not value.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name not in frozen}
        checkpoint["made_for"] = self._made_for()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint, and say in what they differ."""
        before = checkpoint.get("made_for", {})
        for name, value in self._made_for().items():
            if before.get(name) != value:
                raise bad_value(
                    "ckpt",
                    f"made for {name} {before.get(name)}",
                    f"a checkpoint made for {name} {value}",
                    "Give the rows and settings it was made with, or begin anew without ckpt=last",
                )

    def _made_for(self) -> dict[str, str]:
        """What the learned weights belong to, short enough to be shown."""
        if not hasattr(self, "card"):
            return {}
        return {
            "users": f"{len(self.card.users)} ({content_hash(self.card.users)})",
            "model": str(self.card.model["name"]),
            "encoder": f"{self.card.encoder['name']} ({content_hash(self.card.encoder)})",
            "aggregator": f"{self.card.aggregator['name']} ({content_hash(self.card.aggregator)})",
            "backbone": self.card.fingerprint,  # not where it lies: that may change
        }
