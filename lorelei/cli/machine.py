"""install and doctor: commands about this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorelei.cli.arguments import Json, show


def install(
    kind: Annotated[str, typer.Argument(help="vllm or sglang.", metavar="KIND")],
) -> None:
    """Install a rollout server into its own virtual environment, about 5 minutes."""
    from lorelei.venvs.install import install

    typer.echo(install(kind))


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what can run here, and what is missing."""
    from lorelei.plan.doctor import diagnose, doctor_table

    found = diagnose()
    show(asdict(found), as_json, lambda: doctor_table(found))
