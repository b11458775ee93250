"""Logits as the model's own forward makes them: heads, biases, scales and soft caps included."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


class _TrunkOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What a trunk gives, of which there are hidden states alone; whatever else is asked for is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _TrunkThatGives(nn.Module):
    """Stands where the trunk stood and returns hidden states that were computed before."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _TrunkOutput(last_hidden_state=self.hidden)


def own_logits(language_model: nn.Module, trunk: nn.Module, hidden: Tensor) -> Tensor:
    """Return what a language model makes of its trunk's last hidden states, [N, d] -> [N, V].

    Its own forward runs on a shallow copy in which the trunk only returns `hidden`. Weights are
    shared. The copy has no hooks: sharded weights must not be gathered once a call, as processes
    differ in how often they call.
    """
    stub = _TrunkThatGives(hidden[None])
    model: Any = _copy_with(language_model, trunk, stub)
    ids = hidden.new_zeros(1, len(hidden)).long()
    return model(input_ids=ids, use_cache=False).logits[0]


def _copy_with(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy a tree of modules without hooks and patches, `new` for `old`; parameters are shared."""
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
    """Return the parameters that turn hidden states into logits, tied embeddings among them."""
    of_trunk = {id(one) for one in trunk.parameters()}
    behind = [one for one in language_model.parameters() if id(one) not in of_trunk]
    head: Any = language_model.get_output_embeddings()  # type: ignore[operator]
    return behind + ([] if head is None else list(head.parameters()))
