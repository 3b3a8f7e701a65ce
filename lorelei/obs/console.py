"""The console: progress of a training run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorelei.obs.history import History
from lorelei.obs.progress import Progress, clock, counted, eval_words, rate, short, step_words
from lorelei.obs.records import step_record
from lorelei.obs.screen import fitting, open_screen


class Console:
    """Tells a person how a run goes: one line a step, and a live table on a terminal.

    Text from outside (errors, notes) is escaped. `close` is idempotent.
    """

    def __init__(self, total_steps: Mapping[str, int], stream: TextIO | None = None) -> None:
        """total_steps: planned steps by adapter. stream: stdout when None."""
        self._progress = {name: Progress(total=total) for name, total in total_steps.items()}
        self._screen = open_screen(sys.stdout if stream is None else stream)
        self._began = time.monotonic()

    def started(self, lines: Iterable[str]) -> None:
        """Say what is about to run, and show the live table from now on."""
        for line in lines:
            self._screen.line([line], style="bold")
        self._refresh()

    def resumed(self, history: History) -> None:
        """Take the held-out scores and the last steps of a run that goes on, silently."""
        for name, progress in self._progress.items():
            for score in history.evals.get(name, ()):
                progress.evaluated(score.scores)
            for record in history.steps.get(name, ())[-1:]:
                progress.record = record

    def step(self, record: Mapping[str, Any]) -> None:
        """A committed step: the object that goes to metrics.jsonl."""
        parsed = step_record(record)
        progress = self._of(parsed.adapter)
        progress.stepped(parsed)
        self._screen.line(step_words(parsed.adapter, progress))
        self._refresh()

    def evaluated(self, adapter: str, step: int, scores: Mapping[str, float]) -> None:
        """A held-out evaluation."""
        progress = self._of(adapter)
        progress.evaluated(scores)
        self._screen.line(eval_words(adapter, step, progress), style="bold cyan")
        self._refresh()

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._screen.line([text], style="dim")

    def warn(self, text: str) -> None:
        """Something a person should look at."""
        self._screen.line([f"warning: {text}"], style="yellow")

    def page(self, lines: Iterable[str]) -> None:
        """Why the run stops, at length."""
        for line in lines:
            self._screen.line([line], style="red")

    def finished(self, lines: Iterable[str]) -> None:
        """Freeze the live table and print the closing lines below it."""
        self.close()
        for line in lines:
            self._screen.line([line], style="bold")

    def close(self) -> None:
        """Give the terminal back."""
        self._screen.close()

    def _of(self, adapter: str) -> Progress:
        """Of one that was there from the start, or was added while the run goes on."""
        return self._progress.setdefault(adapter, Progress(total=0))

    def _refresh(self) -> None:
        progresses = tuple(self._progress.values())
        left = [p.seconds_left() for p in progresses if p.step < p.total]
        footer = _Footer(
            done=sum(p.step for p in progresses),
            total=sum(p.total for p in progresses),
            began=self._began,
            # The adapter that needs longest decides; one without a pace leaves it unknown.
            ends=nan if any(map(isnan, left)) else time.monotonic() + max(left, default=0.0),
        )
        self._screen.show(Group(_AdapterTable(columns=_columns(self._progress)), footer))


def _columns(progress: Mapping[str, Progress]) -> tuple[tuple[str, ...], ...]:
    """Columns of the live table, header first, the most important column first."""
    scores = tuple(dict.fromkeys(n for p in progress.values() for n in p.last))
    rows = [_row(name, p, scores) for name, p in progress.items()]
    header = ("adapter", "step", "reward", *scores, "errors", "KL", "ratio", "stale", "tok/s g/t")
    columns = zip(header, *rows, strict=True)
    return tuple(c for c in columns if c[0] != "errors" or set(c[1:]) != {"-"})


def _row(name: str, p: Progress, scores: Sequence[str]) -> tuple[str, ...]:
    held_out = (f"{p.first[s]:.2f}→{p.last[s]:.2f}" if s in p.last else "-" for s in scores)
    r = p.record
    if r is None:
        return (name, f"0/{p.total}", "-", *held_out, counted(p.errors), "-", "-", "-", "-")
    return (
        name,
        p.counted(r.step),
        _or_dash(r.reward, ".3f"),
        *held_out,
        counted(p.errors),
        _or_dash(r.kl_sampler, ".0e"),
        _or_dash(r.ratio_max, ".2f"),
        f"{_or_dash(r.staleness_mean, '.1f')}/{_or_dash(r.staleness_max, '.0f')}",
        f"{short(rate(r.generated_tokens, r))}/{short(rate(r.trained_tokens, r))}",
    )


def _or_dash(value: float, spec: str) -> str:
    return "-" if isnan(value) else f"{value:{spec}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _AdapterTable:
    """The columns that fit the terminal; rich would squeeze all of them instead."""

    columns: tuple[tuple[str, ...], ...]

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        widest = [max(column, key=len) for column in self.columns]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        shown = self.columns[: fitting(widest, options.max_width)]
        for column in shown:
            left = column[0] in ("adapter", "errors")
            table.add_column(Text(column[0]), justify="left" if left else "right", no_wrap=True)
        for row in zip(*(column[1:] for column in shown), strict=True):
            table.add_row(*map(Text, row))  # Text: a name is never read as markup
        yield table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Footer:
    """Bar and clocks; drawn every second from values that do not change, by rich's thread."""

    done: int
    total: int
    began: float
    ends: float  # NaN: unknown

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        now = time.monotonic()
        left = nan if isnan(self.ends) else max(0.0, self.ends - now)
        words = f"{self.done}/{self.total} steps  {clock(now - self.began)} gone"
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(
            ProgressBar(total=max(1, self.total), completed=self.done, width=24),
            Text(f"{words}  {clock(left)} left"),
        )
        yield grid
