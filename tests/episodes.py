"""Rollouts with random tokens, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorelei.algo.loss import item_weights
from lorelei.train.batch import rollout_batch
from lorelei.types import Batch, Completion, Floats, Rollout, Turn

VOCAB = 300


def turn(
    prompt: Sequence[int],
    completion: Sequence[int],
    logprobs: Sequence[float] | None = None,
    version: int = 0,
) -> Turn:
    """A turn of given tokens; log-probabilities of -1 unless given."""
    held = [-1.0] * len(completion) if logprobs is None else logprobs
    return Turn(
        prompt=np.array(prompt, dtype=np.int32),
        completion=Completion(
            tokens=np.array(completion, dtype=np.int32),
            logprobs=np.array(held, dtype=np.float32),
            versions=((version, len(completion)),),
            finish_reason="stop",
        ),
        text="",
    )


def rollout(
    *turns: Turn, reward: float | None = 0.0, sample: int = 0, adapter: str = "a"
) -> Rollout:
    """An episode of given turns."""
    return Rollout(adapter=adapter, sample=sample, turns=turns, reward=reward)


def random_group(
    rng: np.random.Generator, prompt: int, completions: Sequence[int], adapter: str = "a"
) -> tuple[Rollout, ...]:
    """Samples of one prompt, by their lengths; behaviour log-probabilities near a tiny model's."""
    tokens = rng.integers(0, VOCAB, prompt).tolist()
    return tuple(
        rollout(
            turn(tokens, rng.integers(0, VOCAB, n).tolist(), rng.normal(-6.5, 1.0, n).tolist()),
            reward=float(rng.normal()),
            sample=sample,
            adapter=adapter,
        )
        for sample, n in enumerate(completions)
    )


def constant(
    groups: Sequence[Sequence[Rollout]], values: Sequence[Sequence[float] | Floats]
) -> list[list[Floats]]:
    """A number for each rollout, as one for each of its sampled tokens."""
    return [
        [np.full(r.sampled_tokens, v, np.float32) for r, v in zip(group, own, strict=True)]
        for group, own in zip(groups, values, strict=True)
    ]


def weighted_batch(
    adapter: str, groups: Sequence[Sequence[Rollout]], temperature: float = 1.0
) -> Batch:
    """The batch of groups, their rewards as advantages; every rollout counts the same."""
    advantages = constant(groups, [[r.reward or 0.0 for r in group] for group in groups])
    batch = rollout_batch(adapter, groups, {"advantage": advantages}, temperature)
    weights = item_weights(batch.items.sequence, "sequence")
    return replace(batch, items=replace(batch.items, weight=weights))
