"""Learning curves: the held-out score of several runs of one recipe in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorelei.obs.figure import COLOURS, GREY, fit_y, label_ends, new_figure, room_x, titles
from lorelei.obs.history import read_metrics
from lorelei.obs.report import run_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[int, float]  # held-out score by step


def render_curves(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Draw the held-out score of each run thin and their mean thick, as PNG of 1000x420 pixels.

    The score is 'strict' where there is one; a run with several adapters counts with their mean.
    The mean covers the steps that every run evaluated. Raises ValueError when a run has no
    evaluation, naming it.
    """
    score = read_metrics(runs[0] / "metrics.jsonl").score_names[:1] if runs else ()
    if not score:
        raise ValueError("runs: the first one has no evaluation; name runs that were evaluated")
    curves = [_curve(run, score[0]) for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not common:
        raise ValueError("runs: no step was evaluated in all of them; draw them one by one")
    mean = {step: float(np.mean([curve[step] for curve in curves])) for step in common}
    subtitle = f"held-out score ({score[0]})"
    if len(runs) > 1:
        subtitle += f", {len(runs)} runs thin, their mean thick"
    with new_figure(1000, 420, out) as figure:
        titles(figure, title, subtitle)
        _draw(
            figure.add_axes((0.06, 0.135, 0.92, 0.64)), [_label(run) for run in runs], curves, mean
        )
    return out


def _draw(axes: Axes, names: Sequence[str], curves: Sequence[Curve], mean: Curve) -> None:
    ends = []
    for name, curve in zip(names, curves, strict=True):
        axes.plot(list(curve), list(curve.values()), color=COLOURS[5], lw=1.1)
        value = curve[max(curve)]
        ends.append((value, f"{value:.2f} {name}", GREY, "normal"))
    axes.plot(list(mean), list(mean.values()), color=COLOURS[0], lw=3, marker="o", ms=6)
    start, now = mean[min(mean)], mean[max(mean)]
    if len(curves) == 1:
        ends = [(now, f"{now:.2f}", COLOURS[0], "bold")]
    else:
        ends.append((now, f"{now:.2f} mean", COLOURS[0], "bold"))
    axes.set_xlabel("step")
    fit_y(axes, [value for curve in curves for value in curve.values()], at_least=0.2)
    begin, end = min(map(min, curves)), max(map(max, curves))
    room_x(axes, begin, end, max(len(label) for _, label, _, _ in ends))
    label_ends(axes, min(mean), [(start, f"{start:.2f}", COLOURS[0], "bold")], "left")
    label_ends(axes, end, ends, "right")


def _label(run: Path) -> str:
    seed = run_config(run).get("seed")
    return run.resolve().name if seed is None else f"seed {seed}"


def _curve(run: Path, score: str) -> Curve:
    history = read_metrics(run / "metrics.jsonl")
    at: dict[int, list[float]] = {}
    for records in history.evals.values():
        for record in records:
            if score in record.scores:
                at.setdefault(record.step, []).append(record.scores[score])
    if not at:
        raise ValueError(f"{run}: no evaluation has the score {score!r}; leave this run out")
    return {step: float(np.mean(values)) for step, values in sorted(at.items())}
