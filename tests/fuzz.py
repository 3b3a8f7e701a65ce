"""How many random inputs the tests of such inputs try, and from where they start.

LORELEI_FUZZ_EXAMPLES=N: examples of each test; LORELEI_FUZZ_SEED=N: another N, other examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, seed, settings

Test = Callable[..., Any]


def fuzz(examples: int) -> Callable[[Test], Test]:
    """Stands above @given. examples: without LORELEI_FUZZ_EXAMPLES."""
    found = settings(
        max_examples=int(os.environ.get("LORELEI_FUZZ_EXAMPLES", examples)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(int(os.environ.get("LORELEI_FUZZ_SEED", "0")))(found(test))
