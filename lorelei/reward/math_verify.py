"""Mathematical equality of an answer and the gold, by the math-verify library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from lorelei.config.errors import shown

# The library's own timeouts are signals, which rewards of users may also want; the pool's
# deadline ends a worker that hangs.
NO_TIMEOUT = 0
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns when timeouts are off


def score(data: Mapping[str, Any], completion: str) -> tuple[float, dict[str, float]]:
    """1.0 if the last answer in the text equals `data["answer"]`, else 0.0.

    Of a gold answer in GSM8K's form, what follows '####' counts. The metric `parsed` says
    whether the text has any answer. Raises ValueError for a gold answer that is not mathematics.
    """
    gold_text = str(data["answer"]).rpartition("####")[2].strip()
    gold = _parse(gold_text) or _parse(f"${gold_text}$")
    if not gold:
        raise ValueError(f"the gold answer {shown(gold_text)} is not a mathematical expression")
    answer = _parse(completion)
    value = float(verify(gold, answer, timeout_seconds=NO_TIMEOUT))
    return value, {"parsed": float(bool(answer))}


def _parse(text: str) -> list[Any]:
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(text, configs, parsing_timeout=NO_TIMEOUT)
