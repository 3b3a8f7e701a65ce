"""The goals of the project, each beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from benchmarks import forward_backward, prefix_sharing
from benchmarks.turns import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on one number of a benchmark's record."""

    benchmark: str
    what: str
    measured: Callable[[Line], float | None]  # from the record; none when a case did not run
    at_least: float = -inf
    at_most: float = inf
    between: str = ""  # what stands between the measured value and the bound, and what was tried

    @property
    def wanted(self) -> str:
        """The bound in words."""
        low, high = self.at_least > -inf, self.at_most < inf
        words = (f"at least {self.at_least:g}" * low, f"at most {self.at_most:g}" * high)
        return " and ".join(filter(None, words))

    def reached(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most


def _times_faster_than_trl(record: Line) -> float | None:
    case = record["cases"].get("2x8")
    return case and case["times_faster"]


def _share_of_trl_memory(record: Line) -> float | None:
    case = record["cases"].get("2x8")
    return case and case.get("share_of_memory")


def _times_slower_is(peer: str, case: str) -> Callable[[Line], float | None]:
    def measured(record: Line) -> float | None:
        found = record["cases"].get(case)
        return found and found["sides"][peer]["times_slower"]

    return measured


def _times_slower_is_best_peer(case: str) -> Callable[[Line], float | None]:
    """Of those that compute in the same precision."""

    def measured(record: Line) -> float | None:
        sides = record["cases"].get(case, {"sides": {}})["sides"].values()
        return min((s["times_slower"] for s in sides if s.get("same_precision")), default=None)

    return measured


def _smallest_share(record: Line) -> float | None:
    if record["cases"].keys() < forward_backward.CASES.keys():
        return None
    return min((case["share"] for case in record["cases"].values()), default=None)


def _largest_difference(record: Line) -> float | None:
    if record["cases"].keys() < prefix_sharing.CASES.keys():
        return None
    differences = (case["difference"]["torch.float32"] for case in record["cases"].values())
    return max(differences, default=None)


def _largest_error(record: Line) -> float | None:
    return max((abs(case["ratio"] - 1) for case in record["cases"].values()), default=None)


GOALS = (
    Goal(
        benchmark="grpo_step",
        what="GRPO step, 2 prompts x 8 samples: times faster than TRL",
        measured=_times_faster_than_trl,
        at_least=3,
        between="Training is three fifths of the step and runs at the speed of the bare matrix "
        "products (see forward and backward below), each prompt once; sampling multiplies every "
        "weight with 16 rows for each of 64 tokens. Kept: "
        "merged and packed weights, one kernel for the softmax, its log-probability and its "
        "gradient, matrices turned for the backward pass when they are needed. TRL pays for "
        "prompts again in every sample, so that the ratio grows with them: see prompt512. What is "
        "left is fewer products: narrower weights for sampling, which fp32 rules out.",
    ),
    Goal(
        benchmark="grpo_step",
        what="GRPO step, 2 prompts x 8 samples: peak memory as a share of TRL's",
        measured=_share_of_trl_memory,
        at_most=1 / 3,
    ),
    Goal(
        benchmark="generation",
        what="generation, 4 prompts x 8 samples: times faster than transformers + peft",
        measured=_times_slower_is("transformers + peft", "4x8"),
        at_least=3,
    ),
    Goal(
        benchmark="generation",
        what="generation, 4 prompts x 8 samples: times faster than the best peer in fp32",
        measured=_times_slower_is_best_peer("4x8"),
        at_least=1.5,
    ),
    Goal(
        benchmark="generation",
        what="generation, 8 sequences: times faster than the best peer in fp32",
        measured=_times_slower_is_best_peer("8"),
        at_least=1,
    ),
    Goal(
        benchmark="generation",
        what="generation, 1 sequence: times faster than the best peer in fp32",
        measured=_times_slower_is_best_peer("1"),
        at_least=1,
        between="A step reads the whole model for one token, as every peer's does, at the speed of "
        "memory, and is one call of a kernel. A new version costs its installation and then either "
        "merging (all weights are read and written once, most of it page faults of the new copy) "
        "or a few per cent of every step. Tried for merging: adding in the same pass that copies, "
        "and huge pages (no gain).",
    ),
    Goal(
        benchmark="forward_backward",
        what="forward and backward: bare matrix products as a share of the time, smallest case",
        measured=_smallest_share,
        at_least=0.85,
    ),
    Goal(
        benchmark="prefix_sharing",
        what="sharing prompts in training: largest relative difference of gradients, fp32",
        measured=_largest_difference,
        at_most=1e-5,
    ),
    Goal(
        benchmark="memory",
        what="memory that `lorelei plan` estimates: largest relative error of all runs",
        measured=_largest_error,
        at_most=0.15,
    ),
)


def goals_table(records: Mapping[str, Line]) -> str:
    """Markdown: the goals that are not reached, every goal in a table, and what is between."""
    short: list[str] = []
    between: list[str] = []
    rows: list[str] = []
    for goal in GOALS:
        record = records.get(goal.benchmark)
        value = None if record is None else goal.measured(record)
        if value is None:
            verdict = "not measured"
        elif goal.reached(value):
            verdict = f"{value:.3g}: reached"
        else:
            verdict = f"{value:.3g}: **falls short**"
            short.append(f"{goal.what} (goal {goal.wanted}, measured {value:.3g})")
            between += ["", f"*{goal.what}*: {goal.between}"] if goal.between else []
        rows.append(f"| {goal.what} | {goal.wanted} | {verdict} |")
    opening = f"Not reached: {'; '.join(short)}." if short else "No measured goal falls short."
    return "\n".join((opening, "", "| what | goal | measured |", "|---|---|---|", *rows, *between))
