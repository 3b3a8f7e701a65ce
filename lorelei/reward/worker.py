"""A reward worker: a process that scores one request after another for a RewardPool.

Speaks JSON lines over its pipes. In: a spec, then {id, samples: [{data, completion}]}. Out: the
id of the line before, a space, and {ready, whole_group} or {failed}, then a list of {value,
metrics, error}. What else a reward writes there has no id, and is dropped. It never imports torch:
it starts fast and stays small.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import fcntl
import inspect
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, BinaryIO, cast

from lorelei.config.errors import shown
from lorelei.reward.contract import NotANumber, Sample, Scorer, read_score
from lorelei.reward.guard import fork_under_guards

_BUILTINS = builtins.__dict__
_PIPES = 200  # numbers of descriptors that no reward comes upon by chance

Result = dict[str, Any]  # the fields of a RewardResult


def main() -> None:
    """Serve one pool until it closes the pipe."""
    requests, replies = _private_pipes()
    fork_under_guards(requests, replies, int(sys.argv[1]))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    worker = _Worker(os.fdopen(requests, "rb", closefd=False), replies)
    os.register_at_fork(after_in_child=worker.close)
    worker.serve()


class _Worker:
    """The scoring process. What it needs is looked up before a reward can replace it."""

    def __init__(self, requests: BinaryIO, replies: int) -> None:
        self._requests, self._replies = requests, replies
        self._pid, self._pipe = os.getpid(), os.fstat(replies)
        self._builtins = dict(_BUILTINS)
        self._loads, self._dumps, self._write, self._exit = (
            json.loads,
            json.dumps,
            os.write,
            os._exit,
        )
        self._getpid, self._fstat, self._chdir, self._cwd = (
            os.getpid,
            os.fstat,
            os.chdir,
            os.getcwd(),
        )

    def serve(self) -> None:
        """Load the scorer and answer requests until the pipe ends. Does not return."""
        spec = self._loads(self._requests.readline())
        _limit_memory(spec["memory_gib"])
        hints = Hints(memory_gib=spec["memory_gib"], withheld=spec["withheld"])
        try:
            scorer = make_scorer(spec["kind"], spec["path"], spec["answer_after"])
        # The border to what a scorer loads.
        except Exception as error:
            line = str(error) if isinstance(error, ValueError) else f"reward: {_told(error)}"
            self._reply(spec["id"], {"failed": hints.added(line, error.__cause__ or error)})
            self._exit(0)
        self._reply(spec["id"], {"ready": True, "whole_group": scorer.whole_group})
        for line in self._requests:
            request = self._loads(line)
            samples = [Sample(**one) for one in request["samples"]]
            results = judge(scorer, samples, timeout=spec["timeout"], hints=hints)
            self._undo()
            self._reply(request["id"], results)
        self._exit(0)

    def close(self) -> None:
        """Let go of the pipes: a fork of a reward shall neither read requests nor answer them."""
        for pipe in (self._requests.fileno(), self._replies):
            with contextlib.suppress(OSError):
                os.close(pipe)

    def _undo(self) -> None:
        """What a reward has changed that the next one, or this file, would stumble over."""
        _BUILTINS.update(self._builtins)
        if self._getpid() != self._pid:
            self._exit(0)  # a fork that came back from the reward
        sys.settrace(None)
        sys.setprofile(None)
        threading.settrace(None)  # type: ignore[arg-type]
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            self._chdir(self._cwd)

    def _reply(self, number: str, message: object) -> None:
        try:
            now = self._fstat(self._replies)
        except OSError:
            self._exit(1)  # the reward closed it
            raise
        if (now.st_dev, now.st_ino) != (self._pipe.st_dev, self._pipe.st_ino):
            self._exit(1)  # its number belongs to another file now
        left = f"\n{number} {self._dumps(message)}\n".encode()  # the first end what others wrote
        while left:
            left = left[self._write(self._replies, left) :]


class Hints:
    """What to add to an error that a limit of the worker has caused."""

    def __init__(self, memory_gib: float = 0.0, withheld: Sequence[str] = ()) -> None:
        """withheld: names of environment variables that the worker was not given."""
        self._memory, self._withheld = memory_gib, withheld

    def added(self, line: str, error: BaseException) -> str:
        """The line about an error with the hint, if there is one."""
        text, hint = _text(error), ""
        if isinstance(error, MemoryError) or "allocate" in text.lower():
            hint = f"a worker may hold reward.memory_gib: {self._memory:g} GiB, raise it"
        for name in self._withheld:
            if name in text:
                hint = f"rewards get {name} only if reward.env lists it"
        return line + (f"{'; ' if ':' in line else ': '}{hint}" if hint else "")


def make_scorer(kind: str, path: str | None, answer_after: str | None = None) -> Scorer:
    """The scorer of a reward kind. Raises ValueError with the line for the user."""
    match kind:
        case "reasoning_gym":
            from lorelei.reward import reasoning_gym

            return _of_one(partial(reasoning_gym.score, answer_after=answer_after))
        case "math_verify":
            from lorelei.reward import math_verify

            return _of_one(math_verify.score)
        case "python":
            from lorelei.reward import python_file

            return python_file.load(path or "")
        case _:
            raise ValueError(
                f"reward.kind: {kind!r} is not one of 'reasoning_gym', 'math_verify', 'python'"
            )


def _of_one(function: Callable[[Mapping[str, Any], str], object]) -> Scorer:
    return Scorer(call=lambda samples: [function(one.data, one.completion) for one in samples])


def judge(
    scorer: Scorer,
    samples: Sequence[Sample],
    *,
    timeout: float | None = None,
    hints: Hints | None = None,
) -> list[Result]:
    """A result for each sample, whatever the scorer does short of ending the process.

    timeout: seconds for what is awaited.
    """
    try:
        found: object = scorer.call(samples)
        if inspect.isawaitable(found):
            found = _loop().run_until_complete(_within(timeout, found))
        scores = _scores(found, len(samples))
    except _Late:
        return [_failed("timeout") for _ in samples]
    # The border to the user's code: a reward that raises is data with a reason.
    except BaseException as error:
        line = (hints or Hints()).added(f"raised {_told(error)}"[:300], error)
        return [_failed(line) for _ in samples]
    return [_result(score) for score in scores]


def _result(score: object) -> Result:
    try:
        value, metrics = read_score(score)
        return {"value": value, "metrics": metrics, "error": None}
    except NotANumber as error:
        return _failed(f"not a number: {error}"[:300])
    except BaseException as error:  # of the user's types
        return _failed(f"not a number: {_name(error)} while it was read")


def _failed(error: str) -> Result:
    return {"value": None, "metrics": {}, "error": error}


def _scores(found: object, count: int) -> list[object]:
    """The scores of a list, a tuple, an array or whatever else is iterated over."""
    scores: list[object] | None = None
    if isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping):
        scores = list(cast(Iterable[object], found))
    if scores is None or len(scores) != count:
        raise ValueError(
            f"it must return a list of {count}, a score for each completion, "
            f"not {shown(cast(object, found))}"
        )
    return scores


class _Late(Exception):
    """What was awaited took longer than reward.timeout."""


async def _within(timeout: float | None, found: Any) -> object:
    deadline = asyncio.timeout(timeout)
    try:
        async with deadline:
            return await found
    except TimeoutError:
        if deadline.expired():
            raise _Late from None
        raise


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls: the clients of a judge stay connected."""
    return asyncio.new_event_loop()


def _name(error: BaseException) -> str:
    return str(type(error).__name__)[:100]


def _told(error: BaseException) -> str:
    return f"{_name(error)}: {_text(error)}".removesuffix(": ")


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except BaseException:  # of the user's exception
        return ""


def _private_pipes() -> tuple[int, int]:
    """The pool's pipes, moved to where neither `print` nor `input` of a reward reaches them."""
    requests = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _PIPES)
    replies = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, requests + 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # what a reward prints goes where its errors go
    return requests, replies


def _limit_memory(gib: float) -> None:
    """Of private writable memory.

    RLIMIT_AS would also count the libraries a user's file maps, which are tens of GB for a CUDA
    build of torch.
    """
    limit = int(gib * 2**30)
    with contextlib.suppress(ValueError, OSError):  # not every system limits it
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
