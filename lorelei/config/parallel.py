"""Sizes of parallel work, and AReaL's short way of writing them.

d4p1t2                           letters: d data, p pipeline, t tensor, c context, e expert
(attn:d1p6t1c1|ffn:d1p6t1e1)     experts laid out apart; both take the same processes
fsdp:d4                          a backend and its sizes
sglang:d4+fsdp:d4                allocation_mode: who samples, who trains
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from lorelei.config.errors import ConfigError, shown

LETTERS = {"d": "data", "p": "pipeline", "t": "tensor", "c": "context", "e": "expert"}
_ATTENTION, _EXPERTS = "dptc", "dpte"
_SIZES = re.compile(r"(?:[a-z][0-9]+)+")
_BETWEEN = re.compile(r"([+|])(?![^(]*\))")  # outside of brackets
_APART = re.compile(r"\(attn:([a-z0-9]+)\|ffn:([a-z0-9]+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """Among how many processes each kind of work is divided. Raises ValueError for misfits."""

    data: int = 1  # batches
    tensor: int = 1  # matrices
    pipeline: int = 1  # layers
    context: int = 1  # sequences
    expert: int = 1  # the experts of a mixture
    expert_tensor: int = 1  # the matrices of each expert

    def __post_init__(self) -> None:
        of_an_expert = self.pipeline * self.expert * self.expert_tensor
        if self.world % of_an_expert:
            raise ValueError(
                f"{self.world} processes cannot hold experts in pipeline {self.pipeline} x expert "
                f"{self.expert} x tensor {self.expert_tensor} parts; use a divisor"
            )

    @property
    def world(self) -> int:
        """All processes."""
        return self.data * self.tensor * self.pipeline * self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An engine and the sizes it runs with."""

    kind: str
    sizes: ParallelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Who samples and who trains."""

    rollout: Backend
    train: Backend
    shared: bool  # on the same devices


def parse_sizes(text: str, field: str) -> ParallelSizes:
    """Of 'd4p1t2' or '(attn:...|ffn:...)'. Raises ConfigError that names `field`."""
    apart = _APART.fullmatch(text)
    try:
        if apart is None:
            return ParallelSizes(**_letters(text, "".join(LETTERS)))
        attention = _letters(apart[1], _ATTENTION)
        experts = _letters(apart[2], _EXPERTS)
        _check_alike(attention, experts)
        return ParallelSizes(
            **attention,
            expert=experts.get("expert", 1),
            expert_tensor=experts.get("tensor", 1),
        )
    except ValueError as error:
        raise ConfigError(f"{field}: {shown(text)} is not allowed; {error}") from error


def parse_backend(text: str, field: str) -> Backend:
    """Of 'fsdp:d4'. Raises ConfigError that names `field`."""
    kind, colon, sizes = text.partition(":")
    if not colon or not kind.isidentifier():
        raise ConfigError(
            f"{field}: {shown(text)} is not allowed; write an engine and its sizes, such as fsdp:d4"
        )
    return Backend(kind=kind, sizes=parse_sizes(sizes, field))


def parse_allocation(text: str, field: str) -> Allocation:
    """Of 'sglang:d4+fsdp:d4', or with '|' on the same devices. Raises ConfigError.

    AReaL's older forms are read too: a dot for the colon, and no engine for training.
    """
    parts = _BETWEEN.split(text)
    if len(parts) != 3:
        raise ConfigError(
            f"{field}: {shown(text)} is not allowed; write who samples and who trains, such as "
            "sglang:d4+fsdp:d4"
        )
    rollout, train = (re.sub(r"^([a-z]+)\.", r"\1:", part) for part in parts[::2])
    if ":" not in train or train.startswith("("):
        sizes = parse_sizes(train, field)
        needs_megatron = sizes.pipeline > 1 or sizes.expert > 1
        train = f"{'megatron' if needs_megatron else 'fsdp'}:{train}"
    return Allocation(
        rollout=parse_backend(rollout, field),
        train=parse_backend(train, field),
        shared=parts[1] == "|",
    )


def _letters(text: str, allowed: str) -> dict[str, int]:
    if _SIZES.fullmatch(text) is None:
        raise ValueError("write letters with numbers, such as d4p1t2")
    found: dict[str, int] = {}
    for letter, number in re.findall(r"([a-z])([0-9]+)", text):
        if letter not in allowed:
            words = ", ".join(f"{a} {LETTERS[a]}" for a in allowed)
            raise ValueError(f"{letter!r} is none of: {words}")
        if LETTERS[letter] in found:
            raise ValueError(f"{letter!r} is given twice; remove one")
        if int(number) < 1:
            raise ValueError(f"{letter}{number} is no size; use 1 or more")
        found[LETTERS[letter]] = int(number)
    return found


def _check_alike(attention: dict[str, int], experts: dict[str, int]) -> None:
    a, b = attention.get("pipeline", 1), experts.get("pipeline", 1)
    if a != b:
        raise ValueError(f"attn has p{a} and ffn p{b}; the layers are the same: use one number")
    a, b = prod(attention.values()), prod(experts.values())
    if a != b:
        raise ValueError(f"attn takes {a} processes and ffn {b}; use as many")
