"""Rewards that do what a reward should not; each gives the sample's own value where it returns."""

from __future__ import annotations

import asyncio
import atexit
import builtins
import contextlib
import ctypes
import gc
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

SLEEP = "7777.25"  # seconds; how the processes that must not be left are found


def own(number: int) -> float:
    """The value of a sample."""
    return float(number) + 0.5


def plain(number: int) -> object:
    return own(number)


def _daemon(*, forever: bool = False) -> None:
    """A process that no parent, session or group connects with this one."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if forever:
                while True:
                    time.sleep(60)
            os.execvp("sleep", ["sleep", SLEEP])
        os._exit(0)
    os.wait()


def _fds() -> range:
    return range(3, 300)


class Angry(BaseException):
    """Not an Exception, and cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Liar(float):
    def __repr__(self) -> str:
        return "99.0, 99.0"

    def __float__(self) -> float:
        raise Angry


class Number:
    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value


def _raise(error: BaseException) -> object:
    raise error


def _recurse() -> int:
    return _recurse() + 1


def _memory() -> object:
    return len(bytearray(1 << 36))


def _eat_memory() -> object:
    held = []
    while True:
        held.append(np.ones(1 << 24))


def _fork_and_return(number: int) -> object:
    os.fork()
    return own(number)


def _c_fork_and_return(number: int) -> object:
    ctypes.CDLL(None).fork()
    return own(number)


def _fork_and_raise(number: int) -> object:
    if os.fork() == 0:
        raise RuntimeError("in the child")
    return own(number)


def _fork_many(number: int) -> object:
    for _ in range(5):
        if os.fork() == 0:
            time.sleep(1000)
    return own(number)


def _then(number: int, *calls: Callable[[], Any]) -> object:
    for call in calls:
        call()
    return own(number)


def _write_everywhere(number: int) -> object:
    line = b'\n{"value": 99, "metrics": {}, "error": null}\n[{"value": 99}]\n'
    for fd in _fds():
        try:
            os.set_blocking(fd, False)
            os.write(fd, line)
            os.write(fd, b"half a line")
        except OSError:
            pass
        with contextlib.suppress(OSError):
            os.set_blocking(fd, True)
    return own(number)


def _flood_every_descriptor(number: int) -> object:
    for fd in _fds():
        try:
            for _ in range(200):
                os.write(fd, b"x" * 10_000 + b"\n")
        except OSError:
            pass
    return own(number)


def _close_all(number: int) -> object:
    os.closerange(3, 1024)
    return own(number)


def _reopen_all(number: int) -> object:
    os.closerange(0, 1024)
    for _ in range(300):
        os.open(os.devnull, os.O_RDWR)
    return own(number)


def _dup_over(number: int) -> object:
    for fd in _fds():
        os.dup2(1, fd)
    return own(number)


def _thread(target: Callable[[], object], *, daemon: bool = False) -> None:
    threading.Thread(target=target, daemon=daemon).start()


def _late(call: Callable[[], object]) -> None:
    timer = threading.Timer(0.05, call)
    timer.daemon = True
    timer.start()


def _spin() -> object:
    while True:
        pass


def _replace_builtins(number: int) -> object:
    result = own(number)
    for name in ("float", "str", "isinstance", "len", "int", "print", "type", "dict", "list"):
        setattr(builtins, name, lambda *_, **__: 99.0)
    return result


def _replace_modules(number: int) -> object:
    json.dumps = lambda *_, **__: '{"value": 99}'  # type: ignore[assignment]
    json.loads = lambda *_, **__: {}  # type: ignore[assignment]
    os.write = lambda *_, **__: 0  # type: ignore[assignment]
    math.isfinite = lambda *_: True  # type: ignore[assignment]
    return own(number)


def _leave_folder(number: int) -> object:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    return own(number)


def _own_handlers(number: int) -> object:
    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP):
        signal.signal(which, signal.SIG_IGN)
    return own(number)


def _close_std(number: int) -> object:
    sys.stdout.close()
    sys.stderr.close()
    return own(number)


