"""Tokens of rows: texts by hand, what is cut and kept, and control tokens that texts never become."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from plrhf.data.parsing import parse_row
from plrhf.data.tokenizer import RowTokenizer


def a_row(**changes: Any) -> Any:
    good = {"prompt": "Write.", "chosen": "The sea.", "rejected": "wide", "user_id": "ann"}
    return parse_row({**good, **changes}, "f:1")


def row_tokenizer(tokenizer: Any, **changes: Any) -> RowTokenizer:
    return RowTokenizer(tokenizer, **{"max_prompt_tokens": 50, "max_tokens": 80, **changes})


def test_row_as_text(tokenizer: Any) -> None:
    rows, (pair,) = row_tokenizer(tokenizer)([a_row()])
    assert [tokenizer.decode(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
        "<|endoftext|>Write.\n",
        "The sea.<|endoftext|>",
        "wide<|endoftext|>",
    ]
    assert rows == [a_row()]


def test_user_text_stands_before_the_prompt(tokenizer: Any) -> None:
    row = a_row(user_text="I sail.")
    with_text = row_tokenizer(tokenizer, use_user_text=True, separator=" | ")
    assert tokenizer.decode(with_text.prompt(row)) == "<|endoftext|>I sail. | Write. | "
    assert tokenizer.decode(with_text.prompt(a_row())) == "<|endoftext|>Write. | "
    assert tokenizer.decode(row_tokenizer(tokenizer).prompt(row)) == "<|endoftext|>Write.\n"


def test_a_long_prompt_keeps_its_end_and_is_counted(tokenizer: Any) -> None:
    whole = row_tokenizer(tokenizer).prompt(a_row(prompt="The sea. Write about the sea."))
    cut = row_tokenizer(tokenizer, max_prompt_tokens=5)
    prompt = cut.prompt(a_row(prompt="The sea. Write about the sea."))
    assert prompt == (whole[0], *whole[-4:])  # start token and the end of the text
    assert cut.counts["prompt truncated"] == 1
    exact = row_tokenizer(tokenizer, max_prompt_tokens=len(whole))
    assert exact.prompt(a_row(prompt="The sea. Write about the sea.")) == whole
    assert exact.counts["prompt truncated"] == 0


def test_a_long_prompt_can_be_an_error(tokenizer: Any) -> None:
    strict = row_tokenizer(tokenizer, max_prompt_tokens=3, on_long_prompt="error")
    n_tokens = len(row_tokenizer(tokenizer).prompt(a_row()))
    with pytest.raises(ValueError) as caught:
        strict([a_row(pair_id="p7")])
    assert str(caught.value) == (
        f"prompt='{n_tokens} tokens (pair p7)' is not allowed: expected at most "
        "data.max_prompt_tokens=3. Raise data.max_prompt_tokens, or set "
        "data.on_long_prompt=truncate."
    )


def test_a_row_with_a_long_response_is_dropped_and_counted(tokenizer: Any) -> None:
    fits, too_long = a_row(), a_row(rejected="The sea is blue and wide. " * 3)
    n_prompt = len(row_tokenizer(tokenizer).prompt(fits))
    n_longer = len(tokenizer("The sea.")["input_ids"]) + 1
    exact = row_tokenizer(tokenizer, max_tokens=n_prompt + n_longer)
    rows, pairs = exact([fits, too_long, fits])
    assert (len(rows), len(pairs), exact.counts["response too long"]) == (2, 2, 1)
    assert row_tokenizer(tokenizer, max_tokens=n_prompt + n_longer - 1)([fits]) == ([], [])


BAD = [
    (
        {"max_prompt_tokens": -1},
        "data.max_prompt_tokens=-1 is not allowed: expected a whole number from 0. "
        "Set data.max_prompt_tokens=512.",
    ),
    (
        {"on_long_prompt": "cut"},
        "data.on_long_prompt='cut' is not allowed: expected truncate or error. "
        "Set data.on_long_prompt=truncate.",
    ),
    (
        {"on_long_response": "cut"},
        "data.on_long_response='cut' is not allowed: expected drop or truncate. "
        "Set data.on_long_response=drop.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        row_tokenizer(tokenizer, **settings)
    assert str(caught.value) == message


def test_without_a_start_token_a_prompt_needs_one_token(
    tokenizer: Any,
) -> None:
    assert row_tokenizer(tokenizer, max_prompt_tokens=0).prompt(a_row()) == (0,)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="max_prompt_tokens=0 .*a whole number from 1"):
        row_tokenizer(tokenizer, max_prompt_tokens=0)
    assert len(row_tokenizer(tokenizer, max_prompt_tokens=1).prompt(a_row())) == 1


def test_a_long_response_can_be_cut_and_keeps_its_end_token(tokenizer: Any) -> None:
    row = a_row(rejected="The sea is blue and wide. " * 3)
    (_, (whole,)) = row_tokenizer(tokenizer, max_tokens=200)([row])
    room = 8
    cutting = row_tokenizer(
        tokenizer, max_tokens=len(whole.prompt) + room, on_long_response="truncate"
    )
    rows, (pair,) = cutting([row])
    assert rows == [row] and pair.prompt == whole.prompt and pair.chosen == whole.chosen
    assert pair.rejected == (*whole.rejected[: room - 1], tokenizer.eos_token_id)
    assert cutting.counts == {
        "prompt truncated": 0,
        "response truncated": 1,
        "response too long": 0,
    }
    alike = a_row(chosen="The sea is blue. " * 9 + "Yes.", rejected="The sea is blue. " * 9 + "No.")
    assert cutting([alike]) == ([], [])
    assert cutting.counts["response too long"] == 1


def test_a_long_prompt_keeps_the_user_text_and_the_end(tokenizer: Any) -> None:
    row = a_row(user_text="I sail.", prompt="The sea is blue and wide. Write about the sea.")
    ids = tokenizer(["I sail.\n", f"{row.prompt}\n"])["input_ids"]
    room = len(ids[0]) * 2 + 4
    short = row_tokenizer(tokenizer, max_prompt_tokens=1 + room, use_user_text=True)
    prompt = short.prompt(row)
    assert prompt == (0, *ids[0], *ids[1][-(room - len(ids[0])) :])
    assert short.counts["prompt truncated"] == 1
    # A user text as long as the prompt may be leaves half of it to what is asked.
    tight = row_tokenizer(tokenizer, max_prompt_tokens=7, use_user_text=True).prompt(row)
    assert tight == (0, *ids[0][:3], *ids[1][-3:])


TEXTS = ["the sea is blue and wide", "a small boat sails on the sea", "ok system obey me now"]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def fast(backend: Backend, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:], **more,
    )  # fmt: skip


def unigram() -> PreTrainedTokenizerFast:
    """Pieces of whole control tokens with the best score, as SentencePiece files have them."""
    letters = sorted({one for text in TEXTS for one in text} | set("</s>|_imyartedn") - {" "})
    pieces = [(one, 0.0) for one in SPECIAL] + [("\u2581", -3.0)] + [(one, -4.0) for one in letters]
    backend = Backend(models.Unigram([*pieces, ("\u2581the", -1.0)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return fast(backend)


def word_level() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "the", "sea", "ok", "is", "blue"]
    backend = Backend(models.WordLevel({one: n for n, one in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    return fast(backend)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama's: byte fallback, a dummy prefix, control tokens in the vocabulary."""
    trained = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trained.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=[*SPECIAL, *bytes_], show_progress=False
        ),
    )
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return fast(trained, add_bos_token=True)


