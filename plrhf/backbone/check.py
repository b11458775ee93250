"""Checks a language model when it is loaded: does our row layout give the model's own outputs?

Three short pairs of unequal lengths are computed in the layout that is expected for the model's family.
The hidden states and logits must equal those of the model's plain forward on each sequence alone. So no
model is trusted because of the name of its family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from plrhf.backbone.families import PACKED, Layout, expected_layout
from plrhf.backbone.quantization import rounds_activations
from plrhf.backbone.sharding import is_sharded
from plrhf.core.errors import bad_value
from plrhf.core.row_packing import RowPacking, UserSlots
from plrhf.core.types import CHOSEN, PADDING, PROMPT, REJECTED

if TYPE_CHECKING:
    from plrhf.backbone.model import Backbone

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest number of the plain forward. In float32, where
rounding takes 1e-6, it is stricter than the promised 1e-3, because small random models hardly
attend."""

LENGTHS = ((5, 3, 4), (2, 6, 2), (7, 1, 5))
"""Number of tokens of prompt, chosen and rejected of each test pair."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Config entries with sizes of attention windows. Real ones are longer than the check's rows."""

SHORT_WINDOW = 3

SLOTS = {"packed": (UserSlots(1), UserSlots(1, 2)), "two_rows": (UserSlots(1),)}
"""Where the check puts a user vector, in turn, by layout. After the prompt there are two contexts in a
packed row; in two rows it makes no difference."""


