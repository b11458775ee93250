"""User vectors as a scale and a shift of hidden states (FiLM)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plrhf.aggregators.base import (
    Aggregator,
    read_without_user,
    spread_over_rows,
    text_layer,
)
from plrhf.aggregators.text_residual import TextResidual
from plrhf.backbone.model import Backbone
from plrhf.core.checks import FractionBelowOne, NonNegativeInt, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import ShrinkageKind, ShrunkLinear
from plrhf.core.types import PreferenceBatch

DEFAULT_USER_DIM = {"last": 128, "every_block": 32}
"""Widest user vector by default. The map from it has 2 * width * hidden size * sites learned numbers:
1.0 million at the last layer of an 8B model and 8.4 million in all of its blocks."""


@check_arguments("aggregator")
class FiLM(Aggregator):
    """Scales and shifts hidden states by linear functions of the user vector.

    h' = (1 + gamma_u) * h + beta_u (Perez et al. 2018, arXiv 1709.07871, eq. 2). (gamma_u, beta_u) is a
    linear map of e_u that starts at zero, so at the start the user has no effect. Both are computed in
    float32, whatever the dtype of the hidden states, since small gammas vanish in bfloat16.

    Args:
        hidden_size: d of the last hidden states. n_blocks: number of blocks.
        block_size: d of a block's output; None: the same.
        site: ``last``: the last hidden states, so that the trunk does not depend on the user;
            ``every_block``: the output of each block from `from_depth` on.
        from_depth: share of the blocks, the first ones, whose output stays as it is (site=every_block
            only), rounded down to whole blocks.
        user_dim: width of e_u; None: d, but at most the site's `DEFAULT_USER_DIM`.
        scale: whether to scale, too; without it a policy's users only make tokens likelier or rarer.
        layer_width, layer_dropout: of `base.text_layer` before FiLM (reward models with site=last
            only).
        shift: whether there is a beta. A reward model never has one, as it would change no margin; a
            policy without one can become a plain model whose last normalisation has no bias.
        shrinkage: ``learned`` shrinks the map from e_u, see `core.shrinkage`. Use it with a small e_u
            (user_dim=4, and the same rank in the encoder).
        text_residual: add a residual for each of `n_texts` train texts that repeat, see `TextResidual`
            (frozen backbones with site=last only).
    """

    penalty_weight = 1.0

    def __init__(
        self,
        *,
        hidden_size: int,
        n_blocks: int,
        block_size: int | None = None,
        site: Literal["last", "every_block"] = "last",
        from_depth: FractionBelowOne = 0.0,
        user_dim: PositiveInt | None = None,
        scale: bool = True,
        layer_width: PositiveInt | None = None,
        layer_dropout: FractionBelowOne = 0.0,
        shift: bool = True,
        shrinkage: ShrinkageKind = "fixed",
        text_residual: bool = False,
        n_texts: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.residual = TextResidual(hidden_size, n_texts) if text_residual else None
        if layer_width is not None and site != "last":
            raise bad_value(
                "aggregator.layer_width",
                layer_width,
                f"null with site={site}",
                "Set aggregator.layer_width=null, or aggregator.site=last",
            )
        if not shift and site != "last":
            cure = "Set aggregator.shift=true, or aggregator.site=last"
            raise bad_value("aggregator.shift", shift, f"true with site={site}", cure)
        if from_depth > 0 and site == "last":
            cure = "Set aggregator.from_depth=0, or aggregator.site=every_block"
            raise bad_value("aggregator.from_depth", from_depth, "0 with site=last", cure)
        self.after_trunk = self.shares_prompts = site == "last"
        self.user_dim = min(hidden_size, DEFAULT_USER_DIM[site]) if user_dim is None else user_dim
        self.n_sites = 1 if self.after_trunk else n_blocks - int(from_depth * n_blocks)
        self.output_size = hidden_size if layer_width is None else layer_width
        self.has_scale, self.has_shift = scale, True
        self.unembeddable = layer_width is None
        self.layer = text_layer(hidden_size, layer_width, layer_dropout)
        self.width = self.output_size  # of gamma and of beta
        if site == "every_block" and block_size is not None:
            self.width = block_size
        n_outputs = self.n_sites * self.n_maps * self.width
        self.to_film: nn.Linear = (
            ShrunkLinear(self.user_dim, n_outputs)
            if shrinkage == "learned"
            else nn.Linear(self.user_dim, n_outputs, bias=False)
        )
        nn.init.zeros_(self.to_film.weight)
        if not shift:
            self.drop_shift()

    @property
    def n_maps(self) -> int:
        """Number of vectors at a site: scale and shift, or one of them."""
        return int(self.has_scale) + int(self.has_shift)

    def text_parameters(self) -> list[nn.Parameter]:
        own = () if self.residual is None else self.residual.parameters()
        return [*self.layer.parameters(), *own]

    def drop_shift(self) -> None:
        if not self.has_scale and self.after_trunk:
            raise bad_value(
                "aggregator.scale",
                False,
                "true without a shift, and for a reward model, in which a shift cancels",
                "Set aggregator.scale=true",
            )
        if self.after_trunk and self.has_shift:
            self.has_shift = False
            self.to_film.out_features = self.width
            keep_rows(self.to_film, "weight", self.width)
            if isinstance(self.to_film, ShrunkLinear):
                keep_rows(self.to_film.shrinkage, "log_information", self.width)

    def count_pairs(self, n_pairs: int) -> None:
        if isinstance(self.to_film, ShrunkLinear):
            self.to_film.n_pairs.fill_(n_pairs)

    def penalty(self) -> Tensor | None:
        found = [] if self.residual is None else [self.residual.penalty()]
        if isinstance(self.to_film, ShrunkLinear):
            found.append(self.to_film.penalty)
            self.to_film.penalty = None
        charged = [one for one in found if one is not None]
        return torch.stack(charged).sum() if len(charged) > 0 else None

    def reward_terms(
        self, hidden: Tensor, direction: Tensor, user_dim: int
    ) -> tuple[Tensor, Tensor] | None:
        if not self.after_trunk or self.has_shift or user_dim > self.width:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            weighted = self.layer(hidden).float() * direction
            slopes = weighted @ self._map() if user_dim > 0 else weighted[:, :0]
            return weighted.sum(dim=-1), slopes

    def _map(self) -> Tensor:
        """Return the map from e_u to scale and shift, in training drawn where it is shrunk."""
        if isinstance(self.to_film, ShrunkLinear):
            return self.to_film.drawn_weight()
        return self.to_film.weight

    def film(self, user: Tensor) -> Tensor:
        """Compute gamma and beta of each site from user vectors [..., D], [..., n_sites, 2, d] float32.

        Without a shift the axis of size 2 has gamma only.
        """
        with torch.autocast(user.device.type, enabled=False):
            maps = self.to_film(user.to(self.to_film.weight.dtype)).float()
        return self._padded(maps)

    def _padded(self, maps: Tensor) -> Tensor:
        """Shape what `to_film` returns, [..., n_outputs], as `film` does; a missing gamma is zero."""
        maps = maps.unflatten(-1, (self.n_sites, self.n_maps, self.width))
        return maps if self.has_scale else torch.cat([torch.zeros_like(maps), maps], dim=-2)

    def gradients(
        self, backbone: Backbone, batch: PreferenceBatch, logps: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Compute the gradients of log-probabilities by `to_film`'s outputs, where these are zero.

        Args:
            logps: computes log-probabilities [B, 2] of responses from hidden states [R, L, d].

        Returns:
            [B, 2, n_outputs] float32.
        """
        n_pairs, n_rows = len(batch), batch.segment.shape[0]
        size = (1, n_rows, self.to_film.out_features)
        with torch.enable_grad():
            maps = torch.zeros(size, device=batch.segment.device, requires_grad=True)
            found = logps(self.modulated(backbone, batch, self._padded(maps))[0])
            of_responses = [
                torch.autograd.grad(found[:, response].sum(), maps, retain_graph=response == 0)[0]
                for response in (0, 1)  # apart, since both have the prompt's positions in common
            ]
        by_row = torch.stack(of_responses, dim=-2)  # [1, R, 2, n_outputs]
        return by_row.view(n_rows // n_pairs, n_pairs, *by_row.shape[2:]).sum(dim=0)

    def first_order(self, gradients: Tensor, texts: Tensor, user: Tensor) -> Tensor:
        """Compute how users change log-probabilities of responses, to first order in scale and shift.

        Args:
            gradients: of M texts, [M, n_outputs], see `gradients`. texts: [B, 2] int64, places of
                the responses of pairs among them. user: [C * B, user_dim].

        Returns:
            [C, B, 2] in nats.
        """
        slopes = nn.functional.embedding(texts, gradients @ self._map())  # [B, 2, user_dim]
        of_contexts = user.view(-1, len(texts), user.shape[-1]).to(slopes.dtype)
        return torch.einsum("bsk,cbk->cbs", slopes, of_contexts)

    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        if user.shape[-1] == 0:  # no user model
            text = read_without_user(backbone, batch, self.layer)
            return text.expand(len(user) // len(batch), -1, -1, -1)
        return self.modulated(backbone, batch, self.film(spread_over_rows(user, batch)))

    def modulated(self, backbone: Backbone, batch: PreferenceBatch, film: Tensor) -> Tensor:
        """Compute the hidden states of the text under scale and shift [C, R, n_sites, 2, d]."""
        if self.after_trunk:
            # In float32 up to the head: a small change would vanish in hidden states of fewer bits.
            text = read_without_user(backbone, batch, self.layer)
            return modulate(text.float(), film[:, :, 0])
        n_contexts, n_rows = film.shape[:2]
        with modulated_blocks(backbone, film.flatten(0, 1)):
            hidden = backbone(
                batch.input_ids.repeat(n_contexts, 1),
                batch.segment.repeat(n_contexts, 1),
                batch.position_ids.repeat(n_contexts, 1),  # and not packed: users go by row
                extent=batch.extent,
            )
        return hidden.unflatten(0, (n_contexts, n_rows))

    @contextlib.contextmanager
    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> Iterator[dict[str, Any]]:
        with self.continuing(backbone, user):
            yield {"input_ids": input_ids, "attention_mask": attention_mask}

    def continuing(self, backbone: Backbone, user: Tensor) -> AbstractContextManager[Any]:
        if user.shape[-1] == 0:  # no user model
            return contextlib.nullcontext()
        sites = modulated_trunk if self.after_trunk else modulated_blocks
        return sites(backbone, self.film(user))  # [N, n_sites, 2, d]


def keep_rows(module: nn.Module, name: str, n_rows: int) -> None:
    """Replace a parameter of a module by its first `n_rows` rows."""
    whole: nn.Parameter = getattr(module, name)
    first = whole[:n_rows].detach().clone()
    setattr(module, name, nn.Parameter(first, requires_grad=whole.requires_grad))


def modulate(hidden: Tensor, film: Tensor) -> Tensor:
    """Return (1 + gamma) * h + beta, computed in float32 and returned in the dtype of h.

    Args:
        hidden: h, [..., L, d]. film: gamma and beta [..., 2, d] float32, or only gamma [..., 1, d].
    """
    gamma, *beta = film.unsqueeze(-3).unbind(dim=-2)  # each [..., 1, d]
    wide = hidden.to(film.dtype)
    changed = wide * (1 + gamma) if len(beta) == 0 else torch.addcmul(beta[0], wide, 1 + gamma)
    return changed.to(hidden.dtype)


@contextlib.contextmanager
def modulated_blocks(backbone: Backbone, film: Tensor) -> Iterator[None]:
    """Modulate the outputs of the last n_sites blocks by `film` [N, n_sites, 2, d] in this context.

    Hooks are used since gradient checkpointing repeats the blocks' forward but not the hooks.
    """

    def hook(site: int) -> Any:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (modulate(output[0], film[:, site]), *output[1:])
            return modulate(output, film[:, site])

        return replace

    blocks = list(backbone.blocks)[-film.shape[1] :]
    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def modulated_trunk(backbone: Backbone, film: Tensor) -> Iterator[None]:
    """Modulate the last hidden states by `film` [N, 1, 2, d] in this context."""

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = modulate(output.last_hidden_state, film[:, 0])
        return output

    handle = backbone.trunk.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
