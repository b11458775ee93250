"""The language model under everything: embed, run the trunk, unembed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from plrhf.backbone import gptj, saving
from plrhf.backbone import lora as lora_layers
from plrhf.backbone.families import is_causal
from plrhf.backbone.kv_cache import RoomyLayer
from plrhf.backbone.masks import FLEX, additive_mask, block_mask, sees
from plrhf.backbone.row_packing import RowPacking
from plrhf.backbone.sharding import gathered, is_sharded
from plrhf.core.errors import bad_value
from plrhf.core.types import PADDING, PROMPT

Trainable = Literal["lora", "frozen", "full"]


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
            saving.save_adapter(self.model, directory)
        elif self.trainable == "full":
            self.save_whole(directory / "backbone")

    def save_whole(self, directory: Path, *, shard_bytes: int = 2**30) -> None:
        """Write the plain Hugging Face model with what was learned folded in; see `saving`."""
        saving.save_whole(self.model, directory, shard_bytes=shard_bytes)

    def merged(self) -> PreTrainedModel:
        """The plain Hugging Face model with what was learned folded into its weights."""
        return saving.merged(self.model)

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
