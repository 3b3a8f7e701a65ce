"""Rewards of same_bits.py, which decide when answers arrive.

When answers arrive decides which rows are decoded and which adapters are trained together, and
that changes the order in which numbers are added. In the case `turns` the next score comes long
after the answer to the last one was decoded. In `three`, `first` trains alone; its evaluation
after a step opens the gate to `second` and `third`, which then train together, while the next
answers of `first` wait for theirs. A reward's worker is one process, so it can count its calls.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

GATES = Path(__file__).parent / "gates"
SAMPLES = 8  # of an adapter in one step
HELD_OUT = 2  # problems of an evaluation of `first`

Score = tuple[float, dict[str, float]]
_calls = itertools.count()


def vowels(completion: str, **row: object) -> Score:
    """The share of vowels: differs between random completions."""
    share = sum(c in "aeiou " for c in completion) / max(len(completion), 1)
    return share, {"length": len(completion)}


def slow(completion: str, **row: object) -> Score:
    """Takes longer than decoding an answer."""
    time.sleep(0.1)
    return vowels(completion)


def first(completion: str, **row: object) -> Score:
    """Of the adapter that trains alone. Its calls: an evaluation, a step, an evaluation, ..."""
    step, call = divmod(next(_calls), HELD_OUT + SAMPLES)
    if call == HELD_OUT - 1 and step > 0:
        _mark(f"open {step - 1}")
        _wait(f"second passed {step - 1}", f"third passed {step - 1}")
        time.sleep(0.3)  # until the last scores of both are there
    if call == HELD_OUT + SAMPLES - 1:
        _wait(f"second {step}", f"third {step}")
    return vowels(completion)


def second(completion: str, **row: object) -> Score:
    """Of one of the adapters that train together."""
    return _behind("second", completion)


def third(completion: str, **row: object) -> Score:
    """Of the other one."""
    return _behind("third", completion)


def _behind(name: str, completion: str) -> Score:
    step, call = divmod(next(_calls), SAMPLES)
    if call == SAMPLES - 1:
        _mark(f"{name} {step}")
        _wait(f"open {step}")
        _mark(f"{name} passed {step}")
    return vowels(completion)


def _mark(name: str) -> None:
    GATES.mkdir(exist_ok=True)
    (GATES / name).touch()


def _wait(*names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((GATES / name).exists() for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {names} came within a minute")
        time.sleep(0.002)
