"""A rollout engine of transformers and peft alone: slow, plain, and independent of ours.

It runs every request by itself, recomputing the whole sequence for each token.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorelei.inference.contract import EngineClosed, Health
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef, Completion, FinishReason, Floats, GenerateRequest, Ints

_made: dict[tuple[Path, str | None], PreTrainedModel] = {}


def reference_model(folder: Path, state: AdapterState | None = None) -> PreTrainedModel:
    """The checkpoint in transformers, in eval mode, with one adapter of peft where given.

    It is made once for a folder and adapter, and kept: nobody may change it.
    """
    key = folder, None if state is None else state.digest()
    if key not in _made:
        _made[key] = _reference_model(folder, state)
    return _made[key]


def _reference_model(folder: Path, state: AdapterState | None) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if state is None:
        return model
    dense = {n: t for n, t in state.tensors.items() if ".experts." not in n}
    add_expert_deltas(model, state)
    if not dense:
        return model
    modules = sorted({n.removeprefix("base_model.model.").rsplit(".", 2)[0] for n in dense})
    config = LoraConfig(
        r=state.spec.rank,
        lora_alpha=state.spec.alpha,  # type: ignore[arg-type]  # peft takes fractions too
        use_rslora=state.spec.rslora,
        target_modules=modules,
    )
    peft_model = get_peft_model(model, config)
    loaded = set_peft_model_state_dict(peft_model, dict(dense))
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    return peft_model.eval()  # type: ignore[return-value]


def add_expert_deltas(model: PreTrainedModel, state: AdapterState) -> None:
    """transformers fuses experts into one tensor, which peft cannot adapt one by one: add B A."""
    fused = dict(model.named_parameters())
    for name, a in state.tensors.items():
        if ".experts." not in name or "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        prefix, _, rest = module.partition(".experts.")
        expert, projection = rest.split(".")
        delta = state.spec.scale * (state.tensors[name.replace("lora_A", "lora_B")] @ a)
        key = "down_proj" if projection == "down_proj" else "gate_up_proj"
        target = fused[f"{prefix}.experts.{key}"].data[int(expert)]
        if projection == "gate_proj":
            target = target[: len(delta)]
        elif projection == "up_proj":
            target = target[-len(delta) :]
        target += delta


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Ints) -> Tensor:
    """[T, V] of one sequence."""
    return model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]


def reference_logprobs(model: PreTrainedModel, tokens: Ints, temperature: float) -> Floats:
    """[T - 1] of tokens 1..T-1."""
    logprobs = (reference_logits(model, tokens)[:-1].double() / temperature).log_softmax(-1)
    chosen = torch.from_numpy(tokens[1:]).long()
    return logprobs.gather(1, chosen[:, None])[:, 0].float().numpy()


class ReferenceEngine:
    """InferenceEngine by the book. Not for use outside tests: it computes on the event loop."""

    def __init__(
        self, folder: Path, *, tokenizer: Any = None, max_running: int, max_context: int
    ) -> None:
        self._folder, self._tokenizer, self._max_context = folder, tokenizer, max_context
        self._models: dict[str | None, PreTrainedModel] = {None: reference_model(folder)}
        self._slots = asyncio.Semaphore(max_running)
        self._go = asyncio.Event()
        self._go.set()
        self._users: dict[str | None, int] = {}
        self._idle = asyncio.Condition()
        self._aborts: Counter[str | None] = Counter()
        self._unfinished = self._running = self._generated = 0
        self._closed = False
        self._served: set[str] = set()

    async def generate(self, request: GenerateRequest) -> Completion:
        name = self._name(request.adapter)
        self._check(request)
        self._users[name] = self._users.get(name, 0) + 1
        self._unfinished += 1
        aborts = self._aborts[name]
        try:
            await self._ready(name, aborts)
            async with self._slots:
                self._running += 1
                try:
                    return await self._sample(request, name, aborts)
                finally:
                    self._running -= 1
        finally:
            self._unfinished -= 1
            self._users[name] -= 1
            async with self._idle:
                self._idle.notify_all()

    async def _ready(self, name: str | None, aborts: int) -> None:
        await asyncio.sleep(0)
        while not self._go.is_set() and aborts == self._aborts[name] and not self._closed:
            await asyncio.sleep(0.001)
        if self._closed:
            raise EngineClosed("the engine was closed")

    async def _sample(self, request: GenerateRequest, name: str | None, aborts: int) -> Completion:
        sampling, model = request.sampling, self._models[name]
        rng = np.random.default_rng([sampling.seed, zlib.crc32(request.key.encode())])
        rng.random(request.position)  # `choice` draws one number a token
        limit = min(sampling.max_new_tokens, self._max_context - len(request.tokens))
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason | None = None
        while reason is None:
            await self._ready(name, aborts)
            if aborts != self._aborts[name]:
                reason = "abort"
                break
            so_far = np.concatenate([request.tokens, np.array(tokens, dtype=np.int32)])
            logits = reference_logits(model, so_far)[-1].double()
            scaled = (logits / (sampling.temperature or 1)).log_softmax(-1)
            probabilities = scaled.exp().numpy()
            token = (
                int(logits.argmax())
                if sampling.temperature == 0
                else int(rng.choice(len(logits), p=probabilities / probabilities.sum()))
            )
            tokens.append(token)
            logprobs.append(float(scaled[token]))
            self._generated += 1
            answer = [*request.tokens[len(request.tokens) - request.position :].tolist(), *tokens]
            if token in sampling.stop_token_ids or self._stops(sampling.stop_strings, answer):
                reason = "stop"
            elif len(tokens) == limit:
                reason = "length"
        version = request.adapter.version if request.adapter is not None else 0
        return Completion(
            tokens=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            versions=((version, len(tokens)),) if tokens else (),
            finish_reason=reason,
        )

    def _stops(self, strings: Sequence[str], tokens: list[int]) -> bool:
        if not strings:
            return False
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in strings)

    def _check(self, request: GenerateRequest) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed")
        if not 0 < len(request.tokens) < self._max_context:
            raise ValueError(
                f"prompt: {len(request.tokens)} tokens, the context has {self._max_context}"
            )

    def _name(self, ref: AdapterRef | None) -> str | None:
        if ref is None:
            return None
        if ref.served_name not in self._served:
            raise KeyError(f"adapter {ref} is not loaded")
        return ref.served_name

    async def score(
        self, sequences: Sequence[Ints], adapter: AdapterRef | None, temperature: float = 1.0
    ) -> list[Floats]:
        model = self._models[self._name(adapter)]
        return [reference_logprobs(model, sequence, temperature) for sequence in sequences]

    async def load(self, ref: AdapterRef, state: AdapterState) -> str | None:
        if self._closed:
            raise EngineClosed("the engine was closed")
        self._models[ref.served_name] = reference_model(self._folder, state)
        self._served.add(ref.served_name)
        return None  # peft does not tell

    async def unload(self, ref: AdapterRef) -> None:
        name = self._name(ref)
        assert name is not None
        self._served.remove(name)
        async with self._idle:
            await self._idle.wait_for(lambda: self._users.get(name, 0) == 0)
        del self._models[name]

    async def pause(self) -> None:
        self._go.clear()

    async def resume(self) -> None:
        self._go.set()

    async def abort(self, adapter: AdapterRef | None = None) -> None:
        for name in [*self._models] if adapter is None else [adapter.served_name]:
            self._aborts[name] += 1

    async def sleep(self) -> None:
        self._go.clear()

    async def wake(self) -> None:
        self._go.set()

    async def health(self) -> Health:
        return Health(
            alive=not self._closed,
            running=self._running,
            waiting=self._unfinished - self._running,
            adapters=tuple(sorted(self._served)),
            tokens_generated=self._generated,
        )

    async def close(self) -> None:
        self._closed = True
