"""What the commands take: a run file with overrides, or a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorelei.config.run import RunConfig

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="RUN.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, such as optimizer.lr=1e-4.", metavar="[KEY=VALUE]..."),
]
RunFolder = Annotated[str, typer.Argument(help="A run folder, or a run's name.", metavar="RUN")]
AdapterName = Annotated[str | None, typer.Option("--adapter", help="Default: the only one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_config(run: Path, overrides: list[str] | None) -> RunConfig:
    """A file's configuration; for one of AReaL's, what was translated or ignored is printed."""
    from lorelei.run_file import read_config

    loaded = read_config(run, overrides or [])
    if loaded.translation is not None:
        from lorelei.areal.report import lines

        for line in lines(loaded.translation, run.name):
            say(line, err=True)
    return loaded.config


def say(text: str, err: bool = False) -> None:
    """Print a text with whatever models, rewards or files put into it, which cannot act."""
    from lorelei.obs.screen import escaped

    typer.echo(escaped(text, keep="\n"), err=err)


def show(value: object, as_json: bool, table: Callable[[], RenderableType]) -> None:
    """Print plain values as JSON, or a table for people."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
        return
    from rich.console import Console

    Console().print(table())


def find_run(run: str) -> Path:
    """A run folder by its path, or by its name in ./runs. Raises ValueError."""
    for folder in (Path(run), Path("runs") / run):
        if folder.is_dir():
            return folder
    raise ValueError(f"run: there is no run folder {run!r}, nor runs/{run}; see `lorelei runs`")


def prepare_run(run: str) -> Path:
    """The run's folder, after setting its threads: torch may be imported from here on."""
    from lorelei.process import set_threads
    from lorelei.run_file import validate
    from lorelei.store.identity import read_identity

    folder = find_run(run)
    set_threads(validate(dict(read_identity(folder).config)).threads)
    return folder
