"""GRPO steps of one case by Lorelei: archon + embedded.

usage: -m benchmarks.ours_step CASE STEPS
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.cases import ALPHA, LR, MODEL, RANK, STEP_CASES, StepCase, toy_reward
from benchmarks.meter import Meter
from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.jobs.rl import policy_work
from lorelei.model.load import load_decoder
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.publish.publisher import VersionPublisher
from lorelei.run_file import validate
from lorelei.train.archon.engine import archon_engine
from lorelei.train.contract import TrainEngine
from lorelei.train.engine_thread import EngineThread
from lorelei.train.step import run_works
from lorelei.types import AdapterRef, GenerateRequest, Group, Prompt, Rollout, SamplingParams, Turn


async def main(
    case: StepCase,
    steps: int,
    lora: Mapping[str, Any],
    lr: float = LR,
    after: Callable[[TrainEngine, Meter], None] = lambda *_: None,
) -> None:
    """lora: that section of the configuration. after: called when the steps are done."""
    folder = resolve_model(MODEL)
    tokenizer = load_tokenizer(folder)
    config = validate(
        {
            "model": MODEL,
            "lora": dict(lora),
            "task": {"kind": "reasoning_gym", "name": "chain_sum"},
            "algo": {"lr": lr, "batch_size": case.prompts},
            "rollout": {"n_samples": case.samples, "max_new_tokens": case.new_tokens},
        }
    )
    (experiment,) = config.experiments()
    algo = experiment.algo
    assert isinstance(algo, PolicyAlgorithm)
    decoder = load_decoder(folder)
    engine = archon_engine(decoder, max_tokens_per_mb=config.train.max_tokens_per_mb)
    engine.add_adapter("default", experiment.lora.spec())
    thread = EngineThread(engine)
    rollout = EmbeddedEngine(decoder, max_running=64)
    publisher = VersionPublisher(rollout, "bench")
    sampling = SamplingParams(max_new_tokens=case.new_tokens)
    meter = Meter()

    async def publish(version: int) -> AdapterRef:
        states = {"default": await thread.call(engine.adapter_state, "default")}
        return (await publisher.publish({"default": version}, states))["default"]

    ref = await publish(0)
    for step in range(steps):
        with meter.phase("step"):
            prompts = [
                np.asarray(
                    tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"],
                    dtype=np.int32,
                )
                for m in case.messages(step)
            ]
            with meter.phase("generate"):
                completions = await asyncio.gather(
                    *(
                        rollout.generate(
                            GenerateRequest(
                                tokens=tokens, adapter=ref, sampling=sampling, key=f"{step}/{p}/{s}"
                            )
                        )
                        for p, tokens in enumerate(prompts)
                        for s in range(case.samples)
                    )
                )
            groups = [
                Group(
                    adapter="default",
                    index=p,
                    prompt=Prompt(id=str(p), tokens=tokens, messages=(), data={}),
                    rollouts=tuple(
                        Rollout(
                            adapter="default",
                            sample=s,
                            turns=(
                                Turn(
                                    prompt=tokens,
                                    completion=completions[p * case.samples + s],
                                    text="",
                                ),
                            ),
                            reward=toy_reward(p, s),
                        )
                        for s in range(case.samples)
                    ),
                )
                for p, tokens in enumerate(prompts)
            ]
            with meter.phase("train"):
                work = policy_work(experiment, algo, groups, step)
                await thread.call(run_works, engine, [work])
            with meter.phase("publish"):
                old, ref = ref, await publish(step + 1)
                await publisher.retire(old)
        prompt_tokens = sum(len(t) for t in prompts)
        meter.emit(generated=sum(len(c.tokens) for c in completions), prompt=prompt_tokens)
    after(engine, meter)
    await rollout.close()
    thread.close()


if __name__ == "__main__":
    shape = {"lora_rank": RANK, "lora_alpha": ALPHA}
    asyncio.run(main(STEP_CASES[sys.argv[1]], int(sys.argv[2]), shape))
