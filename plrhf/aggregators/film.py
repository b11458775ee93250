"""User vectors as a scale and a shift of hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plrhf.aggregators.base import Aggregator, spread_over_rows
from plrhf.backbone.model import Backbone
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch

SITES = ("last", "every_block")


class FiLM(Aggregator):
    """h' = (1 + gamma_u) * h + beta_u (Perez et al. 2018, arXiv 1709.07871, eq. 2).

    (gamma_u, beta_u) is a linear map of e_u that starts at zero, so that the model starts as if
    there were no user.

    Args:
        hidden_size: d of the backbone. n_blocks: its number of blocks.
        site: ``last`` acts on the last hidden states, leaving the trunk free of the user;
            ``every_block`` on the output of each block.
        user_dim: width of e_u, by default d.
        layer_width: put tanh(W dropout(LayerNorm(h))) of this width in front of the user (reward
            models with site=last only): features the trunk does not have linearly.
        layer_dropout: of that layer, in [0, 1).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        n_blocks: int,
        site: Literal["last", "every_block"] = "last",
        user_dim: int | None = None,
        layer_width: int | None = None,
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if site not in SITES:
            raise bad_value("aggregator.site", site, " or ".join(SITES), "Set aggregator.site=last")
        if user_dim is not None and user_dim < 1:
            raise bad_value(
                "aggregator.user_dim",
                user_dim,
                "a whole number from 1, or null for the model's width",
                "Set aggregator.user_dim=null",
            )
        if layer_width is not None and (layer_width < 1 or site != "last"):
            raise bad_value(
                "aggregator.layer_width",
                layer_width,
                "null, or a whole number from 1 with site=last",
                "Set aggregator.layer_width=null",
            )
        if not 0 <= layer_dropout < 1:
            raise bad_value(
                "aggregator.layer_dropout",
                layer_dropout,
                "a number from 0 to below 1",
                "Set aggregator.layer_dropout=0",
            )
        self.after_trunk = site == "last"
        self.user_dim = hidden_size if user_dim is None else user_dim
        self.n_sites = 1 if self.after_trunk else n_blocks
        self.output_size = hidden_size if layer_width is None else layer_width
        self.layer: nn.Module = nn.Identity()
        if layer_width is not None:
            self.unembeddable = False
            self.layer = nn.Sequential(
                nn.LayerNorm(hidden_size, elementwise_affine=False),
                nn.Dropout(layer_dropout),
                nn.Linear(hidden_size, layer_width),
                nn.Tanh(),
            )
        self.to_film = nn.Linear(self.user_dim, self.n_sites * 2 * self.output_size, bias=False)
        nn.init.zeros_(self.to_film.weight)

    def text_parameters(self) -> list[nn.Parameter]:
        return list(self.layer.parameters())

    def film(self, user: Tensor) -> Tensor:
        """User vectors [..., D] -> [..., n_sites, 2, d]: gamma and beta of each site."""
        if user.shape[-1] == 0:  # no user model
            return user.new_zeros(*user.shape[:-1], self.n_sites, 2, self.output_size)
        return self.to_film(user).unflatten(-1, (self.n_sites, 2, self.output_size))

    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        film = self.film(spread_over_rows(user, batch))  # [C, R, n_sites, 2, d]
        if self.after_trunk:
            if batch.hidden is None:
                hidden = self.layer(
                    backbone(backbone.embed(batch.input_ids), batch.segment, batch.position_ids)
                )
            else:
                # The layer once a distinct text; of two ways to index, this one's backward is faster.
                assert batch.texts is not None
                hidden = nn.functional.embedding(batch.texts, self.layer(batch.hidden))
            return modulate(hidden, film[:, :, 0])
        n_contexts, n_rows = film.shape[:2]
        text = backbone.embed(batch.input_ids).repeat(n_contexts, 1, 1)
        with modulated_blocks(backbone, film.flatten(0, 1)):
            hidden = backbone(
                text,
                batch.segment.repeat(n_contexts, 1),
                batch.position_ids.repeat(n_contexts, 1),
                apart=True,
            )
        return hidden.unflatten(0, (n_contexts, n_rows))

    @contextlib.contextmanager
    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> Iterator[dict[str, Any]]:
        film = self.film(user)  # [N, n_sites, 2, d]
        sites = modulated_trunk if self.after_trunk else modulated_blocks
        with sites(backbone, film):
            yield {"input_ids": input_ids, "attention_mask": attention_mask}


def modulate(hidden: Tensor, film: Tensor) -> Tensor:
    """(1 + gamma) * h + beta for [..., L, d] and film [..., 2, d], in the dtype of h."""
    gamma, beta = film.to(hidden.dtype).unsqueeze(-3).unbind(dim=-2)  # each [..., 1, d]
    return torch.addcmul(beta, hidden, 1 + gamma)


@contextlib.contextmanager
def modulated_blocks(backbone: Backbone, film: Tensor) -> Iterator[None]:
    """Within it every block's output is modulated by its site of film [N, n_blocks, 2, d].

    Gradient checkpointing runs `forward` again in the backward pass, not the hooks around it.
    """

    def hook(site: int) -> Any:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (modulate(output[0], film[:, site]), *output[1:])
            return modulate(output, film[:, site])

        return replace

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(backbone.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def modulated_trunk(backbone: Backbone, film: Tensor) -> Iterator[None]:
    """Within it the trunk's last hidden states are modulated by film [N, 1, 2, d]."""

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = modulate(output.last_hidden_state, film[:, 0])
        return output

    handle = backbone.trunk.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
