"""The sampler's, the trainer's and peft's log-probabilities of one adapter on the real model.

Absolute tolerance 1e-4 in fp32: about a hundred times the rounding of a sum over 49152 logits.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.peft_folder import write_peft_folder
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import rollout_batch
from lorelei.train.contract import TrainEngine
from lorelei.types import (
    AdapterRef,
    AdapterSpec,
    Completion,
    Floats,
    GenerateRequest,
    Ints,
    Rollout,
    SamplingParams,
    Turn,
)
from tests.decoders import load_decoder
from tests.parity.oracle import smollm2_folder

SPEC = AdapterSpec(rank=16, alpha=32)
PROMPTS = [np.arange(40, 70, dtype=np.int32), np.arange(900, 917, dtype=np.int32)]


@pytest.fixture(scope="module")
def engine() -> TrainEngine:
    """The trainer with an adapter that changes the model visibly."""
    trainer = archon_engine(load_decoder(smollm2_folder()))
    trainer.add_adapter("a", SPEC)
    state = trainer.adapter_state("a")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(t.shape, generator=generator) * 0.02 if "lora_B" in name else t
        for name, t in state.tensors.items()
    }
    zeros = {name: torch.zeros_like(t) for name, t in tensors.items()}
    state = AdapterState(spec=SPEC, tensors=tensors)
    trainer.restore("a", AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0))
    return trainer


def sampled(engine: TrainEngine, temperature: float) -> list[tuple[Ints, Completion]]:
    """Two completions of each prompt by the embedded engine, on a published copy."""
    state = engine.adapter_state("a")
    ref = AdapterRef(name="a", version=1, run_id="test", digest=state.digest())
    sampling = SamplingParams(temperature=temperature, max_new_tokens=24)

    async def run() -> list[Completion]:
        rollout = EmbeddedEngine(load_decoder(smollm2_folder()))
        await rollout.load(ref, state)
        try:
            return await asyncio.gather(
                *(
                    rollout.generate(
                        GenerateRequest(
                            tokens=prompt, adapter=ref, sampling=sampling, key=f"{i}/{n}"
                        )
                    )
                    for i, prompt in enumerate(PROMPTS)
                    for n in range(2)
                )
            )
        finally:
            await rollout.close()

    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    return list(zip(prompts, asyncio.run(run()), strict=True))


def trainers(engine: TrainEngine, pairs: list[tuple[Ints, Completion]], t: float) -> Floats:
    rollouts = [
        Rollout(
            adapter="a",
            sample=i,
            turns=(Turn(prompt=prompt, completion=completion, text=""),),
            reward=0.0,
        )
        for i, (prompt, completion) in enumerate(pairs)
    ]
    groups = [rollouts[:2], rollouts[2:]]
    batch = rollout_batch("a", groups, {}, t)
    return engine.logprobs(batch, "current").logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_every_sampled_token(
    engine: TrainEngine, temperature: float
) -> None:
    pairs = sampled(engine, temperature)
    theirs = np.concatenate([completion.logprobs for _, completion in pairs])
    base = trainers(engine, pairs, 1.7 - temperature)
    np.testing.assert_allclose(trainers(engine, pairs, temperature), theirs, atol=1e-4, rtol=0)
    assert np.abs(base - theirs).max() > 0.01  # the other temperature would be noticed


def test_exported_adapter_gives_the_trainers_logprobs_in_peft(
    engine: TrainEngine, tmp_path: Path
) -> None:
    pairs = sampled(engine, 1.0)
    write_peft_folder(tmp_path / "out", engine.adapter_state("a"), "base")
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    expected: list[np.ndarray] = []
    for prompt, completion in pairs:
        ids = torch.from_numpy(np.concatenate([prompt, completion.tokens])).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        expected.append(logprobs[at, ids[at + 1]].numpy())
    ours = trainers(engine, pairs, 1.0)
    np.testing.assert_allclose(ours, np.concatenate(expected), atol=1e-4, rtol=0)
