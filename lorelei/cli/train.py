"""train and resume."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

from lorelei.cli.arguments import ConfigFile, Overrides, RunFolder, load_config, prepare_run, say


def train(run: ConfigFile, overrides: Overrides = None) -> None:
    """Train the adapters of a run."""
    from lorelei.plan.plan import plan
    from lorelei.process import set_threads

    config = load_config(run, overrides)
    set_threads(config.threads)  # some models are planned with torch
    planned = plan(config)
    folder = Path(config.runs_dir) / config.name
    if (folder / "run.json").exists():
        raise ValueError(
            f"name: {str(folder)!r} holds a run already; go on with `lorelei resume {folder}`, "
            "or choose another with name=..."
        )
    for warning in planned.warnings:
        say(f"warning: {warning}", err=True)
    from lorelei.launch import local

    with _exit_code_of_a_signal():
        local.train(config)


def resume(run: RunFolder) -> None:
    """Go on with a run from its last committed step."""
    folder = prepare_run(run)
    from lorelei.launch import local

    with _exit_code_of_a_signal():
        local.resume(folder)


@contextmanager
def _exit_code_of_a_signal() -> Generator[None]:
    """Exit as the shell expects of a program that a signal ended."""
    from lorelei.launch.local import Stopped

    try:
        yield
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.signal) from None
