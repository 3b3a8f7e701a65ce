"""Progress of one adapter through its run, and the words that say it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan, nan

from lorelei.obs.records import StepRecord

_WINDOW = 20  # steps behind the ETA: long enough to even out evaluations and checkpoints


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a display remembers of one adapter."""

    total: int
    record: StepRecord | None = None
    first: dict[str, float] = field(default_factory=dict[str, float])  # held-out, at the start
    last: dict[str, float] = field(default_factory=dict[str, float])  # held-out, newest
    evaluations: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def step(self) -> int:
        """Steps done."""
        return self.record.step if self.record else 0

    def counted(self, step: int) -> str:
        """A step of all that are planned, where they are."""
        return f"{step}/{self.total}" if self.total else str(step)

    def stepped(self, record: StepRecord) -> None:
        """Take in a committed step."""
        self.record = record
        self.errors.update(error_counts(record))
        self.marks.append((time.time() if isnan(record.time) else record.time, record.step))

    def evaluated(self, scores: Mapping[str, float]) -> None:
        """Take in a held-out evaluation; the first value of each score is its start."""
        self.evaluations += 1
        self.first = {**scores, **self.first}
        self.last = {**self.last, **scores}

    def seconds_left(self) -> float:
        """By the pace of the recent steps, evaluations between them included; NaN: unknown."""
        if self.record is None:
            return nan
        pace = self.record.step_seconds
        if len(self.marks) > 1:
            (then, first), (now, last) = self.marks[0], self.marks[-1]
            pace = (now - then) / max(1, last - first)
        return pace * max(0, self.total - self.step)


def error_counts(record: StepRecord) -> dict[str, int]:
    """Errors by reason; failed rollouts that no reason explains count as 'failed'."""
    unexplained = record.failed_rollouts - sum(record.errors.values())
    return {**record.errors, **({"failed": unexplained} if unexplained > 0 else {})}


def step_words(name: str, progress: Progress) -> list[str]:
    """One step in words, the most important first, so that a narrow terminal can cut the rest."""
    r = progress.record
    assert r is not None
    errors = error_counts(r)
    gen, train = rate(r.generated_tokens, r), rate(r.trained_tokens, r)
    words = [
        f"step {progress.counted(r.step)}",
        name,
        _value("reward", r.reward, ".3f") + _value(" +-", r.reward_std, ".2f", space=""),
        _value("to teacher", r.kl_teacher, ".3f"),
        f"errors {counted(errors)}" if errors else "",
        "" if isnan(r.step_seconds) else f"{r.step_seconds:.1f}s",
        f"eta {clock(progress.seconds_left())}",
        _value("kl", r.kl_sampler, ".1e"),
        _value("ratio", r.ratio_max, ".3f"),
        _value("stale", r.staleness_mean, ".1f") + _value("/", r.staleness_max, ".0f", space=""),
        "" if isnan(gen) else f"gen {short(gen)} tok/s",
        "" if isnan(train) else f"train {short(train)} tok/s",
        _value("idle train", r.trainer_idle, ".0%") + _value(" gen", r.rollout_idle, ".0%"),
        _value("len", r.completion_tokens_mean, ".1f"),
        _value("cut", r.truncated, ".0%"),
        _value("grad", r.grad_norm, ".3f"),
        _value("loss", r.loss, ".4f"),
    ]
    return [word for word in words if word]


def eval_words(name: str, step: int, progress: Progress) -> list[str]:
    """One evaluation in words: every score, at the start and now."""
    scores = (
        f"{score} {value:.3f}"
        if progress.evaluations == 1
        else f"{score} {progress.first[score]:.3f} -> {value:.3f}"
        for score, value in progress.last.items()
    )
    return [f"eval step {step}", name, *scores]


def rate(tokens: float, record: StepRecord) -> float:
    """Tokens a second of wall-clock time of the whole step: phases may overlap."""
    return tokens / record.step_seconds if record.step_seconds > 0 else nan


def counted(errors: Mapping[str, int]) -> str:
    """Errors as 'timeout=2 failed=1', or '-'."""
    return " ".join(f"{reason}={n}" for reason, n in sorted(errors.items())) or "-"


def short(number: float) -> str:
    """A count in at most four characters: 7.2, 412, 3.4k, 56k, 1.2M; '-' for NaN."""
    if isnan(number):
        return "-"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            number = number / size
            return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def clock(seconds: float) -> str:
    """A time as 8s, 12:03, 1:02:03 or 2d 3h; '-' for NaN."""
    if isnan(seconds):
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}:{m:02}:{s:02}"
    return f"{m}:{s:02}" if m else f"{s}s"


def _value(label: str, value: float, spec: str = "g", space: str = " ") -> str:
    return "" if isnan(value) else f"{label}{space}{value:{spec}}"
