"""What a user gets wrong, from the command line to the message: exit code 2, one line that says
what and where and what to do, no traceback, and nothing left behind.

`pytest -s tests/e2e/test_bad_inputs.py` prints the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lorelei.cli import main as cli
from lorelei.launch import local
from lorelei.run_file import load_config
from lorelei.store.check import check_run
from lorelei.store.lock import FolderLock
from lorelei.store.manifest import manifest_paths
from tests.tiny_models import make_tiny
from tests.tiny_runs import lorelei, make_workplace, write_run

RUN = ("train", "run.yaml")
SUMS = {"kind": "reasoning_gym", "name": "chain_sum"}


def nothing(place: Path, stack: ExitStack) -> None:
    """No preparation."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake. `arguments` run in a workplace with run.yaml and the finished run 'done'."""

    expected: str
    arguments: tuple[str, ...] = RUN
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, ExitStack], None] = nothing
    begins: bool = False  # seen only when the first rollouts are scored


def text(content: bytes) -> Callable[[Path, ExitStack], None]:
    return lambda place, _: void((place / "run.yaml").write_bytes(content))


def void(_: object) -> None:
    """For lambdas."""


def damaged(change: Callable[[Path], None]) -> Callable[[Path, ExitStack], None]:
    """Change a copy of the model, in the folder 'bad'."""

    def prepare(place: Path, _: ExitStack) -> None:
        shutil.copytree(place / "model", place / "bad")
        change(place / "bad")

    return prepare


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def adapter(change: Callable[[Path], None]) -> Callable[[Path, ExitStack], None]:
    """Export the adapter of the finished run into 'start', and change it."""

    def prepare(place: Path, _: ExitStack) -> None:
        shutil.copytree(place / "exported", place / "start")
        change(place / "start")

    return prepare


def of_another_base(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: torch.cat([t, t], dim=-1) for n, t in tensors.items() if "lora_A" in n}
              | {n: t for n, t in tensors.items() if "lora_B" in n}, path)  # fmt: skip


def not_a_number(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: t * torch.nan for n, t in load_file(path).items()}, path)


def rows(lines: str) -> Callable[[Path, ExitStack], None]:
    return lambda place, _: void((place / "bad.jsonl").write_text(lines))


def code(source: str) -> Callable[[Path, ExitStack], None]:
    return lambda place, _: void((place / "bad.py").write_text(source))


def python(function: str, file: str = "bad.py") -> dict[str, Any]:
    return {"reward": {"kind": "python", "path": f"{file}:{function}"}}


def of_done(change: Callable[[Path], None]) -> Callable[[Path, ExitStack], None]:
    """Change a copy of the finished run, in runs/copy."""

    def prepare(place: Path, _: ExitStack) -> None:
        shutil.copytree(place / "runs/done", place / "runs/copy")
        change(place / "runs/copy")

    return prepare


def damage_all(folder: Path) -> None:
    for path in (folder / "snapshots").rglob("*.safetensors"):
        cut(path, 0.9)


def in_use(place: Path, stack: ExitStack) -> None:
    of_done(lambda _: None)(place, stack)
    stack.callback(FolderLock(place / "runs/copy").release)


JSONL = {"task": {"path": "bad.jsonl"}}
START = {"lora": {"init_from": "start"}}
BAD = {"model": "./bad"}

