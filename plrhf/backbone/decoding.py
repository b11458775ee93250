"""How a backbone writes text, whatever its generation_config says beside its end tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from plrhf.backbone.model import Backbone


def end_tokens(backbone: Backbone, tokenizer_end: int | None) -> list[int]:
    """Collect the tokens that end a text: all of the backbone's generation_config, and the tokenizer's.

    Chat models end a turn by another token than a text: Gemma by <end_of_turn>, Llama 3 by <|eot_id|>.
    """
    own = getattr(_bare(backbone).generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer_end]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


@contextlib.contextmanager
def plain_generation(backbone: Backbone) -> Iterator[Any]:
    """Yield the bare model with an empty generation_config, so that `generate` does as it is told.

    A repository's own settings (repetition penalty, beams, forced or suppressed tokens, least lengths)
    would otherwise change which token is taken.
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
