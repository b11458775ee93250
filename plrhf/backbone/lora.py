"""LoRA layers that use less memory bandwidth on CPUs, with and without dropout."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from plrhf.backbone import devices
from plrhf.backbone.devices import product_dtype

DRAW_BITS = 16
"""Number of random bits that decide whether dropout keeps a number; torch uses 64."""


class SixteenBitDropout(nn.Dropout):
    """Dropout that uses 16 random bits for each number on CPUs; elsewhere it is `nn.Dropout`.

    On CPUs, torch draws random numbers on one core, which takes as long as the matrix product of a
    layer of width 256; 16 bits are a quarter of what `nn.Dropout` draws. The rate is rounded to a
    multiple of 2^-16. Kept numbers are scaled by the rounded rate, so the mean is exact.
    """

    @property
    def n_dropped(self) -> int:
        """How many of the 2^16 possible random values mean that a number is dropped."""
        return min(round(self.p * 2**DRAW_BITS), 2**DRAW_BITS - 1)

    @property
    def kept_rate(self) -> float:
        """Probability that a number is kept."""
        return 1 - self.n_dropped / 2**DRAW_BITS

    def drawn_mask(self, shape: torch.Size) -> Tensor:
        """Draw which numbers are kept, with torch's default CPU generator.

        Returns:
            uint8 of `shape`, 1 for kept and 0 for dropped.
        """
        n_draws = shape.numel()
        words = torch.empty(-(-n_draws // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[:n_draws]  # from -2^15
        kept = draws >= self.n_dropped - 2 ** (DRAW_BITS - 1)
        return kept.view(torch.uint8).view(shape)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not devices.computes_on_cpu(values):
            return super().forward(values)
        return values * self.drawn_mask(values.shape) / self.kept_rate


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer, computed by `_FusedLora` on CPUs wherever `can_fuse` allows it.

    The naive twin is PEFT's own forward, which computes all other cases.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not devices.computes_on_cpu(x) or not can_fuse(self):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base, dropout = self.base_layer, self.lora_dropout[name]
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        kept = None
        if isinstance(dropout, SixteenBitDropout) and dropout.training and dropout.p > 0:
            kept = dropout.drawn_mask(x.shape)
            scaling = scaling / dropout.kept_rate
        return _FusedLora.apply(x, base.weight, base.bias, a, b, scaling, kept)


class _FusedLora(torch.autograd.Function):
    """Computes y = x W^T + bias + scaling * (M x) A^T B^T with frozen W and bias and a dropout mask M.

    Hu et al. 2021, arXiv 2106.09685, eq. 3. The low-rank term is added to the output in place. Products
    with a narrow result are computed transposed, as [r, N] instead of [N, r], which takes up to nine
    times less time on CPUs. Of dropout only the mask is kept, one byte a number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        kept: Tensor | None,
    ) -> Tensor:
        dtype = product_dtype(x.device, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
            kept = None if kept is None else kept.view(flat.shape)
            low = a.to(dtype) @ _masked(flat, kept).t()  # (r, N)
            used = weight.to(dtype).t()
            # Not a view of it is returned: models may change it in place.
            y = flat.new_empty(*x.shape[:-1], weight.shape[0])
            rows = y.view(-1, weight.shape[0])
            if bias is None:
                torch.mm(flat, used, out=rows)
            else:
                torch.addmm(bias.to(dtype), flat, used, out=rows)
            rows.addmm_(low.t(), b.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, low, kept)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low, kept = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0]).to(flat.dtype)  # (N, out)
        d_low = (b.to(dy.dtype).t() @ dy.t()).mul_(ctx.scaling)  # (r, N)
        da = (d_low @ _masked(flat, kept)).to(a.dtype)
        db = (low @ dy).mul_(ctx.scaling).t().to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)  # (N, in)
            if kept is None:
                dx.addmm_(d_low.t(), a.to(dy.dtype))
            else:
                dx.add_((d_low.t() @ a.to(dy.dtype)).mul_(kept))
            dx = dx.to(ctx.dtype).view(ctx.shape)
        return dx, None, None, da, db, None, None


def _masked(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept


def can_fuse(layer: Any) -> bool:
    """Return whether a LoRA layer is in a state that `_FusedLora` can compute.

    It is not if adapters are off, merged or of another kind, if the weight is trained, quantised or
    sharded, or if dropout is not `SixteenBitDropout`.
    """
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return False
    name, base = names[0], layer.base_layer
    if name not in layer.lora_A or type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    keeps_all = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    floating = base.weight.is_floating_point() and base.weight.shape == (
        b.out_features,
        a.in_features,
    )
    known_dropout = keeps_all or isinstance(dropout, SixteenBitDropout)
    return known_dropout and floating and b.bias is None and not hasattr(base.weight, "ds_id")


def fuse_lora(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into a `FusedLoraLinear`, in place."""
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = FusedLoraLinear
            for name, dropout in layer.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    replaced = SixteenBitDropout(dropout.p).train(dropout.training)
                    layer.lora_dropout[name] = replaced
