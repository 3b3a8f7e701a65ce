"""Reinforcement learning of one adapter: rollouts, rewards, credit, held-out scores.

Consumes batches of groups of its collector; produces works with advantages as a stream; waits for
a batch. After each step it evaluates where that is due, then lets new rollouts start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.loss import item_weights
from lorelei.config.experiment import Experiment
from lorelei.jobs.evaluation import EvaluationLog, due
from lorelei.jobs.job import OfExperiment, step_metrics
from lorelei.publish.canary import Watched
from lorelei.rollout.collector import Collector, RolloutsFail, Unfit
from lorelei.rollout.evaluate import Evaluator
from lorelei.store.run import RunStore
from lorelei.train.batch import rollout_batch
from lorelei.train.work import Result, Round, RoundResult, Work
from lorelei.types import AdapterRef, Batch, Group, Rollout


@dataclass(slots=True, kw_only=True, eq=False)
class RlJob(OfExperiment):
    """Implements Job."""

    algo: PolicyAlgorithm
    collector: Collector
    evaluator: Evaluator | None  # None: no problems are held out
    evaluations: EvaluationLog
    watched: Watched | None
    store: RunStore
    version: int = 0
    reward: float | None = None  # of the last batch; None: nothing is scored
    _partly_failed: int = 0  # groups, since the last warning of them
    _warn_at: int = 1

    @property
    def done(self) -> bool:
        return self.version >= self.experiment.steps

    async def begin(self, ref: AdapterRef) -> None:
        # a job of this name may have been in the run before, and was removed
        spool = self.collector.spool
        spool.remove(self.name, spool.read(self.name))
        if self.evaluator is not None:
            await self._evaluate(self.evaluator, ref)

    async def work(self) -> Work:
        groups = await self.collector.batch()
        return policy_work(self.experiment, self.algo, groups, self.version)

    async def tell(self, result: Result, ref: AdapterRef | None) -> Mapping[str, Any]:
        assert ref is not None, "every step is published"
        groups = self.collector.taken
        metrics = _rollout_metrics(groups, self.version) | _train_metrics(result)
        stale = self.collector.errors["stale"]
        errors = dict(self.collector.errors)
        self.reward, self.version = metrics.get("reward"), ref.version
        self.collector.trained()
        self.collector.errors.clear()
        partly_failed, self.collector.partly_failed = self.collector.partly_failed, 0
        self._warn_of_bias(partly_failed, errors)
        metrics |= _dropped_metrics(self.collector.dropped, groups)
        lines = _lines(groups, self.version)
        for why, group in self.collector.dropped:
            lines += [{**line, "dropped": why} for line in _lines([group], self.version)]
        self.store.append_rollouts(lines)
        self.collector.dropped.clear()
        steps, every = self.experiment.steps, self.experiment.eval.every
        if self.evaluator is not None and due(self.version, every, steps):
            await self._evaluate(self.evaluator, ref)
        return {
            "step": self.version,
            **metrics,
            "dropped_stale": stale / (stale + len(groups)),
            "partly_failed_groups": partly_failed,
            "errors": errors,
        }

    async def admit(self, ref: AdapterRef | None) -> None:
        assert ref is not None, "every step is published"
        replaced = self.collector.policy.ref
        self.collector.admit(ref)
        # requests go on behind the tokens they have, see rollout.sampler
        if replaced is not None and self.collector.policy.interruptible:
            await self.collector.engine.abort(replaced)

    def saved(self) -> None:
        self.collector.forget_trained()

    def state(self) -> Mapping[str, Any]:
        return {
            "next_index": self.collector.next_index,
            "pending": self.collector.pending(),
            "reward": self.reward,
            "score": self.evaluations.score,
        }

    def restore(self, version: int, state: Mapping[str, Any]) -> None:
        self.version, self.reward = version, state["reward"]
        self.evaluations.score = state["score"]
        self.collector.restore(version, state["next_index"], state["pending"])

    async def close(self) -> None:
        await self.collector.close()

    def _warn_of_bias(self, partly_failed: int, errors: Mapping[str, int]) -> None:
        """A reward that fails on some answers to a prompt trains on the others alone.

        The first such group is told, then twice as many each time.
        """
        self._partly_failed += partly_failed
        if self._partly_failed < self._warn_at:
            return
        often = ", ".join(f"{kind}: {count}" for kind, count in Counter(errors).most_common(3))
        self.evaluations.console.warn(
            f"adapter {self.name}: in {self._partly_failed} groups some rollouts have no reward "
            f"and others of the same prompt do ({often}); if it is the wrong answers that fail, "
            "training is biased: let the reward return a number for them"
        )
        self._partly_failed, self._warn_at = 0, 2 * self._warn_at

    async def _evaluate(self, evaluator: Evaluator, ref: AdapterRef) -> None:
        scores = await evaluator.run(ref)
        if ref.version == 0 and len(scores.errors) == scores.n:
            raise RolloutsFail(
                f"adapter {self.name}: none of {scores.n} held-out problems could be scored; the "
                f"first one: {scores.errors[0]}"
            )
        self.evaluations.add(ref.version, scores)


def policy_work(
    e: Experiment, algo: PolicyAlgorithm, groups: Sequence[Group], version: int
) -> Work:
    """A batch of groups as rounds, one for each minibatch, all of which step at one rate.

    version: of the adapter before them. Rollouts that failed are left out.
    """
    longest = e.rollout.max_new_tokens
    kept = algo.penalised(_trainable(groups), longest)
    credit = algo.credit(kept)
    size = algo.batch_size // algo.ppo_n_minibatches
    rounds: list[Round] = []
    for first in range(0, len(kept), size):
        part = slice(first, first + size)
        streams = {"advantage": credit[part]}
        batch = rollout_batch(e.name, kept[part], streams, e.rollout.temperature)
        # normalised over one optimizer step
        length = algo.loss_length or longest
        weights = item_weights(batch.items.sequence, algo.loss_aggregation, length)
        batch = replace(batch, items=replace(batch.items, weight=weights))
        step = e.optimizer.at(version, e.steps)
        rounds.append(Round(batch=batch, loss=algo.loss(), step=step))
    groups_S = np.repeat(np.arange(len(kept)), [len(group) for group in kept])
    late = algo.credit_reads_policies
    return Work(
        adapter=e.name,
        rounds=tuple(rounds),
        policies=algo.policies,
        advantages=(lambda items: algo.with_policies(items, groups_S)) if late else None,
        last=version + 1 >= e.steps,
    )


def _trainable(groups: Sequence[Group]) -> list[list[Rollout]]:
    return [[r for r in group.rollouts if r.trainable] for group in groups]


def _rollout_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """version: of the adapter before the step."""
    rollouts = [r for group in groups for r in group.rollouts]
    by_group = _trainable(groups)
    kept = [r for group in by_group for r in group]
    turns = [t for r in kept for t in r.turns]
    staleness = [version - group.min_version for group in groups]
    found = {
        **_reward_metrics(by_group),
        "failed_rollouts": float(sum(r.error is not None for r in rollouts)),
        "generated_tokens": float(sum(r.sampled_tokens for r in rollouts)),
        "trained_tokens": float(sum(r.sampled_tokens for r in kept)),
        "completion_tokens_mean": float(np.mean([len(t.completion.tokens) for t in turns])),
        "turns_mean": float(np.mean([len(r.turns) for r in kept])),
        "truncated": float(np.mean([t.completion.finish_reason == "length" for t in turns])),
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(max(staleness)),
    }
    if baselines := [r.baseline for r in kept if r.baseline is not None]:
        found["reward_baseline"] = float(np.mean(baselines))
    tokens: Counter[int] = Counter()
    for turn in turns:
        for sampled, count in turn.completion.versions:
            tokens[version - sampled] += count
    for stale, count in sorted(tokens.items()):
        found[f"staleness/{stale}"] = float(count)  # trained tokens
    for name in sorted({name for r in kept for name in r.metrics}):
        found[f"reward/{name}"] = float(np.mean([r.metrics.get(name, 0.0) for r in kept]))
    return found


def _reward_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Of rollouts that were scored; nothing where none was."""
    scored = [[r.reward for r in group if r.reward is not None] for group in groups]
    rewards = np.array([reward for own in scored for reward in own], dtype=np.float64)
    if not len(rewards):
        return {}
    flat = [len(set(own)) <= 1 for own in scored]
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "flat_groups": float(np.mean(flat)),
    }


