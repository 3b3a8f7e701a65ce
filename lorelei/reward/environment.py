"""Which environment variables rewards get."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_SECRET_NAME = re.compile(
    r"(TOKENS?|(API|ACCESS|PRIVATE|SECRET|SIGNING)?KEYS?|SECRETS?|PASSW(OR)?DS?|PASS|PASSPHRASES?|"
    r"CREDENTIALS?|CREDS|AUTH|COOKIES?|DSN|SAS)(_|\d|$)",
    re.IGNORECASE,
)
_SECRET_FAMILY = re.compile(r"(AWS|AZURE)_", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like a token, a key or a password, or has one in it."""
    return bool(
        _SECRET_NAME.search(name) or _SECRET_FAMILY.match(name) or _PASSWORD_IN_URL.search(value)
    )


def for_rewards(asked: Iterable[str] = ()) -> tuple[dict[str, str], tuple[str, ...]]:
    """(our environment without secrets but for those asked for, the names that are withheld).

    Raises ValueError for one that is asked for and not there.
    """
    asked = set(asked)
    for name in sorted(asked - os.environ.keys()):
        raise ValueError(
            f"reward.env: there is no environment variable {name!r}; set it, or remove it"
        )
    withheld = {n for n, value in os.environ.items() if n not in asked and is_secret(n, value)}
    given = {name: value for name, value in os.environ.items() if name not in withheld}
    return given, tuple(sorted(withheld))
