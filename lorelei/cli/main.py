"""The program `lorelei`: its commands in the order of --help, and how their errors are shown."""

from __future__ import annotations

import os
import sys

import typer

from lorelei.cli.arguments import say
from lorelei.cli.chat import chat
from lorelei.cli.cluster import rollout, slurm
from lorelei.cli.eval import evaluate
from lorelei.cli.export import export
from lorelei.cli.machine import doctor, install
from lorelei.cli.run_file import convert, plan, schema
from lorelei.cli.run_folder import check, report, runs, samples
from lorelei.cli.train import resume, train

app = typer.Typer(
    help="Train LoRA adapters of language models, by reinforcement learning and from examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (schema, plan, convert, train, resume, rollout, install, doctor, check, runs):
    app.command()(_command)
app.command("eval")(evaluate)
for _command in (export, chat, samples, report):
    app.command()(_command)
_launch = typer.Typer(help="Run on a cluster.", no_args_is_help=True)
_launch.command()(slurm)
app.add_typer(_launch, name="launch")


def main() -> None:
    """Run a command. A user-fixable error is one line and exit code 2, without a traceback.

    LORELEI_TRACEBACK=1 shows the traceback.
    """
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("LORELEI_TRACEBACK"):
            raise
        say(f"error: {_one_line(error)}", err=True)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
