"""The run: the whole configuration file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lorelei.config.cluster import ClusterConfig, LocalCluster
from lorelei.config.errors import FieldError
from lorelei.config.experiment import (
    AdapterOverrides,
    Experiment,
    ExperimentDefaults,
    refuse_unused,
    resolve,
)
from lorelei.config.machine import MachineConfig
from lorelei.config.publish import MemoryPublish, PublishConfig
from lorelei.config.section import Name, Section, is_mapping
from lorelei.config.train import ArchonTrain, TrainConfig

DEFAULT_ADAPTER = "default"


def default_publisher(rollout_kind: str) -> str:
    """The kind of publisher that needs nothing set up."""
    return "memory" if rollout_kind == "embedded" else "http"


LOW_LORA_LR = 1e-5
HIGH_FULL_LR = 1e-4


class CheckpointConfig(Section):
    """Checkpoints of adapters; the base model is never written."""

    every: int = Field(default=1, ge=1, description="Steps between checkpoints.")
    keep: int = Field(
        default=2, ge=2, description="Checkpoints kept; at least 2, so that one damaged is no loss."
    )


class RunConfig(ExperimentDefaults):
    """One run: a frozen base model and the adapters trained on it."""

    name: Name = Field(default="run", description="Default: the YAML file's name without suffix.")
    model: str = Field(
        min_length=1,
        description="A model id of the Hugging Face hub or a folder; one that starts with '.' is "
        "relative to the YAML file.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of the base model; adapters and optimizer are float32."
    )
    runs_dir: str = Field(
        default="runs", description="The run folder is runs_dir/name; relative to where you are."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads. Default: the physical cores we may use.",
    )
    train: TrainConfig = Field(default_factory=ArchonTrain, description="The train engine.")
    publish: PublishConfig = Field(
        default_factory=MemoryPublish,
        description="The publisher. Default: memory for the embedded engine, http for servers.",
    )
    cluster: ClusterConfig = Field(
        default_factory=LocalCluster, description="Where train workers and servers run."
    )
    machine: MachineConfig = Field(
        default_factory=MachineConfig, description="What `lorelei plan` counts on."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is kept on disk."
    )
    adapters: dict[Name, AdapterOverrides] = Field(
        default_factory=dict[Name, AdapterOverrides],
        description="Several adapters at once: {name: overrides of seed, steps, lora, task, env, "
        "reward, algo, optimizer, rollout, eval}. Default: one, called 'default'.",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _nothing_overridden(cls, value: object) -> object:
        # `name:` with nothing behind it is YAML's null
        if not is_mapping(value):
            return value
        entries: dict[str, object] = dict(value)
        return {name: AdapterOverrides() if e is None else e for name, e in entries.items()}

    @model_validator(mode="before")
    @classmethod
    def _publisher_of_the_engine(cls, data: Any) -> Any:
        """The kind of `publish` follows from the rollout engine unless it is given."""
        if not is_mapping(data):
            return data
        rollout, publish = data.get("rollout"), data.get("publish")
        kind = rollout.get("kind", "embedded") if is_mapping(rollout) else "embedded"
        if publish is None or (is_mapping(publish) and "kind" not in publish):
            return {**data, "publish": {"kind": default_publisher(kind), **(publish or {})}}
        return data

    @model_validator(mode="after")
    def _publisher_fits(self) -> RunConfig:
        embedded = self.rollout.kind == "embedded"
        if embedded != (self.publish.kind == "memory"):
            allowed = "memory" if embedded else "http, disk, xccl"
            raise FieldError(
                "publish.kind",
                f"{self.publish.kind!r} cannot reach rollout.kind {self.rollout.kind!r}; "
                f"allowed: {allowed}",
            )
        return self

    @model_validator(mode="after")
    def _every_adapter_can_run(self) -> RunConfig:
        experiments = self.experiments()
        if not any(e.samples for e in experiments):
            refuse_unused(self, experiments[0].algo.kind)
        if not all(e.lora.use_lora for e in experiments):
            self._check_full_fine_tuning(experiments)
        return self

    def _check_full_fine_tuning(self, experiments: tuple[Experiment, ...]) -> None:
        if len(experiments) > 1:
            raise FieldError(
                "lora.use_lora",
                f"false with {len(experiments)} adapters; full fine-tuning trains one model: "
                "leave one entry in adapters, or use LoRA",
            )
        allowed: dict[str, tuple[str, str]] = {
            # a narrower one would round away most updates, and the sampler would round others
            "dtype": (self.dtype, "float32"),
            "train.kind": (self.train.kind, "archon or fsdp"),
            "rollout.kind": (self.rollout.kind, "embedded"),
        }
        for field, (value, only) in allowed.items():
            if value not in only.split(" or "):
                raise FieldError(
                    field, f"{value!r} is not allowed with lora.use_lora: false; use {only}"
                )
        if self.train.kind == "fsdp" and self.train.tensor_parallel > 1:
            raise FieldError(
                "train.tensor_parallel",
                f"{self.train.tensor_parallel} is not allowed with lora.use_lora: false; set it to "
                "1 and use train.data_parallel",
            )

    def experiments(self) -> tuple[Experiment, ...]:
        """What each adapter trains on, in the order of `adapters`."""
        entries = self.adapters or {DEFAULT_ADAPTER: AdapterOverrides()}
        return tuple(resolve(name, self, overrides) for name, overrides in entries.items())

    def warnings(self) -> list[str]:
        """What can run but is probably not meant, one line each."""
        found: list[str] = []
        if not self.publish.canary.enabled:
            found.append(
                "publish.canary.enabled: false; nobody notices a rollout engine that serves no "
                "adapter, an old one or another's"
            )
        for experiment in self.experiments():
            optimizer, where = experiment.optimizer, f"adapter {experiment.name}: optimizer"
            if not experiment.lora.use_lora and optimizer.lr > HIGH_FULL_LR:
                found.append(
                    f"{where}.lr: {optimizer.lr:g} is a rate for LoRA; "
                    "full fine-tuning wants about ten times less, 1e-6 to 1e-4"
                )
            if experiment.lora.use_lora and optimizer.lr < LOW_LORA_LR:
                found.append(
                    f"{where}.lr: {optimizer.lr:g} is a rate for full fine-tuning; "
                    "LoRA wants about ten times more, 1e-5 to 1e-3"
                )
            if optimizer.warmup_steps >= experiment.steps:
                found.append(
                    f"{where}.warmup_steps: {optimizer.warmup_steps} of {experiment.steps} steps; "
                    "the rate never reaches optimizer.lr"
                )
        return found
