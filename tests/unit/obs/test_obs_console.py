"""Console: what a person reads, on a terminal and in a log."""

import io
import os
import pty
import re
import subprocess
import sys
from contextlib import closing
from math import isnan

import pytest

from lorelei.obs.console import Console
from lorelei.obs.history import History
from lorelei.obs.progress import Progress, clock, short
from lorelei.obs.records import eval_record, step_record
from lorelei.obs.screen import fitting


def record(step: int = 12, adapter: str = "default", **more: object) -> dict:
    return {
        "kind": "step",
        "step": step,
        "adapter": adapter,
        "time": 1000.0 + 10 * step,
        "reward": 0.53,
        "reward_std": 0.31,
        "kl_sampler": 1.2e-4,
        "ratio_max": 1.08,
        "staleness_mean": 0.25,
        "staleness_max": 1,
        "generated_tokens": 4000,
        "trained_tokens": 2000,
        "seconds": {"step": 10.0},
        **more,
    }


def read(console_of: dict[str, int], *calls: tuple) -> list[str]:
    stream = io.StringIO()
    with closing(Console(console_of, stream)) as console:
        for name, *arguments in calls:
            getattr(console, name)(*arguments)
    return stream.getvalue().splitlines()


def test_a_step_is_one_plain_line_with_everything_a_person_watches() -> None:
    (line,) = read({"default": 200}, ("step", record()))
    assert line.split("  ") == [
        "step 12/200",
        "default",
        "reward 0.530 +-0.31",
        "10.0s",
        "eta 31:20",
        "kl 1.2e-04",
        "ratio 1.080",
        "stale 0.2/1",
        "gen 400 tok/s",
        "train 200 tok/s",
    ]


def test_a_step_with_only_its_name_still_gives_a_line() -> None:
    lines = read({"default": 3}, ("step", {"kind": "step", "step": 1, "adapter": "default"}))
    assert lines == ["step 1/3  default  eta -"]


def test_errors_of_a_step_are_counted_by_reason() -> None:
    failed = record(errors={"timeout": 1}, failed_rollouts=3)
    (line,) = read({"default": 200}, ("step", failed))
    assert "errors failed=2 timeout=1" in line


def test_evaluations_show_the_start_and_now() -> None:
    lines = read(
        {"default": 9},
        ("evaluated", "default", 0, {"strict": 0.1, "lenient": 0.2}),
        ("evaluated", "default", 5, {"strict": 0.3, "lenient": 0.6}),
        ("evaluated", "default", 9, {"strict": 0.4, "lenient": 0.5}),
    )
    assert lines == [
        "eval step 0  default  strict 0.100  lenient 0.200",
        "eval step 5  default  strict 0.100 -> 0.300  lenient 0.200 -> 0.600",
        "eval step 9  default  strict 0.100 -> 0.400  lenient 0.200 -> 0.500",
    ]


def test_a_resumed_run_keeps_the_start_of_its_scores() -> None:
    raw = {"step": 0, "adapter": "default", "scores": {"strict": 0.1}}
    history = History(
        steps={"default": (step_record(record(4)),)}, evals={"default": (eval_record(raw),)}
    )
    lines = read({"default": 9}, ("resumed", history), ("evaluated", "default", 5, {"strict": 0.3}))
    assert lines == ["eval step 5  default  strict 0.100 -> 0.300"]


def test_plain_output_has_no_control_characters_whatever_the_text() -> None:
    lines = read({}, ("warn", "said \x1b[2J\r\nnext\x07"), ("note", "[bold]\u202e"))
    assert lines == [r"warning: said \x1b[2J\r\nnext\x07", r"[bold]\u202e"]


def test_a_log_that_holds_only_ascii_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console({}, stream).note("naïve → fine")
    assert raw.getvalue() == rb"na\xefve \u2192 fine" + b"\n"


def test_lines_reach_the_log_at_once() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8")
    Console({"default": 20}, stream).step(record())
    assert raw.getvalue().endswith(b"\n")  # no close, no flush by us


def test_the_eta_follows_the_wall_clock_between_steps() -> None:
    progress = Progress(total=100)
    for number in range(1, 11):  # steps say 10 s, but evaluations make them 25 s apart
        progress.stepped(step_record(record(number, time=25.0 * number)))
    assert progress.seconds_left() == pytest.approx(90 * 25.0)


def test_the_eta_is_unknown_before_the_first_step() -> None:
    assert isnan(Progress(total=100).seconds_left())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.2, "8s"), (59.7, "1:00"), (723, "12:03"), (3723, "1:02:03"), (200_000, "2d 7h")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0"), (7.21, "7.2"), (412, "412"), (999.7, "1.0k"), (56_400, "56k"), (1.2e6, "1.2M")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_words_that_do_not_fit_are_left_out_but_never_the_first() -> None:
    assert fitting(["1234", "67", "901"], 8) == 2
    assert fitting(["1234", "67", "901"], 7) == 1
    assert fitting(["too long"], 3) == 1
    assert fitting(["漢字", "x"], 6) == 1  # two cells a character


ON_A_TERMINAL = """
from contextlib import closing
from lorelei.obs.console import Console
with closing(Console({"[red]": 4})) as console:
    console.started(["a run"])
    console.evaluated("[red]", 0, {"strict": 0.25})
    console.step({"kind": "step", "step": 1, "adapter": "[red]", "reward": 0.5})
    console.warn("bad \\x1b[2J text")
    console.finished(["the end"])
"""


def test_a_terminal_gets_a_table_and_is_given_back() -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", ON_A_TERMINAL]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    os.close(ours)
    assert child.wait(timeout=30) == 0
    text = shown.decode()
    assert re.search(r"\[red\] +1/4 +0\.500 +0\.25→0\.25", text)  # the table; a name is no markup
    assert r"bad \x1b[2J text" in text  # and a text no escape sequence
    assert "\x1b[2J" not in text
    assert text.rstrip().split("\x1b[?25h")[1:], "the cursor was hidden and never shown again"
    assert "the end" in text.split("\x1b[?25h")[-1]


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says EIO when the other side has closed
        return b""
