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
from lorelei.publish import page
from lorelei.publish.publisher import VersionPublisher
from lorelei.publish.random_adapter import random_adapter, untrained
from lorelei.publish.verdict import Verdict, distance, judge, share_of_way
from lorelei.train.engine_thread import EngineThread
from lorelei.types import BASE as BASE_POLICY
from lorelei.types import (
    CURRENT,
    AdapterRef,
    AdapterSpec,
    Batch,
    Floats,
    GenerateRequest,
    Ints,
    Items,
    Policy,
    SamplingParams,
    Segment,
)

BASE = "the base model"
_EARLIER = 8  # versions whose log-probabilities are remembered
_BASE_ALLOWED = 0.5  # nats between two engines on one base model, bf16 mixtures of experts included
_SIGNAL = 0.5  # nats that a random adapter must move the fixed tokens, at least
_SIGNAL_ALLOWED = 0.005  # of it, on top of the noise: bfloat16 rounds scales
# nats; rows that are decoded go through other products than a score, which rounds elsewhere: no
# noise is seen between an engine and itself. Measured on CPUs in bfloat16: 0.01 to 0.045, on merged
# copies 0.03 to 0.065 (2 and 8 layers, adapters that move tokens by 0.2 to 3). float16 has three
# more bits.
_DECODING_NOISE = {"bfloat16": 0.02, "float16": 0.0025}
_LARGEST = 64.0  # size of a random adapter
_SAMPLED = 8  # tokens


@dataclass(slots=True)
class Memory:
    """The trainer's log-probabilities of one adapter's fixed tokens."""

    noise: float  # nats, of the inference engine on the base model
    base_T: Floats
    earlier: deque[tuple[int, Floats]] = field(default_factory=lambda: deque(maxlen=_EARLIER))

    def others(self, version: int) -> dict[str, Floats]:
        """What a wrong answer may be the answer of."""
        found = {f"version {v}": logprobs_T for v, logprobs_T in self.earlier if v != version}
        return {BASE: self.base_T, **found}


@dataclass(slots=True, kw_only=True)
class Watched:
    """What the canary knows of one adapter; it belongs to the adapter's job."""

    spec: AdapterSpec
    temperature: float  # of its rollouts
    sequences: tuple[Ints, ...]  # fixed tokens, each of 2 or more
    memory: Memory | None = None  # None: before `prove`

    @property
    def known(self) -> Memory:
        assert self.memory is not None, "proved before its first version"
        return self.memory


