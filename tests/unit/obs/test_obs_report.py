"""Report and curves: pictures from records alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.curves import render_curves
from lorelei.obs.figure import smoothed, spread
from lorelei.obs.report import render_report


def make_run(folder: Path, adapters: tuple[str, ...] = ("default",), steps: int = 6) -> Path:
    folder.mkdir()
    config = {"model": "org/model", "seed": 3, "lora": {"lora_rank": 8}, "algo": {"kind": "grpo"}}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    lines = []
    for adapter in adapters:
        for step in range(steps + 1):
            at = {"adapter": adapter, "step": step}
            score = step / (steps + 1)
            if step % 3 == 0:
                scores = {"lenient": score + 0.1, "strict": score}
                lines.append({"kind": "eval", **at, "scores": scores})
            if step:
                seconds = {"step": 3.0, "wait": 2.0, "train": 0.5}
                values = {"reward": score, "kl_sampler": 1e-4 * step, "grad_norm": 1.0}
                lines.append({"kind": "step", **at, **values, "seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def ink(path: Path) -> tuple[int, int, float]:
    """Width, height and the part of the pixels that is not white."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    return pixels.shape[1], pixels.shape[0], float((pixels[..., :3] < 0.98).any(-1).mean())


@pytest.mark.parametrize("adapters", [("default",), ("a", "b"), tuple("abcdefgh")])
def test_a_report_is_a_picture_of_readme_width(tmp_path: Path, adapters: tuple[str, ...]) -> None:
    out = render_report(make_run(tmp_path / "run", adapters), tmp_path / "deep" / "report.png")
    width, height, filled = ink(out)
    assert (width, height) == (1200, 800)
    assert 0.02 < filled < 0.5  # neither blank nor a blot
    assert sorted(p.name for p in out.parent.iterdir()) == ["report.png"]


def test_a_report_of_one_step_without_evaluation_is_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "adapter": "a"}\n')
    assert ink(render_report(run, tmp_path / "report.png"))[:2] == (1200, 800)


def test_names_with_dollar_signs_are_not_read_as_formulas(tmp_path: Path) -> None:
    run = make_run(tmp_path / r"cost_$\frac$")
    ink(render_report(run, tmp_path / "report.png"))


def test_a_run_without_records_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no step yet"):
        render_report(tmp_path, tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()


def test_curves_of_several_seeds_are_one_compact_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"s{i}", steps=6 + 3 * i) for i in range(3)]
    width, height, filled = ink(render_curves(runs, tmp_path / "curves.png", "chain_sum"))
    assert (width, height) == (1000, 420)
    assert 0.01 < filled < 0.5


def test_a_run_without_evaluation_cannot_hide_among_others(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    steps = [x for x in (runs[1] / "metrics.jsonl").read_text().splitlines() if "eval" not in x]
    (runs[1] / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    with pytest.raises(ValueError, match="two: no evaluation has the score 'strict'"):
        render_curves(runs, tmp_path / "curves.png", "t")


def test_smoothing_keeps_a_constant_and_a_mean_and_lowers_noise() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(np.full(50, 2.5)).tolist() == [2.5] * 50
    assert smoothed(noise).std() < 0.4 * noise.std()  # 41 points: 0.16 expected inside
    assert smoothed(np.array([1.0])).tolist() == [1.0]


def test_labels_keep_their_gap_their_order_and_stay_near() -> None:
    wanted = [0.5, 0.1, 0.51, 0.9, 0.5]
    placed = spread(wanted, 0.1, 0.0, 1.0)
    by_height = sorted(placed)
    assert min(np.diff(by_height)) >= 0.1 - 1e-12
    assert placed[1] == 0.1 and placed[3] == 0.9  # alone: not moved
    assert placed[0] < placed[2]
    # Three labels around 0.5 move as one block about their mean: the least-squares place.
    assert math.isclose(placed[0] + placed[2] + placed[4], 1.51)


def test_labels_stay_between_their_limits() -> None:
    placed = spread([0.99, 1.0, 1.0], 0.1, 0.0, 1.0)
    assert max(placed) <= 1.0 + 1e-12
    assert min(spread([0.0, 0.0], 0.1, 0.0, 1.0)) >= 0.0


def test_matplotlib_and_torch_load_only_when_something_is_drawn() -> None:
    code = (
        "import sys, lorelei.obs.report, lorelei.obs.console\n"
        "print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
