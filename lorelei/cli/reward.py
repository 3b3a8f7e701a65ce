"""reward test."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from lorelei.cli.arguments import AdapterName, Overrides, load_config

if TYPE_CHECKING:
    from lorelei.config.experiment import Experiment
    from lorelei.config.reward import ScorerConfig

Row = Mapping[str, Any]


def test(
    file: Annotated[
        str, typer.Argument(help="A run's YAML file, or rewards.py:my_reward.", metavar="FILE")
    ],
    overrides: Overrides = None,
    completion: Annotated[
        list[str] | None,
        typer.Option("--completion", "-c", help="A text to score. Default: the answer, and none."),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="NAME=VALUE of the row, in YAML.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Problems of the run's task.")] = 1,
    adapter: AdapterName = None,
) -> None:
    """Score texts as a run would, and show results, errors and seconds. Exit code 1: an error."""
    columns = dict(map(_column, column or []))
    if file.rpartition(":")[0].endswith(".py"):
        from lorelei.config.reward import PythonReward

        if overrides:
            raise ValueError(f"FILE: {file!r} is not a run, whose {overrides[0]!r} could be set")
        path = str(Path(file).resolve())
        scorer, rows = PythonReward(kind="python", path=path), [("row", columns)]
    else:
        scorer, rows = _of_run(Path(file), overrides, adapter, n)
        rows = [(name, {**row, **columns}) for name, row in rows]
    if _failures(scorer, rows, completion):
        raise typer.Exit(1)


def _of_run(
    file: Path, overrides: list[str] | None, adapter: str | None, n: int
) -> tuple[ScorerConfig, list[tuple[str, Row]]]:
    """The reward of a run's adapter, and the first rows of its task."""
    config = load_config(file, overrides)
    experiments = {e.name: e for e in config.experiments()}
    if adapter is None and len(experiments) > 1:
        raise ValueError(f"--adapter: say which of {', '.join(experiments)}")
    if adapter is not None and adapter not in experiments:
        raise ValueError(f"--adapter: {adapter!r} is none of {', '.join(experiments)}")
    experiment = experiments[adapter or next(iter(experiments))]
    reward = experiment.reward
    if reward is None or reward.kind == "env":
        raise ValueError(f"reward: {file} has none that could be tested without its environment")
    return reward, _rows(experiment, config.model, n)


def _rows(e: Experiment, model: str, n: int) -> list[tuple[str, Row]]:
    from lorelei.data.source import make_source
    from lorelei.model.locate import resolve_model
    from lorelei.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(model))
    source = make_source(e.task, tokenizer, e.seed, eval_size=e.eval_size)
    return [(p.id, p.data) for p in map(source.prompt, range(n))]


def _failures(
    scorer: ScorerConfig, rows: Sequence[tuple[str, Row]], texts: list[str] | None
) -> int:
    """Score and print. Returns how many scores failed."""
    from lorelei.obs.screen import escaped
    from lorelei.reward.pool import make_pool
    from lorelei.reward.trial import sample_of, trial_texts

    failed = 0
    began = time.perf_counter()
    pool = make_pool(scorer)
    try:
        typer.echo(f"loaded in {time.perf_counter() - began:.1f} s")
        for name, row in rows:
            samples = [sample_of(row, text) for text in texts or trial_texts(row)]
            for call in [samples] if pool.whole_group else [[one] for one in samples]:
                began = time.perf_counter()
                results = pool.score_now(call)
                seconds = time.perf_counter() - began
                for one, result in zip(call, results, strict=True):
                    words = [f"{k} {v:.6g}" for k, v in result.metrics.items()]
                    told = f"reward {result.value}" if result.error is None else result.error
                    line = f"{name}  {seconds:.3f} s  {one.completion[:60]!r}: {told}"
                    typer.echo(escaped("  ".join([line, *words])))
                    failed += result.error is not None
    finally:
        pool.close()
    return failed


def _column(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--column: {text!r} must be NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--column: {text!r} is not YAML: {error}") from error
