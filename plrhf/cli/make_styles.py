"""Generates the texts of data=styles with a language model: every prompt in every style.

    python -m plrhf.cli.make_styles backbone.path=DIR out=FILE

If it is started again with the same FILE it continues where it stopped.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch

from plrhf.backbone.decoding import write_tokens
from plrhf.backbone.model import Backbone
from plrhf.cli.assemble import open_backbone, path_of
from plrhf.cli.commands import run
from plrhf.cli.config import BackboneConfig
from plrhf.cli.sections import Section, Seed, check_writable
from plrhf.core.checks import PositiveInt
from plrhf.core.components import Settings
from plrhf.core.errors import bad_value
from plrhf.core.progress import Progress
from plrhf.data.rows import Row
from plrhf.data.style_prompts import STYLES, StylePrompt, all_prompts
from plrhf.data.style_texts import StyleText, append_texts, fault_of, finished_part, read_texts
from plrhf.data.tokenizer import RowTokenizer, Tokenizer
from plrhf.models.generation import check_options, check_room, left_padded, text_ends


class MakeStylesConfig(Section):
    """All settings of the command; conf/make_styles.yaml explains them."""

    backbone: BackboneConfig
    out: str
    n_prompts: PositiveInt
    max_new_tokens: PositiveInt
    temperature: float
    top_p: float
    batch_size: PositiveInt
    seed: Seed
    debug: bool


Task = tuple[StylePrompt, str]  # a prompt and a style


def make_styles(settings: Settings) -> None:
    """Generate the texts that the file lacks, and print how many of all are usable."""
    config = MakeStylesConfig.read(settings, "")
    how = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p")}
    check_options(**how, field="")
    check_writable("out", str(Path(config.out).parent))
    path = Path(config.out)
    known = read_texts(path, cut_short=True) if path.is_file() else []
    todo = _tasks(config, {(text.prompt_id, text.style) for text in known})
    if len(todo) > 0:
        frozen = config.backbone.model_copy(update={"trainable": "frozen", "lora": None})
        tokenizer, backbone = open_backbone(frozen, path_of(config.backbone))
        _write_all(path, known, todo, tokenizer, backbone.eval(), config, how)
    print(_summary(known))


def _tasks(config: MakeStylesConfig, done: set[tuple[str, str]]) -> list[Task]:
    """Return the missing texts: prompts shuffled by the seed, all styles of a prompt together."""
    prompts = all_prompts()
    if config.n_prompts > len(prompts):
        raise bad_value(
            "n_prompts",
            config.n_prompts,
            f"at most {len(prompts)}",
            f"Set n_prompts={len(prompts)}",
        )
    chosen = prompts[: config.n_prompts]
    random.Random(config.seed).shuffle(chosen)
    tasks = [(prompt, style) for prompt in chosen for style in STYLES]
    return [task for task in tasks if (task[0].prompt_id, task[1]) not in done]


def _write_all(
    path: Path,
    known: list[StyleText],
    todo: list[Task],
    tokenizer: Tokenizer,
    backbone: Backbone,
    config: MakeStylesConfig,
    how: dict[str, Any],
) -> None:
    """Generate all texts batch by batch, and append each batch to the file at once."""
    seen = {text.key for text in known if text.dropped is None}
    rows = RowTokenizer(tokenizer, max_prompt_tokens=1024, max_tokens=2048)
    with Progress("writing", total=len(todo)) as progress:
        for tasks in _batches(todo, config.batch_size):
            seed = config.seed * 1_000_003 + len(known)
            torch.manual_seed(seed)
            written = _responses(tasks, rows, backbone, how)
            texts = []
            for (prompt, style), (response, ended) in zip(tasks, written, strict=True):
                text, dropped = finished_part(response, ended=ended)
                made = StyleText(
                    prompt_id=prompt.prompt_id,
                    topic=prompt.topic,
                    prompt=prompt.text,
                    style=style,
                    seed=seed,
                    response=text,
                )
                dropped = dropped or fault_of(made, seen)
                texts.append(made.model_copy(update={"dropped": dropped}))
                if dropped is None:
                    seen.add(made.key)
            append_texts(path, texts)
            known += texts
            progress.update(len(tasks))


def _batches(tasks: list[Task], size: int) -> Iterator[list[Task]]:
    """Yield the tasks in batches of one style, whose shared instruction is then computed once.

    After each round over the styles, all prompts so far have all their texts.
    """
    round_size = size * len(STYLES)
    for start in range(0, len(tasks), round_size):
        by_style: dict[str, list[Task]] = {}
        for task in tasks[start : start + round_size]:
            by_style.setdefault(task[1], []).append(task)
        yield from by_style.values()


@torch.no_grad()
def _responses(
    tasks: list[Task], rows: RowTokenizer, backbone: Backbone, how: dict[str, Any]
) -> list[tuple[str, bool]]:
    """Return for each task of one style the generated text, and whether it ended by itself."""
    tokenizer, device = rows.tokenizer, next(backbone.parameters()).device
    prompts = [rows.prompt(_asked(prompt, style)) for prompt, style in tasks]
    check_room(backbone, prompts, max_new_tokens=how["max_new_tokens"], field="")
    n_shared = min(len(commonprefix(prompts)), *(len(prompt) - 1 for prompt in prompts))
    rest, mask = left_padded([prompt[n_shared:] for prompt in prompts])
    shared = torch.tensor([prompts[0][:n_shared]] * len(prompts), dtype=torch.int64)
    ids = torch.cat([shared, rest], dim=1).to(device)
    mask = torch.cat([torch.ones_like(shared), mask], dim=1).to(device)
    cache = backbone.cache(ids.shape[1] + how["max_new_tokens"])
    if cache is not None:  # of equal rows it computes one; the last column it leaves to `generate`
        first = ids[:1, : n_shared + 1].expand(len(ids), -1)
        backbone.prefill(cache, first, torch.ones_like(first))
    ends = text_ends(backbone, tokenizer)
    tokens = write_tokens(
        backbone,
        {"input_ids": ids, "attention_mask": mask},
        cache,
        ends=ends,
        padding=tokenizer.pad_token_id,
        **how,
    )
    ended = torch.isin(tokens, torch.tensor(ends, device=device)).any(dim=1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return list(zip(texts, ended, strict=True))


def _asked(prompt: StylePrompt, style: str) -> Row:
    """Return a row whose prompt asks for an answer in a style; its other fields are not used."""
    return Row(
        prompt=STYLES[style].turns(prompt.text),
        chosen="",
        rejected="",
        user_id="",
        prompt_id=prompt.prompt_id,
        pair_id="",
    )


def _summary(texts: list[StyleText]) -> str:
    """Return a line with the numbers of texts, and of dropped texts by reason."""
    counts = Counter(text.dropped for text in texts)
    kept = counts.pop(None, 0)
    reasons = ", ".join(f"{count} {why}" for why, count in counts.most_common())
    return f"{kept} texts; dropped: {reasons or 'none'}"


if __name__ == "__main__":
    run("data styles", sys.argv[1:], shown="python -m plrhf.cli.make_styles")
