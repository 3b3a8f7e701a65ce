"""A worker process: one rank of a train engine. It takes orders from one private socket only."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lorelei.model.backend import default_device, dist_backend
from lorelei.parallel.ranks import RankFailed, Ranks
from lorelei.train.contract import TrainEngine
from lorelei.train.kinds import TRAIN
from lorelei.train.remote.forwarding import CALLS
from lorelei.train.remote.wire import NETWORK, Call, Failure, Reply, Start, receive, send


def main() -> None:
    """Serve the socket whose file descriptor is the only argument, until its other end closes."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    channel = socket.socket(fileno=int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):
        serve(channel)
    if dist.is_initialized():
        dist.destroy_process_group()


def serve(channel: socket.socket) -> None:
    """Build the engine and answer calls. Raises EOFError when the controller has closed."""
    start: Start = receive(channel)
    started = _attempt(lambda: _start(start))
    if isinstance(started, Failure):
        send(channel, started)
        return
    engine: TrainEngine = started.value
    send(channel, Reply(value=None))
    while True:
        outcome = _attempt(_bound(engine, receive(channel)))
        if isinstance(outcome, Reply) and dist.get_rank() > 0:
            outcome = Reply(value=None)  # the ranks agree, and one copy is enough
        send(channel, outcome)


def _end_with(parent: int) -> None:
    """A rank that waits for another one in a collective call does not see its channel close."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _start(start: Start) -> TrainEngine:
    if torch.accelerator.is_available():
        local = int(os.environ["LOCAL_RANK"])
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    timeout = timedelta(seconds=start.timeout)
    backend = dist_backend(default_device(), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group(backend, timeout=timeout)
    (kind,) = (kind for kind in TRAIN.values() if kind.spec is type(start.spec))
    return kind.build(start.spec, Ranks.joined())


def _bound(engine: TrainEngine, call: Call) -> Callable[[], Any]:
    assert call.method in CALLS, call.method
    return lambda: getattr(engine, call.method)(*call.args)


def _attempt(work: Callable[[], Any]) -> Reply | Failure:
    try:
        return Reply(value=work())
    except KeyError as error:  # its text is the repr of its argument
        return Failure(kind="KeyError", text=str(error.args[0]) if error.args else "")
    except ValueError as error:
        return Failure(kind="ValueError", text=str(error))
    except RankFailed as error:
        return Failure(kind="RankFailed", text=str(error))
    except Exception as error:  # the border: what a call raises is the controller's
        text = "".join(traceback.format_exception(error))
        return Failure(kind=NETWORK if _of_the_network(error) else type(error).__name__, text=text)


def _of_the_network(error: Exception) -> bool:
    """Whether another rank was out of reach: gloo says so with a plain RuntimeError."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


if __name__ == "__main__":
    main()
