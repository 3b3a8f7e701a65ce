"""The commands. What is heavy is imported within the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorelei.config.run import RunConfig
    from lorelei.plan.plan import Plan

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
    from lorelei.run_file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
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
    """Say what a run would train and need, and where, without loading weights."""
    from lorelei.plan.hardware import wanted
    from lorelei.plan.plan import plan as make_plan

    asked = {"nodes": nodes, "devices": devices, "memory": memory}
    machine = [f"machine.{key}={value}" for key, value in asked.items() if value is not None]
    config = _loaded(run, [*(overrides or []), *machine])
    planned = make_plan(config, wanted(config.machine))
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
        return
    from rich.console import Console

    from lorelei.plan.format import plan_table

    Console().print(plan_table(planned))


@app.command()
def convert(
    run: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: print it.")] = None,
) -> None:
    """Write a file of AReaL as a configuration of ours."""
    from lorelei.run_file import dump_set

    text = dump_set(_loaded(run, overrides))
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise ValueError(f"--out: {str(out)!r} exists; give another name or remove it")
    out.write_text(text)
    typer.echo(f"wrote {out}", err=True)


@app.command()
def train(run: ConfigFile, overrides: Overrides = None) -> None:
    """Train the adapters of a run."""
    from lorelei.plan.plan import plan as make_plan

    config = _loaded(run, overrides)
    _set_threads(config)  # some models are planned with torch
    planned = make_plan(config)
    folder = Path(config.runs_dir) / config.name
    if (folder / "run.json").exists():
        raise ValueError(
            f"name: {str(folder)!r} holds a run already; go on with `lorelei resume {folder}`, "
            "or choose another with name=..."
        )
    for warning in planned.warnings:
        typer.echo(f"warning: {warning}", err=True)
    from lorelei.launch import local

    _until_stopped(lambda: local.train(config))


@app.command()
def resume(run: RunFolder) -> None:
    """Go on with a run from its last committed step."""
    folder = _prepared(run)
    from lorelei.launch import local

    _until_stopped(lambda: local.resume(folder))


@app.command()
def rollout(
    run: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 30000,
) -> None:
    """Run the rollout server of a run here, for a trainer elsewhere (rollout.urls).

    The trainer shows the token in LORELEI_SERVER_TOKEN; an address that others reach needs one.
    """
    config, _ = _planned(run, overrides)
    from lorelei.launch.servers import serve

    serve(config, host, port)


launch_app = typer.Typer(help="Run on a cluster.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")


@launch_app.command()
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

    config, _ = _planned(run, [*(overrides or []), "cluster.kind=ray"])
    job = SlurmJob(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        options=tuple(sbatch or ()),
        setup=tuple(setup or ()),
    )
    check(config, job)
    script = job_script(config, job, run, overrides or [])
    typer.echo(script if dry_run else submit(script), nl=not dry_run)


@app.command()
def install(
    kind: Annotated[str, typer.Argument(help="vllm or sglang.", metavar="KIND")],
) -> None:
    """Install a rollout server into its own virtual environment, about 5 minutes."""
    from lorelei.venvs.install import install

    typer.echo(install(kind))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what can run here, and what is missing."""
    from dataclasses import asdict

    from lorelei.plan.doctor import diagnose, doctor_table

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    from rich.console import Console

    Console().print(doctor_table(found))


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
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        # on a narrow terminal these two give way
        table.add_column(column, no_wrap=column not in ("model", "adapters"), overflow="ellipsis")
    for r in found:
        numbers = ["" if x is None else f"{x:.3f}" for x in (r.reward, r.score)]
        model, updated = Path(r.model).name, r.updated[:16].replace("T", " ")
        cells = (r.name, model, str(r.steps), " ".join(r.adapters), *numbers, updated, r.status)
        table.add_row(*map(Text, cells))
    Console().print(table)


AdapterName = Annotated[str | None, typer.Option("--adapter", help="Default: the only one.")]
Base = Annotated[bool, typer.Option("--base", help="The base model, without the adapter.")]


