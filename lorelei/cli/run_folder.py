"""check, runs, samples and report: commands that read run folders, without torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorelei.cli.arguments import Json, RunFolder, find_run, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from lorelei.store.index import RunSummary


def check(run: RunFolder) -> None:
    """Verify a run folder: checksums, manifests, versions and logs. Exit code 1: a problem."""
    from lorelei.store.check import check_run

    problems = check_run(find_run(run))
    for problem in problems:
        say(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo("no problems")


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the run folders are.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder."""
    from lorelei.store.index import list_runs

    if not folder.is_dir():
        raise ValueError(f"runs: there is no folder {str(folder)!r}; give the one with the runs")
    found = list_runs(folder)
    show([asdict(run) for run in found], as_json, lambda: _table(found))


def samples(
    run: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 5,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Default: all.")] = None,
    order: Annotated[str, typer.Option(help="worst, best or random.")] = "random",
    step: Annotated[int | None, typer.Option(help="Of this step only.")] = None,
) -> None:
    """Read rollouts of a run: prompt, completion, reward."""
    from lorelei.obs.samples import format_samples

    if order not in ("worst", "best", "random"):
        raise ValueError(f"--order: {order!r} is not one of worst, best, random")
    path = find_run(run) / "rollouts.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    every = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # the last may be half written
    records = [record for record in every if step in (None, record["step"])]
    if every and not records:
        raise ValueError(f"--step: no rollouts of step {step}; there are 1 to {every[-1]['step']}")
    say(format_samples(records, n, adapter=adapter, order=order))


def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/report.png.")] = None,
) -> None:
    """Draw a run: held-out score, reward, mismatch, lengths, seconds."""
    from lorelei.obs.report import render_report

    folder = find_run(run)
    say(str(render_report(folder, out or folder / "report.png")))


def _table(found: list[RunSummary]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = ("run", "model", "steps", "adapters", "reward", "score", "updated", "status")
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        # on a narrow terminal these two are cut first
        table.add_column(column, no_wrap=column not in ("model", "adapters"), overflow="ellipsis")
    for r in found:
        numbers = ["" if x is None else f"{x:.3f}" for x in (r.reward, r.score)]
        model, updated = Path(r.model).name, r.updated[:16].replace("T", " ")
        cells = (r.name, model, str(r.steps), " ".join(r.adapters), *numbers, updated, r.status)
        table.add_row(*map(Text, cells))
    return table
