"""eval."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from lorelei.cli.arguments import AcceptChanged, Json, RunFolder, prepare_run, say
from lorelei.types import AdapterRef

if TYPE_CHECKING:
    from lorelei.cli.trained_run import TrainedRun
    from lorelei.jobs.preference import PreferenceEvaluator

Scores = dict[str, dict[str, dict[str, float]]]  # adapter: {"base" or version: {score: mean}}


def evaluate(
    run: RunFolder,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Held-out problems. Default: the run's.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model too.")] = False,
    as_json: Json = False,
    accept_changed: AcceptChanged = None,
) -> None:
    """Score a run's adapters on its held-out problems."""
    folder = prepare_run(run)
    from lorelei.cli.trained_run import TrainedRun

    trained = TrainedRun.read(folder)
    if not any(e.eval.every for e in trained.config.experiments()):
        raise ValueError("eval.every: 0 in every adapter: the run holds no problems out")
    reads = ("model", "task", "env", "reward")
    for warning in trained.check_inputs("eval", reads, accept_changed):
        say(f"warning: {warning}", err=True)
    scores = asyncio.run(_scores(trained, n, base))
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
        return
    for adapter, versions in scores.items():
        for version, means in versions.items():
            words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            say(f"{adapter}  {version:>5}  {words}")


async def _scores(run: TrainedRun, n_prompts: int | None, base: bool) -> Scores:
    """The held-out means of every adapter, on the run's own problems."""
    from lorelei.cache import writable_cache
    from lorelei.jobs.preference import PreferenceEvaluator
    from lorelei.launch.assemble import build, evaluators

    found: Scores = {}
    async with AsyncExitStack() as stack:
        logs = writable_cache("logs") / run.folder.name  # the run folder is only read
        parts = await build(run.config, stack, logs, training=False)
        for name, evaluator in evaluators(run.config, parts).items():
            if name not in run.manifest.adapters:  # it was removed while the run went on
                continue
            held_out = evaluator.prompts
            if n_prompts is not None and n_prompts > len(held_out):
                raise ValueError(
                    f"-n: {n_prompts} is more than the {len(held_out)} problems that are held out"
                )
            evaluator = replace(evaluator, prompts=held_out[:n_prompts])
            if isinstance(evaluator, PreferenceEvaluator):
                evaluator = await _with_reference(evaluator, run)
            state = run.state(name)
            ref = run.ref(name, state)
            await evaluator.engine.load(ref, state)
            found[name] = {"base": (await evaluator.run(None)).means} if base else {}
            found[name][f"v{ref.version}"] = (await evaluator.run(ref)).means
    return found


async def _with_reference(evaluator: PreferenceEvaluator, run: TrainedRun) -> PreferenceEvaluator:
    """The evaluator with the adapter that its objective compares with, where it is not the base."""
    from lorelei.algo.frozen import frozen_adapters
    from lorelei.launch.frozen import read_adapter

    named = frozen_adapters(evaluator.algo).get("reference")
    if named is None:
        return evaluator
    state = read_adapter("algo.reference", named, run.config.model)
    ref = AdapterRef(name="reference", version=0, run_id=run.manifest.run, digest=state.digest())
    await evaluator.engine.load(ref, state)
    return replace(evaluator, reference=ref)
