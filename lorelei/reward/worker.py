"""A reward worker: a process that scores one completion after another for a RewardPool.

Speaks JSON lines over its pipes. In: a spec {kind, path, answer_after, timeout}, then {data,
completion}. Out: {ready} or {failed}, then {value, metrics, error}. It never imports torch: it
starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from collections.abc import Mapping
from functools import partial
from typing import Any, TextIO

from lorelei.reward.contract import NotANumber, Scorer, read_score

# Private writable memory. RLIMIT_AS would also count the libraries a user's file maps, which are
# tens of GB for a CUDA build of torch.
MEMORY_LIMIT = 4 * 2**30


def main() -> None:
    """Serve one pool until it closes the pipe."""
    requests, replies = _private_pipes()
    spec = json.loads(requests.readline())
    with contextlib.suppress(ValueError, OSError):  # not every system limits it
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    try:
        scorer = make_scorer(spec["kind"], spec["path"], spec["answer_after"])
    except ValueError as error:
        _reply(replies, {"failed": str(error)})
        return
    _reply(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        _limit_cpu(spec["timeout"])
        _reply(replies, judge(scorer, request["data"], request["completion"]))


def make_scorer(kind: str, path: str | None, answer_after: str | None = None) -> Scorer:
    """The scorer of a reward kind. Raises ValueError with the line for the user."""
    match kind:
        case "reasoning_gym":
            from lorelei.reward import reasoning_gym

            return partial(reasoning_gym.score, answer_after=answer_after)
        case "math_verify":
            from lorelei.reward import math_verify

            return math_verify.score
        case "python":
            from lorelei.reward import python_file

            return python_file.load(path or "")
        case _:
            raise ValueError(
                f"reward.kind: {kind!r} is not one of 'reasoning_gym', 'math_verify', 'python'"
            )


def judge(scorer: Scorer, data: Mapping[str, Any], completion: str) -> dict[str, Any]:
    """The fields of the RewardResult, whatever the scorer does short of ending the process."""
    try:
        value, metrics = read_score(scorer(data, completion))
        return {"value": value, "metrics": metrics, "error": None}
    except NotANumber as error:
        line = f"not a number: {error}"
    # The border to the user's code: a reward that raises is data with a reason.
    except (Exception, SystemExit) as error:
        line = f"raised {type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return {"value": None, "metrics": {}, "error": line[:300]}


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The pool's pipes, moved to where neither `print` nor `input` of a reward reaches them."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a reward prints goes to standard error
    return requests, replies


def _reply(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _limit_cpu(timeout: float) -> None:
    """End this process some time after the deadline, in case the pool has died and cannot."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + timeout) + 5
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main()
