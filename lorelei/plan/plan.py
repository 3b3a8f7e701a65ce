"""The plan: what a run would train and need, known before any weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorelei.algo.frozen import frozen_adapters, parse_version
from lorelei.algo.kinds import expansion, short_name
from lorelei.config.env import AgentEnv, PythonEnv
from lorelei.config.errors import ConfigError
from lorelei.config.experiment import Experiment
from lorelei.config.reward import PythonReward
from lorelei.config.run import RunConfig
from lorelei.config.section import is_mapping
from lorelei.config.task import JsonlTask, ParquetTask
from lorelei.inference.kinds import INFERENCE
from lorelei.lora.targets import match_targets, tied_names
from lorelei.model.config import BYTES, ModelInfo, ModelSizes
from lorelei.model.shapes import find_shape
from lorelei.model.turn_end import turn_end
from lorelei.plan.adapter_size import AdapterSize, full_size, lora_size
from lorelei.plan.frozen_size import frozen_size
from lorelei.plan.hardware import Hardware, this_machine
from lorelei.plan.memory import Footprint, ProcessGroup, estimate_memory
from lorelei.plan.model_info import model_info
from lorelei.plan.processes import process_groups
from lorelei.train.kinds import TRAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """What one adapter trains."""

    name: str
    task: str
    reward: str | None  # None: nothing is scored
    algo: str
    expands: str  # what the algorithm is beside grpo; empty: nothing is to be said
    steps: int
    sequences_per_step: int  # rollouts, or rows of the data
    samples: bool  # whether they are rollouts
    rank: int  # 0: full fine-tuning
    modules: tuple[str, ...]  # the linear layers that get an adapter, or that are trained
    tied: Mapping[str, str]  # {module: the name of the A that it shares}
    parameters: int  # trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run trains and needs."""

    run: str
    model: str
    folder: str
    architecture: str
    dtype: str
    parameters: Mapping[str, int]  # of the base model, by part
    adapters: tuple[AdapterPlan, ...]
    device: Literal["cpu", "accelerator"]  # whose memory it is
    device_memory: int | None  # bytes of one, or of all CPUs together, where it is known
    # bytes, estimated, by phase and part, of a controller that trains itself
    memory: Mapping[str, Mapping[str, int]]
    processes: tuple[ProcessGroup, ...]
    problems: tuple[str, ...]  # why the run does not fit the devices
    warnings: tuple[str, ...]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_memory(self) -> int:
        """Of the phase that needs most; without phases, of the largest process."""
        phases = [sum(parts.values()) for parts in self.memory.values()]
        return max(phases or [group.bytes for group in self.processes])

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the totals."""
        return {
            **dataclasses.asdict(self),
            "total_parameters": self.total_parameters,
            "total_memory": self.total_memory,
        }


def plan(config: RunConfig, hardware: Hardware | None = None) -> Plan:
    """Look the model up and say what the run would do. hardware: None: this machine.

    Raises ValueError (one line) for a model that is nowhere or not supported, for targets that
    match nothing, for completions that the model has no room for, and for too few devices.
    """
    hardware = hardware or this_machine()
    folder = find_shape(config.model)
    hf_config = _read_config(folder / "config.json")
    try:
        known = model_info(config, folder, hf_config)
    except KeyError as error:
        raise ConfigError(
            f"model: {folder / 'config.json'} has no {error}; get it again"
        ) from error
    model, shapes, parameters = known.sizes, known.linears, known.parameters
    _check_context(config, model)
    _check_files(config)
    TRAIN[config.train.kind].check(config.train, model, hf_config)
    adapters, sizes = zip(
        *(_adapter_plan(e, config, known) for e in config.experiments()), strict=True
    )
    on_cpu, modules = hardware.on_cpu, {name for a in adapters for name in a.modules}
    INFERENCE[config.rollout.kind].check(config, model, sorted(modules), on_cpu)
    run = Footprint(
        config=config,
        model=model,
        base=sum(parameters.values()),
        stored=_stored(hf_config),
        adapters=sizes,
        frozen=frozen_size(config),
        on_cpu=on_cpu,
    )
    alone = TRAIN[config.train.kind].here is not None and config.cluster.kind == "local"
    phases = estimate_memory(run) if alone else {}
    processes, problems = process_groups(run, parameters, shapes, modules, hardware, phases)
    return Plan(
        run=config.name,
        model=config.model,
        folder=str(folder),
        architecture=model.architecture,
        dtype=config.dtype,
        parameters=parameters,
        adapters=adapters,
        device="cpu" if on_cpu else "accelerator",
        device_memory=hardware.memory,
        memory=phases,
        processes=processes,
        problems=problems,
        warnings=(*config.warnings(), *_unnamed_end(folder)),
    )


def _unnamed_end(folder: Path) -> list[str]:
    end = turn_end(folder)
    return [] if end is None or end.named else [end.line]


def _adapter_plan(
    experiment: Experiment, config: RunConfig, model: ModelInfo
) -> tuple[AdapterPlan, AdapterSize]:
    spec, shapes, task = experiment.lora.spec(), model.linears, experiment.task
    try:
        modules = (
            list(shapes) if spec.full else match_targets(shapes, spec, model.sizes.architecture)
        )
    except ValueError as error:
        where = f"adapters.{experiment.name}." if config.adapters else ""
        raise ConfigError(f"{where}{error}") from error
    tied = {name: a for name, a in tied_names(modules, spec).items() if a != name}
    if spec.full:
        size = full_size(model.sizes, sum(model.parameters.values()))
    else:
        size = lora_size(model.sizes, shapes, modules, spec.rank, tied)
    adapter = AdapterPlan(
        name=experiment.name,
        task=task.title if task.kind == "reasoning_gym" else f"{task.kind} {Path(task.path).name}",
        reward=experiment.reward.kind if experiment.reward else None,
        algo=short_name(experiment.algo.kind),
        expands=expansion(experiment.algo),
        steps=experiment.steps,
        sequences_per_step=experiment.algo.batch_size
        * (experiment.rollout.n_samples if experiment.samples else 1),
        samples=experiment.samples,
        rank=spec.rank,
        modules=tuple(modules),
        tied=tied,
        parameters=size.trained,
    )
    return adapter, size


def _stored(hf_config: Mapping[str, Any]) -> str:
    """The dtype of the checkpoint's tensors; older files name it torch_dtype, or not at all."""
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return named if named in BYTES else "float32"


