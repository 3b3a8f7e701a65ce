"""Every field of AReaL's option classes has its rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorelei.areal.file import BELOW, rule_of
from lorelei.areal.service_rules import REPEATED

FIELDS = Path("tests/areal/fields.txt").read_text().split()
WHOLE = ("ref.", "critic.", "teacher.")  # sections of another model


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_has_a_rule_of_its_own(key: str) -> None:
    rule = rule_of(key)
    assert rule is not None
    assert rule.why or rule.ours or rule.equal_to, "says what it becomes, or why not"
    own = {key, key + BELOW}
    if key.startswith(WHOLE):
        own.add(key.partition(".")[0] + BELOW)
    if rule.key != key and rule.key in REPEATED:
        assert key.endswith(f".{rule.key}")
    else:
        assert rule.key in own
