"""Tokens and log-probabilities of every rollout engine against transformers and peft.

Ten versions and the base model answer in one batch, at two temperatures and greedily.

usage: python -m acceptance logprobs [CASE ...]
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from acceptance.record import Line
from acceptance.reference import Reference
from acceptance.stage import PUBLISHERS, SIZES, Case, Stage, holds
from acceptance.table import table
from lorelei.config.run import default_publisher
from lorelei.types import AdapterRef, Completion, Floats, GenerateRequest, Ints, SamplingParams

CASES = {
    f"{engine}-{size}": Case(engine=engine, publisher=default_publisher(engine), size=size)
    for engine in PUBLISHERS
    for size in SIZES
    if holds(engine, size)
}
VERSIONS, TEMPERATURES = 10, (1.0, 0.7)
PROMPT_TOKENS, NEW_TOKENS = 24, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one version sampled, and what the engine says of the same tokens when they are given."""

    ref: AdapterRef | None
    temperature: float  # 0: greedy
    prompt: Ints
    completion: Completion
    scored: Floats  # [T - 1] of prompt and completion together

    @property
    def version(self) -> int:
        return self.ref.version if self.ref else 0

    @property
    def tokens(self) -> Ints:
        return np.concatenate([self.prompt, self.completion.tokens])


async def measure(case: Case, stage: Stage) -> Line:
    """One row."""
    published = [await _next(stage) for _ in range(VERSIONS)]
    refs = [None, *published]
    answers = [a for t in (*TEMPERATURES, 0.0) for a in await _answers(stage, refs, t)]
    for ref in published:
        await stage.publisher.retire(ref)
    reference = Reference(stage)
    versions = [answer.version for answer in answers]
    compared = [
        _compared(reference, answer, another)
        for answer, another in zip(answers, [*versions[1:], versions[0]], strict=True)
    ]
    row: Line = {
        "answers": len(answers),
        "tokens": sum(len(answer.completion.tokens) for answer in answers),
        "tolerance": stage.size.tolerance,
        "sampled_error": _largest(answers, [c["sampled"] for c in compared]),
        "scored_error": _largest(answers, [c["scored"] for c in compared]),
        "nearest_other": min(c["other"] for c in compared),
        "not_greedy": sum(c["not_greedy"] for c in compared),
    }
    return row | {"problems": problems(row)}


async def _next(stage: Stage) -> AdapterRef:
    stage.change()
    return await stage.publish()


async def _answers(
    stage: Stage, refs: Sequence[AdapterRef | None], temperature: float
) -> list[Answer]:
    """One of each version, all in one batch."""
    random = np.random.default_rng(0)
    prompts = [random.integers(5, 290, PROMPT_TOKENS).astype(np.int32) for _ in refs]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature)
    requests = [
        GenerateRequest(tokens=prompt, adapter=ref, sampling=sampling, key=f"{number}")
        for number, (prompt, ref) in enumerate(zip(prompts, refs, strict=True))
    ]
    completions = await asyncio.gather(*map(stage.rollout.generate, requests))
    found: list[Answer] = []
    for prompt, ref, completion in zip(prompts, refs, completions, strict=True):
        tokens = np.concatenate([prompt, completion.tokens])
        (scored,) = await stage.rollout.score([tokens], ref, temperature or 1.0)
        found.append(
            Answer(
                ref=ref,
                temperature=temperature,
                prompt=prompt,
                completion=completion,
                scored=scored,
            )
        )
    return found


def _compared(reference: Reference, answer: Answer, another: int) -> Line:
    """Largest differences from its own version, and the sampled tokens' from another one."""
    temperature, tokens, start = answer.temperature or 1.0, answer.tokens, len(answer.prompt) - 1
    sampled = answer.completion.logprobs
    own = reference.logprobs(answer.version, tokens, temperature)
    other = reference.logprobs(another, tokens, temperature)
    likeliest = reference.greedy(answer.version, tokens)[start:-1]
    greedy = answer.temperature == 0
    return {
        "sampled": float(np.abs(sampled - own[start:]).max()),
        "scored": float(np.abs(answer.scored - own).max()),
        "other": float(np.abs(sampled - other[start:]).max()),
        "not_greedy": int((likeliest != answer.completion.tokens).sum()) if greedy else 0,
    }


def _largest(answers: Sequence[Answer], errors: Sequence[float]) -> dict[str, float]:
    """By temperature; greedy answers are among those of temperature 1."""
    return {
        str(t): max(
            error
            for answer, error in zip(answers, errors, strict=True)
            if (answer.temperature or 1.0) == t
        )
        for t in TEMPERATURES
    }


def problems(row: Line) -> list[str]:
    """What must hold and does not."""
    found: list[str] = []
    for what in ("sampled", "scored"):
        for temperature, error in row[f"{what}_error"].items():
            if error > row["tolerance"]:
                found.append(
                    f"{what} log-probabilities at temperature {temperature} differ by {error:.1e} "
                    f"from transformers and peft, at most {row['tolerance']:.0e} is allowed"
                )
    if row["nearest_other"] <= max(row["sampled_error"].values()):
        found.append("another version is as near as the right one")
    if row["not_greedy"]:
        found.append(f"{row['not_greedy']} greedy tokens are not the likeliest ones")
    return found


COLUMNS = (
    "engine",
    "model",
    *(f"sampled, T = {temperature}" for temperature in TEMPERATURES),
    *(f"given, T = {temperature}" for temperature in TEMPERATURES),
    "next nearest",
    "allowed",
    "greedy tokens that differ",
)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            *(CASES[name].engine, CASES[name].size),
            *(f"{row['sampled_error'][str(t)]:.1e}" for t in TEMPERATURES),
            *(f"{row['scored_error'][str(t)]:.1e}" for t in TEMPERATURES),
            f"{row['nearest_other']:.1e}",
            f"{row['tolerance']:.0e}",
            row["not_greedy"],
        )
        for name, row in found.items()
    ]
    return f"""## Log-probabilities

{VERSIONS} versions and the base model answer {NEW_TOKENS} tokens each in one batch, at both
temperatures and greedily; then each scores its prompt and answer as given tokens. Columns 3 to 6
are the largest difference of a log-probability from transformers and peft with that version's
tensors, *next nearest* the smallest such difference of an answer from another version. The server
of `tiny-tp2` splits its model over two processes.

`make acceptance ARGS=logprobs`

{table(COLUMNS, rows)}
"""
