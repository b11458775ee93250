"""Files for vLLM have its documented formats; transformers and peft compute from them what plrhf does."""

from __future__ import annotations

import base64
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import composed, save_model
from safetensors.torch import load_file
from served import save_run
from tiny import make_backbone, make_model
from transformers import AutoModelForCausalLM

import plrhf
from plrhf.cli.export import export
from plrhf.models.generation import left_padded
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.vllm import RANKS, people_vectors

PROMPT = "Write a note about the harbour."


@pytest.fixture(scope="module", params=["before", "after_prompt"])
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy's run, and its files for vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    soft = ["model=dpo", "aggregator=soft_prompt", "aggregator.n_tokens=3"]
    backbone = save_model(folder / "gptj")
    run = save_run(folder / "run", backbone, *soft, f"aggregator.position={request.param}")
    out = folder / "out"
    export(composed(f"run={run}", f"out={out}", "to=vllm", config="export"))
    return run, out


@pytest.mark.slow
def test_the_adapter_is_as_vllm_reads_it(written: tuple[Path, Path]) -> None:
    """By vllm/lora/peft_helper.py (fields) and `parse_fine_tuned_lora_name` (names of weights)."""
    folder = written[1] / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list) and config["bias"] == "none"
    assert config["peft_type"] == "LORA" and config["lora_alpha"] > 0
    assert not config["use_dora"] and config["modules_to_save"] is None
    weights = load_file(folder / "adapter_model.safetensors")
    for name, weight in weights.items():
        assert name.startswith("base_model.model.")
        layer, kind, end = name.rsplit(".", 2)
        assert kind in ("lora_A", "lora_B") and end == "weight"
        assert layer.rsplit(".", 1)[1] in config["target_modules"]
        assert weight.shape[0 if kind == "lora_A" else 1] == config["r"] <= max(RANKS)
    readme = (written[1] / "README.md").read_text()
    assert "--enable-prompt-embeds --enable-lora --max-lora-rank 8 " in readme


@pytest.mark.slow
@torch.no_grad()
def test_plain_parts_compute_what_plrhf_does(written: tuple[Path, Path]) -> None:
    run, out = written
    model: Any = plrhf.load(run)
    client = runpy.run_path(str(out / "client.py"))
    read = client["Export"](out)
    plain = AutoModelForCausalLM.from_pretrained(model.backbone.bare.name_or_path)
    plain = PeftModel.from_pretrained(plain, out / "adapter").eval()
    with pytest.raises(SystemExit, match="'somebody' is not among the people"):
        read.prompt_embeds(PROMPT, "somebody")
    found = []
    for user in (None, model.card.users[0], model.card.users[-1]):
        embeds = client["encoded"](read.prompt_embeds(PROMPT, user))
        received = torch.load(
            io.BytesIO(base64.b64decode(embeds)), weights_only=True
        )  # as vLLM does
        assert received.ndim == 2 and received.shape[1] == model.backbone.embedding_size
        logits = plain(inputs_embeds=received[None]).logits[0, -1]
        place = 0 if user is None else model.card.user_index(user)
        ids, mask = left_padded([read.token_ids(PROMPT)])
        vector = people_vectors(model)[place].view(1, -1)
        with model.aggregator.decoding(model.backbone, ids, mask, vector) as inputs:
            seen = {"attention_mask": inputs["attention_mask"]}
            hidden = model.backbone.call_trunk(inputs["input_ids"], None, **seen)
        torch.testing.assert_close(
            logits, model.backbone.unembed(hidden)[0, -1], atol=1e-4, rtol=1e-4
        )
        found.append(logits)
    assert all((one - other).abs().max() > 0.01 for one, other in ((found[0], found[1]), found[1:]))
    text = model.write(
        [{"prompt": PROMPT, "user_id": model.card.users[0]}], max_new_tokens=1, temperature=0
    )
    assert text == [read.tokenizer.decode(found[1].argmax(), skip_special_tokens=True)]


def test_the_client_is_short_and_needs_no_plrhf(written: tuple[Path, Path]) -> None:
    text = (written[1] / "client.py").read_text()
    assert "import plrhf" not in text and "from plrhf" not in text
    assert len([line for line in text.split("\n") if line.strip()]) <= 60


def test_what_vllm_cannot_serve() -> None:
    film = make_model(PersonalDPOPolicy, backbone=make_backbone(), aggregator="film_last")
    with pytest.raises(
        ValueError, match="^aggregator=.* expected soft_prompt: FiLM acts on hidden"
    ):
        people_vectors(film)


def test_options_of_one_user_are_refused(tmp_path: Path) -> None:
    for given, name in (("user=ann", "user"), ("features={age:31}", "features")):
        with pytest.raises(ValueError, match=f"^{name}=.* null with to=vllm"):
            export(composed("run=x", f"out={tmp_path}", "to=vllm", given, config="export"))