class Canary:
    """Compares engines over their contracts; it stops a run by raising CanaryFailed."""

    def __init__(
        self,
        thread: EngineThread,
        engine: InferenceEngine,
        publisher: VersionPublisher,
        run_id: str,
        dtype: str = "float32",
    ) -> None:
        """run_id: differs at every start, and so do the random adapters.

        dtype: of the base model, in which both engines compute.
        """
        self._thread, self._engine = thread, engine
        self._publisher, self._run_id = publisher, run_id
        self._decoding_noise = _DECODING_NOISE.get(dtype, 0.0)

    async def prove(self, watched: Mapping[str, Watched]) -> list[dict[str, float | str]]:
        """Show that each shape of adapter is served as itself. Returns one record for each.

        watched: adapters that the train engine holds and nothing serves yet. Full weights are
        whole by themselves: only the base model is compared.
        """
        groups: dict[AdapterSpec, dict[str, Watched]] = {}
        for name, one in watched.items():
            groups.setdefault(one.spec, {})[name] = one
        return [await self._prove(spec, alike) for spec, alike in groups.items()]

    async def check(
        self, refs: Mapping[str, AdapterRef], watched: Mapping[str, Watched]
    ) -> dict[str, dict[str, float]]:
        """Compare versions that were just published, while the trainer still holds them.

        Returns metrics by adapter. When it raises CanaryFailed the versions are retired.
        """
        try:
            return await self._check({n: ref for n, ref in refs.items() if n in watched}, watched)
        except page.CanaryFailed:
            retired = (self._publisher.retire(ref) for ref in refs.values())
            await asyncio.gather(*retired, return_exceptions=True)
            raise

    async def _check(
        self, refs: Mapping[str, AdapterRef], watched: Mapping[str, Watched]
    ) -> dict[str, dict[str, float]]:
        if not refs:
            return {}
        start = time.perf_counter()
        sequences = {name: watched[name].sequences for name in refs}
        right, scored = await asyncio.gather(
            self._train_logprobs(sequences),
            asyncio.gather(*(self._score(sequences[name], ref) for name, ref in refs.items())),
        )
        seconds = time.perf_counter() - start
        metrics: dict[str, dict[str, float]] = {}
        for (name, ref), scored_T in zip(refs.items(), scored, strict=True):
            memory = watched[name].known
            others = memory.others(ref.version)
            verdict = judge(scored_T, right[name], others, memory.noise)
            if not verdict.holds:
                raise page.wrong_version(ref, verdict, len(right[name]))
            metrics[name] = {**_metrics(verdict, ref.version), "canary_seconds": seconds}
        for name, ref in refs.items():
            watched[name].known.earlier.append((ref.version, right[name]))
        return metrics

    async def _prove(
        self, spec: AdapterSpec, alike: Mapping[str, Watched]
    ) -> dict[str, float | str]:
        names = list(alike)
        who = f"adapter {names[0]}" if len(names) == 1 else f"adapters {', '.join(names)}"
        start = time.perf_counter()
        if spec.full:
            await self._compare_bases(who, alike, None)
            record = {"noise": alike[names[0]].known.noise}
        else:
            record = await self._prove_shape(who, spec, alike)
        return {
            "kind": "canary",
            "adapter": names[0],
            **record,
            "seconds": time.perf_counter() - start,
        }

    async def _prove_shape(
        self, who: str, spec: AdapterSpec, alike: Mapping[str, Watched]
    ) -> dict[str, float]:
        engine, call = self._thread.engine, self._thread.call
        own = f"canary-{self._run_id}"  # no adapter of a user's has this name
        await call(engine.add_adapter, own, spec, zlib.crc32(self._run_id.encode()))
        first_name, first = next(iter(alike.items()))
        try:
            await self._compare_bases(who, alike, own)
            right_T, signal = await self._scale_up(own, first_name, first)
            states = {own: await call(engine.adapter_state, own)}
            ref = (await self._publisher.publish({own: 0}, states))[own]
            try:
                found = await self._judge_random(who, ref, first, right_T, signal)
                noise = max(one.known.noise for one in alike.values())
                sampled = [
                    await self._judge_samples(who, ref, one, signal, noise)
                    for one in {w.temperature: w for w in alike.values()}.values()
                ]
            finally:
                await self._publisher.retire(ref)
        finally:
            await call(engine.drop_adapter, own)
        return {
            "noise": first.known.noise,
            "signal": signal,
            "distance": found.distance,
            "sampled": max(sampled),
        }

    async def _compare_bases(
        self, who: str, alike: Mapping[str, Watched], fresh: str | None
    ) -> None:
        """Measure the engines' noise. fresh: an adapter that adds nothing; None: full weights."""
        for name, one in alike.items():
            sequences = one.sequences
            base, scored_T = await asyncio.gather(
                self._train_logprobs({fresh: sequences})
                if fresh is not None
                else self._train_logprobs({name: sequences}, BASE_POLICY),
                self._score(sequences, None),
            )
            (base_T,) = base.values()
            noise = distance(scored_T, base_T)
            if noise > _BASE_ALLOWED:
                raise page.wrong_base(who, noise, len(base_T))
            one.memory = Memory(noise, base_T)

    async def _scale_up(self, own: str, first: str, watched: Watched) -> tuple[Floats, float]:
        """Make the canary's adapter random, and so large that the noise cannot hide it."""
        engine, call = self._thread.engine, self._thread.call
        fresh = await call(engine.adapter_state, own)
        memory = watched.known
        size, wanted = 0.25, max(_SIGNAL, 40 * memory.noise)
        while True:
            state = random_adapter(fresh, size, f"{self._run_id}/{first}")
            await call(engine.restore, own, untrained(state))
            right_T = (await self._train_logprobs({own: watched.sequences}))[own]
            signal = distance(right_T, memory.base_T)
            if signal >= wanted or size >= _LARGEST:
                return right_T, signal
            size *= 2

    async def _judge_random(
        self, who: str, ref: AdapterRef, watched: Watched, right_T: Floats, signal: float
    ) -> Verdict:
        memory = watched.known
        scored_T = await self._score(watched.sequences, ref)
        others = {BASE: memory.base_T}
        verdict = judge(scored_T, right_T, others, memory.noise, _SIGNAL_ALLOWED * signal)
        if not verdict.holds:
            share = share_of_way(scored_T, memory.base_T, right_T)
            raise page.wrong_proof(who, verdict, share, signal)
        return verdict

    async def _judge_samples(
        self, who: str, ref: AdapterRef, one: Watched, signal: float, noise: float
    ) -> float:
        """The distance of log-probabilities that come with sampled tokens."""
        prompt, temperature = one.sequences[0], one.temperature
        sampling = SamplingParams(temperature=temperature, max_new_tokens=_SAMPLED)
        answer = await self._engine.generate(
            GenerateRequest(tokens=prompt, adapter=ref, sampling=sampling, key="canary")
        )
        whole = np.concatenate([prompt, answer.tokens])
        logprobs = await self._train_logprobs({ref.name: (whole,)}, temperature=temperature)
        right_T = logprobs[ref.name][len(prompt) - 1 :]
        noise = max(noise, self._decoding_noise) / min(temperature, 1.0)
        verdict = judge(answer.logprobs, right_T, {}, noise, _SIGNAL_ALLOWED * signal)
        if not verdict.holds:
            raise page.wrong_samples(who, verdict, temperature)
        return verdict.distance

    async def _score(self, sequences: Sequence[Ints], ref: AdapterRef | None) -> Floats:
        return np.concatenate(await self._engine.score(sequences, ref))

    async def _train_logprobs(
        self,
        sequences: Mapping[str, Sequence[Ints]],
        policy: Policy = CURRENT,
        temperature: float = 1.0,
    ) -> dict[str, Floats]:
        """What the trainer says of each adapter's tokens but the first of each sequence."""

        def compute() -> Floats:
            batch = _batch(sequences, temperature)
            return self._thread.engine.logprobs(batch, policy).logprobs

        logprobs = await self._thread.call(compute)
        ends = np.cumsum([sum(len(s) - 1 for s in own) for own in sequences.values()])
        return dict(zip(sequences, np.split(logprobs, ends[:-1]), strict=True))


def fixed_tokens(sequences: Iterable[Ints], count: int) -> tuple[Ints, ...]:
    """The ends of the first sequences, `count` tokens together where there are so many."""
    found: list[Ints] = []
    for sequence in sequences:
        tokens = sequence[-count:]
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
    items = Items(
        source=np.arange(len(target)),
        target=target,
        weight=np.zeros(len(target), dtype=np.float32),
        temperature=np.full(len(target), temperature, dtype=np.float32),
        sequence=np.repeat(np.arange(len(rows)), [len(t) - 1 for _, t in rows]),
    )
    return Batch(segments=tuple(segments), items=items)
