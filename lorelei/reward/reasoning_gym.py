"""reasoning-gym's own scores, without evaluating answers as Python."""

from __future__ import annotations

import json
import re
import sys
from ast import literal_eval
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import create_dataset
from reasoning_gym.utils import extract_answer

from lorelei.reward.answer import lenient_match

# Their scorers call eval() on the answer to accept Python lists: literal_eval does the same.
EVAL_DATASETS = frozenset(
    {"binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion"}
)
# Their scorers hand the answer to sympy.parse_expr, which evaluates it as Python.
SYMPY_DATASETS = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
# Their scorers compare tuples with what JSON brings back as lists.
TUPLE_DATASETS = frozenset({"arc_agi", "rearc"})

_NAMES = re.compile(
    r"[A-Za-z]|a?(sin|cos|tan)h?|sec|csc|cot|exp|log|ln|sqrt|[Aa]bs|pi|erf|[ESC]i|li|fresnel[cs]"
)


def score(
    data: Mapping[str, Any], completion: str, answer_after: str | None = None
) -> tuple[float, dict[str, float]]:
    """The dataset's score of the answer in a completion.

    The answer is what follows the last `answer_after`, else in the last <answer> tags, else
    the whole text. Metrics: `strict`, the same score, and `lenient`, 1.0 if the answer ends with
    the gold one, whatever precedes it (equal to `strict` where there is no single gold one).
    """
    # behind the thinking, where a model thinks
    answer = _answer(data.get("completion_answer", completion), answer_after)
    name = data["dataset"]
    if name in SYMPY_DATASETS and not is_plain_formula(answer):
        strict = 0.0
    else:
        metadata = data["metadata"]
        entry = {
            "question": data["question"],
            "answer": data["answer"],
            "metadata": _tuples(metadata) if name in TUPLE_DATASETS else metadata,
        }
        dataset = _dataset(name, json.dumps(data["config"], sort_keys=True))
        try:
            strict = float(dataset.score_answer(answer, entry))
        # Some scorers raise on an answer they cannot read. It is wrong, not unscored.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            strict = 0.0
    gold = data["answer"]
    lenient = strict if gold is None else float(lenient_match(answer, gold))
    return strict, {"strict": strict, "lenient": lenient}


def _answer(completion: str, answer_after: str | None) -> str:
    if answer_after is not None and answer_after in completion:
        return completion.rpartition(answer_after)[2].strip()
    tagged = extract_answer(completion)
    return completion.strip() if tagged is None else tagged


def is_plain_formula(text: str) -> bool:
    """Whether a text is arithmetic over numbers, one-letter symbols and known functions.

    Attribute access, strings, calls of anything else and non-ASCII names are not.
    """
    if not re.fullmatch(r"[A-Za-z0-9\s+\-*/^().,]*", text) or re.search(r"\.\s*[A-Za-z]", text):
        return False
    return all(_NAMES.fullmatch(word) for word in re.findall(r"[A-Za-z]+", text))


@lru_cache(maxsize=256)
def _dataset(name: str, config: str) -> ProceduralDataset:
    """A dataset to score with: some scorers read the config, none reads the items."""
    dataset = create_dataset(name, seed=0, size=1, **json.loads(config))
    if name in EVAL_DATASETS:
        vars(sys.modules[type(dataset).__module__])["eval"] = literal_eval
    return dataset


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(v) for v in cast(list[Any], value))
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in cast(dict[str, Any], value).items()}
    return value
