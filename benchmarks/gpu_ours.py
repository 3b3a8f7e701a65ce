"""One case of the GPU benchmark by Lorelei: archon and embedded.

usage: -m benchmarks.gpu_ours CASE
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import ALPHA, LR, RANK, toy_reward
from benchmarks.gpu_cases import GpuCase, case_of, device, weight
from benchmarks.gpu_watch import Watch, copy_bandwidth, kernel_seconds
from lorelei.algo.advantage import NormConfig
from lorelei.algo.loss import item_weights
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.model.config import DecoderConfig
from lorelei.model.decoder import Decoder
from lorelei.model.load import Checkpoint, build_decoder
from lorelei.publish.publisher import VersionPublisher
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import rollout_batch
from lorelei.train.contract import TrainEngine
from lorelei.types import (
    AdamHyper,
    AdapterRef,
    AdapterSpec,
    Batch,
    Completion,
    GenerateRequest,
    Ints,
    Items,
    LossSpec,
    Rollout,
    SamplingParams,
    Segment,
    Turn,
)

NAME = "default"
SPEC = AdapterSpec(rank=RANK, alpha=ALPHA)
# the first update of a batch: the ratio is 1 and nothing is clipped
LOSSES = {NAME: LossSpec(path="lorelei.algo.clip:loss", params={"form": "recomputed"})}
HYPER = {NAME: AdamHyper(lr=LR)}


class RandomCheckpoint(Checkpoint):
    """Every tensor that a model asks for, made when it does; there are no biases."""

    def __init__(self, tied: bool) -> None:
        super().__init__({}, Path("random"), torch.bfloat16, device())
        self._tied = tied

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".bias") and not (self._tied and name == "lm_head.weight")

    def tensor(self, name: str, *shape: int) -> Tensor:
        return weight(name, shape)


def plain_batch(case: GpuCase) -> Batch:
    """Sequences that share nothing; the second half of each is predicted."""
    tokens = case.tokens(case.sequences, case.length)
    half, count = case.length // 2, case.sequences * (case.length - case.length // 2)
    ones = np.ones(count, dtype=np.float32)
    starts = np.arange(case.sequences)[:, None] * case.length
    return Batch(
        segments=tuple(Segment(tokens=row, parent=-1, start=0, adapter=NAME) for row in tokens),
        items=Items(
            source=(starts + np.arange(half - 1, case.length - 1)).reshape(-1),
            target=tokens[:, half:].reshape(-1).astype(np.int64),
            weight=ones / count,
            temperature=ones,
            sequence=np.repeat(np.arange(case.sequences), case.length - half),
            streams={"advantage": ones, "behaviour": -ones},
        ),
    )


def train(case: GpuCase, decoder: Decoder, engine: TrainEngine) -> None:
    watch, batch = Watch(), plain_batch(case)
    for _ in range(case.rounds + 1):
        with watch.phase("pass"):
            outputs = engine.forward_backward(batch, LOSSES)
        engine.optim_step({NAME: replace(HYPER[NAME], lr=0.0)})
    watch.emit(
        "train",
        tokens=case.sequences * case.length,
        logprob=float(outputs.items.logprobs.mean()),
        products_s=bare_products(case, decoder),
    )


def bare_products(case: GpuCase, decoder: Decoder) -> float:
    """Seconds of the products with frozen weights in one pass, forward and backward, by torch.mm.

    The lowest layer gives its input no gradient; logits are of the predicted half only.
    """
    known: dict[tuple[int, int, int], float] = {}

    def seconds(rows: int, inner: int, columns: int) -> float:
        shape = (rows, inner, columns)
        if shape not in known:
            left = torch.randn(rows, inner, dtype=decoder.dtype, device=decoder.device)
            right = torch.randn(inner, columns, dtype=decoder.dtype, device=decoder.device)
            known[shape] = kernel_seconds(lambda: torch.mm(left, right))
        return known[shape]

    total = 0.0
    for linear in decoder.linears():
        out, inputs = linear.weight.shape
        rows = case.micro_tokens // 2 if linear is decoder.head else case.micro_tokens
        total += seconds(rows, inputs, out)
        if linear is not decoder.layers[0].qkv:
            total += seconds(rows, out, inputs)
    return total * case.sequences * case.length / case.micro_tokens


async def complete(
    rollout: EmbeddedEngine, ref: AdapterRef, prompts: Ints, samples: int, tokens: int, key: str
) -> list[Completion]:
    """`samples` completions of each prompt, of exactly `tokens` tokens."""
    sampling = SamplingParams(max_new_tokens=tokens)
    requests = [
        GenerateRequest(tokens=row, adapter=ref, sampling=sampling, key=f"{key}/{p}/{s}")
        for p, row in enumerate(prompts)
        for s in range(samples)
    ]
    return await asyncio.gather(*map(rollout.generate, requests))


async def generate(
    case: GpuCase, decoder: Decoder, rollout: EmbeddedEngine, ref: AdapterRef
) -> None:
    read = sum(linear.weight.shape[0] * linear.weight.shape[1] for linear in decoder.linears())
    bandwidth = copy_bandwidth(2**32 if torch.cuda.is_available() else 2**24)
    for batch in case.batches:
        watch, (prompts, samples) = Watch(), case.rows(batch)
        tokens = case.tokens(prompts, case.prompt)
        for number in range(case.rounds + 1):
            key = f"{batch}/{number}"
            with watch.phase("first_token"):
                await complete(rollout, ref, tokens, samples, 1, key)
            with watch.phase("all_tokens"):
                await complete(rollout, ref, tokens, samples, case.new_tokens, key)
        watch.emit(
            f"generate {batch}",
            tokens=batch * case.new_tokens,
            weight_bytes=read * decoder.dtype.itemsize,
            copy_bytes_per_s=bandwidth,
        )


def group_batch(case: GpuCase, prompts: Ints, completions: Sequence[Completion]) -> Batch:
    """GRPO's batch of the completions, in order of prompts."""
    rewards = [toy_reward(p, s) for p in range(case.groups) for s in range(case.samples)]
    groups = [
        [
            Rollout(
                adapter=NAME,
                sample=s,
                turns=(Turn(prompt=tokens, completion=completions[p * case.samples + s], text=""),),
                reward=rewards[p * case.samples + s],
            )
            for s in range(case.samples)
        ]
        for p, tokens in enumerate(prompts)
    ]
    numbers = np.repeat(np.arange(case.groups), case.samples)
    values = NormConfig()(np.array(rewards, dtype=np.float32), numbers)
    credit = [
        [np.full(r.sampled_tokens, v, np.float32) for r, v in zip(group, own, strict=True)]
        for group, own in zip(groups, np.split(values, case.groups), strict=True)
    ]
    batch = rollout_batch(NAME, groups, {"advantage": credit}, 1.0)
    weights = item_weights(batch.items.sequence, "sequence")
    return replace(batch, items=replace(batch.items, weight=weights))


