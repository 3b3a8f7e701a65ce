"""The canary: does the rollout engine serve what the trainer published?

Before the first step a large random adapter of every shape goes through the publisher (`prove`);
after every publication the score of fixed tokens is compared with the trainer's (`check`).
Digests are compared by the publisher itself.
Shapes: T tokens.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorelei.inference.contract import InferenceEngine
from lorelei.model.kernels.build import rest
from lorelei.publish import page
from lorelei.publish.contract import Publisher
from lorelei.publish.random_adapter import random_adapter, untrained
from lorelei.publish.verdict import Verdict, distance, judge, share_of_way
from lorelei.train.step import Trainer
from lorelei.types import (
    AdapterRef,
    AdapterSpec,
    Batch,
    Floats,
    GenerateRequest,
    Ints,
    Items,
    Policy,
    Prompt,
    SamplingParams,
    Segment,
)

BASE = "the base model"
_EARLIER = 8  # versions whose log-probabilities are remembered
_BASE_ALLOWED = 0.5  # nats between two engines on one base model, bf16 mixtures of experts included
_SIGNAL = 0.5  # nats that a random adapter must move the fixed tokens, at least
_SIGNAL_ALLOWED = 0.005  # of it, on top of the noise: bfloat16 rounds scales
_LARGEST = 64.0  # size of a random adapter
_SAMPLED = 8  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What the canary knows of one adapter before the run."""

    spec: AdapterSpec
    temperature: float  # of its rollouts
    sequences: tuple[Ints, ...]  # fixed tokens, each of 2 or more


@dataclass(slots=True)
class _Memory:
    """The trainer's log-probabilities of one adapter's fixed tokens."""

    noise: float  # nats, of the rollout engine on the base model
    base_T: Floats
    earlier: deque[tuple[int, Floats]] = field(default_factory=lambda: deque(maxlen=_EARLIER))

    def others(self, version: int) -> dict[str, Floats]:
        """What a wrong answer may be the answer of."""
        found = {f"version {v}": logprobs_T for v, logprobs_T in self.earlier if v != version}
        return {BASE: self.base_T, **found}


