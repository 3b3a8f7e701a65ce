"""A Ray cluster of several nodes on this machine, in a process of its own.

`python -m tests.ray_nodes NODES` prints the address of the head, which has no cores for work, and
the pids of the nodes' raylets; it ends with its standard input.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorelei.process_guard import descendants

STORE = 100 * 1024 * 1024  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNodes:
    """A running cluster."""

    address: str
    environment: Mapping[str, str]  # of whoever talks to it
    raylets: tuple[int, ...]  # one for each node with cores
    pid: int

    def workers(self) -> list[int]:
        """The train workers that run on any node."""
        return [p for p in descendants(self.pid) if "lorelei.train.remote.worker" in command(p)]


@contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """Start it, with one core on each node and a token that nobody else has."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_open_telemetry": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes", str(count)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = json.loads(next(line for line in process.stdout if line.startswith("{")))
        yield RayNodes(
            address=found["address"],
            environment={**environment, "RAY_ADDRESS": found["address"]},
            raylets=tuple(found["raylets"]),
            pid=process.pid,
        )
    finally:
        process.communicate()


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def main() -> None:
    from ray.cluster_utils import Cluster

    shared = {"object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**shared, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, **shared) for _ in range(int(sys.argv[1]))]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)  # noqa: T201
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
