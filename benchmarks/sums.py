"""The task that both sides learn in `time_to_score`: problems, scoring and settings.

Also a user's reward file: `lorelei train` runs `score` from here, and so does TRL's interpreter.
"""

from __future__ import annotations

import re

STEPS, PROMPTS, SAMPLES, NEW_TOKENS = 12, 4, 8, 16
LR = 1e-4
EVAL_EVERY, HELD_OUT = 2, 32
GAIN = 0.3  # held-out score above the beginning that is waited for


def problems() -> list[dict[str, str]]:
    """All sums of two digits."""
    digits = range(10)
    return [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in digits for b in digits
    ]


def score(completion: str, answer: str) -> float:
    """1 when the last number of the reply is the answer, else 0."""
    numbers = re.findall(r"\d+", completion)
    return float(bool(numbers) and numbers[-1] == answer)
