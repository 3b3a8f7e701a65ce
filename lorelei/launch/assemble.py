"""The parts of a run, built from its configuration; cheap checks first, weights last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorelei.config.cluster import RayCluster
from lorelei.config.experiment import Experiment
from lorelei.config.publish import DiskPublish, HttpPublish, MemoryPublish, XcclPublish
from lorelei.config.rollout import EmbeddedRollout, SglangRollout, VllmRollout
from lorelei.config.run import RunConfig
from lorelei.config.train import MegatronTrain
from lorelei.data.chat import ChatTemplate
from lorelei.data.contract import PromptSource
from lorelei.data.source import make_source
from lorelei.env.contract import Endpoint, Env
from lorelei.env.environment import make_env
from lorelei.env.outcome import NoReward
from lorelei.inference.contract import InferenceEngine
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.inference.server.engine import ServerEngine
from lorelei.launch.train_engine import make_train_engine, trains_here
from lorelei.loop import Loop
from lorelei.lora.peft_folder import read_peft_folder
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.model.backend import DTYPES, default_device
from lorelei.model.config import ModelInfo, ModelSizes
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder, read_config
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
from lorelei.obs.console import Console
from lorelei.plan.model_info import model_info
from lorelei.publish.canary import Canary, Watched, fixed_tokens
from lorelei.publish.contract import Publisher
from lorelei.publish.publisher import Transport, VersionPublisher
from lorelei.reward.pool import make_pool
from lorelei.rollout.admission import Admission
from lorelei.rollout.collector import Collector, Lane
from lorelei.rollout.evaluate import Evaluator
from lorelei.rollout.meter import Meter
from lorelei.rollout.sampler import Policy
from lorelei.store.run import RunStore
from lorelei.store.spool import Spool
from lorelei.train.remote.workers import LOOPBACK
from lorelei.train.step import Trainer
from lorelei.types import Ints, Prompt, SamplingParams
from lorelei.venvs.recipe import interpreter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorelei.launch.ray_cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComponents:
    """What a run is made of, before its state is known."""

    folder: Path  # of the model
    decoder: Decoder | None  # none: no engine in this process computes with the model
    device: torch.device  # of this process
    rollout: InferenceEngine
    sources: Mapping[str, PromptSource]
    held_out: Mapping[str, list[Prompt]]
    envs: Mapping[str, Env]
    tasks: Mapping[str, str]  # for people
    decode: Callable[[Ints], str]
    stop_token_ids: tuple[int, ...]
    cluster: Cluster | None  # none: this machine alone


async def build(
    config: RunConfig, stack: AsyncExitStack, logs: Path | None = None, *, training: bool = True
) -> RunComponents:
    """Check data and rewards, load the model, make the rollout engine on it.

    The stack closes what was started. logs: for what servers print; none: logs/ of the
    run folder. training: whether a trainer is to be made of these parts too.
    Raises ValueError with one line for what a user can mend.
    """
    experiments = config.experiments()
    if isinstance(config.train, MegatronTrain):
        interpreter("megatron")  # or what is missing is said before anything is loaded
    folder = resolve_model(config.model)
    known = model_info(config, folder, read_config(folder))
    model = known.sizes
    tokenizer = load_tokenizer(folder)
    sources = {
        e.name: make_source(e.task, tokenizer, e.seed, eval_size=e.eval_size) for e in experiments
    }
    held_out = {
        e.name: sources[e.name].eval_prompts(e.eval.n_prompts) if e.eval.every else []
        for e in experiments
    }
    for name, source in sources.items():
        _check_prompts([source.prompt(0), *held_out[name]], model, config.rollout.max_context)
    stops = stop_token_ids(folder, tokenizer)
    context = model.context(config.rollout.max_context)
    chat = ChatTemplate(tokenizer=tokenizer, stop_token_ids=stops)
    endpoint = await _endpoint(experiments, chat, stack)
    envs = {e.name: _env(e, chat, context, endpoint, stack) for e in experiments}
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
    return RunComponents(
        folder=folder,
        decoder=decoder,
        device=device,
        rollout=rollout,
        sources=sources,
        held_out=held_out,
        envs=envs,
        tasks={e.name: task_words(e) for e in experiments},
        decode=decoder_of(tokenizer),
        stop_token_ids=stops,
        cluster=cluster,
    )


def _cluster(config: RunConfig, training: bool) -> Cluster | None:
    """The connection to Ray, with places for all processes of the run, if it has any there."""
    rollout = config.rollout
    attached = rollout.kind == "embedded" or bool(rollout.urls)
    workers, servers = config.train.workers if training else 0, 0 if attached else rollout.replicas
    match config.cluster:
        case RayCluster() as ray if workers + servers:
            from lorelei.launch.ray_cluster import Cluster

            cpus = 1 if attached else rollout.threads * rollout.tensor_parallel_size
            return Cluster(ray, workers, servers, cpus)
        case _:
            return None


async def _endpoint(
    experiments: Sequence[Experiment], chat: ChatTemplate, stack: AsyncExitStack
) -> Endpoint | None:
    """What agents speak to, if there are any."""
    if all(e.env.kind != "agent" for e in experiments):
        return None
    from lorelei.inference.endpoint.server import HttpEndpoint

    endpoint = HttpEndpoint(chat)
    stack.push_async_callback(endpoint.close)
    await endpoint.start()
    return endpoint


def _env(
    e: Experiment,
    chat: ChatTemplate,
    context: int,
    endpoint: Endpoint | None,
    stack: AsyncExitStack,
) -> Env:
    """The environment of an adapter, and its reward's workers, which the stack ends."""
    if e.reward.kind == "env":
        reward = NoReward()
    else:
        reward = make_pool(e.reward)
        stack.callback(reward.close)
    return make_env(
        e.env, reward=reward, chat=chat, context=context, endpoint=endpoint, model=e.name
    )


