"""The report of a run: one picture of scores, rewards, distances and times."""
# pyright: reportUnknownMemberType=false
# matplotlib's methods take **kwargs without types

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import floor, isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorelei.obs.figure import (
    COLOURS,
    GREY,
    SHADES,
    Label,
    fit_y,
    label_ends,
    new_figure,
    room_x,
    smoothed,
    titles,
    whole_steps,
)
from lorelei.obs.history import History, read_metrics
from lorelei.obs.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # of the first, second and third score
_FEW = 4  # with more adapters only the first score is drawn, and raw values fade


def render_report(run_folder: Path, out: Path) -> Path:
    """Draw metrics.jsonl of a run as a PNG of 1200x800 pixels and return its path.

    Above: held-out scores and training reward. Below: distance of sampler and trainer, gradient
    norm, completion length, seconds of a step by phase (mean over adapters).
    Raises ValueError when the folder holds no steps and no evaluations.
    """
    history = read_metrics(run_folder / "metrics.jsonl")
    if not history.adapters:
        raise ValueError(f"{run_folder}: metrics.jsonl holds no step yet; wait for the first one")
    with new_figure(1200, 800, out) as figure:
        titles(figure, run_folder.resolve().name, _subtitle(run_folder, history))
        top = figure.add_gridspec(
            1, 2, left=0.055, right=0.975, top=0.86, bottom=0.46, width_ratios=(5, 4), wspace=0.15
        )
        _held_out(figure.add_subplot(top[0]), history)
        _rewards(figure.add_subplot(top[1]), history)
        low = figure.add_gridspec(
            1, 4, left=0.055, right=0.975, top=0.345, bottom=0.07, wspace=0.28
        )
        panels = [figure.add_subplot(low[i]) for i in range(4)]
        _small(panels[0], history, "KL sampler to trainer", lambda r: r.kl_sampler)
        _small(panels[1], history, "Gradient norm", lambda r: r.grad_norm)
        _small(panels[2], history, "Completion length, tokens", lambda r: r.completion_tokens_mean)
        _seconds(panels[3], history)
    return out


def run_config(run_folder: Path) -> dict[str, Any]:
    """`config` of run.json, empty when the run has none."""
    path = run_folder / "run.json"
    return json.loads(path.read_bytes()).get("config", {}) if path.is_file() else {}


def _subtitle(run_folder: Path, history: History) -> str:
    config = run_config(run_folder)
    lora: dict[str, Any] = config.get("lora") or {}
    algo: dict[str, Any] = config.get("algo") or {}
    rank, kind = lora.get("lora_rank"), algo.get("kind")
    steps = max((r.step for rs in history.steps.values() for r in rs[-1:]), default=0)
    words = [
        str(config.get("model", "")),
        f"LoRA rank {rank}" if rank else "",
        str(kind or "").rpartition(":")[2],  # of a user's class without its file's folders
        f"{steps} steps" if steps != 1 else "1 step",
        f"{len(history.adapters)} adapters" if len(history.adapters) > 1 else "",
        _idle(history),
    ]
    return "  ·  ".join(word for word in words if word)


def _idle(history: History) -> str:
    """How much of their time the two engines wait, over the whole run."""
    records = [r for rs in history.steps.values() for r in rs if isfinite(r.rollout_idle)]
    if not records:
        return ""
    trainer, rollout = (
        sum(getattr(r, name) for r in records) / len(records)
        for name in ("trainer_idle", "rollout_idle")
    )
    return f"idle: trainer {trainer:.0%}, rollouts {rollout:.0%}"


def _colour(history: History, adapter: str) -> str:
    return COLOURS[history.adapters.index(adapter) % len(COLOURS)]


def _held_out(axes: Axes, history: History) -> None:
    several = len(history.adapters) > 1
    scores = history.score_names[: 3 if len(history.adapters) <= _FEW else 1]
    axes.set_title("Held-out score" + (f", {scores[0]}" if len(scores) == 1 else ""))
    axes.set_xlabel("step")
    first: list[tuple[float, Label]] = []
    last: list[tuple[float, Label]] = []
    values: list[float] = []
    for score, dash in zip(scores, _DASHES, strict=False):
        for adapter, records in history.evals.items():
            points = [(r.step, r.scores[score]) for r in records if score in r.scores]
            if not points:
                continue
            colour = _colour(history, adapter)
            x, y = zip(*points, strict=True)
            fill = colour if dash == "-" else "white"
            axes.plot(x, y, color=colour, ls=dash, lw=2, marker="o", ms=5, mfc=fill, clip_on=False)
            values += y
            first.append((x[0], (y[0], f"{y[0]:.2f}", colour, "normal")))
            name = (adapter if dash == "-" else "") if several else score
            weight = "bold" if dash == "-" else "normal"
            last.append((x[-1], (y[-1], f"{y[-1]:.2f} {name}".rstrip(), colour, weight)))
    if not values:
        _empty(axes, "no evaluation yet")
        return
    fit_y(axes, values, at_least=0.2)
    begin, end = min(x for x, _ in first), max(x for x, _ in last)
    room_x(axes, begin, end, max(len(label[1]) for _, label in last))
    label_ends(axes, begin, [label for _, label in first], "left")
    label_ends(axes, end, [label for _, label in last], "right")
    if several and len(scores) > 1:
        _score_legend(axes, scores)


