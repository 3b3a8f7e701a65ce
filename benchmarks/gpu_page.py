"""The GPU benchmark's part of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import ALPHA, RANK

Line = dict[str, Any]


def section(record: Line) -> str:
    """Its part of docs/benchmarks.md."""
    at = record["device"]
    peers = [f"{name} {at[name]}" for name in ("transformers", "peft", "trl") if at[name]]
    driver = [f"driver {at['driver']}"] if at["driver"] else []
    software = ", ".join([*driver, f"torch {at['torch']}", f"CUDA {at['cuda']}", *peers])
    parts = [
        "## GPU",
        f"{at['gpu'] or 'No GPU'}, {software}. Random weights of real "
        f"shapes in bf16, with adapters in fp32 (rank {RANK}, alpha {ALPHA}, all linear layers). "
        "The sides have the same weights, tokens and lengths and run one after another, each in a "
        "fresh process; times are medians of rounds after the first. No side uses torch.compile. "
        "transformers runs with peft under autocast; it generates with the adapter merged, and in "
        "a GRPO step with the adapter apart, as TRL does.",
        "`python -m benchmarks.gpu`",
    ]
    parts += [record["remark"]] if "remark" in record else []
    if "contract" in record:
        parts.append(_contract_words(record["contract"]))
    for case in record["cases"].values():
        parts += [f"### {case['model']}", *_case_words(case["works"])]
        parts += [f"Not measured: {side}, which {how}." for side, how in case["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _contract_words(found: Line) -> str:
    words = (
        f"Tests on this device ({', '.join(found['suites'])}): {found['passed']} passed, "
        f"{found['failed']} failed, {found['skipped']} skipped."
    )
    return "\n".join([words, *(f"- failed: `{name}`" for name in found["failures"])])


def _case_words(works: Mapping[str, Mapping[str, Line]]) -> Iterator[str]:
    if train := works.get("train"):
        yield (
            "Forward and backward pass of plain sequences, the second half of each predicted. "
            "The bare products are those with frozen weights, each timed alone with `torch.mm`."
        )
        columns = {
            "tokens/s": "tokens_per_s",
            "bare products, share of the time": "share_of_products",
            "mean log-probability": "logprob",
        }
        yield _table("side", columns, train)
    batches = {
        f"{work.removeprefix('generate ')}, {side}": values
        for work, found in works.items()
        if work.startswith("generate")
        for side, values in found.items()
    }
    if batches:
        yield (
            "Generation of several sequences together. The time of a token is that of the tokens "
            "after the first; the share is what reading all weights once takes of it at the speed "
            "of a copy."
        )
        columns = {
            "tokens/s": "tokens_per_s",
            "ms a token": "token_ms",
            "share of bandwidth": "share_of_bandwidth",
        }
        yield _table("sequences, side", columns, batches)
    if step := works.get("step"):
        yield "A GRPO step: generate, train and, for Lorelei, publish the new version."
        columns = {
            "seconds": "seconds",
            "of these generating": "generate_s",
            "training": "train_s",
        }
        yield _table("side", columns, step)


def _table(first: str, columns: Mapping[str, str], rows: Mapping[str, Line]) -> str:
    every = {**columns, "GiB": "peak_gib", "Lorelei is times faster": "lorelei_times_faster"}
    lines = [f"| {' | '.join([first, *every])} |", "|---" * (len(every) + 1) + "|"]
    for name, values in rows.items():
        cells = [_number(values.get(key)) for key in every.values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
