"""Text generation that ignores the options in a model's generation_config, except for its end tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import Cache, GenerationConfig

from plrhf.backbone.hooks import shifted_positions
from plrhf.backbone.model import Backbone


def write_tokens(
    backbone: Backbone,
    inputs: Mapping[str, Tensor],
    cache: Cache | None,
    *,
    ends: Sequence[int],
    padding: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    of_rows: Mapping[str, Any] | None = None,
) -> Tensor:
    """Generate tokens after left-padded prompts, [N, up to max_new_tokens] int64.

    Args:
        inputs: ``input_ids`` or ``inputs_embeds``, and ``attention_mask``, of N prompts.
        cache: keys and values of prompts computed before; None: the model makes its own cache.
        ends: ids of tokens that end a text. padding: id of the token after them.
        temperature: 0 is greedy decoding; above 0 samples. top_p: mass of nucleus sampling.
        of_rows: instead of these two, options of each row, see `row_options`.
    """
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    shifted = shifted_positions(backbone.trunk, backbone.first_position)
    with shifted, plain_generation(backbone) as writing:
        output = writing.generate(
            **inputs,
            **how,
            **({} if of_rows is None else of_rows),
            **({} if cache is None else {"past_key_values": cache}),
            use_cache=backbone.writes_with_cache,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            eos_token_id=list(ends),
        )
    # Given embeddings, `generate` returns the new tokens alone; given ids, the prompt before them.
    return output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output


def end_tokens(backbone: Backbone, tokenizer_end: int | None) -> list[int]:
    """Return the tokens that end a text: those of the model's generation_config and the tokenizer's.

    Chat models end a turn with a token of their own: Gemma with <end_of_turn>, Llama 3 with <|eot_id|>.
    """
    own = getattr(_bare(backbone).generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer_end]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


@contextlib.contextmanager
def plain_generation(backbone: Backbone) -> Iterator[Any]:
    """Yield the Hugging Face model with an empty generation_config, so that only our options apply.

    Otherwise the repository's own options (repetition penalty, beams, forced or suppressed tokens,
    minimum lengths) would change which tokens are written.
    """
    model = _bare(backbone)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def _bare(backbone: Backbone) -> Any:
    """Return the Hugging Face model without PEFT's wrapper."""
    model = backbone.model
    return model.get_base_model() if isinstance(model, PeftModel) else model
