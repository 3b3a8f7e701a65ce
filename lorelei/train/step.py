"""One training step over any train engine: groups in, updated adapters and numbers out.

Shapes: S rollouts of one adapter, I items.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from lorelei.algo.aggregate import item_weights
from lorelei.algo.preset import adam_hyper, advantages, loss_spec
from lorelei.config.experiment import Experiment
from lorelei.model.kernels.build import rest
from lorelei.train.batch import build_batch, concatenate
from lorelei.train.contract import TrainEngine
from lorelei.types import Batch, Floats, Group, ItemOutputs, Rollout, StepStats

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One adapter's part of a step."""

    experiment: Experiment
    groups: Sequence[Group]
    rollouts: tuple[tuple[Rollout, ...], ...]  # those with a reward and tokens, by group
    advantages: tuple[Floats, ...]

    def minibatch(self, number: int) -> Batch | None:
        """The groups of one optimizer step, weights normalised over it; none when it is empty."""
        per = self.experiment.algo.batch_size // self.experiment.algo.ppo_n_minibatches
        rows = slice(number * per, (number + 1) * per)
        if not self.rollouts[rows]:
            return None
        batch = build_batch(
            self.experiment.name,
            self.rollouts[rows],
            self.advantages[rows],
            self.experiment.rollout.temperature,
        )
        weights = item_weights(batch.items.sequence, self.experiment.algo.loss_aggregation)
        return replace(batch, items=replace(batch.items, weight=weights))


class Trainer:
    """Runs steps in one thread, always the same, so that the event loop stays free."""

    def __init__(self, engine: TrainEngine, experiments: Mapping[str, Experiment]) -> None:
        self.engine = engine
        self._experiments = experiments
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="train")

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Run a call of the engine in the training thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def close(self) -> None:
        """Wait for the running call and close the engine."""
        self._thread.shutdown()
        self.engine.close()

    async def step(
        self, groups: Mapping[str, Sequence[Group]], versions: Mapping[str, int]
    ) -> StepStats:
        """Train each adapter on its batch of groups; no other adapter changes.

        versions: of each adapter before the step, from which the schedule and staleness follow.
        """
        return await self.call(self._step, groups, versions)

    def _step(
        self, groups: Mapping[str, Sequence[Group]], versions: Mapping[str, int]
    ) -> StepStats:
        start = time.perf_counter()
        shares = [_share(self._experiments[name], batch) for name, batch in groups.items()]
        metrics = {s.experiment.name: _rollout_metrics(s, versions) for s in shares}
        # every policy that the losses compare with is evaluated before the first update
        rounds = [
            [(s, self._with_policies(s, b)) for s in shares if (b := s.minibatch(n)) is not None]
            for n in range(max(s.experiment.algo.ppo_n_minibatches for s in shares))
        ]
        for number, present in enumerate(r for r in rounds if r):
            self._update(present, versions, metrics, first=number == 0)
        rest()
        seconds = time.perf_counter() - start
        for values in metrics.values():
            values["train_seconds"] = seconds
        return StepStats(touched=tuple(groups), metrics=metrics)

    def _update(
        self,
        present: Sequence[tuple[_Share, Batch]],
        versions: Mapping[str, int],
        metrics: dict[str, dict[str, float]],
        first: bool,
    ) -> None:
        losses = {s.experiment.name: loss_spec(s.experiment.algo) for s, _ in present}
        outputs = self.engine.forward_backward(concatenate([b for _, b in present]), losses)
        hyper = {
            s.experiment.name: adam_hyper(
                s.experiment.algo, versions[s.experiment.name], s.experiment.steps
            )
            for s, _ in present
        }
        taken = self.engine.optim_step(hyper)
        start = 0
        for share, batch in present:
            name = share.experiment.name
            rows = slice(start, start + len(batch.items))
            start = rows.stop
            if first:  # later minibatches are of a policy that has moved
                metrics[name] |= _mismatch(batch, outputs.items, rows)
            metrics[name] |= outputs.metrics[name]
            metrics[name] |= {
                "grad_norm": taken[name].grad_norm,
                "optimizer_step": taken[name].step,
                "lr": hyper[name].lr,
            }

    def _with_policies(self, share: _Share, batch: Batch) -> Batch:
        """The batch with the log-probabilities that its loss needs besides the current ones.

        With one optimizer step a batch, the proximal policy is the current one: the loss takes
        it from the pass it differentiates, at no cost.
        """
        algo, items = share.experiment.algo, batch.items
        if algo.ppo_n_minibatches > 1 and algo.needs_proximal:
            items = replace(items, proximal=self.engine.logprobs(batch, "current").logprobs)
        if algo.kl_ctl > 0:
            items = replace(items, reference=self.engine.logprobs(batch, "reference").logprobs)
        return replace(batch, items=items)


def _share(experiment: Experiment, groups: Sequence[Group]) -> _Share:
    kept = [tuple(r for r in g.rollouts if r.trainable) for g in groups]
    rewards = np.array([r.reward for group in kept for r in group], dtype=np.float32)
    counts = [len(group) for group in kept]
    values = advantages(experiment.algo, rewards, np.repeat(np.arange(len(kept)), counts))
    split = np.split(values, np.cumsum(counts)[:-1])
    return _Share(
        experiment=experiment, groups=groups, rollouts=tuple(kept), advantages=tuple(split)
    )


def _rollout_metrics(share: _Share, versions: Mapping[str, int]) -> dict[str, float]:
    rollouts = [r for group in share.groups for r in group.rollouts]
    kept = [r for group in share.rollouts for r in group]
    turns = [t for r in kept for t in r.turns]
    rewards = np.array([r.reward for r in kept], dtype=np.float64)
    flat = [len({r.reward for r in group}) <= 1 for group in share.rollouts]
    now = versions[share.experiment.name]
    staleness = [now - group.min_version for group in share.groups]
    found = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "flat_groups": float(np.mean(flat)),
        "failed_rollouts": float(sum(r.error is not None for r in rollouts)),
        "generated_tokens": float(sum(len(t.completion.tokens) for r in rollouts for t in r.turns)),
        "trained_tokens": float(sum(len(t.completion.tokens) for t in turns)),
        "completion_tokens_mean": float(np.mean([len(t.completion.tokens) for t in turns])),
        "turns_mean": float(np.mean([len(r.turns) for r in kept])),
        "truncated": float(np.mean([t.completion.finish_reason == "length" for t in turns])),
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(max(staleness)),
    }
    tokens: Counter[int] = Counter()
    for turn in turns:
        for version, count in turn.completion.versions:
            tokens[now - version] += count
    for stale, count in sorted(tokens.items()):
        found[f"staleness/{stale}"] = float(count)  # trained tokens
    names = sorted({name for r in kept for name in r.metrics})
    for name in names:
        found[f"reward/{name}"] = float(np.mean([r.metrics.get(name, 0.0) for r in kept]))
    return found


def _mismatch(batch: Batch, outputs: ItemOutputs, rows: slice) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's, before the update."""
    log_ratio = outputs.logprobs[rows] - batch.items.behaviour
    return {
        "kl_sampler": float(np.mean(np.expm1(log_ratio) - log_ratio)),
        "ratio_max": float(np.exp(np.abs(log_ratio).max())),
        "ratio_mean": float(np.exp(log_ratio).mean()),
        "ratio_p05": float(np.exp(np.quantile(log_ratio, 0.05))),
        "ratio_p95": float(np.exp(np.quantile(log_ratio, 0.95))),
        "entropy": float(outputs.entropy[rows].mean()),
    }
