"""Starts vLLM in its virtual environment: `python -P -m lorelei.inference.vllm.launcher`.

On a CPU, vLLM's engine and worker processes wait for each other in busy loops, and take the cores
that the API server and the trainer need. Started by this module they sleep until they are
notified. vLLM spawns its processes, and each of them imports this module again.
"""

from __future__ import annotations

import os

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

RESTS = "LORELEI_RESTS"  # environment variable: sleep instead of spinning
LOOK = 50  # milliseconds, should a notification be lost

_wait = SpinCondition.wait


def _rest(self: SpinCondition, timeout_ms: int | None = None) -> None:
    self.busy_loop_s = 0
    _wait(self, LOOK if timeout_ms is None else min(timeout_ms, LOOK))


if os.environ.get(RESTS):
    SpinCondition.wait = _rest


def main() -> None:
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