def _score_legend(axes: Axes, scores: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=GREY, ls=dash, marker="o", ms=5, mfc=GREY if dash == "-" else "white")
        for _, dash in zip(scores, _DASHES, strict=False)
    ]
    axes.legend(lines, scores, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0)


def _rewards(axes: Axes, history: History) -> None:
    taught = not any(isfinite(r.reward) for rs in history.steps.values() for r in rs)
    taught &= any(isfinite(r.kl_teacher) for rs in history.steps.values() for r in rs)
    axes.set_title("KL student to teacher" if taught else "Training reward")
    axes.set_xlabel("step")
    values = _curves(axes, history, lambda r: r.kl_teacher if taught else r.reward)
    if values:
        fit_y(axes, values, at_least=0.1)


def _small(axes: Axes, history: History, title: str, value: Callable[[StepRecord], float]) -> None:
    seen = [value(r) for rs in history.steps.values() for r in rs if isfinite(value(r))]
    largest = max(map(abs, seen), default=0.0)
    power = floor(log10(largest)) if 0 < largest < 1e-2 else 0
    axes.set_title(title + (rf", $10^{{{power}}}$" if power else ""))
    _curves(axes, history, lambda r: value(r) / 10**power)
    if seen and min(seen) > 0 and largest > 30 * float(np.median(seen)):
        axes.set_yscale("log")  # a spike must not press everything else flat
    elif seen:
        axes.locator_params(axis="y", nbins=5)


def _curves(axes: Axes, history: History, value: Callable[[StepRecord], float]) -> list[float]:
    """Every adapter's raw values thin, smoothed ones thick; returns the raw ones."""
    seen: list[float] = []
    for adapter, records in history.steps.items():
        points = [(r.step, value(r)) for r in records if isfinite(value(r))]
        if not points:
            continue
        x, y = np.array(points, dtype=np.float64).T
        colour = _colour(history, adapter)
        axes.plot(x, y, color=colour, lw=0.8, alpha=0.35 if len(history.adapters) <= _FEW else 0.15)
        axes.plot(x, smoothed(y), color=colour, lw=2, marker="o" if len(x) == 1 else "")
        seen += y.tolist()
    if not seen:
        _empty(axes, "not recorded")
        return seen
    axes.margins(x=0.01)
    whole_steps(axes)
    return seen


def _seconds(axes: Axes, history: History) -> None:
    axes.set_title("Seconds of a step")
    at: dict[int, list[StepRecord]] = {}
    for records in history.steps.values():
        for record in records:
            if isfinite(record.step_seconds):
                at.setdefault(record.step, []).append(record)
    steps = sorted(at)
    named = dict.fromkeys(p for rs in at.values() for r in rs for p in r.seconds if p != "step")
    if len(steps) < 2:
        _empty(axes, "shown from two steps on" if steps else "not recorded")
        return
    layers = {
        phase: np.array([float(np.mean([r.seconds.get(phase, 0.0) for r in at[s]])) for s in steps])
        for phase in named
    }
    whole = np.array([float(np.mean([r.step_seconds for r in at[s]])) for s in steps])
    # Phases that overlap (asynchronous runs) leave nothing over.
    layers["other"] = np.clip(whole - sum(layers.values(), np.zeros(len(steps))), 0.0, None)
    # What takes under a hundredth of the time is not visible, and its name only fills the legend.
    shown = {p: smoothed(v) for p, v in layers.items() if v.sum() > 0.01 * whole.sum()}
    axes.stackplot(steps, *shown.values(), labels=list(shown), colors=SHADES, lw=0)
    axes.margins(x=0.01)
    whole_steps(axes)
    axes.set_ylim(0, 1.45 * float(sum(shown.values(), np.zeros(len(steps))).max()))
    axes.legend(
        loc="upper left", ncols=2, fontsize=9, handlelength=0.8, columnspacing=1, borderpad=0
    )


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
