"""GRPO steps of one case of the GPU benchmark by TRL's GRPOTrainer.

usage: -m benchmarks.peers.gpu_trl CASE
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.cases import ALPHA, LR, RANK, toy_reward
from benchmarks.gpu_cases import GpuCase, case_of
from benchmarks.gpu_watch import Watch
from benchmarks.peers.gpu_peft import base_model


def letters() -> PreTrainedTokenizerFast:
    """One token a byte: a prompt of n letters has n tokens, whatever the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def main(case: GpuCase) -> None:
    rounds, batch = case.rounds + 1, case.groups * case.samples
    tokens = case.tokens(rounds * case.groups, case.prompt)
    texts = ["".join(chr(97 + int(token) % 26) for token in row) for row in tokens]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [toy_reward(i // case.samples, i % case.samples) for i in range(len(completions))]

    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            num_generations=case.samples,
            max_completion_length=case.new_tokens,
            generation_kwargs={"min_new_tokens": case.new_tokens},
            temperature=1.0,
            beta=0.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=rounds,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=base_model(case),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=letters(),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.add_callback(_Steps(watch))
        trainer.train()
    watch.emit("step", tokens=batch * case.new_tokens)


class _Steps(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step = self._watch.phase("step")
        self._step.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._step.__exit__(None, None, None)


if __name__ == "__main__":
    main(case_of(sys.argv[1]))
