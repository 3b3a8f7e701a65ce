"""Starts `lorelei ...` in a moment: a process with everything imported forks for each command.

Reads a JSON list of arguments from each line of standard input; answers with the child's pid, and
when the child has ended with its wait status. The child is a real process with its own memory: it
can be killed like any other. No tensor is touched before the fork, and OMP_NUM_THREADS is 1, so
that no thread of the parent is missing in the child.
"""

from __future__ import annotations

import json
import os
import sys

from lorelei.cli import main as cli
from lorelei.launch import local  # noqa: F401 - what the commands import late


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.argv = ["lorelei", *json.loads(line)]
            null, log = os.open(os.devnull, os.O_RDONLY), os.open("log.txt", LOG, 0o644)
            for fd, source in enumerate((null, log, log)):
                os.dup2(source, fd)
            cli.main()
            sys.stdout.flush()
            os._exit(0)
        print(pid, flush=True)  # noqa: T201
        print(os.waitpid(pid, 0)[1], flush=True)  # noqa: T201


LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND

if __name__ == "__main__":
    main()
