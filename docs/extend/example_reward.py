"""A reward: right answers score, and brief ones a little more."""

from __future__ import annotations

import re


def brief(completion: str, answer: str, budget: int = 40) -> tuple[float, dict[str, float]]:
    """1 for the right last number, and up to 0.2 on top for staying below `budget` characters.

    completion: what the model wrote. answer, budget: columns of the row, the latter if it has one.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
    right = bool(numbers) and float(numbers[-1]) == float(answer)
    spared = max(0.0, 1.0 - len(completion) / budget)
    return right * (1.0 + 0.2 * spared), {"right": float(right), "spared": spared}
