"""How adapter versions reach the rollout engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorelei.config.canary import WithCanary
from lorelei.config.section import tagged


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