class Canary:
    """Compares engines over their contracts; it stops a run by raising CanaryFailed."""

    def __init__(
        self,
        watched: Mapping[str, Watched],
        trainer: Trainer,
        engine: InferenceEngine,
        publisher: Publisher,
        run_id: str,
    ) -> None:
        """watched: by adapter. run_id: differs at every start, and so do the random adapters."""
        self._watched, self._trainer, self._engine = watched, trainer, engine
        self._publisher, self._run_id = publisher, run_id
        self._memories: dict[str, _Memory] = {}

    async def prove(self) -> list[dict[str, float | str]]:
        """Show that each shape of adapter is served as itself. Returns one record for each.

        Full weights are whole by themselves: only the base model is compared.
        """
        groups: dict[AdapterSpec, list[str]] = {}
        for name, one in self._watched.items():
            groups.setdefault(one.spec, []).append(name)
        return [await self._prove(spec, names) for spec, names in groups.items()]

    async def check(self, refs: Mapping[str, AdapterRef]) -> dict[str, dict[str, float]]:
        """Compare versions that were just published, while the trainer still holds them.

        Returns metrics by adapter. When it raises CanaryFailed the versions are retired.
        """
        try:
            return await self._check(refs)
        except page.CanaryFailed:
            retired = (self._publisher.retire(ref) for ref in refs.values())
            await asyncio.gather(*retired, return_exceptions=True)
            raise

    async def _check(self, refs: Mapping[str, AdapterRef]) -> dict[str, dict[str, float]]:
        start = time.perf_counter()
        sequences = {name: self._watched[name].sequences for name in refs}
        right, scored = await asyncio.gather(
            self._train_logprobs(sequences),
            asyncio.gather(*(self._score(sequences[name], ref) for name, ref in refs.items())),
        )
        seconds = time.perf_counter() - start
        metrics: dict[str, dict[str, float]] = {}
        for (name, ref), scored_T in zip(refs.items(), scored, strict=True):
            memory = self._memories[name]
            others = memory.others(ref.version)
            verdict = judge(scored_T, right[name], others, memory.noise)
            if not verdict.holds:
                raise page.wrong_version(ref, verdict, len(right[name]))
            metrics[name] = {**_metrics(verdict, ref.version), "canary_seconds": seconds}
        for name, ref in refs.items():
            self._memories[name].earlier.append((ref.version, right[name]))
        return metrics

    async def _prove(self, spec: AdapterSpec, names: Sequence[str]) -> dict[str, float | str]:
        who = f"adapter {names[0]}" if len(names) == 1 else f"adapters {', '.join(names)}"
        start = time.perf_counter()
        if spec.full:
            await self._compare_bases(who, names, None)
            record = {"noise": self._memories[names[0]].noise}
        else:
            record = await self._prove_shape(who, spec, names)
        return {
            "kind": "canary",
            "adapter": names[0],
            **record,
            "seconds": time.perf_counter() - start,
        }

    async def _prove_shape(
        self, who: str, spec: AdapterSpec, names: Sequence[str]
    ) -> dict[str, float]:
        engine, call = self._trainer.engine, self._trainer.call
        own = _unused_name(self._watched)
        await call(engine.add_adapter, own, spec, zlib.crc32(self._run_id.encode()))
        try:
            await self._compare_bases(who, names, own)
            right_T, signal = await self._scale_up(own, names)
            states = {own: await call(engine.adapter_state, own)}
            ref = (await self._publisher.publish({own: 0}, states))[own]
            try:
                found = await self._judge_random(who, ref, names, right_T, signal)
                sampled = [
                    await self._judge_samples(who, ref, self._watched[name], signal)
                    for name in _one_of_each_temperature(self._watched, names)
                ]
            finally:
                await self._publisher.retire(ref)
        finally:
            await call(engine.drop_adapter, own)
        return {
            "noise": self._memories[names[0]].noise,
            "signal": signal,
            "distance": found.distance,
            "sampled": max(sampled),
        }

    async def _compare_bases(self, who: str, names: Sequence[str], fresh: str | None) -> None:
        """Measure the engines' noise. fresh: an adapter that adds nothing; none: full weights."""
        for name in names:
            sequences = self._watched[name].sequences
            base, scored_T = await asyncio.gather(
                self._train_logprobs({fresh: sequences})
                if fresh is not None
                else self._train_logprobs({name: sequences}, "reference"),
                self._score(sequences, None),
            )
            (base_T,) = base.values()
            noise = distance(scored_T, base_T)
            if noise > _BASE_ALLOWED:
                raise page.wrong_base(who, noise, len(base_T))
            self._memories[name] = _Memory(noise, base_T)

    async def _scale_up(self, own: str, names: Sequence[str]) -> tuple[Floats, float]:
        """Make the canary's adapter random, and so large that the noise cannot hide it."""
        engine, call = self._trainer.engine, self._trainer.call
        fresh = await call(engine.adapter_state, own)
        memory = self._memories[names[0]]
        size, wanted = 0.25, max(_SIGNAL, 40 * memory.noise)
        while True:
            state = random_adapter(fresh, size, f"{self._run_id}/{names[0]}")
            await call(engine.restore, own, untrained(state))
            right_T = (await self._train_logprobs({own: self._watched[names[0]].sequences}))[own]
            signal = distance(right_T, memory.base_T)
            if signal >= wanted or size >= _LARGEST:
                return right_T, signal
            size *= 2

    async def _judge_random(
        self, who: str, ref: AdapterRef, names: Sequence[str], right_T: Floats, signal: float
    ) -> Verdict:
        memory = self._memories[names[0]]
        scored_T = await self._score(self._watched[names[0]].sequences, ref)
        others = {BASE: memory.base_T}
        verdict = judge(scored_T, right_T, others, memory.noise, _SIGNAL_ALLOWED * signal)
        if not verdict.holds:
            share = share_of_way(scored_T, memory.base_T, right_T)
            raise page.wrong_proof(who, verdict, share, signal)
        return verdict

    async def _judge_samples(self, who: str, ref: AdapterRef, one: Watched, signal: float) -> float:
        """The distance of log-probabilities that come with sampled tokens."""
        prompt, temperature = one.sequences[0], one.temperature
        sampling = SamplingParams(temperature=temperature, max_new_tokens=_SAMPLED)
        answer = await self._engine.generate(
            GenerateRequest(tokens=prompt, adapter=ref, sampling=sampling, key="canary")
        )
        whole = np.concatenate([prompt, answer.tokens])
        logprobs = await self._train_logprobs({ref.name: (whole,)}, temperature=temperature)
        right_T = logprobs[ref.name][len(prompt) - 1 :]
        noise = max(memory.noise for memory in self._memories.values()) / min(temperature, 1.0)
        verdict = judge(answer.logprobs, right_T, {}, noise, _SIGNAL_ALLOWED * signal)
        if not verdict.holds:
            raise page.wrong_samples(who, verdict, temperature)
        return verdict.distance

    async def _score(self, sequences: Sequence[Ints], ref: AdapterRef | None) -> Floats:
        return np.concatenate(await self._engine.score(sequences, ref))

    async def _train_logprobs(
        self,
        sequences: Mapping[str, Sequence[Ints]],
        policy: Policy = "current",
        temperature: float = 1.0,
    ) -> dict[str, Floats]:
        """What the trainer says of each adapter's tokens but the first of each sequence."""

        def compute() -> Floats:
            batch = _batch(sequences, temperature)
            logprobs = self._trainer.engine.logprobs(batch, policy).logprobs
            rest()
            return logprobs

        logprobs = await self._trainer.call(compute)
        ends = np.cumsum([sum(len(s) - 1 for s in own) for own in sequences.values()])
        return dict(zip(sequences, np.split(logprobs, ends[:-1]), strict=True))


