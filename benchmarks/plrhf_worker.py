"""Trains with this package, as many steps as the parent orders: started by `against_trl.py`.

python benchmarks/plrhf_worker.py METHOD BACKBONE_DIR PAIRS_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities import move_data_to_device
from trl_workload import LORA, METHODS, N_TOKENS, SHAPES, TARGETS, Method
from turns import Turns, memory, say

from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.backbone.loading import load_backbone, load_tokenizer
from plrhf.data.module import PreferenceData
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.encoders import LookupEncoder
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.trainer import TrainingData

POSITIONS: dict[str, Any] = {"soft_prompt": "before", "late_soft_prompt": "after_prompt"}


def make_ours(method: Method, folder: Path, pairs: Path) -> tuple[Any, Any]:
    """This package's model for a method, and its pairs."""
    lightning.seed_everything(0, verbose=False)
    data = PreferenceData(
        source=JsonlSource(path=str(pairs)),
        seed=0,
        batch_size=SHAPES[pairs.stem].batch,
        eval_batch_size=4,
        max_prompt_tokens=1600,
        max_tokens=2000,
        separator=" ",
    )
    lora = {**LORA, "dropout": method.dropout, "target_modules": TARGETS}
    backbone = load_backbone(path=str(folder), dtype=method.dtype, lora=lora)
    data.tokenize(load_tokenizer(str(folder)), layout="packed")
    width = backbone.hidden_size
    n_blocks = backbone.config.num_hidden_layers
    aggregator: Any = FiLM(hidden_size=width, n_blocks=n_blocks, user_dim=width)
    if method.aggregator in POSITIONS:
        position = POSITIONS[method.aggregator]
        aggregator = ConcatSoftPrompt(hidden_size=width, n_tokens=N_TOKENS, position=position)
    encoder = LookupEncoder(
        n_users=data.n_users, user_dim=aggregator.user_dim, vocabulary=backbone.vocabulary()
    )
    kind = PersonalDPOPolicy if method.model == "dpo" else PersonalRewardModel
    model = kind(
        backbone=backbone, encoder=encoder, aggregator=aggregator, n_users=data.n_users + 1
    )
    data.fit_to_model(max_positions=model.max_positions, user_slots=model.user_slots)
    if isinstance(model, PersonalDPOPolicy):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        data.precompute_reference(
            lambda batch: model.reference_logps(move_data_to_device(batch, device)).cpu()
        )
    return model, data


def train(method: Method, folder: Path, pairs: Path, turns: Turns) -> None:
    """Train with this package; the first step waits for orders."""
    model, data = make_ours(method, folder, pairs)

    class Gate(lightning.Callback):
        def on_train_start(self, *_: Any) -> None:
            say(ready=True, **memory())
            turns.step_over()

        def on_train_batch_end(self, *_: Any) -> None:
            turns.step_over()

    trainer = lightning.Trainer(
        max_steps=1_000_000,
        max_epochs=-1,
        precision="bf16-mixed" if method.dtype == "bfloat16" else "32-true",
        callbacks=[Gate()],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=TrainingData(data))


if __name__ == "__main__":
    sys.stdout = sys.stderr  # stdout is the parent's
    train(METHODS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), Turns())
