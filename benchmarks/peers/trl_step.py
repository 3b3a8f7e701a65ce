"""GRPO steps of one case by TRL's GRPOTrainer with peft, in the peers' environment.

usage: -m benchmarks.peers.trl_step CASE STEPS MODEL_FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.cases import ALPHA, LR, RANK, STEP_CASES, StepCase, toy_reward
from benchmarks.meter import Meter


def main(case: StepCase, steps: int, folder: str) -> None:
    rows = [{"prompt": m} for step in range(steps) for m in case.messages(step)]

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [toy_reward(i // case.samples, i % case.samples) for i in range(len(completions))]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=case.prompts * case.samples,
            gradient_accumulation_steps=1,
            num_generations=case.samples,
            max_completion_length=case.new_tokens,
            generation_kwargs={"min_new_tokens": case.new_tokens},
            temperature=1.0,
            beta=0.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            shuffle_dataset=False,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        meter = Meter()
        trainer._generate_single_turn = _metered(meter, "generate", trainer._generate_single_turn)
        trainer.add_callback(_Steps(meter, case))
        trainer.train()


def _metered(meter: Meter, name: str, function: Any) -> Any:
    def metered(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(name):
            return function(*args, **kwargs)

    return metered


class _Steps(TrainerCallback):
    def __init__(self, meter: Meter, case: StepCase) -> None:
        self._meter, self._case = meter, case

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step = self._meter.phase("step")
        self._step.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._step.__exit__(None, None, None)
        self._meter.emit(generated=self._case.prompts * self._case.samples * self._case.new_tokens)


if __name__ == "__main__":
    main(STEP_CASES[sys.argv[1]], int(sys.argv[2]), sys.argv[3])