def _dropped_metrics(
    dropped: Sequence[tuple[Unfit, Group]], trained: Sequence[Group]
) -> dict[str, float]:
    """What was sampled and not trained on, and the mean reward of all that was sampled."""
    rollouts = [r for _, group in dropped for r in group.rollouts]
    sampled = [*rollouts, *(r for group in trained for r in group.rollouts)]
    rewards = [r.reward for r in sampled if r.reward is not None]
    reasons = Counter(why for why, _ in dropped)
    return {
        "dropped_groups": float(len(dropped)),
        **{f"dropped_groups/{why}": float(reasons[why]) for why in get_args(Unfit)},
        "dropped_rollouts": float(len(rollouts)),
        "dropped_tokens": float(sum(r.sampled_tokens for r in rollouts)),
        **({"reward_sampled": float(np.mean(rewards))} if rewards else {}),
    }


def _train_metrics(result: Result) -> dict[str, float]:
    # later rounds: the policy has moved
    metrics = _mismatch(result.work.rounds[0].batch, result.rounds[0])
    for one in result.rounds:
        metrics |= one.metrics
    return metrics | step_metrics(result)


def _mismatch(batch: Batch, result: RoundResult) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's, before the update."""
    log_ratio = result.outputs.logprobs - batch.items.streams["behaviour"]
    return {
        "kl_sampler": float(np.mean(np.expm1(log_ratio) - log_ratio)),
        "ratio_max": float(np.exp(np.abs(log_ratio).max())),
        "ratio_mean": float(np.exp(log_ratio).mean()),
        "ratio_p05": float(np.exp(np.quantile(log_ratio, 0.05))),
        "ratio_p95": float(np.exp(np.quantile(log_ratio, 0.95))),
        "entropy": float(result.outputs.entropy.mean()),
    }


def _lines(groups: Sequence[Group], step: int) -> list[dict[str, Any]]:
    """What rollouts.jsonl says of a step."""
    return [
        {
            "step": step,
            "adapter": group.adapter,
            "prompt_id": group.prompt.id,
            "sample": rollout.sample,
            "reward": rollout.reward,
            "error": rollout.error,
            "version": group.min_version,
            "finish_reason": rollout.turns[-1].completion.finish_reason if rollout.turns else None,
            "prompt": group.prompt.messages[-1]["content"],
            "completion": "\n".join(turn.text for turn in rollout.turns),
            "metrics": dict(rollout.metrics),
        }
        for group in groups
        for rollout in group.rollouts
    ]
