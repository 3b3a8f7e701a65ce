"""Rounds of generation by Lorelei's embedded engine; each round publishes a new adapter version.

usage: -m benchmarks.ours_generate JOB   (a folder that benchmarks.generation writes)
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.meter import Meter
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.peft_folder import read_peft_folder
from lorelei.model.load import load_decoder
from lorelei.types import AdapterRef, GenerateRequest, SamplingParams


async def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    prompts = [np.asarray(tokens, dtype=np.int32) for tokens in job["prompts"]]
    engine = EmbeddedEngine(load_decoder(Path(job["model"])))
    meter = Meter()

    async def generate(ref: AdapterRef, sampling: SamplingParams) -> list[list[int]]:
        requests = [
            GenerateRequest(
                tokens=tokens, adapter=ref, sampling=sampling, key=f"{ref.version}/{p}/{s}"
            )
            for p, tokens in enumerate(prompts)
            for s in range(job["samples"])
        ]
        done = await asyncio.gather(*(engine.generate(request) for request in requests))
        return [completion.tokens.tolist() for completion in done]

    for version, adapter in enumerate(job["adapters"]):
        state = read_peft_folder(Path(adapter))
        with meter.phase("publish"):
            ref = AdapterRef(name="bench", version=version, run_id="run", digest=state.digest())
            await engine.load(ref, state)
        if version == 0:  # warms up, and shows that all sides run the same model
            greedy = SamplingParams(temperature=0.0, max_new_tokens=job["greedy_tokens"])
            sys.stdout.write(json.dumps({"greedy": await generate(ref, greedy)}) + "\n")
            meter = Meter()
        else:
            with meter.phase("generate"):
                rows = await generate(ref, SamplingParams(max_new_tokens=job["new_tokens"]))
            meter.emit(generated=sum(map(len, rows)))
        await engine.unload(ref)
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
