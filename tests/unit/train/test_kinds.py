"""The descriptions of the train engines fit the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorelei.train.kinds import TRAIN


@pytest.mark.parametrize("name", TRAIN)
def test_a_spec_is_made_of_the_engines_own_section(name: str) -> None:
    kind = TRAIN[name]
    section = kind.config(kind=name, max_tokens_per_mb=77, gradient_checkpointing=True)
    spec = kind.make_spec(section, Path("/model"), "bfloat16")
    assert type(spec) is kind.spec
    assert (spec.model, spec.dtype) == ("/model", "bfloat16")
    assert (spec.max_tokens_per_mb, spec.recompute) == (77, True)


def test_sizes_reach_the_spec() -> None:
    section = TRAIN["megatron"].config(kind="megatron", tensor_parallel=2, sequence_parallel=True)
    spec = TRAIN["megatron"].make_spec(section, Path("/model"), "float32")
    sizes = (spec.tensor_parallel, spec.sequence_parallel, spec.expert_parallel)  # type: ignore[attr-defined]  # of MegatronSpec
    assert sizes == (2, True, 1)


def test_descriptions_load_no_torch() -> None:
    code = "import sys, lorelei.train.kinds; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
