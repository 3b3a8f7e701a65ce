"""The parts of a run, built from its configuration; cheap checks first, weights last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lorelei.config.experiment import Experiment
from lorelei.config.publish import DiskPublish, HttpPublish, MemoryPublish, XcclPublish
from lorelei.config.rollout import EmbeddedRollout, ServerRollout, SglangRollout, VllmRollout
from lorelei.config.run import RunConfig
from lorelei.config.train import MegatronTrain
from lorelei.data.examples import ExampleSource
from lorelei.data.pairs import ComparisonSource
from lorelei.env.contract import Endpoint
from lorelei.inference.contract import InferenceEngine
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.inference.server.engine import ServerEngine
from lorelei.jobs.preference import PreferenceEvaluator
from lorelei.jobs.registry import Registry
from lorelei.launch.jobs import Data, DataMaker, JobMaker, Problems, Sampler
from lorelei.loop import Loop
from lorelei.lora.peft_folder import read_peft_folder
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.lora.targets import match_targets, module_patterns, module_shapes
from lorelei.model.backend import DTYPES, default_device
from lorelei.model.config import ForeignModel, ModelInfo
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder, read_config
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
from lorelei.obs.console import Console
from lorelei.plan.model_info import model_info
from lorelei.publish.canary import Canary
from lorelei.publish.contract import Transport
from lorelei.publish.publisher import VersionPublisher
from lorelei.rollout.evaluate import Evaluator, LossEvaluator
from lorelei.rollout.meter import Meter
from lorelei.store.run import RunStore
from lorelei.store.spool import Spool
from lorelei.train.contract import TrainEngine
from lorelei.train.engine_thread import EngineThread
from lorelei.train.kinds import TRAIN, trains_here
from lorelei.train.remote.engine import RemoteEngine
from lorelei.train.remote.restarting import Restarting
from lorelei.train.remote.workers import LOOPBACK, Launcher, LocalWorkers
from lorelei.types import Ints
from lorelei.venvs.recipe import interpreter

if TYPE_CHECKING:
    from lorelei.launch.ray_cluster import Cluster
    from lorelei.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComponents:
    """What a run is made of, before its state is known."""

    folder: Path  # of the model
    decoder: Decoder | None  # None: no engine in this process computes with the model
    device: torch.device  # of this process
    data: Mapping[str, Data]  # by adapter
    sampler: Sampler
    cluster: Cluster | None  # None: this machine alone


async def build(
    config: RunConfig, stack: AsyncExitStack, logs: Path | None = None, *, training: bool = True
) -> RunComponents:
    """Check data and rewards, load the model, make the rollout engine on it.

    The stack closes what was started. logs: for what servers print; None: logs/ of the
    run folder. training: whether a trainer is to be made of these parts too.
    Raises ValueError with one line for a user-fixable error.
    """
    experiments = config.experiments()
    if isinstance(config.train, MegatronTrain):
        interpreter("megatron")  # or what is missing is said before anything is loaded
    folder = resolve_model(config.model)
    known = model_info(config, folder, read_config(folder))
    tokenizer = load_tokenizer(folder)
    stops = stop_token_ids(folder, tokenizer)
    maker = DataMaker(
        tokenizer=tokenizer,
        stop_token_ids=stops,
        model=known.sizes,
        max_context=config.rollout.max_context,
        stack=stack,
    )
    endpoint = await _endpoint(experiments, stack)
    data = {e.name: maker.data(e, endpoint) for e in experiments}
    cluster = _cluster(config, training)
    if cluster is not None:
        stack.callback(cluster.close)
    device = default_device()
    decoder = None
    if config.rollout.kind == "embedded" or (training and trains_here(config)):
        decoder = load_decoder(folder, DTYPES[config.dtype], device)
    logs = logs or Path(config.runs_dir) / config.name / "logs"
    rollout = _rollout_engine(config, folder, known, decoder, tokenizer, cluster, logs)
    stack.push_async_callback(rollout.close)
    if isinstance(rollout, ServerEngine):
        await rollout.start()

    def decode(tokens: Ints) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    return RunComponents(
        folder=folder,
        decoder=decoder,
        device=device,
        data=data,
        sampler=Sampler(engine=rollout, decode=decode, stop_token_ids=stops),
        cluster=cluster,
    )


def _cluster(config: RunConfig, training: bool) -> Cluster | None:
    """The connection to Ray, with places for all processes of the run, if it has any there."""
    rollout = config.rollout
    workers, servers, cpus = config.train.workers if training else 0, 0, 1
    if isinstance(rollout, ServerRollout) and not rollout.urls:
        servers, cpus = rollout.replicas, rollout.threads * rollout.tensor_parallel_size
    if config.cluster.kind == "local" or not workers + servers:
        return None
    from lorelei.launch.ray_cluster import Cluster

    return Cluster(config.cluster, workers, servers, cpus)


async def _endpoint(experiments: Sequence[Experiment], stack: AsyncExitStack) -> Endpoint | None:
    """What agents speak to, if there are any."""
    if all(e.env.kind != "agent" for e in experiments):
        return None
    from lorelei.inference.endpoint.server import HttpEndpoint

    endpoint = HttpEndpoint()
    stack.push_async_callback(endpoint.close)
    await endpoint.start()
    return endpoint


def make_thread(
    config: RunConfig, parts: RunComponents, stack: AsyncExitStack, store: RunStore | None
) -> EngineThread:
    """The train engine with the run's adapters, all fresh; the stack closes it.

    store: of a run that goes on, whose adapters are those of its last checkpoint.
    """
    engine = make_train_engine(config, parts.folder, parts.decoder, parts.cluster)
    thread = EngineThread(engine)
    stack.callback(thread.close)
    for e in _trained(config, store):
        engine.add_adapter(e.name, e.lora.spec(), e.seed)
    return thread


def make_train_engine(
    config: RunConfig, folder: Path, decoder: Decoder | None, cluster: Cluster | None
) -> TrainEngine:
    """folder: of the model. decoder: for an engine in this process; None: in workers."""
    train = config.train
    kind = TRAIN[train.kind]
    if kind.here is not None and trains_here(config):
        assert decoder is not None, "loaded for it"
        return kind.here(train, decoder)
    launcher: Launcher = LocalWorkers if cluster is None else cluster.launch_workers
    spec = kind.make_spec(train, folder, config.dtype)
    python = sys.executable if kind.venv is None else str(interpreter(kind.venv))

    # casts: both have the protocol's calls, but only at run time (see remote.forwarding)
    def make() -> TrainEngine:
        return cast(TrainEngine, RemoteEngine(spec, train.workers, python, launcher=launcher))

    return cast(TrainEngine, Restarting(make, config.cluster.restarts))


def _trained(config: RunConfig, store: RunStore | None) -> list[Experiment]:
    """The adapters of a new run, or those that a checkpoint still has."""
    latest = store.latest if store else None
    return [e for e in config.experiments() if latest is None or e.name in latest.adapters]


def make_loop(
    config: RunConfig,
    parts: RunComponents,
    thread: EngineThread,
    store: RunStore,
    console: Console,
) -> Loop:
    """The loop of a new run, or of one that goes on where its last manifest says."""
    meter = Meter()
    publisher = VersionPublisher(
        parts.sampler.engine, store.run_id, _transport(config, parts, store, console.warn)
    )
    entries = store.latest.adapters if store.latest else {}
    maker = JobMaker(
        config=config,
        data=parts.data,
        sampler=parts.sampler,
        thread=thread,
        store=store,
        spool=Spool(store.folder),
        console=console,
        meter=meter,
    )
    jobs = {e.name: maker.job(e) for e in _trained(config, store)}
    for name in entries.keys() & jobs.keys():
        jobs[name].restore(entries[name].record.version, entries[name].record.state)
    for warning in (*store.warnings, *maker.spool.warnings):
        console.warn(warning)
    canary = Canary(thread, parts.sampler.engine, publisher, store.run_id, config.dtype)
    return Loop(
        registry=Registry(jobs.values(), console.warn),
        thread=thread,
        publisher=publisher,
        canary=canary if config.publish.canary.enabled else None,
        store=store,
        console=console,
        checkpoint_every=config.checkpoint.every,
        gauges=lambda seconds: {"rollout_idle": min(meter.lap() / seconds, 1.0)},
        step=store.latest.step if store.latest else 0,
        # their jobs were added to the live run, by somebody who may add them again
        resting={n: e.record for n, e in entries.items() if n not in jobs},
    )


def _rollout_engine(
    config: RunConfig,
    folder: Path,
    model: ModelInfo,
    decoder: Decoder | None,
    tokenizer: Tokenizer,
    cluster: Cluster | None,
    logs: Path,
) -> InferenceEngine:
    match config.rollout:
        case EmbeddedRollout() as embedded:
            assert decoder is not None, "loaded for it"
            return EmbeddedEngine(
                decoder,
                tokenizer=tokenizer,
                max_running=embedded.max_running,
                max_context=embedded.max_context,
            )
        case VllmRollout() | SglangRollout() as servers:
            from lorelei.launch.servers import make_server_engine

            return make_server_engine(config, servers, folder, model, tokenizer, logs, cluster)


def _transport(
    config: RunConfig, parts: RunComponents, store: RunStore, warn: Callable[[str], None]
) -> Transport | None:
    """How versions travel; none: by the engine's own `load`."""
    publish, engine = config.publish, parts.sampler.engine
    match publish:
        case MemoryPublish() | HttpPublish():
            return None
        case DiskPublish():
            from lorelei.publish.disk import Disk

            assert isinstance(engine, ServerEngine), "checked by the configuration"
            given = publish.folder and Path(publish.folder) / store.run_id
            return Disk(engine, given or store.folder / "published", config.model)
        case XcclPublish():
            from lorelei.publish.xccl import Xccl

            assert isinstance(engine, ServerEngine), "checked by the configuration"
            known = parts.cluster.host if parts.cluster is not None else LOOPBACK
            return Xccl(engine, parts.device, publish.host or known, publish.timeout, warn)


