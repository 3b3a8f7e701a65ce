"""Where the time of a training pass and of decoding goes on a GPU, by torch's profiler.

usage: -m benchmarks.gpu_profile CASE    prints tables; the kernels that took the most time first
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_cases import GpuCase, case_of
from benchmarks.gpu_ours import LOSSES, NAME, SPEC, RandomCheckpoint, complete, plain_batch
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.model.config import DecoderConfig
from lorelei.model.load import build_decoder
from lorelei.publish.publisher import VersionPublisher
from lorelei.train.archon.engine import archon_engine

_ROWS = 25


@contextmanager
def table(title: str) -> Iterator[None]:
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=activities) as found:
        yield
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = found.key_averages()
    sys.stdout.write(f"\n{title}\n")
    sys.stdout.write(averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=60))


async def main(case: GpuCase) -> None:
    config = DecoderConfig.from_hf(case.config)
    decoder = build_decoder(config, RandomCheckpoint(config.tied_embeddings))
    engine = archon_engine(decoder, max_tokens_per_mb=case.micro_tokens)
    engine.add_adapter(NAME, SPEC)
    batch = plain_batch(case)
    engine.forward_backward(batch, LOSSES)
    with table("forward and backward"):
        engine.forward_backward(batch, LOSSES)
    rollout = EmbeddedEngine(decoder, max_running=max(case.batches))
    states = {NAME: engine.adapter_state(NAME)}
    ref = (await VersionPublisher(rollout, "bench").publish({NAME: 0}, states))[NAME]
    for rows in (case.batches[0], case.batches[-1]):
        prompts, samples = case.rows(rows)
        tokens = case.tokens(prompts, case.prompt)
        await complete(rollout, ref, tokens, samples, case.new_tokens, "warm")
        with table(f"{rows} sequences of 8 tokens"):
            await complete(rollout, ref, tokens, samples, 8, "profiled")
    await rollout.close()


if __name__ == "__main__":
    asyncio.run(main(case_of(sys.argv[1])))
