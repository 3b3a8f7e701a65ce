"""The job of docs/extend, on a loop that runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorelei import loop as the_loop
from lorelei.user_file import load_function
from tests.tiny_models import make_tiny
from tests.unit.jobs.live import SPEC, live_loop

EXAMPLE = Path(__file__).parents[3] / "docs" / "extend" / "example_job.py"


@pytest.mark.parametrize("steps", [60])
def test_the_example_job_teaches_every_sentence_and_goes_on_after_a_restart(
    tmp_path: Path, steps: int
) -> None:
    model = make_tiny("llama", tmp_path / "model")
    make_job = load_function(f"{EXAMPLE}:PatientJob", "job")
    sentences = ([5, 17, 200, 42], [9, 8, 7, 6, 5])

    async def teach(until: int) -> int:
        async with live_loop(model, tmp_path / "run") as loop:
            job = make_job(name="pupil", spec=SPEC, sentences=sentences)
            await the_loop.add(loop, job)
            while job.learnt < until:
                assert job.steps < steps, "a sentence of four tokens is learnt by then"
                await asyncio.sleep(0.01)
            return job.steps

    first = asyncio.run(teach(1))
    assert 0 < first < asyncio.run(teach(2))
