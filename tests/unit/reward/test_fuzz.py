"""Whatever a reward returns: every sample has its own number or one of the known errors.

See tests/fuzz.py for how many are tried.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from lorelei.reward.contract import MOST_METRICS, Sample, Scorer
from lorelei.reward.worker import Result, judge
from tests.fuzz import fuzz

Make = Callable[[], Any]  # a new value each time: iterators and coroutines are used up


class Hostile:
    """Every method that reading a score may call raises."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def _raise(self, *_: object) -> Any:
        raise self._error

    __float__ = __len__ = __iter__ = __getitem__ = __repr__ = __str__ = __bool__ = __eq__ = _raise
    item = __hash__ = _raise


class Returns:
    """`float` and `item` give something that is no number."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> Any:
        return self.value

    def item(self) -> Any:
        return self.value


async def awaited(value: Any) -> Any:
    return value


def packable(number: float) -> bool:
    try:
        struct.pack("<f", number)
    except OverflowError:
        return False
    return math.isfinite(number)


numbers = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.integers(10**300, 10**400),
    st.floats(),
    st.floats(-1, 1),
    st.booleans(),
    st.decimals(),
    st.fractions(),
)
texts = st.text(max_size=4) | st.sampled_from(["1.0", "\ud800", "\x1b[31m", "nan"])
arrays = st.builds(
    lambda shape, dtype, value: np.full(shape, value, dtype=dtype),
    st.sampled_from([(), (1,), (1, 1), (0,), (2,), (3, 2)]),
    st.sampled_from(["float16", "float64", "int8", "uint64", "bool", "complex64", "U3", "object"]),
    st.integers(0, 1),
)
errors = st.sampled_from(
    [ValueError("x\ny"), KeyboardInterrupt(), SystemExit(3), MemoryError(), RecursionError()]
)
leaves = st.one_of(
    numbers,
    texts,
    st.none(),
    st.binary(max_size=3),
    st.complex_numbers(),
    arrays,
    arrays.filter(lambda a: a.dtype.kind in "fiub").map(lambda a: torch.tensor(a.tolist())),
    numbers.filter(lambda n: isinstance(n, float)).map(np.float64),
    errors.map(Hostile),
    texts.map(Returns),
    st.dates(),
)
metrics = st.dictionaries(texts | st.integers(), leaves, max_size=3)
scores = st.one_of(
    leaves,
    st.tuples(leaves, metrics),
    st.tuples(leaves, leaves),
    st.tuples(leaves, st.just(dict.fromkeys(range(MOST_METRICS + 1), 0))),
    st.recursive(leaves, lambda below: st.lists(below, max_size=3), max_leaves=6),
    metrics,
)
SAMPLES = [Sample(data={}, completion=text) for text in "abc"]


def scored(call: Callable[[Sequence[Sample]], object], count: int = 3) -> list[Result]:
    """A result for each sample, in the form that the pipe takes."""
    results = judge(Scorer(call=call), SAMPLES[:count], timeout=5)
    assert len(results) == count
    for one in results:
        json.dumps(one, allow_nan=False)
        if one["error"] is None:
            assert all(map(packable, (one["value"], *one["metrics"].values())))
        else:
            assert one["value"] is None and one["metrics"] == {}
            assert one["error"].startswith(("raised ", "not a number: ")), one["error"]
            assert len(one["error"]) <= 300
        event(ascii(one["error"])[:20])
    return results


@fuzz(1500)
@given(st.lists(scores, min_size=3, max_size=3))
def test_a_score_counts_for_its_own_sample_alone(found: list[Any]) -> None:
    alone = [scored(lambda _, one=one: [one], 1)[0] for one in found]
    assert scored(lambda _: found) == alone
    assert scored(lambda _: tuple(found)) == alone
    assert scored(lambda _: iter(found)) == alone
    assert scored(lambda _: awaited(found)) == alone
    for value, result in zip(found, alone, strict=True):
        if isinstance(value, int | float | Decimal | Fraction):
            assert result["value"] == exact(value)


def exact(value: Any) -> float | None:
    """What `float` makes of it, where float32 can hold that."""
    try:
        number = float(value)
    except (OverflowError, ValueError):  # a large integer; a signalling NaN
        return None
    return number if packable(number) else None


@fuzz(1500)
@given(scores | st.lists(scores, max_size=4))
def test_what_is_no_list_of_scores_is_every_samples_error(found: Any) -> None:
    results = scored(lambda _: found)
    if not isinstance(found, list | tuple | dict | np.ndarray | torch.Tensor):
        assert all(one["error"] is not None for one in results)


@fuzz(300)
@given(errors, texts)
def test_what_is_raised_is_every_samples_error(error: BaseException, text: str) -> None:
    def raises(_: Sequence[Sample]) -> object:
        raise type(error)(text)

    assert all(one["error"].startswith("raised ") for one in scored(raises))
