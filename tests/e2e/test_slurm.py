"""`lorelei launch slurm`: the job script, and a job that trains on two hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lorelei.store.check import check_run
from tests.hosts import Hosts, require_hosts
from tests.slurm import Slurm
from tests.tiny_runs import final, lorelei, make_workplace, write_run

pytest.importorskip("ray")
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": os.environ.get("HOME", "/root"),
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "RAY_enable_open_telemetry": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # how long a node outlives its head
}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    shared = {"steps": 4, "eval": {"every": 0}, "train": {"workers": 2}}
    write_run(place, "here", **shared)
    write_run(place, "there", **shared, cluster={"kind": "ray", "spread": "strict"})
    return place


def dry(place: Path, *arguments: str, code: int = 0) -> str:
    return lorelei(place, "launch", "slurm", "there.yaml", *arguments, code=code)


def test_a_dry_run_prints_a_script_that_bash_accepts(place: Path) -> None:
    script = dry(
        place,
        *("--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--sbatch=--partition=a b"),
        *("--setup", "module load cuda", "task.prompt_template=it's {question}"),
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    for option in ("--nodes=2", "--gpus-per-node=4", "--partition=a b", "--requeue"):
        assert f"#SBATCH {option}" in lines
    assert lines[0] == "#!/bin/bash" and "module load cuda" in lines
    assert "'task.prompt_template=it'\"'\"'s {question}'" in script
    assert "--num-gpus=4" in script and "RAY_AUTH_MODE=token" in script


def test_too_few_gpus_and_a_missing_sbatch_are_one_line(place: Path) -> None:
    few = dry(place, "--gpus-per-node", "1", "train.workers=3", code=2)
    assert "3 processes need a GPU each" in " ".join(few.split())
    assert "there is no sbatch here" in dry(place, code=2)
    assert "algo.rl" in dry(place, "algo.rl=1", code=2)


def test_the_template_for_skypilot_is_one_that_bash_accepts() -> None:
    root = Path(__file__).parents[2]
    task = yaml.safe_load((root / "recipes/cluster/skypilot.yaml").read_text())
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert set(task["envs"]) == {"RAY_AUTH_TOKEN", "RUN"} and (root / task["envs"]["RUN"]).is_file()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_job_trains_on_two_hosts_and_ends_with_the_adapter_of_this_machine(
    place: Path, tmp_path: Path
) -> None:
    require_hosts()
    lorelei(place, "train", "here.yaml")
    with Hosts(2) as hosts:
        slurm = Slurm(hosts, tmp_path / "slurm")
        told = slurm.submit("there.yaml", "--nodes", "2", environment=ENVIRONMENT, folder=place)
        assert told == "Submitted batch job 4242\n"
        assert slurm.wait(180) == 0, slurm.log
    assert "train worker" not in slurm.log, "nothing was lost"
    assert final(place / "runs/there") == final(place / "runs/here")
    assert check_run(place / "runs/there") == []
