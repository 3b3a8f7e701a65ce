"""rollout and launch slurm: commands for more than one machine."""

from __future__ import annotations

from typing import Annotated

import typer

from lorelei.cli.arguments import ConfigFile, Overrides, load_config


def rollout(
    run: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 30000,
) -> None:
    """Run the rollout server of a run here, for a trainer elsewhere (rollout.urls).

    The trainer shows the token in LORELEI_SERVER_TOKEN; an address that others reach needs one.
    """
    from lorelei.plan.plan import plan

    config = load_config(run, overrides)
    plan(config)  # refuses what cannot run
    from lorelei.launch.servers import serve

    serve(config, host, port)


def slurm(
    run: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: train on CPUs.")] = 0,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="An option of sbatch, such as --sbatch=--partition=gpu; repeatable."),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="A shell line before the start, such as 'module load cuda'; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the job script, submit nothing.")] = False,
) -> None:
    """Submit a Slurm job that starts Ray on its nodes and trains on them."""
    from lorelei.launch.slurm import SlurmJob, check, job_script, submit
    from lorelei.plan.plan import plan

    config = load_config(run, [*(overrides or []), "cluster.kind=ray"])
    plan(config)  # refuses what cannot run
    job = SlurmJob(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        options=tuple(sbatch or ()),
        setup=tuple(setup or ()),
    )
    check(config, job)
    script = job_script(config, job, run, overrides or [])
    typer.echo(script if dry_run else submit(script), nl=not dry_run)
