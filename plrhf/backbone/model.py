"""The language model under everything: loading, LoRA, masks. The only file importing transformers, peft."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_only
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPTJConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from plrhf.backbone import gptj
from plrhf.backbone import lora as lora_layers
from plrhf.backbone.row_packing import RowPacking
from plrhf.backbone.sharding import gathered, is_sharded, own_part, whole_shape
from plrhf.core.errors import BadValue, bad_value
from plrhf.core.types import PADDING, PROMPT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Trainable = Literal["lora", "frozen", "full"]
FLEX = "flex_attention"
ATTENTION = ("eager", "sdpa", FLEX)
"""Implementations that take a mask of who sees whom; flash-attention does not."""
READ_AT_ONCE = 2**20  # numbers of a tensor, 4 MiB in float32
Shards = Callable[[], contextlib.AbstractContextManager[None]]


def visible(query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor) -> Tensor:
    """Whether a position sees another in the packed layout.

    It sees itself and earlier positions of the prompt and of its own response, never the other
    response; padding, which nobody sees, sees the prompt: no softmax is over nothing.

    Args:
        query, key: where they stand. of_query, of_key: their segments.
    """
    return (key <= query) & ((of_key == PROMPT) | (of_key == of_query))


def sees(segment: Tensor, owner: Tensor | None = None) -> Tensor:
    """Which position sees which, [R, L] -> [R, L, L] bool.

    Args:
        owner: [R, L], whose each position is where several pairs are in a row: none sees another's.
    """
    place = torch.arange(segment.shape[1], device=segment.device)
    seen = visible(place[:, None], place, segment[:, :, None], segment[:, None, :])
    return seen if owner is None else seen & (owner[:, :, None] == owner[:, None, :])


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """`sees` as it is added to attention's scores, [R, L, L] bool -> [R, 1, L, L]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def block_mask(segment: Tensor, owner: Tensor | None = None) -> BlockMask:
    """`sees` for FlexAttention, which skips blocks of positions that see nothing of one another."""
    whose = torch.zeros_like(segment) if owner is None else owner

    def of_row(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(query, key, segment[row, query], segment[row, key])
        return seen & (whose[row, query] == whose[row, key])

    n_rows, length = segment.shape
    return create_block_mask(of_row, n_rows, None, length, length, device=str(segment.device))


class Backbone(nn.Module):
    """A Hugging Face model seen as: embed, run the trunk, unembed; with adapters that can be off.

    Args:
        model: a causal LM, or a bidirectional encoder (`causal` False), on which LoRA may be put.
        trainable: ``lora``, ``frozen`` or ``full``.
        lora: r, alpha, dropout, target_modules (names, or "all-linear"), for ``lora`` only.
        gradient_checkpointing: recompute activations in the backward pass.
        compiled: train blocks by torch.compile (not GPT-J's); the naive twin is the same without.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        trainable: Trainable = "lora",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if trainable not in ("lora", "frozen", "full"):
            raise bad_value(
                "backbone.trainable",
                trainable,
                "lora, frozen or full",
                "Set backbone.trainable=lora",
            )
        if trainable == "lora" and lora is None:
            raise bad_value(
                "backbone.lora",
                lora,
                "r, alpha, dropout and target_modules",
                "Give them, or set backbone.trainable=frozen",
            )
        self.causal = is_causal(model.config)
        self.trainable = trainable
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model: PreTrainedModel | PeftModel = model
        if trainable == "lora" and lora is not None:
            self.model = add_lora(model, **lora)
            lora_layers.fuse(self.model)
        elif trainable == "frozen":
            model.requires_grad_(False)
        # With another implementation of attention asked for, that one is used.
        self.is_gptj = (
            model.config.model_type == "gptj" and model.config._attn_implementation == "eager"
        )
        if self.is_gptj:
            gptj.use_packed_blocks(self.trunk)
        if compiled and model.config.model_type == "gptj":
            raise bad_value(
                "backbone.compiled",
                compiled,
                "false for GPT-J, whose own forward leaves it little to gain",
                "Set backbone.compiled=false",
            )
        if compiled:
            for block in self.blocks:
                compile_in_training(block)

    @property
    def trunk(self) -> PreTrainedModel:
        """The model without its language head; LoRA layers are put into it in place."""
        # Not an attribute: its weights would stand in the state dict a second time.
        bare: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return bare.base_model

    @property
    def config(self) -> Any:
        """The Hugging Face config of the model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width d of embeddings and hidden states."""
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int | None:
        """Positions the model was made for, or None where its config names no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        table = getattr(getattr(self.trunk, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # RoBERTa and its kin number positions from behind their padding index.
        return limit if limit is None or padding is None else limit - padding - 1

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        n_blocks = self.config.num_hidden_layers
        for module in self.trunk.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_blocks:
                return list(module)
        raise bad_value(
            "backbone.path",
            type(self.trunk).__name__,
            "a model with one list of blocks",
            "Use aggregator=soft_prompt or aggregator.site=last with it",
        )

    def vocabulary(self) -> Tensor:
        """Input embeddings of all tokens, [V, d], detached."""
        weight: Any = self.trunk.get_input_embeddings().weight
        with gathered([weight]):
            return weight.detach().clone() if is_sharded(weight) else weight.detach()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [R, L] -> input embeddings [R, L, d]."""
        return self.trunk.get_input_embeddings()(input_ids)

    def forward(
        self, inputs_embeds: Tensor, segment: Tensor, position_ids: Tensor, *, apart: bool = False
    ) -> Tensor:
        """Last hidden states [R, T + L, d] of T user vectors followed by L text positions.

        Short rows are put together and taken apart again, see `RowPacking`.

        Args:
            inputs_embeds: [R, T + L, d]; T is what `segment` is shorter by.
            segment, position_ids: [R, L] int64; user vectors count as prompt and take positions 0..T-1.
            apart: leave rows as they are, since something in the trunk goes by row.
        """
        n_vectors = inputs_embeds.shape[1] - segment.shape[1]
        segment = nn.functional.pad(segment, (n_vectors, 0), value=PROMPT)
        if not self.causal:
            output = self.trunk(
                inputs_embeds=inputs_embeds, attention_mask=(segment != PADDING).long()
            )
            return output.last_hidden_state
        own = torch.arange(n_vectors, device=segment.device).expand(segment.shape[0], -1)
        positions = torch.cat([own, position_ids + n_vectors], dim=1)
        packing = None if apart else RowPacking.of(segment)
        if packing is None:
            return self._run(inputs_embeds, segment, positions)
        segment, positions = packing.pack(segment, PADDING), packing.pack(positions)
        hidden = self._run(packing.pack(inputs_embeds), segment, positions, packing.source_row)
        return packing.unpack(hidden)

    def _run(
        self, inputs: Tensor, segment: Tensor, positions: Tensor, owner: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [R, L, d] of a causal trunk; `owner` as in `sees`."""
        if self.is_gptj:
            seen = sees(segment, owner)
            layout = gptj.attention_layout(self.trunk, segment, positions, seen, dtype=inputs.dtype)
            return gptj.run_trunk(self.trunk, inputs, layout)
        mask: Any = (
            block_mask(segment, owner)
            if self.config._attn_implementation == FLEX
            else additive_mask(sees(segment, owner), inputs.dtype)
        )
        output = self.trunk(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state

    def cache(self, length: int) -> Cache:
        """Empty key-value cache for rows of at most `length` positions, for `generate`."""
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        # Sliding windows and recurrent states are of one size: no room would spare them anything.
        cache.layers = [
            RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        return cache

    def prefill(self, cache: Cache, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Fill an empty `cache` with left-padded prompts [N, L] but for their last token.

        Rows of one prompt are computed once.
        """
        if input_ids.shape[1] == 1:
            return
        both = torch.stack([input_ids, attention_mask], dim=1)  # padding is any token, masked
        distinct, at = both.unique(dim=0, return_inverse=True)
        ids, mask = distinct[:, 0, :-1], distinct[:, 1, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.trunk(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(at)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., d] -> logits [..., V]."""
        head: Any = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and is_sharded(head.weight):
            # As a module it would be gathered at every call, and processes differ in their calls.
            return nn.functional.linear(hidden, head.weight, head.bias)
        return head(hidden)

    @property
    def unembeds_alike(self) -> bool:
        """Whether `unembed` is the same at every step, and all of it in this process."""
        head: Any = self.model.get_output_embeddings()
        return not any(one.requires_grad or is_sharded(one) for one in head.parameters())

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the frozen weights: another model's are others."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.named_parameters()):
            if not value.requires_grad:
                # Summed in double, whose rounding by device and thread count four digits hide.
                with gathered([value]):
                    shape, total = tuple(value.shape), float(value.detach().double().sum())
                digest.update(f"{name} {shape} {total:.4e}".encode())
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """Hash of every bit of the frozen weights, thirty-two hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.named_parameters()):
            if not value.requires_grad:
                with gathered([value]):
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    bits: Any = value.detach().cpu().contiguous().view(torch.uint8).numpy()
                    digest.update(bits)
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write what was learned: the PEFT adapter, or the whole model to ``backbone/``."""
        if isinstance(self.model, PeftModel):
            learned = [one for one in self.model.parameters() if one.requires_grad]
            with gathered(learned):
                if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                    self.model.save_pretrained(str(directory))
                    (directory / "README.md").unlink(
                        missing_ok=True
                    )  # PEFT's template, not filled in
        elif self.trainable == "full":
            self.save_whole(directory / "backbone")

    def save_whole(self, directory: Path, *, shard_bytes: int = 2**30) -> None:
        """Write the plain Hugging Face model with what was learned folded in.

        Sharded weights are gathered a few at a time, and rank 0 writes files of `shard_bytes`.
        """
        if not any(is_sharded(one) for one in self.model.parameters()):
            self.merged().save_pretrained(directory)
            return
        writer = ShardWriter(directory, shard_bytes=shard_bytes)
        bare: Any = self.model
        if isinstance(bare, PeftModel):
            bare = bare.get_base_model()
        written: set[int] = set()
        module: Any
        for path, module in bare.named_modules():
            if isinstance(module, LoraLinear):
                with gathered(list(module.parameters())), torch.no_grad():
                    for name, value in module.get_base_layer().named_parameters():
                        change = module.get_delta_weight("default") if name == "weight" else 0
                        writer.add(f"{path}.{name}", value + change)
                written.update(id(one) for one in module.parameters())
        for name, value in bare.named_parameters():
            if id(value) not in written:
                with gathered([value]):
                    writer.add(name, value)
        writer.close()
        if writer.writes:
            bare.config.save_pretrained(directory)

    def merged(self) -> PreTrainedModel:
        """The plain Hugging Face model with what was learned folded into its weights."""
        if isinstance(self.model, PeftModel):
            return self.model.merge_and_unload()
        return self.model

    def load_adapter(self, directory: Path) -> None:
        """Put the adapter `save` wrote, if this backbone has one, into place."""
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(
                self.model, load_file(directory / "adapter_model.safetensors")
            )

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is pi_ref: adapters off, dropout off, no gradient."""
        was_training = self.training
        self.eval()
        adapters_off = (
            self.model.disable_adapter()
            if isinstance(self.model, PeftModel)
            else contextlib.nullcontext()
        )
        try:
            with torch.no_grad(), adapters_off:
                yield
        finally:
            self.train(was_training)


def compile_in_training(block: nn.Module) -> None:
    """Let a block run by torch.compile while it trains; texts and margins, of all lengths, do not.

    Its own forward alone is compiled: hooks around it (`aggregators.film`) are new at every call.
    """
    plain = block.forward
    fast = torch.compile(plain, dynamic=True)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (fast if self.training else plain)(*args, **kwargs)

    block.forward = MethodType(forward, block)


class RoomyLayer(DynamicLayer):
    """One block's keys and values with room for those to come; its naive twin is `DynamicLayer`.

    That one copies them all for every token, which is most of the time that writing would take.

    Args:
        length: most positions a row will have.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.room: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new positions, each [N, H, n, d / H], and give all so far."""
        states = (key_states, value_states)
        if not self.room:
            self.lazy_initialization(*states)
            self.room = tuple(
                one.new_empty(*one.shape[:2], self.length, one.shape[3]) for one in states
            )
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for room, new in zip(self.room, states, strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, any of them more than once."""
        n_held = self.get_seq_length()
        self.room = tuple(room[indices] for room in self.room)
        self.keys, self.values = (room[:, :, :n_held] for room in self.room)


class ShardWriter:
    """Writes tensors to safetensors files of a limited size, with the index that transformers reads.

    Args:
        directory: where to; made if need be. shard_bytes: size from which a file is closed.
    """

    def __init__(self, directory: Path, *, shard_bytes: int) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.n_files = self.n_bytes = 0
        self.writes = rank_zero_only.rank == 0  # type: ignore[attr-defined]

    def add(self, name: str, value: Tensor) -> None:
        """Take a whole tensor, which may go once this has returned."""
        if self.writes:
            self.held[name] = value.detach().cpu().clone()
            if sum(one.nbytes for one in self.held.values()) >= self.shard_bytes:
                self._flush()

    def close(self) -> None:
        """Write what is left, and the index."""
        if not self.writes:
            return
        self._flush()
        index = {"metadata": {"total_size": self.n_bytes}, "weight_map": self.file_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.directory / "model.safetensors.index.json").write_text(text)

    def _flush(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.n_files += 1
        file = f"model-{self.n_files:05d}.safetensors"
        save_file(self.held, self.directory / file, metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(self.held, file)
        self.n_bytes += sum(one.nbytes for one in self.held.values())
        self.held = {}


def is_causal(config: Any) -> bool:
    """Whether a model of this config writes text left to right."""
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT-like: as decoders too
        return bool(getattr(config, "is_decoder", False))
    own_code = getattr(config, "auto_map", None) or {}
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own_code
    )


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: int, dropout: float, target_modules: Any
) -> PeftModel:
    """Freeze `model` and put LoRA beside the named linear layers (a list, or "all-linear")."""
    if r < 1:
        raise bad_value("backbone.lora.r", r, "a whole number from 1", "Set backbone.lora.r=8")
    if not 0 <= dropout < 1:
        raise bad_value(
            "backbone.lora.dropout",
            dropout,
            "a number from 0 to below 1",
            "Set backbone.lora.dropout=0.05",
        )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM" if is_causal(model.config) else "FEATURE_EXTRACTION",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise bad_value(
            "backbone.lora.target_modules",
            targets,
            f"all-linear or names among {linear}",
            "Name layers this model has",
        ) from error


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    shards: Shards | None = None,
) -> PreTrainedModel:
    """Load a causal LM, or a bidirectional encoder, by directory or hub name.

    Args:
        shards: context in which parameters are sharded as they are made; None: the model is whole.

    Raises:
        ValueError: no model there, a dtype outside `DTYPES`, or attention this model does not have.
    """
    if dtype not in DTYPES:
        raise bad_value(
            "backbone.dtype", dtype, f"one of {sorted(DTYPES)}", "Set backbone.dtype=float32"
        )
    check_path(path)
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
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
        return kind.from_pretrained(
            path, dtype=DTYPES[dtype], attn_implementation=attention, **options
        )
    except BadValue:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise bad_value(
            "backbone.path",
            path,
            "a model's directory or a hub name that can be reached",
            f"Check it ({' '.join(str(error).split())[:120]})",
        ) from error


def _check_attention(attention: str, model: Any) -> None:
    has = {"eager": True, "sdpa": model._supports_sdpa, FLEX: model._supports_flex_attn}
    if not has.get(attention, False):
        allowed = ", ".join(name for name in ATTENTION if has[name])
        raise bad_value(
            "backbone.attention",
            attention,
            f"null or one that {type(model).__name__} has: {allowed}",
            "Set backbone.attention=null",
        )


def fill_shards(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Put the weights at `path` into a sharded model: each process reads its shards, and no more.

    Raises:
        ValueError: no safetensors files there, or some that lack weights of the model or have others.
    """
    folder = Path(path)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(path, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [one.name for one in (folder / "model.safetensors",) if one.is_file()]
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    missing = {name for name, _ in model.named_parameters()}
    for file in (folder / name for name in names):
        with safe_open(file, "pt") as weights:
            in_file = list(weights.keys())
        for name in in_file:
            known = (name, f"{model.base_model_prefix}.{name}")
            found = next((one for one in known if one in own), None)
            if found is not None:
                with own_part(own[found]) as (part, first):
                    _read_part(part, first, file, name, shape=whole_shape(own[found]))
                missing.discard(found)
    if len(missing) > 0:
        raise bad_value(
            "backbone.path",
            path,
            f"safetensors files with all weights (lacking {sorted(missing)[0]})",
            "Save the model anew with save_pretrained",
        )
    return model.eval()


def _read_part(part: Tensor, first: int, file: Path, name: str, *, shape: torch.Size) -> None:
    """Read numbers `first` and on of a tensor in a file into `part`, [n], a piece at a time."""
    for start in range(0, len(part), READ_AT_ONCE):
        piece = part[start : start + READ_AT_ONCE]
        begin, end = first + start, first + start + len(piece)
        with safe_open(file, "pt") as weights:  # anew: its pages go with each piece
            found = weights.get_slice(name)
            if tuple(found.get_shape()) != tuple(shape):
                raise bad_value(
                    f"{file.name} {name}",
                    found.get_shape(),
                    f"shape {list(shape)}, as config.json says",
                    "Save the model anew with save_pretrained",
                )
            width = shape[1:].numel()  # numbers a row
            rows = found[begin // width : -(-end // width)].reshape(-1)
            skipped = begin - begin // width * width
            piece.copy_(rows[skipped : skipped + len(piece)])


def empty_model(
    *,
    path: str | None,
    architecture: dict[str, Any] | None = None,
    tiny: dict[str, Any] | None = None,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of which nothing but the shape is there: on the meta device, no weights read.

    Args:
        path: whose config.json says the shape, unless `architecture` does: model_type and what
            differs from that type's defaults, as `AutoConfig.for_model` takes them.
        tiny: shape of `tiny_gptj` where both are None. others: as in `load_model`.

    Raises:
        ValueError: no config there, or an architecture transformers does not know.
    """
    with torch.device("meta"):
        if architecture is None and path is None:
            return tiny_gptj(**(tiny or {}), eos_token_id=0)
        try:
            config = (
                AutoConfig.for_model(**architecture)
                if architecture is not None
                else AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
            )
            kind = AutoModelForCausalLM if is_causal(config) else AutoModel
            return kind.from_config(
                config,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, TypeError) as error:
            raise bad_value(
                "backbone.path" if architecture is None else "backbone.architecture",
                path if architecture is None else architecture,
                "a shape: a config.json that can be reached, or an architecture with its model_type",
                f"Set backbone.architecture={{model_type:NAME}} ({' '.join(str(error).split())[:120]})",
            ) from error


def load_backbone(
    *,
    path: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    trainable: Trainable = "lora",
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    shards: Shards | None = None,
) -> Backbone:
    """A `Backbone` over the model at `path`; see `load_model` and `Backbone` for the settings."""
    model = load_model(
        path,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        shards=shards,
    )
    return Backbone(
        model=model,
        trainable=trainable,
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        compiled=compiled,
    )


def looks_local(path: str) -> bool:
    """Whether a path is meant as a directory on disk rather than a hub name."""
    return path.startswith((".", "/", "~")) or Path(path).exists()


def check_path(path: str) -> None:
    """Raise where a path is meant as a directory and is not a model's."""
    if looks_local(path) and not Path(path, "config.json").is_file():
        raise bad_value(
            "backbone.path",
            path,
            "a model's directory (with config.json) or a hub name",
            "Give the directory that save_pretrained wrote",
        )


def load_tokenizer(
    path: str, *, pad_token: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a pad token and an end token (encoder-only: their separator).

    Raises:
        ValueError: either is missing.
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


def tiny_gptj(
    *,
    vocab_size: int,
    n_layers: int,
    width: int,
    n_heads: int,
    max_positions: int,
    eos_token_id: int,
) -> PreTrainedModel:
    """A GPT-J small enough for a laptop, weights random from torch's current seed."""
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
    """Byte-pair tokenizer learned from `texts`, whose one special token ends, starts and pads."""
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
