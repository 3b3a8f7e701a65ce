"""A trial of a reward before anything is loaded for it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from lorelei.config.errors import shown
from lorelei.data.reply import Reply
from lorelei.reward.contract import Sample
from lorelei.reward.pool import RewardPool, tell
from lorelei.reward.process import TELL_AFTER


def try_out(pool: RewardPool, rows: Iterable[Mapping[str, Any]]) -> None:
    """Score the answers of a few rows, and an empty text. One that can be scored is enough.

    Raises ValueError with what is wrong with the first one.
    """
    patience = threading.Timer(
        TELL_AFTER, tell, [f"reward: its first score takes longer than {TELL_AFTER:g} s"]
    )
    patience.daemon = True
    patience.start()
    first: str | None = None
    try:
        for row in rows:
            samples = [sample_of(row, text) for text in trial_texts(row)]
            calls = [samples] if pool.whole_group else [[one] for one in samples]
            for call in calls:
                results = pool.score_now(call)
                if any(result.value is not None for result in results):
                    pool.errors.clear()
                    return
                first = first or f"{results[0].error} (for the text {shown(call[0].completion)})"
                if results[0].error == "timeout":
                    raise ValueError(
                        f"reward.timeout: the first score took more than {pool.timeout:g} s; "
                        "raise it, or make the reward faster"
                    )
    finally:
        patience.cancel()
    raise ValueError(
        f"reward: no text of a trial could be scored: {first}; `lorelei reward test` shows more, "
        "reward.trial: false goes on without a trial"
    )


def trial_texts(row: Mapping[str, Any]) -> list[str]:
    """What a model might have written: the answer, if the row has one, and nothing."""
    answer = row.get("answer")
    return [str(answer), ""] if isinstance(answer, str | int | float) else [""]


def sample_of(row: Mapping[str, Any], text: str) -> Sample:
    """A sample as environments hand it on."""
    return Sample(data={**row, **Reply.of(text).columns()}, completion=text)
