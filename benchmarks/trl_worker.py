"""Trains with TRL, as many steps as the parent orders: started by `against_trl.py`.

python benchmarks/trl_worker.py METHOD BACKBONE_DIR PAIRS_FILE
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl_workload import LORA, METHODS, SHAPES, TARGETS, Method
from turns import Turns, memory, say


def train(method: Method, folder: Path, pairs: Path, turns: Turns) -> None:
    """Train with TRL; the first step waits for orders."""
    rows = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(pairs.parent))
    rows = rows.filter(lambda row: row["split"] == "train")
    assert len(rows) == SHAPES[pairs.stem].n_pairs, "with more, one step an epoch is short"
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    rows = rows.map(lambda row: {"prompt": row["prompt"] + " "})

    class Gate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            say(ready=True, **memory())
            turns.step_over()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_over()

    twice = [i for i in range(len(rows)) for _ in range(method.rows_a_pair)]
    is_dpo = method.model == "dpo"
    settings: dict[str, Any] = {
        "output_dir": str(pairs.parent / "trl"),
        "per_device_train_batch_size": SHAPES[pairs.stem].batch * method.rows_a_pair,
        "max_steps": 1_000_000,
        "max_length": 2000,
        "gradient_checkpointing": False,
        "bf16": method.dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1_000_000,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": method.dtype},
    }
    if method.at_best:
        fastest = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
        settings["model_init_kwargs"]["attn_implementation"] = fastest
        settings["use_liger_kernel"] = find_spec("liger_kernel") is not None
    if is_dpo:
        settings["precompute_ref_log_probs"] = not method.online_reference
    kinds: Any = (DPOTrainer, DPOConfig) if is_dpo else (RewardTrainer, RewardConfig)
    make_trainer, make_config = kinds
    trainer = make_trainer(
        model=str(folder),
        args=make_config(**settings),
        train_dataset=rows.select(twice),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=LORA["r"],
            lora_alpha=LORA["alpha"],
            lora_dropout=method.dropout,
            target_modules=TARGETS,
            task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS",
        ),
        callbacks=[Gate()],
    )
    trainer.train()


if __name__ == "__main__":
    sys.stdout = sys.stderr  # stdout is the parent's
    train(METHODS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), Turns())
