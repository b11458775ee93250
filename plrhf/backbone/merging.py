"""What one user does to a policy as weights and tokens of a plain Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.processors import Sequence as InTurn
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel

from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue, bad_value

PROBE = range(2, 9)  # token ids of a text on which a merged model is checked
TOLERANCE = 1e-3  # largest relative change of hidden states by merging


def probe_states(backbone: Backbone) -> Tensor:
    """Compute the last hidden states of a probe text, without the user."""
    ids = torch.tensor([list(PROBE)]) % backbone.vocabulary_size
    with torch.no_grad():
        return backbone.call_trunk(ids, None, attention_mask=torch.ones_like(ids)).float()


@torch.no_grad()
def fold_into_norm(backbone: Backbone, scale: Tensor, shift: Tensor, before: Tensor) -> None:
    """Let the last normalisation compute scale * h + shift in the place of h.

    Its weight w becomes scale * w, or scale * (1 + w) - 1 for models that add 1 to it, and its bias b
    becomes scale * b + shift. Which one is right is checked on a probe text.

    Args:
        scale, shift: [d] float32. before: last hidden states of the probe text.

    Raises:
        ValueError: there is no such normalisation, or it has no bias to hold the shift.
    """
    norm = _last_norm(backbone)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if bias is None and float(shift.abs().max()) > 0:
        raise bad_value(
            "aggregator.shift",
            True,
            f"false, as the last normalisation of {type(backbone.bare).__name__} has no bias to hold it",
            "Train with aggregator.shift=false or aggregator=soft_prompt, or use the export with plrhf",
        )
    own, expected = weight.float().clone(), before * scale + shift
    if bias is not None:
        bias.copy_(bias.float() * scale + shift)
    for changed in (own * scale, (1 + own) * scale - 1):
        weight.copy_(changed)
        error = (probe_states(backbone) - expected).norm() / expected.norm()
        if error < TOLERANCE:
            return
    raise _cannot_hold(backbone)


def _last_norm(backbone: Backbone) -> Any:
    """Find the module with a weight [d] whose output is the last hidden states."""
    found: list[tuple[Tensor, nn.Module]] = []

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((output, module))

    candidates = [
        one
        for one in backbone.trunk.modules()
        if getattr(one, "weight", None) is not None and one.weight.shape == (backbone.hidden_size,)
    ]
    handles = [one.register_forward_hook(keep) for one in candidates]
    try:
        last = probe_states(backbone)
    finally:
        for handle in handles:
            handle.remove()
    for output, module in reversed(found):
        if output.shape == last.shape and torch.equal(output.float(), last):
            return module
    raise _cannot_hold(backbone)


def _cannot_hold(backbone: Backbone) -> BadValue:
    """Return the error for a model that does not end with a normalisation we can change."""
    return bad_value(
        "backbone",
        type(backbone.bare).__name__,
        "a model that ends with a normalisation by a weight",
        "Use the export with plrhf",
    )


@torch.no_grad()
def add_prompt_tokens(
    backbone: Backbone, plain: PreTrainedModel, tokenizer: Any, vectors: Tensor
) -> list[str]:
    """Make a user's soft prompt [T, e] new tokens, and return them. They are never written.

    Raises:
        ValueError: the model does not embed them as these vectors.
    """
    names = [f"<|user_{place}|>" for place in range(len(vectors))]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(names))
    if int(ids.max()) >= backbone.vocabulary_size:
        plain.resize_token_embeddings(int(ids.max()) + 1, mean_resizing=False)
    table: Any = plain.get_input_embeddings()
    scale = 1.0
    for _ in range(2):  # some models scale their embeddings
        table.weight[ids] = (vectors / scale).to(table.weight.dtype)
        embedded = backbone.embed(ids).float()
        scale = scale * float(embedded.norm() / vectors.norm())
    if (embedded - vectors).norm() > TOLERANCE * 10 * vectors.norm():
        raise _cannot_hold(backbone)
    options: Any = plain.generation_config
    options.suppress_tokens = sorted({*(options.suppress_tokens or []), *ids.tolist()})
    return names


def start_token(tokenizer: Any) -> list[str]:
    """Return the start token if training puts it in front of a text, but the tokenizer does not."""
    start = tokenizer.bos_token_id
    if start is None or tokenizer("A")["input_ids"][:1] == [start]:
        return []
    return [str(tokenizer.bos_token)]


def put_in_front(tokenizer: Any, names: list[str]) -> None:
    """Let a tokenizer put tokens in front of every text, and its chat template all but the start token."""
    if len(names) == 0:
        return
    front = " ".join(f"{name}:0" for name in names)
    ids = tokenizer.convert_tokens_to_ids(names)
    template = TemplateProcessing(
        single=f"{front} $A:0",
        pair=f"{front} $A:0 $B:1",
        special_tokens=sorted(set(zip(names, ids, strict=True))),
    )
    backend = tokenizer.backend_tokenizer
    usual = backend.post_processor
    backend.post_processor = template if usual is None else InTurn([usual, template])
    if isinstance(tokenizer.chat_template, str):
        own = "".join(name for name in names if name != tokenizer.bos_token)
        tokenizer.chat_template = own + tokenizer.chat_template
