"""Mathematical equality of an answer and the gold, by the math-verify library.

The library looks for the last thing in a text that it can read. Here it is given the whole answer
and nothing else, so that a part of an answer (the 2 of 2\\sqrt{3}) is not taken for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from lorelei.config.errors import shown

# The library's own timeouts are signals, which rewards of users may also want; the pool's
# deadline ends a worker that hangs, which is an error and not a wrong answer.
NO_TIMEOUT = 0
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns when timeouts are off

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_MATHS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SEVERAL = re.compile(r"[\s$.,;]*(?:and|or)?[\s$.,;]*")  # between boxes of one answer
_ANSWER = re.compile(r"(?i:answers?)\**(?:\s+(?:is|are)|\s*[:=])\**:?\s*(.+)")
_THOUSANDS = re.compile(
    r"(?<![\d.])\d{1,3}(?:(?:\\[,!;: ]|~|\{,\}|,\\!|[\u00a0\u2009\u202f])\d{3})+(?!\d)"
)
_SPACED_NUMBER = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_WORDING = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'’.-]+[^\W\d_]+)*|[^\W\d_]+(?:[\s'’.-]+[^\W\d_]{3,})+")


def score(data: Mapping[str, Any], completion: str) -> tuple[float, dict[str, float]]:
    """1.0 if the answer of the text equals `data["answer"]`, else 0.0.

    The answer is what the last \\boxed{} holds (or the last ones, joined by 'and' or commas), else
    what the library finds. A gold answer may be LaTeX with or without dollar signs; in GSM8K's
    form, what follows '####' counts. Words are compared as text. The metric `parsed` says whether
    the text has any answer. Raises ValueError for a gold answer that is empty.
    """
    gold_text = _of_gold(str(data["answer"]))
    if not gold_text.strip("$ "):
        raise ValueError(f"the gold answer {shown(str(data['answer']))} is empty")
    completion = data.get("completion_answer", completion)  # numbers of the thinking are no answer
    said, whole = _of_completion(completion)
    if _as_text(said) == _as_text(gold_text):
        return 1.0, {"parsed": 1.0}
    if _WORDS.fullmatch(_as_text(gold_text)):
        return 0.0, {"parsed": float(bool(said))}
    answer = _latex(said) if whole else _found_in(completion)
    value = float(verify(_latex(gold_text), answer, timeout_seconds=NO_TIMEOUT))
    return value, {"parsed": float(bool(answer))}


def _of_gold(text: str) -> str:
    text = text.rpartition("####")[2].strip()
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    whole = _MATHS.fullmatch(text.rstrip("."))
    return next(filter(None, whole.groups())) if whole else text


def _of_completion(text: str) -> tuple[str, bool]:
    """(what may be the answer, whether it is all of it); '' for a box that is not closed."""
    if _BOX.search(text):
        return _boxed(text) or "", True
    lines = text.strip().splitlines() or [""]
    told = _ANSWER.search(lines[-1])
    said = (told[1] if told else lines[-1]).strip().rstrip(".").strip("*")
    if whole := _MATHS.fullmatch(said):
        return next(filter(None, whole.groups())), True
    # a formula without dollar signs: LaTeX, or letters among numbers; prose is the library's
    marked = any(mark in said.replace("\\$", "") for mark in ("$", "\\(", "\\["))
    prose = re.search(r"(?<!\\)\b[^\W\d_]{3,}", _as_text(said))
    formula = re.search(r"\\[a-zA-Z]|[\^_]|\d\s*[a-zA-Z]\b", said)
    return said, bool(formula) and not prose and not marked


def _boxed(text: str) -> str | None:
    """What the last boxes hold; None where there is none, or the last one is not closed."""
    boxes = [(m.start(), *_braced(text, m.end())) for m in _BOX.finditer(text)]
    if not boxes or boxes[-1][2] is None:
        return None
    first, _, last = boxes[-1]
    held = [str(last)]
    for start, end, content in reversed(boxes[:-1]):
        if content is None or not _SEVERAL.fullmatch(text[end:first]):
            break
        held.insert(0, content)
        first = start
    return ", ".join(held)


def _braced(text: str, start: int) -> tuple[int, str | None]:
    """(where it ends, the group in braces at `start`, or the one word there)."""
    if not text.startswith("{", start):
        word = re.compile(r"[^\s$.,]+").match(text, start)
        return (word.end(), word[0]) if word else (start, None)
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place + 1, text[start + 1 : place]
    return len(text), None


def _as_text(text: str) -> str:
    """A form in which equal answers are often equal: no wrapping, outer marks and white space."""
    text = _WORDING.sub(r"\1", _without_separators(text))
    return " ".join(text.replace("$", "").split()).strip(" .").lower()


def _without_separators(text: str) -> str:
    """A text whose numbers have no marks between thousands."""
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    return text.replace(" ", "") if _SPACED_NUMBER.fullmatch(text.strip()) else text


def _latex(text: str) -> list[Any]:
    """The whole text as one expression; empty where it cannot be read."""
    plain = _without_separators(text).replace("\\$", "").replace("$", "").strip()
    return parse(f"${plain}$", [LatexExtractionConfig()], parsing_timeout=NO_TIMEOUT)


def _found_in(text: str) -> list[Any]:
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(_without_separators(text), configs, parsing_timeout=NO_TIMEOUT)
