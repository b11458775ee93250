"""Writes a policy as files for vLLM: a LoRA adapter, and its people's soft prompts as prompt embeddings."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plrhf.aggregators import ConcatSoftPrompt
from plrhf.backbone import saving
from plrhf.backbone.merging import put_in_front, start_token
from plrhf.core.errors import bad_value
from plrhf.core.types import UserBatch

if TYPE_CHECKING:
    from plrhf.models.policy import PersonalPolicy

CLIENT = Path(saving.__file__).with_name("vllm_client.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be, as `MaxLoRARanks` in vllm/config/lora.py has it."""
TOLERANCE = 1e-4

README = """\
# A policy for vLLM

```bash
vllm serve {base} --served-model-name base --enable-prompt-embeds{lora}
python client.py "Write a note." --model {name}{user}
```

`client.py` sends the vectors of a person with the embeddings of the prompt (vLLM's Completions API,
`prompt_embeds`). `people.json` lists the people; without `--user` the text is for nobody in particular.
Anybody who may read this folder may read the people's vectors.
"""


def save_for_vllm(model: PersonalPolicy, directory: Path) -> None:
    """Write adapter, token embeddings, people's vectors, tokenizer, an example client and a README.

    Args:
        model: from an export.

    Raises:
        ValueError: users act otherwise than by a soft prompt, or have features, which an export does not
            keep, or the model does not read its token embeddings as they are.
    """
    backbone, tokenizer = model.backbone, copy.deepcopy(model.tokenizer)
    vectors = people_vectors(model)
    tokens = backbone.embed(torch.arange(backbone.vocabulary_size)).detach()
    _check_embeddings(model, tokens)
    directory.mkdir(parents=True, exist_ok=True)
    base, lora, name = str(backbone.bare.name_or_path), "", "base"
    if backbone.trainable == "lora":
        rank = _save_adapter(model, directory / "adapter")
        lora = f" --enable-lora --max-lora-rank {rank} --lora-modules policy=adapter"
        name = "policy"
    elif backbone.trainable == "full":
        backbone.save_whole(directory / "model")
        base = "model"
    put_in_front(tokenizer, start_token(tokenizer))
    tokenizer.save_pretrained(directory)
    both = {"tokens": tokens.contiguous(), "people": vectors.to(tokens.dtype).contiguous()}
    save_file(both, directory / "embeddings.safetensors")
    people = {
        "users": model.card.users,
        "after_prompt": bool(getattr(model.aggregator, "after_prompt", False)),
        "separator": model.card.text["separator"],
    }
    (directory / "people.json").write_text(json.dumps(people, indent=1) + "\n")
    # An example, which stands in a block of Markdown.
    plain = [one for one in model.card.users if one.isprintable() and "`" not in one]
    known = plain if vectors.shape[1] > 0 else []
    user = f" --user {shlex.quote(known[0])}" if len(known) > 0 else ""
    text = README.format(base=shlex.quote(base), lora=lora, name=name, user=user)
    (directory / "README.md").write_text(text)
    shutil.copyfile(CLIENT, directory / "client.py")


def _save_adapter(model: PersonalPolicy, directory: Path) -> int:
    """Write the LoRA adapter with the last names of its layers as targets; return ``--max-lora-rank``."""
    model.backbone.save(directory)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    targets = config["target_modules"]
    if isinstance(targets, list):
        config["target_modules"] = sorted({one.rpartition(".")[2] for one in targets})
    path.write_text(json.dumps(config, indent=2) + "\n")
    return next(one for one in RANKS if one >= config["r"])


@torch.no_grad()
def people_vectors(model: PersonalPolicy) -> Tensor:
    """Compute the soft prompts of the generic user and of all n train users, [1 + n, T, e].

    T is 0 for a policy without a user model.
    """
    aggregator = model.aggregator
    if not model.has_user_vectors:
        return torch.zeros(1 + len(model.card.users), 0, model.backbone.embedding_size)
    if not isinstance(aggregator, ConcatSoftPrompt):
        raise bad_value(
            "aggregator",
            type(aggregator).__name__,
            "soft_prompt: FiLM acts on hidden states, and vLLM gives a model nothing of a request but its "
            "prompt, and a logits processor only logits",
            "Set to=merged for a plain model of one user",
        )
    schema, n_users = model.card.feature_schema(), 1 + len(model.card.users)
    if schema.n_features > 0 and not model.card.user_tables:
        raise bad_value(
            "encoder",
            model.card.encoder.get("name", type(model.encoder).__name__),
            "one that knows users by their ids, as an export keeps no features of its users",
            "Set to=merged with user and features",
        )
    users = UserBatch(user_id=torch.arange(n_users), features=schema.table([None] * n_users))
    return model.encode(users)[0].float().view(n_users, -1, aggregator.embedding_size)


@torch.no_grad()
def _check_embeddings(model: PersonalPolicy, tokens: Tensor) -> None:
    """Raise a ValueError unless the plain model reads token embeddings as it reads the tokens."""
    bare: Any = model.backbone.bare
    ids = torch.arange(2, 9)[None] % len(tokens)
    by_ids, by_embeddings = bare(input_ids=ids).logits, bare(inputs_embeds=tokens[ids]).logits
    if (by_ids - by_embeddings).norm() > TOLERANCE * by_ids.norm():
        raise bad_value(
            "backbone",
            type(bare).__name__,
            "a model that reads embeddings as its embedding layer gives them",
            "Set to=merged",
        )
