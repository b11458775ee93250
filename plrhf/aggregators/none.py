"""No aggregator: the text stays as it is, and users act in the reward head only."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from plrhf.aggregators.base import Aggregator, read_without_user, text_layer
from plrhf.aggregators.text_residual import TextResidual
from plrhf.backbone.model import Backbone
from plrhf.core.checks import FractionBelowOne, NonNegativeInt, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch


@check_arguments("aggregator")
class NoAggregator(Aggregator):
    """Passes hidden states to the reward head unchanged; users act there.

    Args:
        user_dim: width of the user vectors that the head reads.
        layer_width, layer_dropout: of `base.text_layer` before the head.
        text_residual: add a residual for each of `n_texts` train texts that repeat, see `TextResidual`.
    """

    after_trunk = shares_prompts = True
    user_acts = False
    penalty_weight = 1.0

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: PositiveInt = 8,
        layer_width: PositiveInt | None = None,
        layer_dropout: FractionBelowOne = 0.0,
        text_residual: bool = False,
        n_texts: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.residual = TextResidual(hidden_size, n_texts) if text_residual else None
        self.user_dim = user_dim
        self.output_size = hidden_size if layer_width is None else layer_width
        self.unembeddable = layer_width is None
        self.layer = text_layer(hidden_size, layer_width, layer_dropout)

    def text_parameters(self) -> list[Any]:
        own = () if self.residual is None else self.residual.parameters()
        return [*self.layer.parameters(), *own]

    def penalty(self) -> Tensor | None:
        return None if self.residual is None else self.residual.penalty()

    def transform_texts(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.layer(hidden)
        return found

    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        text = read_without_user(backbone, batch, self.layer)
        return text.float().expand(len(user) // len(batch), -1, -1, -1)

    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> AbstractContextManager[dict[str, Any]]:
        return contextlib.nullcontext({"input_ids": input_ids, "attention_mask": attention_mask})

    def continuing(self, backbone: Backbone, user: Tensor) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()
