"""Rounds of generation by transformers, in the peers' environment.

usage: -m benchmarks.peers.transformers_generate JOB WEIGHTS CACHE
WEIGHTS: unmerged (a peft adapter), merged (into a plain model). CACHE: dynamic, static, paged
(transformers' continuous batching).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.meter import Meter

Job = dict[str, Any]


class Unmerged:
    """As peft leaves it: every layer adds its low-rank product."""

    def __init__(self, job: Job) -> None:
        base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, job["adapters"][0]).eval()

    @torch.no_grad()
    def publish(self, tensors: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, tensors)


class Merged:
    """A plain model, written anew from a copy of its weights for every version."""

    def __init__(self, job: Job) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        self._scale = job["scale"]
        self._base = {name: p.clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def publish(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if (a := tensors.get(f"{module}.lora_A.weight")) is not None:
                b = tensors[f"{module}.lora_B.weight"]
                torch.addmm(self._base[name], b, a, alpha=self._scale, out=weight)


def generate(model: Any, job: Job, cache: str, greedy: bool) -> list[list[int]]:
    new_tokens = job["greedy_tokens"] if greedy else job["new_tokens"]
    # greedy samples are no choice of transformers, any samples none of its continuous batching
    copies = job["samples"] if greedy or cache == "paged" else 1
    config = GenerationConfig(
        do_sample=not greedy,
        top_k=0 if not greedy else None,  # the whole vocabulary
        num_return_sequences=job["samples"] // copies,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        cache_implementation="static" if cache == "static" else None,
        disable_compile=True,
    )
    prompts: list[list[int]] = [tokens for tokens in job["prompts"] for _ in range(copies)]
    if cache == "paged":
        done = model.generate_batch(
            prompts, generation_config=config, progress_bar=False, warmup=False
        )
        return [output.generated_tokens for output in done.values()]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return rows[:, longest:].tolist()


def main(folder: Path, weights: str, cache: str) -> None:
    job = json.loads((folder / "job.json").read_text())
    side = (Merged if weights == "merged" else Unmerged)(job)
    side.model.generation_config.eos_token_id = None  # nothing ends a sequence early
    meter = Meter()
    for version, adapter in enumerate(job["adapters"]):
        tensors = load_file(Path(adapter) / "adapter_model.safetensors")
        with meter.phase("publish"):
            side.publish(tensors)
        if version == 0:
            rows = generate(side.model, job, cache, greedy=True)
            sys.stdout.write(json.dumps({"greedy": rows}) + "\n")
            meter = Meter()
        else:
            with meter.phase("generate"):
                rows = generate(side.model, job, cache, greedy=False)
            meter.emit(generated=sum(map(len, rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
