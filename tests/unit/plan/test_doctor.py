"""The doctor says what is here, what can run, and how to fix what is missing."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from lorelei.cli import main as cli
from lorelei.plan.doctor import Component, Diagnosis, diagnose, doctor_table
from lorelei.venvs.recipe import KINDS, recipe
from tests.tiny_runs import lorelei


def shown(found: Diagnosis, width: int = 80) -> str:
    written = io.StringIO()
    Console(width=width, file=written).print(doctor_table(found))
    return written.getvalue()


def test_every_train_engine_is_shown_with_every_rollout_engine():
    pairs = [(c.train, c.rollout) for c in diagnose().combinations]
    trains, samples = ("archon", "fsdp", "megatron"), ("embedded", "vllm", "sglang")
    assert pairs == [(t, r) for t in trains for r in samples]


def test_what_needs_no_server_runs():
    (own,) = [c for c in diagnose().combinations if (c.train, c.rollout) == ("archon", "embedded")]
    assert own.runs
    assert own.publishers == ("memory",)


def test_a_missing_server_is_shown_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path))
    found = diagnose()
    for kind in KINDS:
        (part,) = [p for p in found.parts if p.name == kind]
        assert part.found is None
        assert part.fix == f"make {kind}"
        assert f"make {kind}" in shown(found)
    assert all(not c.runs for c in found.combinations if c.rollout in KINDS)


def test_an_installed_server_is_shown_with_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("LORELEI_CACHE", str(tmp_path))
    marker = recipe("vllm").marker
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"vllm": "0.32.0", "torch": "2.13.0"}))
    found = diagnose()
    assert next(p for p in found.parts if p.name == "vllm").found.startswith("0.32.0 (cpu)")
    assert all(c.runs for c in found.combinations if (c.train, c.rollout) == ("archon", "vllm"))
    megatron = [c for c in found.combinations if (c.train, c.rollout) == ("megatron", "vllm")]
    assert [c.fix for c in megatron] == ["make megatron"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width):
    found = diagnose()
    long = Component(name="a long one", found="/a/path/that/goes/on" * 10)
    text = shown(replace(found, parts=(*found.parts, long)), width)
    assert max(map(len, text.splitlines())) <= width


def test_the_command_prints_a_table_or_json_and_ends_well(tmp_path, capsys):
    assert "runs here" in lorelei(tmp_path, "doctor")
    cli.doctor(as_json=True)
    assert {"parts", "combinations"} == json.loads(capsys.readouterr().out).keys()