@app.command("eval")
def evaluate(
    run: RunFolder,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Held-out problems. Default: the run's.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model too.")] = False,
    as_json: Json = False,
) -> None:
    """Score a run's adapters on its held-out problems."""
    folder = _prepared(run)
    from lorelei.launch import trained

    scores = trained.evaluate(folder, n, base)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
        return
    for adapter, versions in scores.items():
        for version, means in versions.items():
            words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            typer.echo(f"{adapter}  {version:>5}  {words}")


@app.command()
def export(
    run: RunFolder,
    adapter: AdapterName = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export/NAME-vN.")] = None,
) -> None:
    """Write an adapter as a PEFT folder, which peft, vLLM and others read.

    A run with lora.use_lora: false is written as a checkpoint folder.
    """
    folder = _prepared(run)
    from lorelei.launch import trained

    typer.echo(trained.export(folder, adapter, out))


@app.command()
def chat(
    run: RunFolder,
    adapter: AdapterName = None,
    base: Base = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to an adapter. One line is one message; an empty line or the end of input ends."""
    folder = _prepared(run)
    from lorelei.launch.trained import Chat
    from lorelei.obs.escape import escaped
    from lorelei.types import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    talk = Chat(folder, adapter, base, sampling)
    typer.echo(f"{talk.who} answers; an empty line ends")
    for answer in talk.answers(_lines()):
        typer.echo(escaped(answer, keep="\n"))


@app.command()
def samples(
    run: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 5,
    adapter: AdapterName = None,
    order: Annotated[str, typer.Option(help="worst, best or random.")] = "random",
    step: Annotated[int | None, typer.Option(help="Of this step only.")] = None,
) -> None:
    """Read rollouts of a run: prompt, completion, reward."""
    from lorelei.obs.samples import format_samples

    if order not in ("worst", "best", "random"):
        raise ValueError(f"--order: {order!r} is none of worst, best, random")
    path = _run_folder(run) / "rollouts.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    every = [json.loads(line) for line in lines if line.endswith("\n")]  # one may be in the writing
    records = [record for record in every if step in (None, record["step"])]
    if every and not records:
        raise ValueError(f"--step: no rollouts of step {step}; there are 1 to {every[-1]['step']}")
    typer.echo(format_samples(records, n, adapter=adapter, order=order))


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/report.png.")] = None,
) -> None:
    """Draw a run: held-out score, reward, mismatch, lengths, seconds."""
    from lorelei.obs.report import render_report

    folder = _run_folder(run)
    typer.echo(render_report(folder, out or folder / "report.png"))


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
    from lorelei.plan.plan import plan as make_plan

    config = _loaded(run, overrides)
    return config, make_plan(config)


def _loaded(run: Path, overrides: list[str] | None) -> RunConfig:
    """A file's configuration; what became of one of AReaL's is printed."""
    from lorelei.run_file import read_config

    loaded = read_config(run, overrides or [])
    if loaded.translation is not None:
        from lorelei.areal.report import lines

        for line in lines(loaded.translation, run.name):
            typer.echo(line, err=True)
    return loaded.config


def _set_threads(config: RunConfig) -> None:
    """To be called before torch is imported: that is when it reads the environment."""
    from lorelei.process import set_threads

    set_threads(config.threads)


def _prepared(run: str) -> Path:
    """The run's folder, after setting its threads: torch may be imported from here on."""
    from lorelei.run_file import validate
    from lorelei.store.identity import read_identity

    folder = _run_folder(run)
    _set_threads(validate(dict(read_identity(folder).config)))
    return folder


def _until_stopped(work: Callable[[], None]) -> None:
    """Exit as the shell expects of a program that a signal ended."""
    from lorelei.launch.local import Stopped

    try:
        work()
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.signal) from None


def _lines() -> Iterator[str]:
    """Lines of standard input until an empty one."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


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