def _check_context(config: RunConfig, model: ModelSizes) -> None:
    limit, asked = model.max_positions, config.rollout.max_context
    if asked is not None and asked > limit:
        raise ConfigError(
            f"rollout.max_context: {asked} is more than the model's {limit} positions; lower it"
        )
    for experiment in config.experiments():
        if not experiment.samples:
            continue
        longest = max(experiment.rollout.max_new_tokens, experiment.eval.max_new_tokens or 0)
        if longest >= (asked or limit):
            raise ConfigError(
                f"rollout.max_new_tokens: {longest} (adapter {experiment.name}) leaves no room for "
                f"a prompt in {asked or limit} positions; lower it"
            )


def _check_files(config: RunConfig) -> None:
    for experiment in config.experiments():
        task, reward, start = experiment.task, experiment.reward, experiment.lora.init_from
        env = experiment.env
        yours = env.tools if env.kind == "tools" else ()
        files = {
            "env.path": _file(env.path) if isinstance(env, PythonEnv | AgentEnv) else None,
            **{f"env.tools: {tool}": _file(tool) for tool in yours if ".py:" in tool},
            "task.path": task.path if isinstance(task, JsonlTask | ParquetTask) else None,
            "reward.path": _file(reward.path) if isinstance(reward, PythonReward) else None,
            "lora.init_from": str(Path(start, "adapter_config.json")) if start else None,
            **{f"algo.{k}": _adapter(v) for k, v in frozen_adapters(experiment.algo).items()},
        }
        for field, file in files.items():
            if file is not None and not Path(file).is_file():
                raise ConfigError(
                    f"{field}: there is no file {file} (adapter {experiment.name}); a relative "
                    "path starts at the YAML file's folder"
                )


def _adapter(named: str) -> str:
    """A file of a frozen adapter, or of the run that has it."""
    version = parse_version(named)
    return str(version.run / "run.json" if version else Path(named, "adapter_config.json"))


def _file(path: str) -> str:
    """The file of 'file.py:function'."""
    return path.rpartition(":")[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model: {path} is not JSON ({error}); get it again") from error
    if not is_mapping(found):
        raise ConfigError(f"model: {path} holds no JSON object; get it again")
    return found