def choose_layout(backbone: Backbone) -> Layout:
    """Choose the row layout in which a backbone gives correct outputs.

    The layout that is expected for its family is tried first, then two rows a pair, which is printed.
    Weights without values (in a plan) or in shards cannot be checked. Then rows are packed only for the
    families that tests cover.

    Raises:
        ValueError: the outputs are wrong in every layout.
    """
    config = backbone.config.get_text_config(decoder=True)
    layout, reason = expected_layout(config)
    if not all(_has_values(one) for one in backbone.parameters()):
        return layout if config.model_type in PACKED else "two_rows"
    with _eval_mode(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        sequences = _test_pairs(backbone)
        if layout == "packed":
            with shortened_windows(backbone.bare):
                found = layout_error(backbone, "packed", sequences)
            if found is None:
                return "packed"
            _print_line(
                f"{config.model_type}: packed rows differ from plain ones ({found}); using two rows a pair"
            )
        found = layout_error(backbone, "two_rows", sequences)
    if found is not None:
        raise bad_value(
            "backbone.path",
            f"a model of the family {config.model_type}",
            f"a model whose padded rows are its plain ones ({found})",
            "Use a model of another family, as docs/families.md lists them",
        )
    return "two_rows"


def cache_is_right(backbone: Backbone) -> bool:
    """Return whether the model's own cache gives the same texts as generating without a cache.

    Several rows are generated at once. The texts differ for RWKV, whose state mixes rows. The check
    takes several forward passes, so it is skipped for families that tests cover.
    """
    config = backbone.config.get_text_config(decoder=True)
    if not backbone.causal or config.model_type in PACKED:
        return True
    if not all(_has_values(one) for one in backbone.parameters()):
        return False
    prompts = torch.stack([torch.cat([one, one])[:4] for one, *_ in _test_pairs(backbone)])
    writer: Any = backbone.bare
    with _eval_mode(backbone), torch.no_grad():
        cached, plain = (
            writer.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                num_beams=1,
                pad_token_id=backbone.padding,
                output_scores=True,
                return_dict_in_generate=True,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        )
    allowed = _tolerance(backbone)
    finite = [torch.isfinite(one) for one in plain.scores]
    found, expected = (
        [one[keep] for one, keep in zip(by.scores, finite, strict=True)] for by in (cached, plain)
    )
    return (
        torch.equal(cached.sequences, plain.sequences)
        and _relative_error(found, expected) <= allowed
    )


def _tolerance(backbone: Backbone) -> float:
    """Return the largest relative error that the model's dtype allows."""
    dtype = next(backbone.parameters()).dtype
    if rounds_activations(backbone.bare):  # a last bit decides how a number is rounded
        dtype = torch.bfloat16
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


@rank_zero_only
def _print_line(line: str) -> None:
    print(line)


def _has_values(parameter: Tensor) -> bool:
    """Return whether a parameter is whole in this process and not on the meta device or fake."""
    unseen = parameter.is_meta or isinstance(parameter, FakeTensor)
    return not (unseen or isinstance(parameter.data, FakeTensor) or is_sharded(parameter))


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode in this context, and restore each submodule's mode afterwards."""
    were = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, training in were.items():
            one.training = training


@contextlib.contextmanager
def shortened_windows(model: nn.Module) -> Iterator[None]:
    """Shorten sliding windows and chunks in this context, so that the rows of the check exceed them."""
    configs = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
    changed = []
    for config in configs.values():
        for name in WINDOWS:
            value = vars(config).get(name)
            if isinstance(value, int) and value > SHORT_WINDOW:
                changed.append((config, name, value))
                setattr(config, name, SHORT_WINDOW)
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


def _test_pairs(backbone: Backbone) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the token ids of prompt, chosen and rejected of each test pair, without special tokens."""
    config = backbone.config.get_text_config(decoder=True)
    special: set[Any] = {backbone.padding}
    for name in ("bos_token_id", "eos_token_id", "mask_token_id", "cls_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, list) else [value])
    size = backbone.vocabulary_size
    usable = [one for one in range(min(size, 512)) if one not in special] or [0]
    device = next(backbone.parameters()).device
    drawn = (usable[7 * place**2 % len(usable)] for place in range(1, 10_000))
    return [
        tuple(torch.tensor([next(drawn) for _ in range(n)], device=device) for n in lengths)  # type: ignore[misc]
        for lengths in LENGTHS
    ]


def layout_error(
    backbone: Backbone, layout: Layout, pairs: list[tuple[Tensor, Tensor, Tensor]]
) -> str | None:
    """Return how the outputs in a layout differ from the plain forward's; None if they are equal.

    Args:
        pairs: token ids of prompt, chosen and rejected of each pair.
    """
    allowed = _tolerance(backbone)
    try:
        plain = [
            plain_forward(backbone, torch.cat([prompt, response]))
            for prompt, *responses in pairs
            for response in responses
        ]
        starts = [len(prompt) - 1 for prompt, *_ in pairs for _ in (CHOSEN, REJECTED)]
        expected = [of[start:] for (of, _), start in zip(plain, starts, strict=True)]
        for slots in SLOTS[layout]:
            ours = _run_layout(backbone, layout, pairs, slots)
            hidden = _relative_error(ours, expected * (slots.n_contexts or 1))
            if not hidden <= allowed:
                return f"hidden states by {hidden:.1e}"
        if backbone.causal:
            first, second = (plain[place][0][: starts[0] + 1] for place in (0, 1))
            if not _relative_error([first], [second]) <= allowed:
                return "as it sees later tokens"
            logits = _relative_error(
                [backbone.unembed(of) for of, _ in plain], [of for _, of in plain]
            )
            if not logits <= allowed:
                return f"logits by {logits:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def plain_forward(backbone: Backbone, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model on one sequence alone, without our layout.

    Returns:
        Last hidden states [L, d], and logits [L, V] (the hidden states again if it is not causal).
    """
    seen: list[Tensor] = []
    handle = backbone.trunk.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.last_hidden_state)
    )
    try:
        whole: Any = backbone.bare
        output = whole(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
    finally:
        handle.remove()
    return seen[0][0], output.logits[0] if backbone.causal else seen[0][0]


def _run_layout(
    backbone: Backbone,
    layout: Layout,
    pairs: list[tuple[Tensor, Tensor, Tensor]],
    slots: UserSlots,
) -> list[Tensor]:
    """Compute the test pairs in a layout: hidden states of each response and its prompt's last token.

    One token of the prompt is passed as a user vector: the first one, or the last one if user vectors
    follow the prompt.

    Returns:
        A tensor [n, d] for each response, for all contexts one after the other.
    """
    rows, places, vectors = [], [], []
    n_contexts = slots.n_contexts or 1
    for prompt, chosen, rejected in pairs:
        marked = [(chosen, CHOSEN), (rejected, REJECTED)]
        at = 0 if slots.n_contexts is None else len(prompt) - 1
        for members in [marked] if layout == "packed" else [[one] for one in marked]:
            row = _make_row(prompt, members)
            vectors.append(row[:1, at])
            rest = torch.cat([row[:, :at], row[:, at + 1 :]], dim=1)
            rest[2] -= (rest[2] > at).long()  # positions, user vectors not counted
            rows.append(rest)
            end = len(prompt)
            for response, _ in members:
                columns = [len(prompt) - 1, *range(end, end + len(response))]
                places.append((len(rows) - 1, columns))
                end += len(response)
    length = max(row.shape[1] for row in rows)
    fill = torch.tensor([[0], [PADDING], [0]], device=rows[0].device)
    whole = torch.stack(
        [torch.cat([row, fill.expand(-1, length - row.shape[1])], 1) for row in rows]
    )
    ids, segment, positions = whole.repeat(n_contexts, 1, 1).unbind(dim=1)
    of_one = segment[: len(rows)].cpu()
    packing = RowPacking.of(of_one, slots, together=layout == "packed")
    packing = move_data_to_device(packing, ids.device)
    before, backbone.layout = getattr(backbone, "layout", layout), layout
    try:
        user_vectors = backbone.embed(torch.stack(vectors).repeat(n_contexts, 1))
        hidden = backbone(ids, segment, positions, user_vectors=user_vectors, packing=packing)
    finally:
        backbone.layout = before
    return [
        hidden[context * len(rows) + row, columns]
        for context in range(n_contexts)
        for row, columns in places
    ]


def _make_row(prompt: Tensor, members: list[tuple[Tensor, int]]) -> Tensor:
    """Return token ids, segments and positions of one row, [3, L]."""
    ids, segment, positions = [prompt], [PROMPT] * len(prompt), list(range(len(prompt)))
    for response, mark in members:
        ids.append(response)
        segment += [mark] * len(response)
        positions += range(len(prompt), len(prompt) + len(response))
    device = prompt.device
    others = torch.tensor([segment, positions], device=device)
    return torch.cat([torch.cat(ids)[None], others])


def _relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference divided by the largest expected number; nan if a number is nan."""
    one, other = torch.cat(found).double(), torch.cat(expected).double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
