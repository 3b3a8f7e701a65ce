"""Train workers and inference servers on the nodes of a Ray cluster.

Ray brings processes to nodes, carries calls to them, and notices their end. All actors of a run
are in one placement group, reserved before anything heavy starts.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lorelei.config.cluster import RayCluster
from lorelei.inference.server.backend import ServerBackend
from lorelei.inference.server.client import ServerTrouble
from lorelei.inference.server.process import RunningServer
from lorelei.train.contract import WorkersLost
from lorelei.train.remote.workers import RankInfo, WorkerGone, open_store

# Ray reads them when it is imported; what goes wrong comes as an exception too
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
try:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ModuleNotFoundError as error:
    raise ValueError(
        "cluster.kind: 'ray' needs Ray; install it with `pip install 'lorelei[ray]'`, in the same "
        "version on all nodes"
    ) from error

from lorelei.launch.ray_node import Host, NodeFacts, installed

_STRATEGIES = {"pack": "PACK", "spread": "SPREAD", "strict": "STRICT_SPREAD"}
_QUICK = 10.0  # seconds for an actor to answer a small question


class Cluster:
    """A connection to Ray, and the resources that it reserves for this run."""

    def __init__(self, config: RayCluster, workers: int, servers: int, server_cpus: int) -> None:
        """Connect and reserve resources: of `workers` train workers, then of `servers` servers.

        Raises ValueError for a user-fixable error: no Ray, no token, other versions, no room.
        """
        self._config, self._workers = config, workers
        _connect(config.address)
        self.host = config.host or ray.util.get_node_ip_address()
        try:
            self.gpus = config.gpus_per_worker
            if self.gpus is None:
                self.gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
            self._idle: list[Any] = []
            self._bundles = [{"CPU": config.cpus_per_worker, "GPU": self.gpus}] * workers
            self._bundles += [{"CPU": server_cpus, "GPU": self.gpus}] * servers
            self._group = placement_group(
                [{k: v for k, v in b.items() if v} for b in self._bundles],
                strategy=_STRATEGIES[config.spread],
            )
            if not self._group.wait(config.wait):
                raise ValueError(f"cluster.wait: {self._no_room()}")
            self._idle += [self._new_actor(n) for n in range(len(self._bundles))]
            self._check(self._idle)
        except BaseException:
            ray.shutdown()
            raise

    def launch_workers(self, size: int, python: str) -> RayWorkers:
        """Implements Launcher. For our own interpreter, nodes take that of their Ray."""
        assert size == self._workers, "one bundle was reserved for each"
        theirs = None if python == sys.executable else python
        return RayWorkers([self._actor(n) for n in range(size)], self._config, self.host, theirs)

    def start(self, backend: ServerBackend, number: int, token: str, folder: Path) -> RunningServer:
        """Implements Launcher."""
        actor = self._actor(self._workers + number)
        return RayServer(actor, backend, number, token, folder, self._config.wait)

    def close(self) -> None:
        """Release the resources and disconnect. Idempotent."""
        if ray.is_initialized():
            remove_placement_group(self._group)
            ray.shutdown()

    def _actor(self, number: int) -> Any:
        """An actor in one of the bundles, unused so far."""
        actor, self._idle[number] = self._idle[number], None
        return actor or self._new_actor(number)

    def _new_actor(self, number: int) -> Any:
        bundle = self._bundles[number]
        return (
            ray.remote(Host)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle["GPU"],
                max_restarts=0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=number
                ),
            )
            .remote()
        )

    def _check(self, actors: Sequence[Any]) -> None:
        """Every node has what this machine has, and asks for a token."""
        try:
            found: list[NodeFacts] = ray.get(
                [actor.facts.remote() for actor in actors], timeout=self._config.wait
            )
        except GetTimeoutError as error:
            raise ValueError(f"cluster.wait: {self._no_room()}") from error
        except RayError as error:
            raise ValueError(f"cluster: a node cannot run Lorelei: {_last_line(error)}") from error
        for facts in found:
            for (what, there), (_, here) in zip(facts.versions, installed(), strict=True):
                if there != here:
                    raise ValueError(
                        f"cluster: node {facts.address} has {what} {there}, this machine {here}; "
                        "install the same version on both"
                    )
            if facts.auth != "token" and not ipaddress.ip_address(facts.address).is_loopback:
                raise ValueError(
                    f"cluster: Ray on node {facts.address} asks nobody for a token; whoever "
                    "reaches it runs code there. Start Ray with RAY_AUTH_MODE=token on every node"
                )

    def _no_room(self) -> str:
        total = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
        wanted = [{k: v for k, v in b.items() if v} for b in self._bundles]
        return (
            f"{self._config.wait:g} s have passed and Ray has no room for {wanted} "
            f"(cluster.spread: {self._config.spread}); its nodes have {total} in all. Add nodes, "
            "ask for less, or wait longer"
        )


class RayWorkers:
    """Implements Workers."""

    def __init__(
        self, actors: Sequence[Any], config: RayCluster, host: str, python: str | None
    ) -> None:
        """Raises WorkersLost when a node is lost meanwhile."""
        self._actors = actors
        self._store, port = open_store(host)
        seats = [
            RankInfo(
                rank=rank,
                size=len(actors),
                # Ray shows each process its own devices only
                local_rank=0,
                local_size=1,
                threads=config.cpus_per_worker,
                host=host,
                port=port,
                interface="",  # its node knows
            )
            for rank in range(len(actors))
        ]
        started = [a.start_worker.remote(s, python) for a, s in zip(actors, seats, strict=True)]
        try:
            facts: list[NodeFacts] = ray.get(
                [a.facts.remote() for a in actors], timeout=config.wait
            )
            self.pids: Sequence[int] = ray.get(started, timeout=config.wait)
        except RayError as error:
            self.end(0)
            raise WorkersLost(f"train workers do not start: {_last_line(error)}") from error
        self.addresses = [f.address for f in facts]
        self.names: Sequence[str] = [
            f"{rank} (pid {pid} on {address})"
            for rank, (pid, address) in enumerate(zip(self.pids, self.addresses, strict=True))
        ]

    def ask(self, frame: bytes) -> Sequence[Future[bytes]]:
        held = ray.put(frame)
        return [_answer(actor.exchange.remote(held)) for actor in self._actors]

    def end(self, grace: float) -> None:
        ending = [actor.end_worker.remote(grace) for actor in self._actors]
        ray.wait(ending, num_returns=len(ending), timeout=grace + _QUICK)
        for actor in self._actors:
            ray.kill(actor)


class RayServer:
    """Implements RunningServer."""

    def __init__(
        self, actor: Any, backend: ServerBackend, number: int, token: str, folder: Path, wait: float
    ) -> None:
        """wait: seconds for a node that is lost to come back, or for another one.

        Raises ValueError when it cannot be started there, ServerTrouble when no node is there.
        """
        self._actor = actor
        try:
            self.url: str = ray.get(
                actor.start_server.remote(backend, number, token, str(folder.absolute())),
                timeout=wait,
            )
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise ValueError(f"{backend.name}-{number} on its node: {cause}") from error
        except RayError as error:
            raise ServerTrouble(f"its node is lost: {_last_line(error)}") from error
        self._ended: Future[None] = actor.server_ended.remote().future()

    @property
    def alive(self) -> bool:
        return not self._ended.done()

    @property
    def pids(self) -> list[int]:
        return self._told(self._actor.server_pids, [])

    def log_tail(self) -> str:
        return self._told(self._actor.server_log_tail, "its node is lost")

    async def stop(self) -> None:
        await asyncio.to_thread(self._told, self._actor.end_server, None, 60.0)
        ray.kill(self._actor)

    def _told(self, method: Any, otherwise: Any, timeout: float = _QUICK) -> Any:
        try:
            return ray.get(method.remote(), timeout=timeout)
        except RayError:
            return otherwise


def _connect(address: str | None) -> None:
    if ray.is_initialized():
        raise ValueError("cluster.kind: 'ray': this process is connected to a Ray cluster already")
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        ray.init(
            address=where, namespace="lorelei", log_to_driver=False, logging_level=logging.WARNING
        )
    except (ConnectionError, RayError) as error:
        raise ValueError(
            f"cluster.address: no Ray at {where!r} that takes our token ({_last_line(error)}); "
            "start it on every node with `ray start` and RAY_AUTH_MODE=token, or write a job with "
            "`lorelei launch slurm`. The token is looked for in RAY_AUTH_TOKEN, "
            "RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token"
        ) from error
    except RuntimeError as error:  # among them: other versions of Ray or Python
        raise ValueError(f"cluster.address: {where!r}: {' '.join(str(error).split())}") from error


def _answer(ref: Any) -> Future[bytes]:
    """The answer, with Ray's errors as WorkerGone."""
    answer: Future[bytes] = Future()

    def done(came: Future[Any]) -> None:
        if (error := came.exception()) is None:
            answer.set_result(came.result())
            return
        why = _last_line(error)
        if isinstance(error, RayTaskError) and isinstance(error.cause, WorkerGone):
            why = str(error.cause)
        elif isinstance(error, RayActorError):
            why = f"was lost with its node or actor ({why})"
        answer.set_exception(WorkerGone(why))

    ref.future().add_done_callback(done)
    return answer


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
