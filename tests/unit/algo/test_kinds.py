"""Which algorithms there are, and what is said of one that is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorelei.algo.grpo import Grpo
from lorelei.algo.kinds import KINDS, algorithm, class_of, fields_of, short_name
from lorelei.algo.loss import load_loss
from lorelei.config.errors import ConfigError, FieldError
from lorelei.run_file import dump_config, load_config, to_plain, validate

RUN = "model: m/m\ntask: {kind: reasoning_gym, name: chain_sum}\n"
MINE = '''
"""Rewards as they are."""
from __future__ import annotations
from pydantic import Field, model_validator
from lorelei.algo.algorithm import Algorithm, PolicyAlgorithm
from lorelei.algo.loss import LossResult, loss_path
from lorelei.types import LossSpec

class Mine(PolicyAlgorithm):
    factor: float = Field(default=1.0, gt=0, description="Of the loss.")

    @model_validator(mode="after")
    def _even(self) -> Mine:
        if self.batch_size % 2:
            raise ValueError("pairs are needed")
        return self

    def loss(self) -> LossSpec:
        return LossSpec(path=loss_path(loss), params={"factor": self.factor})

class Other(Mine):
    def loss(self) -> LossSpec:
        return LossSpec(path=loss_path(lambda current, items: None), params={})

class Unfinished(PolicyAlgorithm): ...
class Jobless(Algorithm): ...
class Plain: ...

def loss(current_I, items, *, factor):
    return LossResult(total=-factor * (current_I * items.weight).sum(), metrics={})
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    return tmp_path


def test_a_mapping_without_a_kind_is_grpo() -> None:
    assert algorithm({}) == Grpo() == algorithm({"kind": "grpo"})
    assert class_of("rloo") is KINDS["rloo"]


def test_an_algorithm_keeps_of_others_what_it_has_itself() -> None:
    values = {"batch_size": 8, "kl_ctl": 0.1, "eps_clip": 0.3}
    assert fields_of("grpo", values) == values
    assert fields_of("rloo", values) == {"batch_size": 8, "kl_ctl": 0.1}
    assert fields_of("sft", values) == {"batch_size": 8}
    assert fields_of("nothing", values) == values


def test_a_class_of_yours_is_an_algorithm(folder: Path) -> None:
    kind = f"{folder / 'mine.py'}:Mine"
    mine = algorithm({"kind": kind, "factor": 2, "kl_ctl": 0.5})
    assert (mine.kind, mine.factor, mine.kl_ctl, mine.job) == (kind, 2.0, 0.5, "rl")
    spec = mine.loss()
    assert spec.path == f"{folder / 'mine.py'}:loss"
    assert load_loss(spec) is load_loss(spec), "a file that did not change is run once"
    assert algorithm({"kind": kind}) == algorithm({"kind": kind})
    assert short_name(kind) == "Mine" and short_name("grpo") == "grpo"


def test_a_loss_of_yours_is_found_by_another_process(folder: Path) -> None:
    path = algorithm({"kind": f"{folder / 'mine.py'}:Mine"}).loss().path
    code = (
        "from lorelei.algo.loss import load_loss; from lorelei.types import LossSpec\n"
        f"print(load_loss(LossSpec(path={path!r}, params={{}})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "loss\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(RUN + text)
    return path


def test_a_relative_file_starts_at_the_yaml_file_and_that_of_an_override_where_one_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    kind = f"{folder / 'mine.py'}:Mine"
    path = write(folder, "algo: {kind: mine.py:Mine, factor: 3.0}\n")
    assert load_config(path).algo.kind == kind
    assert load_config(path, ["algo.kind=../mine.py:Mine"]).algo.kind == kind
    adapters = "adapters: {a: {algo: {kind: mine.py:Mine, factor: 2.0}}, b: {}}\n"
    a, b = load_config(write(folder, "algo: {ppo_n_minibatches: 2}\n" + adapters)).experiments()
    assert (a.algo.kind, a.algo.factor, a.algo.ppo_n_minibatches) == (kind, 2.0, 2)
    assert (b.algo.kind, b.algo.ppo_n_minibatches) == ("grpo", 2)


def test_a_run_of_a_class_of_yours_survives_its_own_run_json(folder: Path) -> None:
    config = load_config(write(folder, "algo: {kind: mine.py:Mine, factor: 3.0}\n"))
    again = validate(to_plain(config))
    assert again.experiments() == config.experiments()
    assert again.algo.factor == 3.0
    path = folder / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path).experiments() == config.experiments()


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("kind: absent.py:Mine", "algo.kind: there is no file {folder}/absent.py$"),
        ("kind: mine.py:Mien", "mine.py has no function 'Mien'; did you mean 'Mine'?$"),
        (
            "kind: mine.py:Nobody",
            "'Nobody'; allowed: Jobless, Mine, Other, Plain, Unfinished, loss$",
        ),
        ("kind: mine.py:loss", "algo.kind: loss is not a subclass of Algorithm$"),
        ("kind: mine.py:Plain", "algo.kind: Plain is not a subclass of Algorithm$"),
        ("kind: mine.py:Jobless", "kind: Jobless says no job that feeds it; derive it from Policy"),
        ("kind: mine.py:Unfinished", "algo.kind: Unfinished has no method `loss`$"),
        (
            "kind: mine.py:Other",
            "kind: Other: loss: '{folder}/mine.py:<lambda>' must be a file and",
        ),
        ("kind: broken.py:f", "algo.kind: importing {folder}/broken.py failed: SyntaxError: "),
        ("kind: 'mine.py:'", "algo.kind: '{folder}/mine.py:' must be a file and a function"),
        ("kind: mine.py:Mine, factor: 0", "algo.factor: 0 is not allowed; it must be greater than"),
        ("kind: mine.py:Mine, batch_size: 3", "algo.kind: .* pairs are needed"),
        ("kind: mine.py:Mine, factr: 2", "algo.factr: unknown key; did you mean 'factor'?"),
        ("kind: mine.py:Mine, eps_clip: 0.3", "algo.eps_clip: has no effect with kind: Mine, only"),
    ],
)
@pytest.mark.parametrize("place", ["algo: {%s}", "adapters: {a: {algo: {%s}}}"])
def test_what_is_wrong_with_a_class_of_yours_is_one_line(
    folder: Path, algo: str, expected: str, place: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, place % algo))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("algo." if place.startswith("algo") else "adapters.a.algo.")
    for part in expected.replace("{folder}", str(folder)).split(" .* "):
        assert part in f"{line}$"


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys, lorelei.run_file, lorelei.algo.kinds\n"
        "[kind.model_json_schema() for kind in lorelei.algo.kinds.KINDS.values()]\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("kind", [3, None, ["grpo"], "grop", ""])
def test_a_kind_that_is_none_is_refused_with_those_there_are(kind: Any) -> None:
    with pytest.raises(FieldError, match=r"^kind: .* is not allowed; .*my_file\.py:MyClass$"):
        class_of(kind)
