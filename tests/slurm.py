"""A Slurm of a few hosts: sbatch, srun and scontrol that run what they get, on tests/hosts.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tests.hosts import Hosts

JOB = "4242"

# the commands know the folder they are in, and nothing of the hosts
_SBATCH = """
script = sys.stdin.read()
options = [line.split(None, 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
if not script.startswith("#!") or not options:
    sys.exit("sbatch: error: this does not look like a batch script")
(place / "options.json").write_text(json.dumps(options))
(place / "job.sh").write_text(script)
given = {"SLURM_JOB_ID": JOB, "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "host[1-2]"}
with (place / "job.log").open("ab") as log:
    job = subprocess.Popen(
        ["bash", "-c", "bash job.sh; echo $? > job.exit"],
        cwd=place, env={**os.environ, **given}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    )
print("Submitted batch job", JOB)
"""
_SRUN = """
words = sys.argv[1:]
count = int(next(w for w in words if w.startswith("--ntasks=")).partition("=")[2])
while words[0].startswith("-"):
    words.pop(0)
step = {"command": words, "count": count, "folder": os.getcwd(), "environment": dict(os.environ)}
(place / "step.new").write_text(json.dumps(step))
(place / "step.new").rename(place / "step.json")
while not (place / "step.exit").exists():
    time.sleep(0.1)
sys.exit(int((place / "step.exit").read_text()))
"""
_HEAD = """#!{python}
import json, os, subprocess, sys, time
from pathlib import Path
JOB, place = "{job}", Path("{place}")
"""


class Slurm:
    """Runs one job at a time, on the first hosts."""

    def __init__(self, hosts: Hosts, place: Path) -> None:
        """place: a folder of its own, which all hosts see."""
        self.place, self._hosts = place, hosts
        self.steps: list[subprocess.Popen[str]] = []
        commands = place / "bin"
        commands.mkdir(parents=True)
        head = _HEAD.format(python=sys.executable, job=JOB, place=place)
        for name, body in (("sbatch", _SBATCH), ("srun", _SRUN)):
            (commands / name).write_text(head + body)
            (commands / name).chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, *arguments: str, environment: Mapping[str, str], folder: Path) -> str:
        """`lorelei launch slurm ...` on the first host; what it prints."""
        for name in ("job.exit", "step.exit", "step.json"):
            (self.place / name).unlink(missing_ok=True)
        out = self.place / "submitted.txt"
        with out.open("w") as file:
            run = self._hosts.all[0].start(
                [sys.executable, "-m", "lorelei", "launch", "slurm", *arguments],
                {**environment, "PATH": f"{self.place / 'bin'}:{environment['PATH']}"},
                folder,
                file,
            )
        assert run.wait(60) == 0, out.read_text()
        return out.read_text()

    def wait(self, seconds: float) -> int:
        """The job's exit status."""
        deadline = time.monotonic() + seconds
        while not (self.place / "job.exit").exists() or not self._told("job.exit"):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)
        return int(self._told("job.exit"))

    @property
    def log(self) -> str:
        """What the job and its tasks have printed."""
        files = sorted(self.place.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-4000:]}" for file in files)

    def _told(self, name: str) -> str:
        return (self.place / name).read_text().strip()

    def _serve(self) -> None:
        """What slurmd does: the tasks of a step, one on each host."""
        while True:
            time.sleep(0.1)
            if not (self.place / "step.json").exists() or (self.place / "step.exit").exists():
                continue
            step = json.loads(self._told("step.json"))
            self.steps = []
            for host in self._hosts.all[: step["count"]]:
                with (self.place / f"task-{host.name}.log").open("a") as log:
                    given = (step["command"], step["environment"], Path(step["folder"]), log)
                    self.steps.append(host.start(*given))
            codes = [task.wait() for task in self.steps]
            (self.place / "step.new").write_text(str(max(codes)))
            os.rename(self.place / "step.new", self.place / "step.exit")
