"""One case of the GPU benchmark by transformers and peft, with torch's autocast to bf16.

usage: -m benchmarks.peers.gpu_peft CASE
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.cases import ALPHA, LR, RANK, toy_reward
from benchmarks.gpu_cases import GpuCase, case_of, device, weight
from benchmarks.gpu_watch import Watch


def base_model(case: GpuCase) -> Any:
    """The model in bf16, with the weights that every side has."""
    fields = dict(case.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weight(name, parameter.shape))
    return model


def adapted(model: Any) -> Any:
    """peft keeps the adapter in fp32 over a bf16 base."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def autocast() -> torch.autocast:
    return torch.autocast(device().type, dtype=torch.bfloat16)


def forward_backward(model: Any, ids_BT: Tensor, start: int, advantage_B: Tensor) -> float:
    """Gradients of the loss of tokens [start, T); their mean log-probability."""
    with autocast():
        kept = ids_BT.shape[1] - start + 1
        logits = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    logits = logits.float()
    picked = logits.gather(-1, ids_BT[:, start:, None])[..., 0]
    logprobs = picked - logits.logsumexp(-1)
    ratio = (logprobs - logprobs.detach()).exp()
    (-(ratio * advantage_B[:, None]).mean()).backward()
    return logprobs.mean().item()


def train(case: GpuCase, model: Any) -> None:
    watch = Watch()
    ids = torch.from_numpy(case.tokens(case.sequences, case.length)).long().to(device())
    ones = torch.ones(case.sequences, device=device())
    rows = case.micro_tokens // case.length
    for _ in range(case.rounds + 1):
        with watch.phase("pass"):
            means = [
                forward_backward(model, part, case.length // 2, ones[: len(part)])
                for part in ids.split(rows)
            ]
        model.zero_grad()
    watch.emit("train", tokens=ids.numel(), logprob=sum(means) / len(means))


@torch.no_grad()
def complete(model: Any, ids_NP: Tensor, samples: int, tokens: int) -> Tensor:
    """[N * samples, P + tokens]."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,  # the whole vocabulary
        num_return_sequences=samples,
        max_new_tokens=tokens,
        eos_token_id=None,  # nothing ends a sequence early
        pad_token_id=0,
        disable_compile=True,
    )
    mask = torch.ones_like(ids_NP)
    return model.generate(input_ids=ids_NP, attention_mask=mask, generation_config=config)


def generate(case: GpuCase, model: Any) -> None:
    """With the adapter merged into the weights, which is faster."""
    model.merge_adapter()
    for batch in case.batches:
        watch, (prompts, samples) = Watch(), case.rows(batch)
        ids = torch.from_numpy(case.tokens(prompts, case.prompt)).long().to(device())
        for _ in range(case.rounds + 1):
            with watch.phase("first_token"):
                complete(model, ids, samples, 1)
            with watch.phase("all_tokens"):
                complete(model, ids, samples, case.new_tokens)
        watch.emit(f"generate {batch}", tokens=batch * case.new_tokens)
    model.unmerge_adapter()


def steps(case: GpuCase, model: Any) -> None:
    """The adapter stays apart: merging into bf16 weights and back would change them."""
    watch = Watch()
    ids = torch.from_numpy(case.tokens(case.groups, case.prompt)).long().to(device())
    rewards = torch.tensor(
        [[toy_reward(p, s) for s in range(case.samples)] for p in range(case.groups)]
    ).to(device())
    centred = rewards - rewards.mean(1, keepdim=True)
    advantage = (centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6)).reshape(-1)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    rows = max(case.micro_tokens // (case.prompt + case.new_tokens), 1)
    for _ in range(case.rounds + 1):
        with watch.phase("step"):
            with watch.phase("generate"), autocast():
                model.eval()
                sequences = complete(model, ids, case.samples, case.new_tokens)
            with watch.phase("train"):
                model.train()
                parts = sequences.split(rows)
                for part, values in zip(parts, advantage.split(rows), strict=True):
                    forward_backward(model, part, case.prompt, values * len(part) / len(sequences))
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                adam.step()
                adam.zero_grad()
    watch.emit("step", tokens=case.groups * case.samples * case.new_tokens)


def main(case: GpuCase) -> None:
    model = adapted(base_model(case))
    train(case, model)
    model.eval()
    generate(case, model)
    steps(case, model)


if __name__ == "__main__":
    main(case_of(sys.argv[1]))
