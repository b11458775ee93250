"""A GPT-J and a tokenizer small enough for a laptop."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from plrhf.core.errors import bad_value


def tiny_gptj(
    *,
    vocab_size: int,
    n_layers: int,
    width: int,
    n_heads: int,
    max_positions: int,
    eos_token_id: int,
) -> PreTrainedModel:
    """Build a small GPT-J with random weights, drawn with torch's current seed."""
    if width % n_heads != 0:
        raise bad_value(
            "backbone.width",
            width,
            f"a multiple of backbone.n_heads={n_heads}",
            f"Set backbone.width={n_heads * max(1, width // n_heads)}",
        )
    config = GPTJConfig(
        vocab_size=vocab_size,
        n_positions=max_positions,
        n_embd=width,
        n_layer=n_layers,
        n_head=n_heads,
        rotary_dim=min(64, width // n_heads),
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-pair tokenizer on `texts`. Its one special token is start, end and padding token."""
    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, bos_token=end, pad_token=end, unk_token=end
    )
