"""An environment: the model answers, then says how sure it is, and is scored for both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

QUESTION = "How sure are you that this is right? Write a whole number of percent."


def step(
    messages: Sequence[Mapping[str, str]], data: dict[str, Any]
) -> str | tuple[float, dict[str, float]]:
    """Called after every answer; the reward is 1 less the Brier score of what the model claims.

    messages: the conversation, the answer last. data: the row, this episode's own copy.
    """
    said = messages[-1]["content"]
    if "right" not in data:
        data["right"] = str(data["answer"]) in said
        return QUESTION
    percent = re.search(r"\d+", said)
    if percent is None:
        return 0.0, {"right": float(data["right"])}
    claimed = min(int(percent.group()), 100) / 100
    brier = (claimed - data["right"]) ** 2
    return 1.0 - brier, {"right": float(data["right"]), "claimed": claimed}
