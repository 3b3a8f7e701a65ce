"""Held-out evaluations of one adapter, as jobs record them."""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.obs.console import Console
from lorelei.rollout.evaluate import Scores
from lorelei.store.run import RunStore

# which of an evaluation's means stands for it; the first that is there
HEADLINES = ("strict", "reward", "accuracy", "loss")


@dataclass(slots=True, kw_only=True, eq=False)
class EvaluationLog:
    """Where the evaluations of an adapter go: the log, the console and the job's state."""

    adapter: str
    store: RunStore
    console: Console
    score: float | None = None  # of the last one, its headline

    def add(self, step: int, scores: Scores) -> None:
        """Record an evaluation after a step."""
        self.score = next(scores.means[name] for name in HEADLINES if name in scores.means)
        self.store.append_metrics(
            {
                "kind": "eval",
                "step": step,
                "adapter": self.adapter,
                "scores": dict(scores.means),
                "n": scores.n,
                "errors": len(scores.errors),
                "seconds": scores.seconds,
            }
        )
        if scores.errors:
            self.console.warn(
                f"{len(scores.errors)} of {scores.n} held-out problems were not scored: "
                f"{scores.errors[0]}"
            )
        self.console.evaluated(self.adapter, step, scores.means)


def due(step: int, every: int, steps: int) -> bool:
    """Whether an evaluation is due after a step of `steps`; every 0: at the end only."""
    return step % max(every, 1) == 0 or step == steps
