"""Starts `lorelei ...` in a moment: a process with everything imported forks for each command.

Reads a command as JSON from each line of standard input; answers with the child's pid, and when
the child has ended with its wait status. The child is a real process with its own memory: it can
be killed like any other. No tensor is touched before the fork, and OMP_NUM_THREADS is 1, so that
no thread of the parent is missing in the child.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class ForkServer:
    """Runs one command at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(
        self,
        *arguments: str,
        folder: Path,
        out: Path,
        errors: Path,
        environment: Mapping[str, str],
    ) -> int:
        """The pid of a command that runs in a folder, with additions to the environment.

        out, errors: what it prints is added to these files.
        """
        assert self._process.stdin is not None
        order = (arguments, str(folder), str(out), str(errors), dict(environment))
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def ended(self, seconds: float) -> bool:
        """Whether the command has ended, within this time."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def code(self) -> int:
        """Wait for its exit code; minus the signal for a command that died of one."""
        return os.waitstatus_to_exitcode(int(self._answer()))

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def main() -> None:
    from transformers import AutoTokenizer  # noqa: F401

    from lorelei.cli.main import main as command

    # what the commands import late
    from lorelei.launch import local  # noqa: F401

    for line in sys.stdin:
        arguments, folder, out, errors, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            os.environ |= environment
            sys.argv = ["lorelei", *arguments]
            for fd, path in enumerate((os.devnull, out, errors)):
                os.dup2(os.open(path, LOG if fd else os.O_RDONLY, 0o644), fd)
            command()
            sys.stdout.flush()
            os._exit(0)
        print(pid, flush=True)  # noqa: T201
        print(os.waitpid(pid, 0)[1], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
