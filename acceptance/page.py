"""docs/acceptance.md, made from the JSON in acceptance/results and from nothing else."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from acceptance.record import Line, kept

PAGE = Path("docs/acceptance.md")
MATRICES = (  # in the order of the page
    "logprobs",
    "publishing",
    "fifty_publishes",
    "asynchronous",
    "hosts",
    "areal",
    "megatron",
    "killed",
    "pairs",
    "rank_memory",
)


def page() -> str:
    """The whole page; a matrix that was not measured is left out."""
    found = {matrix: kept(matrix) for matrix in MATRICES}
    measured = {matrix: cases for matrix, cases in found.items() if cases}
    sections = [_section(matrix, cases) for matrix, cases in measured.items()]
    return "\n\n".join((_opening(measured), *sections)) + "\n"


def _opening(measured: dict[str, dict[str, Line]]) -> str:
    problems = [
        f"- {matrix} {name}: {problem}"
        for matrix, cases in measured.items()
        for name, case in cases.items()
        for problem in case["problems"]
    ]
    verdict = "Everything that was measured holds." if measured else "Nothing is measured yet."
    lines = "\n".join(["What does not hold:", "", *problems] if problems else [verdict])
    return f"""# Acceptance

Train engine, publishers and rollout engines as a run uses them, with the real servers. Every
number comes from a file of [acceptance/results](../acceptance/results); `make acceptance` measures
all again, `make acceptance ARGS='MATRIX CASE'` one case, `make acceptance ARGS='on vllm tiny'` what
one server can answer, `make acceptance ARGS=page` writes this page.

{lines}

{_missing(measured)}""".rstrip()


def _missing(measured: dict[str, dict[str, Line]]) -> str:
    """The cases that have no result, by matrix."""
    known = {matrix: import_module(f"acceptance.{matrix}").CASES for matrix in MATRICES}
    absent = {
        matrix: [case for case in cases if case not in measured.get(matrix, {})]
        for matrix, cases in known.items()
    }
    words = [f"{matrix} ({', '.join(cases)})" for matrix, cases in absent.items() if cases]
    return f"Not measured: {'; '.join(words)}." if words else ""


def _section(matrix: str, cases: dict[str, Line]) -> str:
    module = import_module(f"acceptance.{matrix}")
    ordered = {name: cases[name] for name in module.CASES if name in cases}
    return f"{module.section(ordered).strip()}\n\n{_measured_on(ordered)}"


def _measured_on(cases: dict[str, Line]) -> str:
    """Which cases were measured where, with which versions."""
    by: dict[str, list[str]] = {}
    for name, case in cases.items():
        m, servers = case["machine"], case["versions"]
        words = [
            f"{m['cores']} cores of {m['cpu']}",
            f"Python {m['python']}",
            f"torch {m['torch']}",
            *(f"{kind} {version}" for kind, version in servers.items() if name.startswith(kind)),
            case["day"],
        ]
        by.setdefault(", ".join(words), []).append(name)
    return "\n".join(f"- {', '.join(names)}: {where}" for where, names in by.items())
