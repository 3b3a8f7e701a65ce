"""Rounds of generation by llama.cpp, in the peers' environment.

usage: -m benchmarks.peers.llama_cpp_generate JOB WEIGHTS
WEIGHTS: f32 or q8_0 (the merged model, as a new GGUF file for each version), lora (unmerged).
Each prompt is read once; its samples are sequences that are decoded together.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

from benchmarks.meter import Meter
from benchmarks.peers.generate_gguf import KINDS, Checkpoint


class Token(NamedTuple):
    id: int
    position: int
    sequence: int
    predicts: bool  # whether its logits are wanted


class Loaded:
    """A model file and a context for all sequences of a job."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        longest = max(map(len, job["prompts"]))
        self._job, self._rows = job, len(job["prompts"]) * job["samples"]
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = self._rows
        params.n_ctx = self._rows * (longest + job["new_tokens"])
        params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        capacity = max(sum(map(len, job["prompts"])), self._rows)
        self._batch = llama_cpp.llama_batch_init(capacity, 0, 1)

    def use_adapter(self, path: Path) -> None:
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        adapters, scales = (
            (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter),
            (ctypes.c_float * 1)(1.0),
        )
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise RuntimeError(f"llama.cpp refuses the adapter {path}")

    def generate(self, sampler: Any, new_tokens: int) -> list[list[int]]:
        """Tokens of every sample, a prompt's samples together."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        prompts, samples = self._job["prompts"], self._job["samples"]
        self._decode(
            [
                Token(token, at, p * samples, at == len(tokens) - 1)
                for p, tokens in enumerate(prompts)
                for at, token in enumerate(tokens)
            ]
        )
        rows: list[list[int]] = []
        last = np.cumsum([len(tokens) for tokens in prompts]) - 1
        for row in range(self._rows):
            prompt = row // samples
            if row % samples:
                llama_cpp.llama_memory_seq_cp(memory, prompt * samples, row, -1, -1)
            rows.append([self._draw(sampler, int(last[prompt]))])
        for step in range(new_tokens - 1):
            self._decode(
                [
                    Token(tokens[-1], len(prompts[row // samples]) + step, row, True)
                    for row, tokens in enumerate(rows)
                ]
            )
            for row, tokens in enumerate(rows):
                tokens.append(self._draw(sampler, row))
        return rows

    def _draw(self, sampler: Any, index: int) -> int:
        return llama_cpp.llama_sampler_sample(sampler, self.context, index)

    def _decode(self, tokens: list[Token]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token.id, token.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.sequence
            batch.logits[i] = token.predicts
        if (code := llama_cpp.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {code}")

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp reports every tensor otherwise."""


def main(folder: Path, weights: str) -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    job = json.loads((folder / "job.json").read_text())
    checkpoint, file = Checkpoint(job), folder / f"{weights}.gguf"
    loaded: Loaded | None = None
    if weights == "lora":
        checkpoint.write_model(folder / "base.gguf", {}, KINDS["f32"])
        loaded = Loaded(folder / "base.gguf", job)
    meter = Meter()
    sampler = llama_cpp.llama_sampler_init_dist(0)
    for version, path in enumerate(job["adapters"]):
        adapter = load_file(Path(path) / "adapter_model.safetensors")
        with meter.phase("publish"):
            if weights == "lora":
                checkpoint.write_adapter(file, adapter)
                loaded.use_adapter(file)
            else:
                if loaded is not None:
                    loaded.close()
                checkpoint.write_model(file, adapter, KINDS[weights])
                loaded = Loaded(file, job)
        if version == 0:
            greedy = llama_cpp.llama_sampler_init_greedy()
            rows = loaded.generate(greedy, job["greedy_tokens"])
            sys.stdout.write(json.dumps({"greedy": rows}) + "\n")
            meter = Meter()
        else:
            with meter.phase("generate"):
                rows = loaded.generate(sampler, job["new_tokens"])
            meter.emit(generated=sum(map(len, rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