async def steps(
    case: GpuCase,
    engine: TrainEngine,
    rollout: EmbeddedEngine,
    publisher: VersionPublisher,
    ref: AdapterRef,
) -> None:
    watch, prompts = Watch(), case.tokens(case.groups, case.prompt)
    for number in range(case.rounds + 1):
        with watch.phase("step"):
            with watch.phase("generate"):
                completions = await complete(
                    rollout, ref, prompts, case.samples, case.new_tokens, f"step/{number}"
                )
            with watch.phase("train"):
                engine.forward_backward(group_batch(case, prompts, completions), LOSSES)
                engine.optim_step(HYPER)
            states = {NAME: engine.adapter_state(NAME)}
            old, ref = ref, (await publisher.publish({NAME: number + 1}, states))[NAME]
            await publisher.retire(old)
    watch.emit("step", tokens=case.groups * case.samples * case.new_tokens)


async def main(case: GpuCase) -> None:
    config = DecoderConfig.from_hf(case.config)
    decoder = build_decoder(config, RandomCheckpoint(config.tied_embeddings))
    engine = archon_engine(decoder, max_tokens_per_mb=case.micro_tokens)
    engine.add_adapter(NAME, SPEC)
    train(case, decoder, engine)
    rollout = EmbeddedEngine(decoder, max_running=max(*case.batches, case.groups * case.samples))
    publisher = VersionPublisher(rollout, "bench")
    ref = (await publisher.publish({NAME: 0}, {NAME: engine.adapter_state(NAME)}))[NAME]
    await generate(case, decoder, rollout, ref)
    await steps(case, engine, rollout, publisher, ref)
    await rollout.close()


if __name__ == "__main__":
    asyncio.run(main(case_of(sys.argv[1])))
