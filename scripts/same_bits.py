"""Trains the same runs with the code of two checkouts and says whether they end with the same bits.

usage: same_bits.py OLD_CHECKOUT NEW_CHECKOUT [CASE ...]
       same_bits.py --record OUT.json CHECKOUT [CASE ...]
       same_bits.py --against OUT.json CHECKOUT [CASE ...]

Compared are the tensors of every adapter's last snapshot (weights and Adam's moments), the step
and eval records of metrics.jsonl and the lines of rollouts.jsonl; times are left out, and metrics
that only the new code has are listed. Both checkouts run on the inputs and the recipe of the
checkout that holds this script, in its Python. Only the command line and the files of a run folder
are used. The bits depend on the processor: a recording is good for the machine that made it.
chain_sum needs the model of `make model`, the megatron cases need `make megatron`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiny_models import make_tiny, make_tokenizer  # noqa: E402
from tests.tiny_runs import make_workplace, write_run  # noqa: E402

Found = dict[str, Any]  # what a run ended with, by the name of the tensor or field

TIME = re.compile(r"(.*_)?(seconds|time|idle)")
FUSED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "three": {
        "reward": {"timeout": 90},
        "eval": {"every": 0},
        "adapters": {
            "first": {
                "reward": {"path": "rewards.py:first"},
                "lora": {"lora_rank": 2},
                "algo": {"kind": "rloo"},
                "rollout": {"max_new_tokens": 4},
                "eval": {"every": 1, "n_prompts": 2},
            },
            "second": {
                "reward": {"path": "rewards.py:second"},
                "algo": {"ppo_n_minibatches": 2, "kl_ctl": 0.05},
            },
            "third": {"reward": {"path": "rewards.py:third"}, "lora": {"lora_rank": 8}},
        },
    },
    "fsdp": {"train": {"kind": "fsdp", "data_parallel": 2}},
    "megatron_tp2": {
        "train": {"kind": "megatron", "tensor_parallel": 2},
        "lora": {"target_modules": FUSED},
    },
    "megatron_ep2": {
        "model": "./experts",
        "train": {"kind": "megatron", "data_parallel": 2, "expert_parallel": 2},
    },
    "full": {"lora": {"use_lora": False}, "algo": {"lr": 1e-3, "kl_ctl": 0.05}},
    "turns": {
        "reward": {"path": "rewards.py:slow"},
        "env": {"kind": "multi_turn", "max_turns": 3, "solved": 0.25, "turn_discount": 0.8},
    },
}
RECIPE = f"threads=1 steps={STEPS} algo.batch_size=4 eval.every={STEPS} eval.n_prompts=8".split()
NAMES = ("chain_sum", *CASES)


class RunFailed(Exception):
    """A run did not end well; the message is the last it said."""


def make_inputs(folder: Path) -> Path:
    """A folder with tiny models, rows, rewards and the YAML files of all cases."""
    folder.mkdir()
    tokenizer = make_tokenizer()
    make_workplace(folder, tokenizer)
    tokenizer.save_pretrained(make_tiny("qwen3_moe", folder / "experts"))
    shutil.copy(ROOT / "scripts/gated_rewards.py", folder / "rewards.py")
    shutil.copy(ROOT / "recipes/chain_sum/run.yaml", folder / "chain_sum.yaml")
    for name, sections in CASES.items():
        write_run(folder, name, **{"steps": STEPS, **sections})
    return folder


def check_import(checkout: Path, folder: Path) -> None:
    """Leave when the code that runs would be another's."""
    file = call(checkout, folder, "-c", "import lorelei; print(lorelei.__file__)")
    if not Path(file).is_relative_to(checkout):
        sys.exit(f"{checkout}: Python imports {file}; give the root of a checkout")


def train(checkout: Path, inputs: Path, case: str) -> Found:
    """Run a case with the code of a checkout. Raises RunFailed."""
    work = inputs.with_name("work")  # the same path for every run
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(inputs, work)
    overrides = RECIPE if case == "chain_sum" else []
    call(checkout, work, "-m", "lorelei", "train", f"{case}.yaml", *overrides)
    return read_run(work / "runs" / case)