CASES = {
    # the configuration
    "no file": Case(arguments=("train", "absent.yaml"), expected="absent.yaml: cannot be read: No"),
    "not YAML": Case(prepare=text(b"model: [./model\nsteps: 3"), expected="run.yaml, line 2: "),
    "not UTF-8": Case(
        prepare=text(b"model: \xff\xfe"), expected="run.yaml: cannot be read: not UT"
    ),
    "empty file": Case(prepare=text(b""), expected="model: is required"),
    "unknown key": Case(config={"step": 3}, expected="step: unknown key; did you mean 'steps'?"),
    "wrong type": Case(config={"steps": "many"}, expected="steps: 'many' is not allowed; it must"),
    "rank 0": Case(config={"lora": {"lora_rank": 0}}, expected="lora.lora_rank: 0 is not allowed"),
    "no workers": Case(
        config={"train": {"workers": 0}}, expected="train.workers: 0 is not allowed"
    ),
    "run name": Case(config={"name": "../up"}, expected="name: '../up' is not allowed; a name has"),
    "override without value": Case(
        arguments=(*RUN, "steps"),
        expected="override 'steps': write key=value, such as optimizer.lr=1e-4",
    ),
    "override of no section": Case(
        arguments=(*RUN, "steps.x=1"), expected="steps.x: steps is 3, which has no keys to set"
    ),
    "override of a wrong type": Case(
        arguments=(*RUN, "optimizer.lr=fast"),
        expected="optimizer.lr: 'fast' is not allowed; it must be a",
    ),
    # the model
    "no model folder": Case(config={"model": "./absent"}, expected="absent'; write a folder or a"),
    "no model id": Case(config={"model": "org/absent"}, expected="model: 'org/absent' is not in "),
    "config.json is not JSON": Case(
        config=BAD, prepare=damaged(lambda m: cut(m / "config.json")), expected="is not JSON"
    ),
    "unsupported architecture": Case(
        config=BAD,
        prepare=damaged(lambda m: edit(m / "config.json", architectures=["GPT2LMHeadModel"])),
        expected="model: architecture 'GPT2LMHeadModel' is not supported",
    ),
    "no weights": Case(
        config=BAD,
        prepare=damaged(lambda m: (m / "model.safetensors").unlink()),
        expected="has no *.safetensors; download it again",
    ),
    "weights are no safetensors": Case(
        config=BAD,
        prepare=damaged(lambda m: void((m / "model.safetensors").write_bytes(b"\x80\x04" * 999))),
        expected="model.safetensors is not a readable safetensors file",
    ),
    "weights cut off": Case(
        config=BAD,
        prepare=damaged(lambda m: cut(m / "model.safetensors")),
        expected="model.safetensors is not a readable safetensors file",
    ),
    "a tensor is missing": Case(
        config=BAD,
        prepare=damaged(lambda m: drop_tensor(m / "model.safetensors")),
        expected="has no tensor 'model.norm.weight'; is it complete?",
    ),
    "no tokenizer": Case(
        config=BAD,
        prepare=damaged(lambda m: (m / "tokenizer.json").unlink()),
        expected="has no tokenizer (none of tokenizer.json, tokenizer.model, vocab.json); copy",
    ),
    "tokenizer is damaged": Case(
        config=BAD,
        prepare=damaged(lambda m: cut(m / "tokenizer.json")),
        expected="model: the tokenizer in ",
    ),
    "tokenizer of another model": Case(
        config=BAD,
        prepare=damaged(lambda m: void(make_tiny("llama", m, vocab_size=150))),
        expected="has 150; get the tokenizer files of this very model",
    ),
    "completions longer than the context": Case(
        config={"rollout": {"max_new_tokens": 512}},
        expected="rollout.max_new_tokens: 512 (adapter default) leaves no room for a prompt in 512",
    ),
    # the adapter
    "target that matches nothing": Case(
        config={"lora": {"target_modules": ["q_prj"]}},
        expected="lora.target_modules: 'q_prj' matches no linear layer of LlamaForCausalLM; did y",
    ),
    "no adapter to start from": Case(config=START, expected="lora.init_from: there is no file "),
    "adapter of another base": Case(
        config=START,
        prepare=adapter(of_another_base),
        expected="lora.init_from: adapter 'default': base_model.model.model.layers.0.",
    ),
    "adapter of another rank": Case(
        config={"lora": {"init_from": "start", "lora_rank": 8}},
        prepare=adapter(void),
        expected="has lora_rank 4, adapter 'default' has 8; set lora.lora_rank: 4",
    ),
    "adapter cut off": Case(
        config=START,
        prepare=adapter(lambda a: cut(a / "adapter_model.safetensors")),
        expected="adapter_model.safetensors: not a readable safetensors file",
    ),
    "adapter with DoRA": Case(
        config=START,
        prepare=adapter(lambda a: edit(a / "adapter_config.json", use_dora=True)),
        expected="adapter_config.json: use_dora: True trains magnitudes too; train with use_dora=F",
    ),
    "adapter that starts from the base's values": Case(
        config=START,
        prepare=adapter(lambda a: edit(a / "adapter_config.json", init_lora_weights="pissa")),
        expected="init_lora_weights: 'pissa' was trained on a base from whose weights its first",
    ),
    "adapter with NaN": Case(
        config=START,
        prepare=adapter(not_a_number),
        expected="values are NaN or infinite in float32; take an earlier checkpoint",
    ),
    "adapter of other layers": Case(
        config={"lora": {"init_from": "start", "target_modules": ["q_proj"]}},
        prepare=adapter(void),
        expected="adapter 'default' does not target; set lora.target_modules: [",
    ),
    "adapter without tensors": Case(
        config=START,
        prepare=adapter(lambda a: (a / "adapter_model.safetensors").unlink()),
        expected="adapter_model.safetensors: missing",
    ),
    "adapter configuration is damaged": Case(
        config=START,
        prepare=adapter(lambda a: cut(a / "adapter_config.json")),
        expected="adapter_config.json: not JSON",
    ),
    # the task
    "no data file": Case(
        config={"task": {"path": "absent.jsonl"}}, expected="task.path: there is no file "
    ),
    "empty data set": Case(config=JSONL, prepare=rows(""), expected="task: bad has no rows"),
    "data is not JSON": Case(
        config=JSONL,
        prepare=rows('{"question": "a", "answer": "b"}\n{"question": '),
        expected="task.path: line 2 of ",
    ),
    "missing question": Case(
        config=JSONL,
        prepare=rows('{"problem": "a", "answer": "b"}\n' * 9),
        expected="bad.jsonl has no column 'question'; allowed: answer, problem",
    ),
    "missing answer": Case(
        config={**JSONL, "reward": {"kind": "math_verify"}},
        prepare=rows('{"question": "a", "anwser": "b"}\n' * 9),
        expected="bad.jsonl has no column 'answer'; did you mean 'anwser'?",
    ),
    "null question": Case(
        config=JSONL,
        prepare=rows('{"question": "a", "answer": "b"}\n{"question": null, "answer": "b"}\n'),
        expected="bad.jsonl: the column 'question' is null; fill it in, or leave such rows out",
    ),
    "half a character": Case(
        config=JSONL,
        prepare=rows('{"question": "a", "answer": "\\ud83d"}\n'),
        expected="bad.jsonl: the column 'answer' holds half a character (a lone surrogate)",
    ),
    "variable that the chat template has not": Case(
        config={"task": {"chat_template_kwargs": {"enable_thinking": False}}},
        expected="task.chat_template_kwargs: 'enable_thinking' is no variable of the model's chat",
    ),
    "nothing left to train on": Case(
        config=JSONL,
        prepare=rows('{"question": "a", "answer": "b"}\n' * 9),
        expected="task.eval_size: 4 held-out rows leave none of the 9 rows of",
    ),
    "prompt over its limit": Case(
        config={"task": {"max_prompt_tokens": 3}}, expected="task.max_prompt_tokens: the prompt of"
    ),
    "prompt over the context": Case(
        config={"task": {"system_prompt": "Calm. " * 100, "max_prompt_tokens": 9999}},
        expected="and leaves no room to answer in a context of 512; shorten such problems",
    ),
    "prompt over rollout.max_context": Case(
        config={"rollout": {"max_context": 20}}, expected="or raise rollout.max_context"
    ),
    "unknown reasoning-gym data set": Case(
        config={"task": {**SUMS, "name": "chain_sums"}},
        expected="task.name: reasoning-gym has no dataset 'chain_sums'; did you mean 'chain_sum'?",
    ),
    "unknown reasoning-gym option": Case(
        config={"task": {**SUMS, "config": {"min_term": 2}}},
        expected="task.config: chain_sum has no option 'min_term'; did you mean 'min_terms'?",
    ),
    "refused reasoning-gym option": Case(
        config={"task": {**SUMS, "config": {"min_terms": 5, "max_terms": 2}}},
        expected="task.config: chain_sum refuses ",
    ),
    # the reward
    "no reward file": Case(
        config=python("score", "absent.py"), expected="reward.path: there is no"
    ),
    "no reward function": Case(
        config=python("scor"),
        prepare=code("def score(completion): return 1"),
        expected="bad.py has no function 'scor'; did you mean 'score'?",
    ),
    "reward file does not import": Case(
        config=python("score"), prepare=code("def score(:"), expected="failed: SyntaxError: "
    ),
    "reward function takes no completion": Case(
        config=python("score"),
        prepare=code("def score(text): return 1"),
        expected="reward.path: score(text) must have a parameter 'completion' (one text) or",
    ),
    "reward of another task": Case(
        config={"reward": {"kind": "reasoning_gym"}},
        expected="reward.kind: 'reasoning_gym' cannot score task.kind 'jsonl'; use math_verify or",
    ),
    "weights of what is not scored": Case(
        config={"reward": {"weights": {"strict": 1.0}}, "steps": 1},
        expected="reward: no text of a trial could be scored: not a number: reward.weights names "
        "'strict', the scorer has",
    ),
    "reward that fails on every text": Case(
        config=python("score"),
        prepare=code("def score(completion, solution): return 1"),
        expected="reward: no text of a trial could be scored: raised ValueError: no column "
        "'solution' in the row; it has",
    ),
    "reward that asks for what TRL alone has": Case(
        config=python("score"),
        prepare=code("def score(completions, trainer_state): return [1]"),
        expected="reward.path: score asks for TRL's 'trainer_state', which is not given here; ",
    ),
    "reward of an environment variable that is not set": Case(
        config={"reward": {**python("score")["reward"], "env": ["NO_SUCH_KEY"]}},
        prepare=code("def score(completion): return 1"),
        expected="reward.env: there is no environment variable 'NO_SUCH_KEY'; set it, or remove",
    ),
    # the run folder
    "name is taken": Case(
        config={"name": "done"}, expected="name: 'runs/done' holds a run already; go on with `lor"
    ),
    "a file where the runs should be": Case(
        config={"runs_dir": "rows.jsonl"}, expected="rows.jsonl: cannot be written: File exists ("
    ),
    "no run to resume": Case(
        arguments=("resume", "absent"), expected="run: there is no run folder 'absent', nor runs/ab"
    ),
    "resume of what is no run": Case(
        arguments=("resume", "model"), expected="model: not a run folder, it has no run.json"
    ),
    "run in use": Case(
        arguments=("resume", "copy"), prepare=in_use, expected="runs/copy: in use by process "
    ),
    "run.json is damaged": Case(
        arguments=("resume", "copy"),
        prepare=of_done(lambda run: cut(run / "run.json")),
        expected="runs/copy/run.json: not JSON",
    ),
    "every checkpoint is damaged": Case(
        arguments=("resume", "copy"),
        prepare=of_done(damage_all),
        expected="runs/copy: no checkpoint verifies (",
    ),
    # the commands that read a run
    "unknown adapter": Case(
        arguments=("export", "done", "--adapter", "math"),
        expected="adapter: there is no 'math'; use --adapter with one of: default",
    ),
    "fused experts of a model without experts": Case(
        arguments=("export", "done", "--experts", "fused"),
        expected="--experts: fused: the adapter has no LoRA on experts; leave the option out",
    ),
    "export to where something is": Case(
        arguments=("export", "done", "--out", "model"), expected="model: exists already; remove it"
    ),
    "export of a damaged run": Case(
        arguments=("export", "copy"),
        prepare=of_done(damage_all),
        expected="runs/copy: it has no checkpoint that verifies; see `lorelei check`",
    ),
    "more problems than are held out": Case(
        arguments=("eval", "done", "-n", "99"), expected="-n: 99 is more than the 4 problems that"
    ),
    "samples in no order": Case(
        arguments=("samples", "done", "--order", "top"),
        expected="--order: 'top' is not one of worst",
    ),
    "samples of no adapter": Case(
        arguments=("samples", "done", "--adapter", "x"), expected="adapter: no rollout of 'x'; reco"
    ),
    "samples of no step": Case(
        arguments=("samples", "done", "--step", "9"),
        expected="--step: no rollouts of step 9; there",
    ),
    "report of what is no run": Case(
        arguments=("report", "model"), expected="model/metrics.jsonl: no such file"
    ),
    "runs of no folder": Case(
        arguments=("runs", "absent"), expected="runs: there is no folder 'ab"
    ),
}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Path]:
    """A workplace with a finished run and an exported adapter."""
    place = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    with working_in(place):
        local.train(load_config(write_run(place, "done", steps=1)))
        lorelei_here("export", "done", "--out", "exported")
    yield place


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[dict[str, str]]:
    """Every mistake and its line, printed at the end."""
    lines: dict[str, str] = {}
    yield lines
    for name, line in lines.items():
        print(f"| {name} | {line} |")  # noqa: T201


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def lorelei_here(*arguments: str) -> int:
    """The exit code of a command, run in this process: an import of torch less."""
    before, sys.argv = sys.argv, ["lorelei", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.argv = before
    return 0


def files(folder: Path) -> dict[str, int]:
    """Everything below a folder, with its size."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    place: Path,
    table: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    case = CASES[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with ExitStack() as stack, working_in(place):
        clean = files(place)
        write_run(place, "run", **case.config)
        case.prepare(place, stack)
        before = files(place)
        capfd.readouterr()
        code = lorelei_here(*case.arguments)
        out, errors = capfd.readouterr()
        left = files(place)
        for path in sorted(left.keys() - clean.keys(), reverse=True):
            (place / path).unlink() if (place / path).is_file() else (place / path).rmdir()
    lines = errors.splitlines()
    assert (code, len(lines), bool(out)) == (2, 1, case.begins), f"{code}\n{out}\n{errors}"
    assert lines[0].startswith("error: ") and case.expected in lines[0]
    assert len(lines[0].replace(str(place), "")) < 400
    assert left == before, "something was left behind"
    table[name] = lines[0].replace(str(place), "/home/you").replace("|", "\\|")


def test_what_the_table_says_is_what_users_see(place: Path) -> None:
    write_run(place, "seen", lora={"target_modules": ["q_prj"]})
    errors = lorelei(place, "train", "seen.yaml", code=2)
    assert errors.startswith("error: lora.target_modules: 'q_prj'") and errors.count("\n") == 1


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_cannot_be_written_is_said_so(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "ro") as disk, working_in(place):
        write_run(place, "run", runs_dir=str(disk))
        assert lorelei_here("train", "run.yaml") == 2
        out, errors = capfd.readouterr()
        assert list(disk.iterdir()) == []
    assert out == "" and errors.count("\n") == 1
    assert errors.startswith(f"error: {disk}/run: cannot be written: Read-only file system (")
    assert "make the folder writable" in errors


def test_a_disk_that_is_full_from_the_start_is_said_so(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk, working_in(place):
        fill(disk, leave=0)
        write_run(place, "run", runs_dir=str(disk))
        assert lorelei_here("train", "run.yaml") == 2
        out, errors = capfd.readouterr()
        assert [path.name for path in disk.iterdir()] == ["filler"]
    assert out == "" and errors.count("\n") == 1
    assert errors.startswith(f"error: {disk}/run") and "No space left on device" in errors
    assert "free some space or move the run to a larger disk" in errors


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_when_there_is_room(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=450k") as disk, working_in(place):
        write_run(place, "run", runs_dir=str(disk), steps=60, eval={"every": 0})
        assert lorelei_here("train", "run.yaml") == 2
        out, errors = capfd.readouterr()
        assert errors.count("\n") == 1 and "No space left on device" in errors
        step = max(int(path.stem) for path in manifest_paths(disk / "run"))
        assert f"saved after step {step}; go on with: lorelei resume {disk}/run" in out
        assert list(disk.rglob(".*")) == [], "temporary files"
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert lorelei_here("resume", str(disk / "run")) == 0
        assert check_run(disk / "run") == []


def fill(disk: Path, leave: int) -> None:
    with open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            try:
                if not filler.write(b"x" * 1024):
                    break
            except OSError:
                break