def make_trainer(config: RunConfig, parts: RunComponents, stack: AsyncExitStack) -> Trainer:
    """The trainer with the run's adapters, all fresh; the stack closes it."""
    experiments = config.experiments()
    engine = make_train_engine(config, parts.folder, parts.decoder, parts.cluster)
    trainer = Trainer(engine, {e.name: e for e in experiments})
    stack.callback(trainer.close)
    for e in experiments:
        engine.add_adapter(e.name, e.lora.spec(), e.seed)
    return trainer


def make_loop(
    config: RunConfig, parts: RunComponents, trainer: Trainer, store: RunStore, console: Console
) -> Loop:
    """The loop of a new run, or of one that goes on where its last manifest says."""
    spool, meter = Spool(store.folder), Meter()
    publisher = VersionPublisher(
        parts.rollout, store.run_id, _transport(config, parts, store, console.warn)
    )
    lanes = [_lane(e, parts, store, spool) for e in config.experiments()]
    for warning in (*store.warnings, *spool.warnings):
        console.warn(warning)
    state = store.latest.state if store.latest else {}
    return Loop(
        collector=Collector(lanes, parts.rollout, spool, meter),
        trainer=trainer,
        publisher=publisher,
        canary=_canary(config, parts, trainer, publisher, store.run_id),
        store=store,
        spool=spool,
        console=console,
        evaluators=evaluators(config, parts, meter),
        checkpoint_every=config.checkpoint.every,
        step=store.latest.step if store.latest else 0,
        scores=dict(state.get("score", {})),
        reward=state.get("reward"),
    )


