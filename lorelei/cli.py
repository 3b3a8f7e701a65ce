"""The commands. What is heavy is imported within the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorelei.config.run import RunConfig
    from lorelei.launch.plan import Plan

app = typer.Typer(
    help="Train LoRA adapters of language models by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="RUN.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, such as algo.lr=1e-4.", metavar="[KEY=VALUE]..."),
]
RunFolder = Annotated[str, typer.Argument(help="A run folder, or a run's name.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file: every field, default and description."""
    from lorelei.config.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def plan(run: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a run would train and need, without loading weights."""
    _, planned = _planned(run, overrides)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
        return
    from rich.console import Console

    from lorelei.launch.table import plan_table

    Console().print(plan_table(planned))


@app.command()
def train(run: ConfigFile, overrides: Overrides = None) -> None:
    """Train the adapters of a run."""
    config, planned = _planned(run, overrides)
    for warning in planned.warnings:
        typer.echo(f"warning: {warning}", err=True)
    _set_threads(config)
    from lorelei.launch import local

    local.train(config)


@app.command()
def resume(run: RunFolder) -> None:
    """Go on with a run from its last committed step."""
    from lorelei.config.load import validate
    from lorelei.store.identity import read_identity

    folder = _run_folder(run)
    _set_threads(validate(dict(read_identity(folder).config)))
    from lorelei.launch import local

    local.resume(folder)


@app.command()
def check(run: RunFolder) -> None:
    """Verify a run folder: checksums, manifests, versions and logs. Exit code 1: a problem."""
    from lorelei.store.check import check_run

    problems = check_run(_run_folder(run))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo("no problems")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where the run folders are.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder."""
    from dataclasses import asdict

    from lorelei.store.index import list_runs

    if not folder.is_dir():
        raise ValueError(f"runs: there is no folder {str(folder)!r}; give the one with the runs")
    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in found], indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("run", "model", "steps", "adapters", "reward", "score", "updated", "status")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for r in found:
        numbers = ["" if x is None else f"{x:.3f}" for x in (r.reward, r.score)]
        cells = (r.name, r.model, str(r.steps), " ".join(r.adapters), *numbers, r.updated, r.status)
        table.add_row(*map(Text, cells))
    Console().print(table)


def main() -> None:
    """Run a command. What a user can mend is one line and exit code 2, without a traceback.

    LORELEI_TRACEBACK=1 shows the traceback.
    """
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("LORELEI_TRACEBACK"):
            raise
        typer.echo(f"error: {_one_line(error)}", err=True)
        sys.exit(2)


def _planned(run: Path, overrides: list[str] | None) -> tuple[RunConfig, Plan]:
    from lorelei.config.load import load_config
    from lorelei.launch.plan import plan as make_plan

    config = load_config(run, overrides or [])
    return config, make_plan(config)


def _set_threads(config: RunConfig) -> None:
    """To be called before torch is imported: that is when it reads the environment."""
    from lorelei.config.threads import set_threads

    set_threads(config.threads)


def _run_folder(run: str) -> Path:
    """A run folder by its path, or by its name in ./runs."""
    for folder in (Path(run), Path("runs") / run):
        if folder.is_dir():
            return folder
    raise ValueError(f"run: there is no run folder {run!r}, nor runs/{run}; see `lorelei runs`")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