def fixed_tokens(prompts: Iterable[Prompt], count: int) -> tuple[Ints, ...]:
    """The ends of the first prompts, `count` tokens together where there are so many."""
    found: list[Ints] = []
    for prompt in prompts:
        tokens = prompt.tokens[-count:]
        if len(tokens) >= 2:
            found.append(tokens)
            count -= len(tokens)
        if count < 2:
            break
    return tuple(found)


def _metrics(verdict: Verdict, version: int) -> dict[str, float]:
    before = f"version {version - 1}"
    found = {"canary_version": verdict.distance, "canary_base": verdict.others[BASE]}
    if before in verdict.others:
        found["canary_before"] = verdict.others[before]
        # 0: the step was too small to be seen in the noise, and only the digest tells
        found["canary_told_apart"] = float(before in verdict.distinguishable)
    return found


def _batch(sequences: Mapping[str, Sequence[Ints]], temperature: float) -> Batch:
    """Every token but the first of each sequence as an item; no losses."""
    rows = [(name, tokens) for name, own in sequences.items() for tokens in own]
    segments = [Segment(tokens=t[:-1], parent=-1, start=0, adapter=name) for name, t in rows]
    target = np.concatenate([tokens[1:] for _, tokens in rows]).astype(np.int64)
    zeros = np.zeros(len(target), dtype=np.float32)
    items = Items(
        source=np.arange(len(target)),
        target=target,
        weight=zeros,
        advantage=zeros,
        behaviour=zeros,
        temperature=np.full(len(target), temperature, dtype=np.float32),
        sequence=np.repeat(np.arange(len(rows)), [len(t) - 1 for _, t in rows]),
    )
    return Batch(segments=tuple(segments), items=items)


def _one_of_each_temperature(watched: Mapping[str, Watched], names: Sequence[str]) -> list[str]:
    return list({watched[name].temperature: name for name in names}.values())


def _unused_name(taken: Mapping[str, Watched]) -> str:
    return next(n for i in range(len(taken) + 1) if (n := f"canary-{i}") not in taken)