def _rollout_engine(
    config: RunConfig,
    folder: Path,
    model: ModelInfo,
    decoder: Decoder | None,
    tokenizer: PreTrainedTokenizerBase,
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

            built = (config, servers, folder, model, tokenizer, logs)
            if cluster is None:
                return make_server_engine(*built)
            return make_server_engine(*built, cluster, "cuda" if cluster.gpus else "cpu")


def _transport(
    config: RunConfig, parts: RunComponents, store: RunStore, warn: Callable[[str], None]
) -> Transport | None:
    """How versions travel; none: by the engine's own `load`."""
    publish, engine = config.publish, parts.rollout
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


def _canary(
    config: RunConfig, parts: RunComponents, trainer: Trainer, publisher: Publisher, run_id: str
) -> Canary | None:
    if not config.publish.canary.enabled:
        return None
    count = config.publish.canary.tokens or (64 if config.dtype == "float32" else 512)
    watched: dict[str, Watched] = {}
    for e in config.experiments():
        source = parts.sources[e.name]
        prompts = parts.held_out[e.name] or map(source.prompt, range(count))
        watched[e.name] = Watched(
            spec=e.lora.spec(),
            temperature=e.rollout.temperature,
            sequences=fixed_tokens(prompts, count),
        )
    return Canary(watched, trainer, parts.rollout, publisher, run_id)


def evaluators(
    config: RunConfig, parts: RunComponents, meter: Meter | None = None
) -> dict[str, Evaluator]:
    """The evaluator of every adapter that holds problems out."""
    meter = meter or Meter()
    return {
        e.name: Evaluator(
            engine=parts.rollout,
            prompts=parts.held_out[e.name],
            env=parts.envs[e.name],
            policy=_eval_policy(e, parts),
            meter=meter,
        )
        for e in config.experiments()
        if e.eval.every
    }


def _lane(e: Experiment, parts: RunComponents, store: RunStore, spool: Spool) -> Lane:
    """An adapter's lane; groups that a crash left finished are kept, others start again."""
    entry = store.latest.adapters[e.name] if store.latest else None
    version = entry.record.version if entry else 0
    position = entry.record.data_position if entry else 0
    owed = {int(i) for i in entry.record.admission["pending"]} if entry else set[int]()
    found = spool.read(e.name)
    kept = {
        index: group
        for index, group in found.items()
        # a version that was rolled back with the crash is not one to learn from
        if (index in owed or index >= position) and group.newest_version <= version
    }
    spool.remove(e.name, found.keys() - kept.keys())
    next_index = max([position, *(index + 1 for index in kept)])
    redo = sorted((owed | set(range(position, next_index))) - kept.keys())
    return Lane(
        experiment=e,
        source=parts.sources[e.name],
        env=parts.envs[e.name],
        policy=Policy(
            ref=None,
            sampling=SamplingParams(
                temperature=e.rollout.temperature,
                max_new_tokens=e.rollout.max_new_tokens,
                stop_token_ids=parts.stop_token_ids,
                stop_strings=e.rollout.stop_strings,
                seed=e.seed,
            ),
            stream=e.name,
            decode=parts.decode,
            interruptible=e.rollout.interruptible,
        ),
        admission=Admission(
            batch_size=e.algo.batch_size,
            max_staleness=e.rollout.max_head_offpolicyness,
            max_concurrent=e.max_concurrent,
            version=version,
            accepted=version * e.algo.batch_size + len(kept),
        ),
        next_index=next_index,
        redo=redo,
        finished=list(kept.values()),
    )


def _check_prompts(prompts: Sequence[Prompt], model: ModelSizes, asked: int | None) -> None:
    """A sample of the prompts; a longer one that comes later fails its own rollouts."""
    context = model.context(asked)
    for prompt in prompts:
        if (largest := prompt.tokens.max()) >= model.vocab:
            raise ValueError(
                f"model: its tokenizer makes token {largest} of the prompt {prompt.id}, the model "
                f"has {model.vocab}; get the tokenizer files of this very model"
            )
        if len(prompt.tokens) >= context:
            raise ValueError(
                f"task: the prompt of {prompt.id} has {len(prompt.tokens)} tokens and leaves no "
                f"room to answer in a context of {context}; shorten such problems"
                + (", or raise rollout.max_context" if context < model.max_positions else "")
            )


def _eval_policy(e: Experiment, parts: RunComponents) -> Policy:
    return Policy(
        ref=None,
        sampling=SamplingParams(
            temperature=e.eval.temperature,
            max_new_tokens=e.eval.max_new_tokens or e.rollout.max_new_tokens,
            stop_token_ids=parts.stop_token_ids,
            stop_strings=e.rollout.stop_strings,
            seed=e.seed,
            top_k=e.eval.top_k,
            top_p=e.eval.top_p,
            min_p=e.eval.min_p,
        ),
        stream=f"{e.name}/eval",
        decode=parts.decode,
        training=False,
    )


def warm_starts(config: RunConfig) -> dict[str, AdapterSnapshot]:
    """The adapters of `lora.init_from`. Raises ValueError for one of another shape."""
    return {
        e.name: _untrained(_warm_start(e, e.lora.init_from))
        for e in config.experiments()
        if e.lora.init_from is not None
    }


def _warm_start(e: Experiment, folder: str) -> AdapterState:
    state = read_peft_folder(Path(folder))
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
    return AdapterState(spec=wanted, tensors=state.tensors)


def _untrained(state: AdapterState) -> AdapterSnapshot:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    return AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0)


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[Ints], str]:
    """Token ids to text, without special tokens."""
    return lambda tokens: str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def task_words(e: Experiment) -> str:
    """A task in a few words."""
    match e.task.kind:
        case "reasoning_gym":
            names = [e.task.name] if e.task.name else [item.name for item in e.task.mixture or ()]
            return " + ".join(str(name) for name in names)
        case "jsonl" | "parquet" | "hf":
            return e.task.path
