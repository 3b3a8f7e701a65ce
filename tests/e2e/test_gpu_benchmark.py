"""The GPU benchmark, with tiny shapes, on whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

import pytest

from benchmarks.gpu import section

pytestmark = pytest.mark.slow
Line = dict[str, object]


@pytest.fixture(scope="module")
def record() -> dict[str, Line]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def test_every_side_does_every_kind_of_work(record: Mapping) -> None:
    case = record["cases"]["tiny"]
    assert case["failed"] == {}
    assert list(case["works"]) == ["train", "generate 1", "generate 4", "step"]
    for work, found in case["works"].items():
        assert {"lorelei", "transformers"} <= found.keys(), work
        for side, values in found.items():
            assert values["tokens_per_s"] > 0, (work, side)
        assert found["transformers"]["lorelei_times_faster"] == pytest.approx(
            found["transformers"]["seconds"] / found["lorelei"]["seconds"], abs=1e-3
        )
    assert 0 < case["works"]["train"]["lorelei"]["share_of_products"] < 1


def test_the_sides_have_the_same_model_and_tokens(record: Mapping) -> None:
    train = record["cases"]["tiny"]["works"]["train"]
    # bf16 through two layers; weights of five other seeds are 0.017 away or more
    assert train["lorelei"]["logprob"] == pytest.approx(train["transformers"]["logprob"], abs=2e-3)


def test_tests_are_counted_and_named(record: Mapping) -> None:
    found = record["contract"]
    assert found["passed"] >= 15 and found["failed"] == len(found["failures"]) == 0
    named = section({**record, "contract": found | {"failed": 1, "failures": ["test_x"]}})
    assert "1 failed" in named and "- failed: `test_x`" in named


def test_the_page_shows_every_side_and_what_could_not_be_measured(record: Mapping) -> None:
    case = record["cases"]["tiny"]
    text = section({**record, "cases": {"tiny": case | {"failed": {"trl": "ended badly"}}}})
    train = case["works"]["train"]["transformers"]
    assert f"| transformers | {train['tokens_per_s']:.0f} |" in text
    assert "| 4, lorelei |" in text
    assert "Not measured: trl, which ended badly." in text


def test_without_cuda_nothing_is_measured_or_kept() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "0.6b"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "--tiny" in done.stderr


def test_an_unknown_case_is_named_with_those_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "9b"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "'9b'; use contract, 0.6b, 8b" in done.stderr
