"""How adapter versions reach the rollout engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorelei.config.section import Section, tagged


class CanaryConfig(Section):
    """Compares the log-probabilities of fixed tokens after every publication."""

    enabled: bool = Field(
        default=True, description="Stop when the rollout engine serves another adapter."
    )
    tokens: int | None = Field(
        default=None,
        ge=8,
        description="Tokens compared for each adapter. Default: 64, and 512 with a dtype other "
        "than float32, whose rounding hides small updates.",
    )


class WithCanary(Section):
    """What every publisher's section has."""

    canary: CanaryConfig = Field(
        default_factory=CanaryConfig, description="Checks what the rollout engine serves."
    )


class MemoryPublish(WithCanary):
    """A copy within the process, for the embedded engine."""

    kind: Literal["memory"] = Field(default="memory", description="Which publisher.")


class HttpPublish(WithCanary):
    """Safetensors bytes to every server: no shared disk, no group of processes."""

    kind: Literal["http"] = Field(description="Which publisher.")


class DiskPublish(WithCanary):
    """A PEFT folder for each version, on a disk that trainer and servers share."""

    kind: Literal["disk"] = Field(description="Which publisher.")
    folder: str | None = Field(
        default=None,
        description="Where versions are written, and deleted again. Default: in the run folder.",
    )


class XcclPublish(WithCanary):
    """A torch.distributed broadcast to every worker: NCCL between GPUs, gloo between CPUs."""

    kind: Literal["xccl"] = Field(description="Which publisher.")
    host: str | None = Field(
        default=None,
        description="The trainer's address, as the servers reach it. Default: 127.0.0.1, on a Ray "
        "cluster the one that its nodes reach.",
    )
    timeout: float = Field(
        default=60.0, gt=0, description="Seconds for one broadcast, and for the first meeting."
    )


PublishConfig = Annotated[
    MemoryPublish | HttpPublish | DiskPublish | XcclPublish,
    Field(discriminator="kind"),
    tagged(MemoryPublish, HttpPublish, DiskPublish, XcclPublish),
]
