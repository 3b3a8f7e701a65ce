"""Starts SGLang's server with our hooks, in SGLang's virtual environment.

`python -m lorelei.inference.sglang.in_server.launcher ARGUMENTS OF SGLANG`. SGLang spawns its
processes, and each of them imports this module again.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lorelei.inference.sglang.in_server import cpu

cpu.install_shims()  # before anything imports sglang


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, with our sampler and adapter route."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    from lorelei.inference.sglang.in_server import (
        adapters,
        counter,
        finishing,
        sampling,
        scoring,
    )

    for hook in (adapters, sampling, scoring, finishing, counter):
        hook.install()
    run_scheduler_process(*args, **kwargs)


def main() -> None:
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from lorelei.inference.server.routes import LOOPBACK, TOKEN, Middleware
    from lorelei.inference.sglang.in_server import counter, routes

    counter.make_counter()
    app.add_middleware(Middleware, make=routes.SglangServer)
    # a token on the command line would be everybody's to read
    token = os.environ.get(TOKEN)
    arguments = prepare_server_args([*sys.argv[1:], *(("--api-key", token) if token else ())])
    if token is None and arguments.host not in LOOPBACK:
        sys.exit(f"bound to {arguments.host} without {TOKEN}; set it, here and at the trainer")
    arguments.resolve_once()
    try:
        launch_server(arguments, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
