"""Where the processes of a run are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorelei.config.section import Section, tagged


class _Cluster(Section):
    restarts: int = Field(
        default=3,
        ge=0,
        description="Most restarts of lost train workers in a row, without a finished step.",
    )


class LocalCluster(_Cluster):
    """Everything on this machine; rollout servers may be elsewhere (rollout.urls)."""

    kind: Literal["local"] = Field(default="local", description="Where processes are started.")


class RayCluster(_Cluster):
    """Train workers and rollout servers on the nodes of a Ray cluster; the loop runs here."""

    kind: Literal["ray"] = Field(description="Where processes are started.")
    address: str | None = Field(
        default=None,
        description="host:port of Ray's head. Default: RAY_ADDRESS, else Ray on this machine.",
    )
    host: str | None = Field(
        default=None,
        description="This machine's address, as the nodes reach it. Default: the one Ray uses.",
    )
    spread: Literal["pack", "spread", "strict"] = Field(
        default="pack",
        description="pack: few nodes. spread: many. strict: each process on a node of its own.",
    )
    cpus_per_worker: int = Field(
        default=1, ge=1, le=1024, description="CPU cores, and threads, of each train worker."
    )
    gpus_per_worker: int | None = Field(
        default=None,
        ge=0,
        description="GPUs of each process. Default: 1 if Ray has any, else 0.",
    )
    wait: float = Field(
        default=600.0, gt=0, description="Seconds to wait until Ray has room for all processes."
    )


ClusterConfig = Annotated[
    LocalCluster | RayCluster,
    Field(discriminator="kind"),
    tagged(LocalCluster, RayCluster, default="local"),
]