def evaluators(
    config: RunConfig, parts: RunComponents
) -> dict[str, Evaluator | LossEvaluator | PreferenceEvaluator]:
    """The evaluator of every adapter that holds problems or examples out."""
    found: dict[str, Evaluator | LossEvaluator | PreferenceEvaluator] = {}
    for e in config.experiments():
        match parts.data[e.name]:
            case Problems() as problems if e.eval.every:
                found[e.name] = parts.sampler.evaluator(e, problems, Meter())
            case ExampleSource(held_out=[_, *_] as examples):
                found[e.name] = LossEvaluator(engine=parts.sampler.engine, prompts=examples)
            case ComparisonSource(held_out=[_, *_] as rows, max_tokens=limit):
                found[e.name] = PreferenceEvaluator(
                    engine=parts.sampler.engine, algo=e.algo, prompts=rows, max_tokens=limit
                )
            case _:
                pass
    return found


def warm_starts(config: RunConfig) -> dict[str, AdapterSnapshot]:
    """The adapters of `lora.init_from`. Raises ValueError for one of another shape."""
    return {
        e.name: _warm_start(e, e.lora.init_from, resolve_model(config.model))
        for e in config.experiments()
        if e.lora.init_from is not None
    }


def _warm_start(e: Experiment, folder: str, base: Path) -> AdapterSnapshot:
    try:
        state = read_peft_folder(Path(folder), base)
    except ValueError as error:
        raise ValueError(f"lora.init_from: {error}") from error
    wanted = e.lora.spec()
    for field, here, there in (
        ("lora_rank", wanted.rank, state.spec.rank),
        ("lora_alpha", wanted.alpha, state.spec.alpha),
        ("use_rslora", wanted.rslora, state.spec.rslora),
    ):
        if here != there:
            raise ValueError(
                f"lora.init_from: {folder!r} has {field} {there}, adapter {e.name!r} "
                f"has {here}; set lora.{field}: {str(there).lower()}"
            )
    _check_modules(e, folder, state.spec.target_modules, base)
    state = AdapterState(spec=wanted, tensors=state.tensors)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    return AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0)


def _check_modules(e: Experiment, folder: str, held: Sequence[str], base: Path) -> None:
    """Raises ValueError, with the targets to set, when the run targets other modules."""
    try:
        names = list(module_shapes(read_config(base)))
    except ForeignModel:  # its train engine knows the names
        return
    targeted = set(match_targets(names, e.lora.spec(), folder))
    if missing := sorted(targeted - set(held)):
        what = f"has no LoRA on {missing[0]!r}, which"
        verb = "targets"
    elif extra := sorted(set(held) - targeted):
        what = f"has LoRA on {extra[0]!r}, which"
        verb = "does not target"
    else:
        return
    raise ValueError(
        f"lora.init_from: {folder!r} {what} adapter {e.name!r} {verb}; set lora.target_modules: "
        f"{json.dumps(module_patterns(held))}"
    )
