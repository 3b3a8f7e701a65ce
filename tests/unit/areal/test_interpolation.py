"""OmegaConf's references."""

from __future__ import annotations

import pytest

from lorelei.areal.interpolation import resolve
from lorelei.config.errors import ConfigError


def test_a_whole_value_keeps_its_type_and_a_part_becomes_text():
    data = {
        "seed": 1,
        "on": True,
        "list": [1, {"a": "${seed}"}],
        "copy": "${list}",
        "name": "run-${seed}-${on}",
    }
    assert resolve(data) == {
        "seed": 1,
        "on": True,
        "list": [1, {"a": 1}],
        "copy": [1, {"a": 1}],
        "name": "run-1-True",
    }


def test_references_may_go_through_others_and_into_lists():
    data = {"a": {"b": "${c.0.d}"}, "c": [{"d": "${e}"}], "e": 7, "f": "${a.b}", "g": "${c[0].d}"}
    resolved = resolve(data)
    assert (resolved["a"]["b"], resolved["f"], resolved["g"]) == (7, 7, 7)


def test_dots_in_front_are_relative():
    data = {"x": 1, "a": {"x": 2, "y": "${.x}", "b": {"x": 3, "y": "${..x}", "z": "${x}"}}}
    resolved = resolve(data)["a"]
    assert (resolved["y"], resolved["b"]["y"], resolved["b"]["z"]) == (2, 2, 1)


def test_a_reference_may_be_inside_another():
    data = {"which": "b", "all": {"a": 1, "b": 2}, "x": "${all.${which}}"}
    assert resolve(data)["x"] == 2


def test_what_is_escaped_stays():
    assert resolve({"a": "\\${b}"}) == {"a": "${b}"}


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("LORELEI_TEST", "here")
    data = {"a": "${oc.env:LORELEI_TEST}", "b": "${oc.env:LORELEI_ABSENT,there}/x"}
    assert resolve(data) == {"a": "here", "b": "there/x"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"a": {"b": "${a.c}"}}, "a.b: ${a.c} names nothing: there is no a.c; allowed: b"),
        ({"path": 1, "b": "${pth}"}, "there is no pth; did you mean 'path'?"),
        ({"a": 1, "b": "${a.c}"}, "there is no a.c; it has no keys"),
        ({"a": "${b}", "b": "${a}"}, "refers to itself (a -> b -> a); write the value"),
        ({"a": "${oc.env:LORELEI_ABSENT}"}, "a: the environment variable LORELEI_ABSENT is not"),
        ({"a": "${eval:1+1}"}, "a: ${eval:...} is no resolver that is known here"),
    ],
)
def test_what_cannot_be_resolved_says_where(data, words):
    with pytest.raises(ConfigError) as caught:
        resolve(data)
    assert words in str(caught.value)
