"""Logits exactly as the model's own forward computes them, with biases, scales and soft caps."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class _TrunkOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The output of a trunk: its hidden states; any other attribute is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _FixedTrunk(nn.Module):
    """Replaces a trunk and returns precomputed hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _TrunkOutput(last_hidden_state=self.hidden)


def model_logits(language_model: nn.Module, trunk: nn.Module, hidden: Tensor) -> Tensor:
    """Compute the logits of a language model from its trunk's last hidden states, [N, d] -> [N, V].

    The model's own forward runs on a shallow copy whose trunk only returns `hidden`. The copy shares
    the weights and has no hooks, because hooks would gather sharded weights at each call, and processes
    differ in how often they call.
    """
    stub = _FixedTrunk(hidden[None])
    model: Any = _copy_with(language_model, trunk, stub)
    ids = hidden.new_zeros(1, len(hidden)).long()
    return model(input_ids=ids, use_cache=False).logits[0]


def _copy_with(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy a tree of modules without its hooks, replacing `old` by `new`; parameters are shared."""
    if module is old:
        return new
    made = copy.copy(module)
    made.__dict__ = dict(module.__dict__)
    made.__dict__.pop("forward", None)  # patched onto an object it would call the original's parts
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        made.__dict__[name] = type(module.__dict__[name])()
    made.__dict__["_modules"] = {
        name: child if child is None else _copy_with(child, old, new)
        for name, child in module._modules.items()
    }
    return made


def head_parameters(language_model: nn.Module, trunk: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that turn hidden states into logits, including tied embeddings."""
    head: Any = language_model.get_output_embeddings()  # type: ignore[operator]
    found = _parameters_outside(language_model, trunk)
    found += [] if head is None else list(head.parameters())
    return list({id(one): one for one in found}.values())


def _parameters_outside(module: nn.Module, trunk: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters without walking through the trunk, since every step asks for them."""
    if module is trunk:
        return []
    own = list(module.parameters(recurse=False))
    return own + [one for child in module.children() for one in _parameters_outside(child, trunk)]
