"""Loads models and tokenizers from directories or the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from plrhf.backbone.families import is_causal
from plrhf.backbone.masks import FLEX
from plrhf.backbone.model import Backbone, Trainable
from plrhf.backbone.quantization import (
    Quantization,
    keep_stored_weights,
    quantization_config,
    quantize_shape,
)
from plrhf.backbone.sharded_loading import check_all_there, fill_shards
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.errors import BadValue, bad_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("eager", "sdpa", FLEX)
"""Attention implementations that accept a mask; flash-attention does not."""
UNREADABLE = (
    *(OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError),
    ImportError,  # quantised checkpoints without their library
)
"""Exceptions of transformers for files that it cannot load as a model."""
Shards = Callable[[], contextlib.AbstractContextManager[None]]


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    shards: Shards | None = None,
) -> PreTrainedModel:
    """Load a causal language model or a bidirectional encoder by directory or hub name.

    Args:
        quantization: of the weights of linear layers, see `quantization_config`; None: none.
        shards: context in which parameters are sharded as they are created; None: they stay whole.

    Raises:
        ValueError: there is no model, the dtype is not in `DTYPES`, or the model lacks this attention.
    """
    if dtype not in DTYPES:
        raise bad_value(
            "backbone.dtype", dtype, f"one of {sorted(DTYPES)}", "Set backbone.dtype=float32"
        )
    check_path(path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    quantized: dict[str, Any] = {}
    if quantization is not None:
        quantized["quantization_config"] = quantization_config(quantization, DTYPES[dtype])
    try:
        config = read_config(path, **options)
        kind = AutoModelForCausalLM if is_causal(config) else AutoModel
        if attention is not None:
            with torch.device("meta"):
                _check_attention(attention, kind.from_config(config, **options))
        if shards is not None:
            with prevent_arange_dtype_change(), shards(), no_init_weights():
                model = kind.from_config(
                    config, dtype=DTYPES[dtype], attn_implementation=attention, **options
                )
            return fill_shards(model, path)
        loaded: Any = kind.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            **options,
            **quantized,
        )
        model, found = loaded
        check_all_there(path, found["missing_keys"])
        return keep_stored_weights(model)
    except BadValue:
        raise
    except UNREADABLE as error:
        raise bad_value(
            "backbone.path",
            path,
            "a model's directory or a hub name that can be reached",
            f"Check it ({' '.join(str(error).split())[:120]})",
        ) from error


def read_config(path: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read the config of a model, which may name no attention of the hub unless its code is trusted.

    Raises:
        ValueError: it names one, which transformers would download and run.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention) and not trust_remote_code:
            raise bad_value(
                "backbone.path",
                path,
                f"a model whose attention is no code of the hub ({attention})",
                "If you trust where it comes from, set backbone.trust_remote_code=true",
            )
    return config


def _check_attention(attention: str, model: Any) -> None:
    """Raise a ValueError if the model does not have this attention implementation."""
    has = {"eager": True, "sdpa": model._supports_sdpa, FLEX: model._supports_flex_attn}
    if not has.get(attention, False):
        allowed = ", ".join(name for name in ATTENTION if has[name])
        raise bad_value(
            "backbone.attention",
            attention,
            f"null or one that {type(model).__name__} has: {allowed}",
            "Set backbone.attention=null",
        )


def empty_model(
    *,
    path: str | None,
    architecture: dict[str, Any] | None = None,
    tiny: dict[str, Any] | None = None,
    dtype: str = "float32",
    attention: str | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a model on the meta device from its config alone; no weights are read.

    Args:
        path: directory or hub name with the config.json, used unless `architecture` is given.
        architecture: model_type and all settings that differ from its defaults, as for
            `AutoConfig.for_model`.
        tiny: arguments of `tiny_gptj`, used if `path` and `architecture` are None. others: as in
            `load_model`.

    Raises:
        ValueError: there is no config, or transformers does not know the architecture.
    """
    with torch.device("meta"):
        if architecture is None and path is None:
            return _quantized_shape(tiny_gptj(**(tiny or {}), eos_token_id=0), quantization)
        try:
            config = (
                AutoConfig.for_model(**architecture)
                if architecture is not None
                else read_config(str(path), trust_remote_code=trust_remote_code)
            )
            kind = AutoModelForCausalLM if is_causal(config) else AutoModel
            model = kind.from_config(
                config,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
            return _quantized_shape(model, quantization)
        except BadValue:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise bad_value(
                "backbone.path" if architecture is None else "backbone.architecture",
                path if architecture is None else architecture,
                "a shape: a config.json that can be reached, or an architecture with its model_type",
                f"Set backbone.architecture={{model_type:NAME}} ({' '.join(str(error).split())[:120]})",
            ) from error


def _quantized_shape(model: PreTrainedModel, quantization: Quantization | None) -> PreTrainedModel:
    """Replace layers by their `QuantizedShape` if a quantisation is given; return the model."""
    if quantization is not None:
        quantize_shape(model, quantization)
    return model


def load_backbone(
    *,
    path: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    trainable: Trainable = "lora",
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    shards: Shards | None = None,
) -> Backbone:
    """Load the model at `path` and wrap it in a `Backbone`; both explain the arguments."""
    if quantization is not None and (trainable == "full" or shards is not None):
        why = "backbone.trainable=full" if trainable == "full" else "ZeRO-3's shards"
        raise bad_value(
            "backbone.quantization",
            quantization,
            f"null with {why}, as weights that are rounded are neither learned nor sharded",
            "Set backbone.quantization=null",
        )
    if trainable == "full" and shards is None:
        dtype = "float32"  # as `Backbone` keeps learned weights: read so, nothing is rounded
    model = load_model(
        path,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        shards=shards,
    )
    return Backbone(
        model=model,
        trainable=trainable,
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        compiled=compiled,
        block_masks=attention is None,
    )


def looks_local(path: str) -> bool:
    """Return whether a path means a directory on disk rather than a hub name."""
    return path.startswith((".", "/", "~")) or Path(path).exists()


def check_path(path: str) -> None:
    """Raise a ValueError if a path means a directory but is not one with a model."""
    if looks_local(path) and not Path(path, "config.json").is_file():
        raise bad_value(
            "backbone.path",
            path,
            "a model's directory (with config.json) or a hub name",
            "Give the directory that save_pretrained wrote",
        )


def check_vocabulary(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer has tokens without an embedding in the model."""
    size = backbone.vocabulary_size
    if int(tokenizer.pad_token_id) >= size:
        raise bad_value(
            "backbone.pad_token",
            str(tokenizer.pad_token),
            f"a token among the {size} that the model has embeddings for",
            f"Set backbone.pad_token='{tokenizer.eos_token}', or resize the model's embeddings",
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise bad_value(
            "backbone.path",
            f"a tokenizer with token ids up to {largest}",
            f"ids below {size}, as the model has so many embeddings",
            "Save the model with its embeddings resized, or the tokenizer it was trained with",
        )


PLAIN_CHAT = (
    "{% for one in messages %}{{ '' if loop.first else '\n' }}{{ one['role'] }}: {{ one['content'] }}"
    "{{ eos_token if one['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '\nassistant: ' if add_generation_prompt else '' }}"
)
"""Chat template: one line for each turn, in front of it who speaks."""


def is_encoder(path: str) -> bool:
    """Return whether a directory or hub name has a model that reads texts both ways, from its config."""
    try:
        return not is_causal(read_config(path, trust_remote_code=False))
    except (ValueError, OSError):  # loading says what is wrong with it
        return False


def load_tokenizer(
    path: str,
    *,
    pad_token: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure it has a padding and an end token.

    The end token of a bidirectional encoder is its separator token.

    Args:
        chat_template: ``plain`` for `PLAIN_CHAT`; None: the tokenizer's own, if it has one.

    Raises:
        ValueError: one of the two is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise bad_value(
            "backbone.path",
            path,
            "a directory or hub name with a tokenizer",
            f"Save the tokenizer beside the model ({' '.join(str(error).split())[:120]})",
        ) from error
    if chat_template == "plain":
        tokenizer.chat_template = PLAIN_CHAT
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise bad_value(
                "backbone.pad_token",
                pad_token,
                "a token of the vocabulary",
                f"Set backbone.pad_token='{tokenizer.eos_token}'",
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        raise bad_value(
            "backbone.pad_token",
            None,
            f"a token of the vocabulary, as {path} has no pad token of its own",
            f"Set backbone.pad_token='{tokenizer.eos_token}'",
        )
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        raise bad_value(
            "backbone.path",
            path,
            "a tokenizer with an end-of-sequence or separator token",
            "Set eos_token in its tokenizer_config.json",
        )
    return tokenizer