def _unload(number: int) -> object:
    for name in ("json", "math", "struct", "lorelei.reward.contract"):
        sys.modules.pop(name, None)
    return own(number)


async def _late_answer(number: int) -> float:
    await asyncio.sleep(1000)
    return own(number)


async def _leaves_a_task(number: int) -> float:
    asyncio.get_running_loop().create_task(asyncio.sleep(1000))
    return own(number)


async def _cancels_itself(number: int) -> float:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return own(number)


async def _awaited(number: int) -> float:
    await asyncio.sleep(0.01)
    return own(number)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _kill(pid: int, number: int) -> None:
    os.kill(pid, number)


def _popen(*command: str, **options: Any) -> None:
    subprocess.Popen(command, **options)


BEHAVIOURS: dict[str, Callable[[int], object]] = {
    # what is returned
    "plain": plain,
    "None": lambda n: None,
    "nan": lambda n: math.nan,
    "infinity": lambda n: -math.inf,
    "beyond float32": lambda n: 1e300,
    "huge integer": lambda n: 10**400,
    "text": lambda n: str(own(n)),
    "bytes": lambda n: b"1.0",
    "list": lambda n: [own(n)],
    "dict": lambda n: {"reward": own(n)},
    "complex": lambda n: complex(own(n)),
    "generator": lambda n: (own(n) for _ in range(1)),
    "decimal": lambda n: Decimal(own(n)),
    "fraction": lambda n: Fraction(own(n)),
    "numpy scalar": lambda n: np.float32(own(n)),
    "numpy array of one": lambda n: np.array([[own(n)]]),
    "numpy array of two": lambda n: np.array([own(n), own(n)]),
    "numpy text": lambda n: np.array(["1.0"]),
    "own number": lambda n: Number(own(n)),
    "liar": lambda n: Liar(own(n)),
    "metrics": lambda n: (own(n), {"length": np.int64(n)}),
    "metric is text": lambda n: (own(n), {"x": "y"}),
    "metric with a surrogate": lambda n: (own(n), {"\udc80\n\x00": 1}),
    "million metrics": lambda n: (own(n), dict.fromkeys(map(str, range(10**6)), 1.0)),
    "object": lambda n: object(),
    "function": lambda n: len,
    "lock": lambda n: threading.Lock(),
    # what is raised
    "raise": lambda n: _raise(KeyError("no such key")),
    "raise long": lambda n: _raise(ValueError("x" * 10**7)),
    "raise surrogate": lambda n: _raise(ValueError("\udcff\x1b[2J\n\n")),
    "raise base": lambda n: _raise(Angry()),
    "raise keyboard": lambda n: _raise(KeyboardInterrupt()),
    "raise generator exit": lambda n: _raise(GeneratorExit()),
    "raise cancelled": lambda n: _raise(asyncio.CancelledError()),
    "raise stop": lambda n: _raise(StopIteration()),
    "sys.exit": lambda n: sys.exit(0),
    "recursion": lambda n: _recurse(),
    "memory": lambda n: _memory(),
    "eat memory": lambda n: _eat_memory(),
    # how the process ends
    "exit": lambda n: os._exit(n % 256),
    "abort": lambda n: os.abort(),
    "segfault": lambda n: ctypes.string_at(0),
    "kill self": lambda n: _kill(os.getpid(), signal.SIGKILL),
    "terminate self": lambda n: _kill(os.getpid(), signal.SIGTERM),
    "interrupt self": lambda n: _kill(os.getpid(), signal.SIGINT),
    "stop self": lambda n: _kill(os.getpid(), signal.SIGSTOP),
    "stop later": lambda n: _then(n, lambda: _late(lambda: _kill(os.getpid(), signal.SIGSTOP))),
    "exit later": lambda n: _then(n, lambda: _late(lambda: os._exit(3))),
    "kill guard": lambda n: _then(n, lambda: _kill(os.getppid(), signal.SIGKILL)),
    "stop guard": lambda n: _then(
        n, lambda: _kill(os.getppid(), signal.SIGSTOP), lambda: os._exit(3)
    ),
    "kill group": lambda n: os.killpg(0, signal.SIGKILL),
    "alarm": lambda n: _then(n, lambda: signal.alarm(1)),
    # time
    "sleep": lambda n: time.sleep(1000),
    "spin": lambda n: _spin(),
    "await for ever": lambda n: _late_answer(n),
    # async
    "awaited": lambda n: _awaited(n),
    "leaves a task": lambda n: _leaves_a_task(n),
    "cancels itself": lambda n: _cancels_itself(n),
    "asyncio.run": lambda n: asyncio.run(_awaited(n)),
    # processes
    "fork and return": _fork_and_return,
    "fork in C and return": _c_fork_and_return,
    "fork and raise": _fork_and_raise,
    "fork many": _fork_many,
    "daemon": lambda n: _then(n, _daemon),
    "daemon that sleeps": lambda n: _then(n, lambda: _daemon(forever=True)),
    "daemon, then exit": lambda n: _then(n, _daemon, lambda: os._exit(3)),
    "daemon, then kill guard": lambda n: _then(
        n, _daemon, lambda: _kill(os.getppid(), signal.SIGKILL)
    ),
    "child": lambda n: _then(n, lambda: _popen("sleep", SLEEP)),
    "child in a session": lambda n: _then(
        n, lambda: _popen("sleep", SLEEP, start_new_session=True)
    ),
    "child without environment": lambda n: _then(n, lambda: _popen("sleep", SLEEP, env={})),
    "child with all descriptors": lambda n: _then(
        n, lambda: _popen("sleep", SLEEP, close_fds=False)
    ),
    "wait for a child": lambda n: subprocess.run(["sleep", SLEEP], check=True),
    "multiprocessing": lambda n: _then(
        n,
        lambda: multiprocessing.get_context("fork").Process(target=time.sleep, args=[9e3]).start(),
    ),
    # output and descriptors
    "print flood": lambda n: _then(n, lambda: _print("x" * 10**7)),
    "error flood": lambda n: _then(n, lambda: os.write(2, b"y\n" * 10**5)),
    "print escapes": lambda n: _then(n, lambda: _print("\x1b[2J\x07\udc80\u202e")),
    "read input": lambda n: _then(n, lambda: sys.stdin.read()),
    "write to every descriptor": _write_everywhere,
    "flood every descriptor": _flood_every_descriptor,
    "close all": _close_all,
    "close all and open others": _reopen_all,
    "dup over all": _dup_over,
    "close stdout": _close_std,
    "leak sockets": lambda n: _then(n, lambda: [socket.socket().detach() for _ in range(50)]),
    # the interpreter
    "thread": lambda n: _then(n, lambda: _thread(lambda: time.sleep(1000))),
    "daemon thread that spins": lambda n: _then(n, lambda: _thread(_spin, daemon=True)),
    "settrace": lambda n: _then(n, lambda: sys.settrace(lambda *_: _raise(Angry()))),
    "setprofile": lambda n: _then(n, lambda: sys.setprofile(lambda *_: None)),
    "recursion limit": lambda n: _then(n, lambda: sys.setrecursionlimit(30)),
    "switch interval": lambda n: _then(n, lambda: sys.setswitchinterval(100)),
    "builtins": _replace_builtins,
    "modules": _replace_modules,
    "unload": _unload,
    "chdir": _leave_folder,
    "environment": lambda n: _then(n, os.environ.clear),
    "handlers": _own_handlers,
    "atexit": lambda n: _then(n, lambda: atexit.register(time.sleep, 1000)),
    "gc": lambda n: _then(n, gc.disable, gc.freeze),
    "warnings": lambda n: _then(n, lambda: warnings.simplefilter("error")),
    "umask": lambda n: _then(n, lambda: os.umask(0o777)),
    "nice": lambda n: _then(n, lambda: os.nice(1)),
    "floating point": lambda n: _then(n, lambda: np.seterr(all="raise")),
    "hooks": lambda n: _then(n, lambda: setattr(sys, "excepthook", None)),
}


def act(completion: str) -> object:
    """What 'NAME#NUMBER' says; the rest of the text is only long."""
    name, _, number = completion.split("\n")[0].rpartition("#")
    return BEHAVIOURS[name](int(number))
