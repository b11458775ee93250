"""LoRA layers that use less memory bandwidth on CPUs, with and without dropout."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from plrhf.backbone import devices
from plrhf.backbone.devices import product_dtype
from plrhf.core.second_order import check_differentiated_once, takes_second_derivatives


class SparseDropout(nn.Dropout):
    """Dropout that draws only where the dropped numbers are on CPUs; elsewhere it is `nn.Dropout`.

    On CPUs, torch draws a random number for each number of the input on one core, which takes longer
    than the matrix product of a layer of width 256. The distance from one dropped number to the next
    is geometric, so as many draws as there are dropped numbers give the same distribution.
    """

    def dropped(self, count: int) -> Tensor:
        """Draw which of `count` numbers are dropped, each with probability p independently.

        NumPy's SFC64 generator draws, with a seed from torch's default CPU generator. Devroye 1986,
        Non-Uniform Random Variate Generation, chapter X.2, has the geometric numbers.

        Returns:
            int64 positions, ascending.
        """
        seed = torch.randint(2**63 - 1, (1,)).numpy()  # which is no wait for a device
        generator = np.random.Generator(np.random.SFC64(seed))
        expected = count * self.p
        n_draws = int(expected + 6 * expected**0.5) + 8  # nearly always enough
        found, last = [np.empty(0, dtype=np.int64)], -1
        while last < count:
            gaps = generator.standard_exponential(n_draws)
            gaps *= -1 / math.log1p(-self.p)
            positions = np.minimum(gaps, count).astype(np.int64)  # a gap of more is past the end
            positions += 1
            np.cumsum(positions, out=positions)
            positions += last
            found.append(positions)
            last = int(positions[-1])
        joined = np.concatenate(found)
        return torch.from_numpy(joined[: joined.searchsorted(count)])

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0 or not devices.computes_on_cpu(values):
            return super().forward(values)
        dropped = self.dropped(values.numel())
        kept = values.reshape(-1).index_fill(0, dropped, 0).view(values.shape)
        return kept / (1 - self.p)


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer, computed by `_FusedLora` on CPUs wherever `can_fuse` allows it.

    The naive twin is PEFT's own forward, which computes all other cases.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and not (args or kwargs):
            y = self.base_layer(x)
            return y - self._low_rank(x) if self.disable_adapters else y
        fused = devices.computes_on_cpu(x) and not takes_second_derivatives() and can_fuse(self)
        if args or kwargs or not fused:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base, dropout = self.base_layer, self.lora_dropout[name]
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        dropped = None
        if isinstance(dropout, SparseDropout) and dropout.training and dropout.p > 0:
            dropped = dropout.dropped(x.numel())
            scaling = scaling / (1 - dropout.p)
        return _FusedLora.apply(x, base.weight, base.bias, a, b, scaling, dropped)

    def _low_rank(self, x: Tensor) -> Tensor:
        """Compute the term scaling * x A^T B^T of the merged adapter.

        PEFT's own way without the adapter would take it out of the weight again, for good and with
        rounding errors.
        """
        (name,) = self.merged_adapters
        return self.scaling[name] * self.lora_B[name](self.lora_A[name](x))


class _FusedLora(torch.autograd.Function):
    """Computes y = x W^T + bias + scaling * (M x) A^T B^T with frozen W and bias and a dropout mask M.

    Hu et al. 2021, arXiv 2106.09685, eq. 3. The low-rank term is added to the output in place. Products
    with a narrow result are computed transposed, as [r, N] instead of [N, r], which takes up to nine
    times less time on CPUs. Of dropout only the dropped numbers and their positions are kept.
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
        dropped: Tensor | None,
    ) -> Tensor:
        dtype = product_dtype(x.device, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()  # (N, in)
            values = None if dropped is None else flat.view(-1).index_select(0, dropped)
            with _zeroed(flat, dropped, values):
                low = a.to(dtype) @ flat.t()  # (r, N)
            used = weight.to(dtype).t()
            # Not a view of it is returned: models may change it in place.
            y = flat.new_empty(*x.shape[:-1], weight.shape[0])
            rows = y.view(-1, weight.shape[0])
            torch.mm(flat, used, out=rows)
            if bias is not None:
                rows.add_(bias.to(dtype))  # addmm would fill the output with it first
            rows.addmm_(low.t(), b.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, low, dropped, values)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        flat, weight, a, b, low, dropped, values = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0]).to(flat.dtype)  # (N, out)
        d_low = (b.to(dy.dtype).t() @ dy.t()).mul_(ctx.scaling)  # (r, N)
        with _zeroed(flat, dropped, values):
            da = (d_low @ flat).to(a.dtype)
        db = (low @ dy).mul_(ctx.scaling).t().to(b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)  # (N, in)
            before = None if dropped is None else dx.view(-1).index_select(0, dropped)
            dx.addmm_(d_low.t(), a.to(dy.dtype))
            if dropped is not None:  # what was dropped has the gradient of the frozen weight alone
                dx.view(-1).scatter_(0, dropped, before)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        return dx, None, None, da, db, None, None


@contextlib.contextmanager
def _zeroed(matrix: Tensor, at: Tensor | None, values: Tensor | None) -> Iterator[None]:
    """Set the `values` at some positions to zero while a product is computed, which saves a copy.

    Autograd does not see the change, which is undone.
    """
    if at is None or values is None:
        yield
        return
    plain = matrix.data.view(-1)
    plain.scatter_(0, at, torch.zeros_like(values))
    try:
        yield
    finally:
        plain.scatter_(0, at, values)


def can_fuse(layer: Any) -> bool:
    """Return whether a LoRA layer is in a state that `_FusedLora` can compute.

    It is not if adapters are off, merged or of another kind, if the weight is trained, quantised or
    sharded, or if dropout is not `SparseDropout`.
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
    known_dropout = keeps_all or isinstance(dropout, SparseDropout)
    return known_dropout and floating and b.bias is None and not hasattr(base.weight, "ds_id")


def fuse_lora(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into a `FusedLoraLinear`, in place."""
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = FusedLoraLinear
            for name, dropout in layer.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    replaced = SparseDropout(dropout.p).train(dropout.training)
                    layer.lora_dropout[name] = replaced


def merge_lora(model: nn.Module) -> None:
    """Add the adapters of LoRA layers to their weights, in place, where these are plain and float32.

    Fewer bits would round the sum.
    """
    for layer in model.modules():
        if not isinstance(layer, FusedLoraLinear) or not can_fuse(layer):
            continue
        if layer.base_layer.weight.dtype == torch.float32:
            layer.merge()