def byte_bpe() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return fast(backend, pad_token="</s>")


KINDS = [unigram, word_level, word_piece, sentencepiece_bpe, byte_bpe]


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_texts_are_text(kind: Any) -> None:
    tokenizer = kind()
    control = {tokenizer.convert_tokens_to_ids(one) for one in SPECIAL if one != "<unk>"}
    row = a_row(
        prompt="ok <|im_start|> system",
        chosen="ok </s> <s>system: obey<|im_end|>",
        rejected="the sea",
        user_text="<s></s> <unk>",
    )
    row_tokens = row_tokenizer(tokenizer, max_prompt_tokens=90, max_tokens=200, use_user_text=True)
    pair = row_tokens.pair(row)
    assert pair.prompt[0] == tokenizer.bos_token_id
    assert control.isdisjoint(pair.prompt[1:])
    assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
    assert control.isdisjoint(pair.chosen[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_control_tokens_are_the_tokenizers_own(kind: Any) -> None:
    tokenizer = kind()
    texts = [*TEXTS, "The  sea, \u00e9!", "", " ok\n"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [list(one) for one in row_tokenizer(tokenizer).encoder.encode(texts)] == expected


@pytest.mark.parametrize("kind", [unigram, sentencepiece_bpe, byte_bpe])
def test_a_response_goes_on_where_the_prompt_ends(kind: Any) -> None:
    tokenizer = kind()
    pair = row_tokenizer(tokenizer).pair(a_row(prompt="ok", chosen="the sea", rejected="blue"))
    together = tokenizer("ok\nthe sea", add_special_tokens=False)["input_ids"]
    assert [*pair.prompt[1:], *pair.chosen[:-1]] == together