def call(checkout: Path, folder: Path, *arguments: str) -> str:
    """What a Python that imports the checkout's code prints. Raises RunFailed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RunFailed((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout.strip()


def read_run(folder: Path) -> Found:
    """The tensors of the last manifest's snapshots and the records, without what is a time."""
    manifest = max((folder / "manifests").glob("*.json"), key=lambda path: int(path.stem))
    found: Found = {}
    for name, adapter in json.loads(manifest.read_text())["adapters"].items():
        for tensor, digest in tensors(folder / adapter["snapshot"]):
            found[f"tensor {name} {tensor}"] = digest
    for record in records(folder):
        names = ("kind", "adapter", "step", "prompt_id", "sample")
        who = " ".join(str(record[name]) for name in names if name in record)
        while f"{who}: step" in found:
            who += " again"
        found |= {f"{who}: {field}": value for field, value in fields(record)}
    return found


def tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Name and (dtype, shape, sha256) of the tensors of a safetensors file, by name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256(data[start + begin : start + end]).hexdigest()
        yield name, f"{entry['dtype']} {entry['shape']} {digest[:16]}"


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Steps, evaluations and rollouts of a run."""
    for file in ("metrics", "rollouts"):
        for line in (folder / f"{file}.jsonl").read_text().splitlines():
            record = {"kind": "rollout", **json.loads(line)}
            if record["kind"] in ("step", "eval", "rollout"):
                yield record


def fields(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record at any depth, but no times."""
    for name, value in record.items():
        if TIME.fullmatch(name):
            continue
        if isinstance(value, Mapping):
            yield from fields(value, f"{above}{name}/")
        else:
            yield above + name, value


def compare(old: Found, new: Found) -> tuple[list[str], list[str]]:
    """What differs, and the metrics that only `new` has: more of a record that `old` has too."""
    differ = [f"{key} is missing" for key in old if key not in new]
    differ += [f"{k} is {new[k]}, was {old[k]}" for k in old if k in new and new[k] != old[k]]
    known = {key.partition(": ")[0] for key in old if not key.startswith("tensor ")}
    more = [key for key in new if key not in old]
    differ += [f"{key} is new" for key in more if key.partition(": ")[0] not in known]
    return differ, sorted({k.partition(": ")[2] for k in more if k.partition(": ")[0] in known})


def report(case: str, old: Found, new: Found, seconds: float) -> bool:
    """Print the line of a case. Returns whether it is the same."""
    differ, more = compare(old, new)
    count = sum(key.startswith("tensor ") for key in old)
    what = f"same: {count} tensors, {len(old) - count} values"
    if differ:
        what = f"DIFFERS in {len(differ)} places: {differ[0]}"
    say(f"{case}: {what}, {seconds:.0f} s" + (f"; new metrics: {more}" if more else ""))
    return not differ


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)  # noqa: T201


def main() -> int:
    """The exit code. 1: a difference, or a run that failed."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("arguments", nargs="+", help=f"the cases are {', '.join(NAMES)}")
    given = parser.parse_args()
    count = 1 if given.record or given.against else 2
    checkouts = [Path(path).resolve() for path in given.arguments[:count]]
    recorded = json.loads(given.against.read_text()) if given.against else {}
    known = tuple(recorded) or NAMES
    cases = given.arguments[count:] or known
    if len(checkouts) < count or not set(cases) <= set(known):
        parser.error(f"give {count} checkout(s), then cases of {', '.join(known)}")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        inputs = make_inputs(Path(temporary) / "inputs")
        for checkout in checkouts:
            check_import(checkout, inputs)
        for case in cases:
            start = time.monotonic()
            try:
                found = [train(checkout, inputs, case) for checkout in checkouts]
            except RunFailed as error:
                say(f"{case}: FAILED: {error}")
                good = False
                continue
            seconds = time.monotonic() - start
            if given.record:
                recorded[case] = found[0]
                given.record.write_text(json.dumps(recorded, indent=1) + "\n")
                say(f"{case}: recorded, {seconds:.0f} s")
                continue
            old = recorded[case] if given.against else found[0]
            good &= report(case, old, found[-1], seconds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
