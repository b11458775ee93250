"""Generation without the defaults of a model's generation_config, except for its end tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from plrhf.backbone.model import Backbone


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
    model = backbone.model
    return model.get_base_model() if isinstance(model, PeftModel) else model
