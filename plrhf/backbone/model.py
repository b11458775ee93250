"""The language model in three steps: embed, trunk, unembed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from plrhf.backbone import block_attention, gptj, hashes, saving
from plrhf.backbone import lora as lora_layers
from plrhf.backbone.adapters import add_lora
from plrhf.backbone.check import cache_is_right, choose_layout
from plrhf.backbone.compiled import compile_in_training
from plrhf.backbone.devices import product_dtype
from plrhf.backbone.families import Layout, is_causal
from plrhf.backbone.hooks import replaced_output, switch_dropout_off
from plrhf.backbone.kv_cache import RoomyLayer
from plrhf.backbone.logits import head_parameters, model_logits
from plrhf.backbone.masks import PackedRows, packed_rows
from plrhf.backbone.sharding import gathered, is_sharded, whole_shape
from plrhf.core.errors import bad_value
from plrhf.core.row_index import Extent
from plrhf.core.row_packing import NO_USER, RowPacking
from plrhf.core.second_order import takes_second_derivatives
from plrhf.core.types import PADDING, PROMPT, PreferenceBatch

Trainable = Literal["lora", "frozen", "full"]


class Backbone(nn.Module):
    """Wraps a Hugging Face model as three steps (embed, trunk, unembed), with optional LoRA.

    Args:
        model: a causal LM, or a bidirectional encoder (`causal` is False).
        trainable: ``lora``, ``frozen`` or ``full``.
        lora: r, alpha, dropout, target_modules (names, or "all-linear"), for ``lora`` only.
        gradient_checkpointing: recompute activations in the backward pass.
        compiled: use torch.compile for blocks in training (not GPT-J's). The naive twin is without.
        block_masks: attend to packed rows by FlexAttention on GPUs where it works.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        trainable: Trainable = "lora",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        block_masks: bool = True,
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
        self._fingerprint: tuple[list[tuple[int, int]], str] | None = None
        self.causal = is_causal(model.config)
        self.trainable, self.block_masks = trainable, block_masks
        switch_dropout_off(model)
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model: PreTrainedModel | PeftModel = model
        if trainable == "lora" and lora is not None:
            self.model = add_lora(model, **lora)
            lora_layers.fuse_lora(self.model)
        elif trainable == "frozen":
            model.requires_grad_(False)
        elif not any(is_sharded(one) for one in model.parameters()):
            # Steps are smaller than what bfloat16 can tell apart, so learned weights are float32.
            # Sharded ones are in float32 too, in DeepSpeed's own copy.
            model.float()
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
        self.layout: Layout = choose_layout(self)
        self.writes_with_cache = cache_is_right(self)
        if compiled:
            for block in self.blocks:
                compile_in_training(block)

    @property
    def bare(self) -> PreTrainedModel:
        """The Hugging Face model, with LoRA layers in place."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def trunk(self) -> PreTrainedModel:
        """The part that computes last hidden states; training and generation both call it."""
        # Not an attribute: its weights would stand in the state dict a second time.
        base: Any = self.bare.base_model
        if base is self.bare and self.causal:  # Llama 4 gives its trunk another name than it has
            base = base.model
        # OPT and the like call the decoder within the base model, and never the base model itself.
        return base.decoder if self.causal and "decoder" in base._modules else base

    @property
    def config(self) -> Any:
        """The Hugging Face config of the model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width d of the last hidden states."""
        # OPT's smaller models project them down to the width of their embeddings.
        projected = getattr(self.trunk, "project_out", None)
        return int(self.block_size if projected is None else projected.out_features)

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        config = self.config.get_text_config(decoder=True)
        width = getattr(config, "head_dim", None)
        return int(config.hidden_size // config.num_attention_heads if width is None else width)

    @property
    def block_size(self) -> int:
        """Width of a block's output."""
        return int(self.config.get_text_config(decoder=True).hidden_size)

    @property
    def embedding_size(self) -> int:
        """Width of token embeddings, which may be narrower than the blocks."""
        weight: Any = self.trunk.get_input_embeddings().weight
        return int(whole_shape(weight)[1])

    @property
    def embedding_dtype(self) -> torch.dtype:
        """Dtype of token embeddings."""
        return self.trunk.get_input_embeddings().weight.dtype  # type: ignore[return-value]

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions, or None if the model's config has no limit."""
        config = self.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if limit is not None and rope.get("rope_type") == "longrope":
            # Beyond it all rows of a batch are turned by other angles if one of them is long.
            limit = rope.get("original_max_position_embeddings", limit)
        return limit if limit is None else limit - self.first_position

    @property
    def vocabulary_size(self) -> int:
        """Number V of tokens that have an embedding."""
        weight: Any = self.trunk.get_input_embeddings().weight
        return int(whole_shape(weight)[0])

    @property
    def first_position(self) -> int:
        """Position of a text's first token; for RoBERTa and similar models it is the padding index + 1."""
        table = getattr(getattr(self.trunk, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else padding + 1

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, from first to last."""
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
        """Return the input embeddings of all tokens, [V, e], scaled if the model scales them."""
        table: Any = self.trunk.get_input_embeddings()
        with gathered([table.weight]), torch.no_grad():
            if type(table) is nn.Embedding:
                weight = table.weight.detach()
                return weight.clone() if is_sharded(weight) else weight
            return table(torch.arange(len(table.weight), device=table.weight.device))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed token ids, [R, L] -> [R, L, e]."""
        return self.trunk.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        segment: Tensor,
        position_ids: Tensor,
        *,
        user_vectors: Tensor | None = None,
        packing: RowPacking | None = None,
        extent: Extent | None = None,
    ) -> Tensor:
        """Compute last hidden states [R, T + L, d] of T user vectors followed by L text positions.

        Args:
            input_ids, segment, position_ids: [R, L] int64, in the layout `layout`.
            user_vectors: [R, T, e]. They belong to the prompt and take positions: 0..T-1, before the
                text, or those after the prompt if `packing` puts them there.
            packing: how rows are packed for the trunk, made for T user vectors; None: not at all.
            extent: of the rows of text without packing, if the loader has computed it.
        """
        n_vectors = 0 if user_vectors is None else user_vectors.shape[1]
        if packing is not None and packing.n_contexts is None and self.layout == "two_rows":
            packing = None  # each text would be read with the others of its row
        embeddings = None
        if user_vectors is not None and n_vectors > 0:
            embeddings = torch.cat([user_vectors, self.embed(input_ids)], dim=1)
        own = torch.arange(n_vectors, device=segment.device).expand(segment.shape[0], -1)
        moved = position_ids + n_vectors
        if packing is not None and packing.n_contexts is not None:  # vectors follow the prompt
            own = own + (segment == PROMPT).sum(dim=1, keepdim=True)
            moved = position_ids + n_vectors * (segment != PROMPT)
        input_ids = nn.functional.pad(input_ids, (n_vectors, 0), value=self.placeholder)
        segment = nn.functional.pad(segment, (n_vectors, 0), value=PROMPT)
        rows = PackedRows(segment, torch.cat([own, moved], dim=1))
        if packing is None:
            rows.extent = None if extent is None else extent.shifted_by(n_vectors)
            return self._run(input_ids, embeddings, rows)
        packed = PackedRows(
            packing.pack(segment, PADDING),
            packing.pack(rows.positions),
            packing.source_row,
            packing.branch,
            packing.extent,
            packing.until,
        )
        text = None if embeddings is None else packing.pack(embeddings)
        return packing.unpack(self._run(packing.pack(input_ids), text, packed))

    def read_text(self, batch: PreferenceBatch, *, reads_prompt: bool = False) -> Tensor:
        """Compute last hidden states [R, L, d] of a batch's text, without users.

        Those of prompts may be zero unless `reads_prompt`.
        """
        rows = (batch.input_ids, batch.segment, batch.position_ids)
        if reads_prompt:
            return self(*rows, extent=Extent(first_read=0, n_causal=0))
        return self(*rows, packing=batch.packing_for(NO_USER), extent=batch.extent)

    def _run(self, input_ids: Tensor, embeddings: Tensor | None, rows: PackedRows) -> Tensor:
        """Compute last hidden states [R, L, d] of rows in the model's layout."""
        mask = (rows.segment != PADDING).long()
        if self.layout == "two_rows":
            input_ids = input_ids.masked_fill(mask == 0, self.padding)
            return self.call_trunk(input_ids, embeddings, attention_mask=mask)
        rows.in_blocks = self._attends_in_blocks(input_ids.device)
        if self.is_gptj:
            embeddings = self.embed(input_ids) if embeddings is None else embeddings
            layout = gptj.attention_layout(self.trunk, rows, dtype=embeddings.dtype)
            return gptj.run_trunk(self.trunk, embeddings, layout)
        with packed_rows(rows):
            # The model makes its masks as for one text a row, and `packed_rows` answers.
            positions = rows.positions + self.first_position
            return self.call_trunk(
                input_ids, embeddings, attention_mask=mask, position_ids=positions
            )

    def _attends_in_blocks(self, device: torch.device) -> bool:
        """Whether packed rows are attended to by FlexAttention on a device."""
        if not self.block_masks or device.type != "cuda" or takes_second_derivatives():
            return False
        dtype = product_dtype(device, self.embedding_dtype)
        return block_attention.works_on(device, dtype, self.head_width)

    def call_trunk(self, input_ids: Tensor, embeddings: Tensor | None, **others: Tensor) -> Tensor:
        """Call the trunk with token ids, and return the last hidden states [R, L, d].

        With ``inputs_embeds``, some models would skip a part of their embedding.

        Args:
            embeddings: [R, L, e], returned by the input embedding instead of those of `input_ids`;
                None: no change.
        """
        if self.causal:
            others["use_cache"] = False  # type: ignore[assignment]
        with replaced_output(self.trunk.get_input_embeddings(), embeddings):
            return self.trunk(input_ids=input_ids, **others).last_hidden_state

    @property
    def padding(self) -> int:
        """Token id of padding, which is masked."""
        padding = getattr(self.config.get_text_config(decoder=True), "pad_token_id", None)
        return 0 if padding is None or padding < 0 else int(padding)

    @property
    def placeholder(self) -> int:
        """Token id used at the positions of user vectors; any id but the padding's."""
        return 1 if self.padding == 0 else 0

    def cache(self, length: int) -> Cache | None:
        """Make an empty key-value cache for rows of at most `length` positions.

        None for models that make their own cache, such as recurrent ones.
        """
        if self.layout == "two_rows":
            return None
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        # Sliding windows and recurrent states are of one size: no room would spare them anything.
        cache.layers = [
            RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        return cache

    def prefill(self, cache: Cache, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Fill an empty cache with left-padded prompts [N, L], except their last tokens.

        Equal prompts are computed once.
        """
        if input_ids.shape[1] == 1:
            return
        both = torch.stack([input_ids, attention_mask], dim=1)  # padding is any token, masked
        distinct, at = both.unique(dim=0, return_inverse=True)
        ids, mask = distinct[:, 0, :-1], distinct[:, 1, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + self.first_position
        self.trunk(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(at)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Compute logits from hidden states as the model's own forward does, [..., d] -> [..., V]."""
        if self.is_gptj and not is_sharded(self.bare.lm_head.weight):
            return self.bare.lm_head(hidden)  # all that it does
        flat = model_logits(self.bare, self.trunk, hidden.reshape(-1, hidden.shape[-1]))
        return flat.view(*hidden.shape[:-1], -1)

    @property
    def unembedding_is_constant(self) -> bool:
        """Whether the weights of `unembed` are frozen, and whole in this process."""
        head = head_parameters(self.bare, self.trunk)
        return not any(one.requires_grad or is_sharded(one) for one in head)

    def fingerprint(self) -> str:
        """Hash the frozen weights by rounded sums, quickly; see `hashes.fingerprint`.

        As long as they are the same it is computed once.
        """
        frozen = [one for one in self.parameters() if not one.requires_grad]
        # A write raises the version, which tensors of inference mode lack.
        versions = [(id(one), 0 if one.is_inference() else one._version) for one in frozen]
        if self._fingerprint is None or self._fingerprint[0] != versions:
            self._fingerprint = versions, hashes.fingerprint(self)
        return self._fingerprint[1]

    @cached_property
    def digest(self) -> str:
        """Hash of every bit of the frozen weights; see `hashes.digest`."""
        return hashes.digest(self)

    def save(self, directory: Path) -> None:
        """Write the learned weights: the PEFT adapter, or the fully trained model to ``backbone/``."""
        if isinstance(self.model, PeftModel):
            saving.save_adapter(self.model, directory)
        elif self.trainable == "full":
            self.save_whole(directory / "backbone")

    def save_whole(self, directory: Path, *, shard_bytes: int = 2**30) -> None:
        """Write a plain Hugging Face model with LoRA merged into its weights; see `saving`."""
        saving.save_whole(self.model, directory, shard_bytes=shard_bytes)

    def merged(self) -> PreTrainedModel:
        """Return a plain Hugging Face model with LoRA merged into its weights."""
        return saving.merged(self.model)

    def merge_adapters(self) -> None:
        """Add LoRA to the weights in place, which spares its products; do not train or save them then.

        `reference` still gives the model without LoRA.
        """
        lora_layers.merge_lora(self.bare)

    def load_adapter(self, directory: Path) -> None:
        """Load the adapter that `save` wrote, if the backbone has one; see `saving`."""
        if isinstance(self.model, PeftModel):
            saving.load_adapter(self.model, directory)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Make the model the reference pi_ref in this context: no adapters, dropout or gradient."""
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
