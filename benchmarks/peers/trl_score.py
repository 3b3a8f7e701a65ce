"""Trains the task of benchmarks/sums.py by TRL's GRPOTrainer with peft, in the peers' environment.

usage: -m benchmarks.peers.trl_score PROMPTS.json SEED MODEL_FOLDER
Prints the held-out score and the unix time of every evaluation.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.cases import ALPHA, RANK
from benchmarks.sums import EVAL_EVERY, LR, NEW_TOKENS, PROMPTS, SAMPLES, STEPS, score

Row = dict[str, Any]


def main(prompts: dict[str, list[Row]], seed: int, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            gradient_accumulation_steps=1,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=STEPS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            shuffle_dataset=False,  # the rows are in the order of the other side
            seed=seed,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(prompts["train"]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.add_callback(_HeldOut(trainer.model, tokenizer, prompts["held_out"]))
        trainer.train()


def reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """`score` in TRL's form."""
    return [score(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]


class _HeldOut(TrainerCallback):
    """Greedy answers to all held-out problems in one padded batch, with the adapter merged."""

    def __init__(self, model: PeftModel, tokenizer: Any, rows: list[Row]) -> None:
        self._model, self._tokenizer, self._rows = model, tokenizer, rows

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % EVAL_EVERY == 0:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        inputs = self._tokenizer.apply_chat_template(
            [row["prompt"] for row in self._rows],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(self._model.device)
        self._model.eval()
        self._model.merge_adapter()  # faster than adapters beside the weights, which TRL samples by
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        self._model.unmerge_adapter()
        self._model.train()
        texts = self._tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        scores = [score(t, row["answer"]) for t, row in zip(texts, self._rows, strict=True)]
        line = {"step": step, "time": time.time(), "score": sum(scores) / len(scores)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[3])
