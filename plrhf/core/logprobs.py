"""Log-probabilities of responses, whose logits are computed for response tokens only, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from plrhf.core.row_index import RowIndex
from plrhf.core.second_order import check_differentiated_once, takes_second_derivatives
from plrhf.core.types import CHOSEN, REJECTED

Unembed = Callable[[Tensor], Tensor]


def sum_by_response(values: Tensor, segment: Tensor, n_pairs: int) -> Tensor:
    """Sum values [R, L] over the tokens of each response, [B, 2]: chosen, rejected."""
    of_row = torch.stack([(values * (segment == s)).sum(dim=1) for s in (CHOSEN, REJECTED)], dim=1)
    return of_row.view(-1, n_pairs, 2).sum(dim=0)  # rows of a pair: [R, 2] -> [B, 2]


def _logps_of(hidden: Tensor, targets: Tensor, unembed: Unembed) -> Tensor:
    """Return the log-probability [N] of each target token, from hidden states [N, d]."""
    return -cross_entropy(unembed(hidden).float(), targets, reduction="none")  # [N, V] -> [N]


class _LogpsWithGradient(torch.autograd.Function):
    """`_logps_of` for a frozen unembedding: the forward pass also computes the gradients.

    A token's log-probability depends on its own hidden state alone. So its gradient can be computed
    while the logits exist, and the backward pass only scales it: logits are never computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, unembed: Unembed) -> Tensor:
        with torch.enable_grad():
            given = hidden.detach().requires_grad_()
            logps = _logps_of(given, targets, unembed)
            logps.sum().backward()  # nothing else in it has gradients
        ctx.save_for_backward(given.grad)
        return logps.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        (gradient,) = ctx.saved_tensors  # [N, d]
        return (grads[0][:, None] * gradient).to(gradient.dtype), None, None


def response_logps(
    hidden: Tensor,
    input_ids: Tensor,
    segment: Tensor,
    unembed: Unembed,
    *,
    n_pairs: int,
    **how: Any,
) -> Tensor:
    """Return the log-probability of each response: the sum over its tokens, end token included.

    The naive twin is `naive_response_logps`.

    Args:
        n_pairs: B. others: see `token_logps`.

    Returns:
        [B, 2] float32 in nats: chosen, rejected.
    """
    return sum_by_response(
        token_logps(hidden, input_ids, segment, unembed, **how), segment, n_pairs
    )


def token_logps(
    hidden: Tensor,
    input_ids: Tensor,
    segment: Tensor,
    unembed: Unembed,
    *,
    constant: bool,
    chunk_size: int = 1024,
    index: RowIndex | None = None,
) -> Tensor:
    """Return the log-probability of each response token, end token included.

    Prompt tokens and user vectors are not scored. Logits exist for `chunk_size` tokens at a time. They
    are computed once if the unembedding is constant, else once forward and once backward.

    Args:
        hidden: [R, L, d] last hidden states. input_ids, segment: [R, L] int64.
        unembed: hidden states [N, d] -> logits [N, V].
        constant: whether the unembedding's weights need no gradients.
        chunk_size: tokens whose logits are held at once, > 0.
        index: of the rows, which the loader has made; None: it is made here.

    Returns:
        [R, L] float32 in nats, 0 for what is no response.
    """
    index = RowIndex.of(segment) if index is None else index
    rows, columns = index.row, index.column
    targets = input_ids[rows, columns]
    selected = hidden[rows, index.before]  # [N, d]
    pieces = []
    once = constant and torch.is_grad_enabled() and not takes_second_derivatives()
    for start in range(0, len(rows), chunk_size):
        given = (selected[start : start + chunk_size], targets[start : start + chunk_size], unembed)
        if once and selected.requires_grad:
            pieces.append(_LogpsWithGradient.apply(*given))
        else:
            pieces.append(
                checkpoint(_logps_of, *given, use_reentrant=False, preserve_rng_state=False)
            )
    logps = torch.zeros(segment.shape, dtype=torch.float32, device=hidden.device)
    return logps.index_put((rows, columns), torch.cat(pieces))


def naive_response_logps(
    hidden: Tensor, input_ids: Tensor, segment: Tensor, unembed: Unembed, *, n_pairs: int
) -> Tensor:
    """Return the same as `response_logps`, with all logits at once; for two-row batches only."""
    logps = unembed(hidden[:, :-1]).float().log_softmax(dim=-1)  # [R, L-1, V]
    of_tokens = logps.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return sum_by_response(of_tokens, segment[:, 1:], n_pairs)
