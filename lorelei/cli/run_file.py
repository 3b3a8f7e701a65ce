"""schema, plan and convert: commands about a run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorelei.cli.arguments import ConfigFile, Json, Overrides, load_config, say, show


def schema() -> None:
    """Print the JSON schema of a configuration file: every field, default and description."""
    from lorelei.run_file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def plan(
    run: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines. Default: machine.nodes.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Accelerators of each. Default: machine.devices.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of each accelerator, such as 80GB. Default: machine.memory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run would train and need, and where, without loading weights.

    Exit code 1: it does not fit.
    """
    from lorelei.plan.format import plan_table
    from lorelei.plan.hardware import wanted
    from lorelei.plan.plan import plan as make_plan

    asked = {"nodes": nodes, "devices": devices, "memory": memory}
    machine = [f"machine.{key}={value}" for key, value in asked.items() if value is not None]
    config = load_config(run, [*(overrides or []), *machine])
    planned = make_plan(config, wanted(config.machine))
    show(planned.to_json(), as_json, lambda: plan_table(planned))
    if planned.problems:
        raise typer.Exit(1)


def convert(
    run: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: print it.")] = None,
) -> None:
    """Translate a file of AReaL to our schema."""
    from lorelei.run_file import dump_set

    text = dump_set(load_config(run, overrides))
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise ValueError(f"--out: {str(out)!r} exists; give another name or remove it")
    out.write_text(text)
    say(f"wrote {out}", err=True)
