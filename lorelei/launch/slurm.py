"""A Slurm job that starts Ray on its nodes and trains on them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.run import RunConfig

STORE = 2_000_000_000  # bytes of Ray's object store on each node: only adapters and batches pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What is asked of Slurm."""

    nodes: int
    gpus_per_node: int
    options: tuple[str, ...]  # of sbatch, as on its command line
    setup: tuple[str, ...]  # shell lines before anything is started


def check(config: RunConfig, job: SlurmJob) -> None:
    """Raises ValueError when the nodes have too few GPUs for the processes of the run."""
    rollout = config.rollout
    servers = 0 if rollout.kind == "embedded" or rollout.urls else rollout.replicas
    held = config.train.workers + servers
    if job.gpus_per_node and held > job.nodes * job.gpus_per_node:
        raise ValueError(
            f"--nodes {job.nodes} x --gpus-per-node {job.gpus_per_node}: {held} processes "
            "need a GPU each (train workers and servers; see `lorelei plan`); ask for more, or "
            "lower rollout.replicas or the processes of train"
        )


def job_script(config: RunConfig, job: SlurmJob, run: Path, overrides: Sequence[str]) -> str:
    """The text for sbatch. run: the YAML file; overrides: as on the command line of `train`.

    The script goes on with a run that is there already, so that Slurm may queue it again.
    """
    folder = Path(config.runs_dir) / config.name
    train = ["train", str(run.absolute()), *overrides]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(config, job)),
        setup="\n".join(job.setup),
        place=shlex.quote(str(Path.cwd())),
        bin=shlex.quote(str(Path(sys.executable).parent)),
        identity=shlex.quote(str(folder / "run.json")),
        resume=shlex.join(["resume", str(folder)]),
        train=shlex.join(train),
        nodes=job.nodes,
        gpus=f" --num-gpus={job.gpus_per_node}" if job.gpus_per_node else "",
        store=STORE,
    )


def submit(script: str) -> str:
    """What sbatch answers. Raises ValueError when there is none, or it refuses the job."""
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(
            "launch slurm: there is no sbatch here; use a login node of the cluster, or --dry-run"
        ) from error
    if done.returncode != 0:
        raise ValueError(f"sbatch: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _options(config: RunConfig, job: SlurmJob) -> list[str]:
    derived = [
        f"--job-name=lorelei-{config.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",  # `ray stop` ends every Ray of its user on a node
        f"--output=lorelei-{config.name}-%j.log",
        "--signal=B:TERM@120",  # seconds before the time is over: the step is saved
        "--requeue",
    ]
    if job.gpus_per_node:
        derived.append(f"--gpus-per-node={job.gpus_per_node}")
    return [*derived, *job.options]


_SCRIPT = """\
#!/bin/bash
{options}
set -euo pipefail
umask 077
cd {place}
export PATH={bin}:$PATH
{setup}

# whoever has the token may run code on these nodes: a new one for each job
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 RAY_USAGE_STATS_ENABLED=0

# this script runs on the first node, where Ray's head and the loop will be
address=${{LORELEI_HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}}:$((20000 + SLURM_JOB_ID % 10000))
pid=$(mktemp)
if [ -e {identity} ]; then
  work=({resume})
else
  work=({train} cluster.kind=ray)
fi
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \\
  ray symmetric-run --address "$address" --min-nodes {nodes} \\
  --num-cpus="$SLURM_CPUS_ON_NODE"{gpus} --object-store-memory={store} \\
  -- bash -c 'echo $$ > "$1"; export RAY_ADDRESS=$2; exec python -m lorelei "${{@:3}}"' \\
  - "$pid" "$address" "${{work[@]}}" &
# Slurm's warning is for Lorelei, which saves; Ray must not hear it
trap 'kill -TERM "$(cat "$pid")" || true' TERM
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do
  code=0
  wait $! || code=$?
done
rm -f "$pid"
exit "$code"
"""
