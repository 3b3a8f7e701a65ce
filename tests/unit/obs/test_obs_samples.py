"""Samples: rollouts a person can read, and that cannot act on the terminal."""

import pytest

from lorelei.obs.samples import format_samples
from lorelei.obs.screen import escaped


def rollout(reward: float | None, step: int = 1, adapter: str = "default", **more: object) -> dict:
    return {
        "step": step,
        "adapter": adapter,
        "prompt_id": f"p{step}",
        "sample": 0,
        "reward": reward,
        "error": None,
        "version": step,
        "finish_reason": "stop",
        "prompt": "2 + 2 =",
        "completion": f"answer of {reward}",
        "metrics": {"strict": 1.0},
        **more,
    }


RECORDS = [rollout(0.5), rollout(None, error="timeout"), rollout(1.0, step=2), rollout(0.0, step=3)]


def shown(text: str) -> list[str]:
    return [line.split("answer of ")[1] for line in text.splitlines() if "answer of" in line]


def test_worst_and_best_sort_by_reward_and_put_unscored_last() -> None:
    assert shown(format_samples(RECORDS, 9, order="worst")) == ["0.0", "0.5", "1.0", "None"]
    assert shown(format_samples(RECORDS, 2, order="best")) == ["1.0", "0.5"]


def test_equal_rewards_show_the_newest_step_first() -> None:
    text = format_samples([rollout(1.0, step=s) for s in (1, 3, 2)], 1, order="best")
    assert "step 3" in text


def test_random_samples_repeat_with_their_seed_and_never_twice_in_one() -> None:
    many = [rollout(float(i)) for i in range(50)]
    first = shown(format_samples(many, 10, seed=1))
    assert first == shown(format_samples(many, 10, seed=1))
    assert first != shown(format_samples(many, 10, seed=2))
    assert len(set(first)) == 10


def test_only_the_adapter_that_was_asked_for_is_shown() -> None:
    both = [rollout(0.1, adapter="a"), rollout(0.2, adapter="b")]
    assert shown(format_samples(both, 9, adapter="b")) == ["0.2"]


def test_an_unknown_adapter_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no rollout of 'c'; recorded are: a, b"):
        format_samples([rollout(0, adapter="b"), rollout(0, adapter="a")], 1, adapter="c")


def test_a_sample_says_where_it_comes_from() -> None:
    text = format_samples([rollout(0.25, step=7, error="parse: none")], 1)
    head, *rest = text.splitlines()
    assert head.startswith("── reward 0.25 · step 7 · default@v7 · prompt p7 · sample 0 · stop ─")
    assert rest == [
        "error       parse: none",
        "metrics     strict 1",
        "prompt      │ 2 + 2 =",
        "completion  │ answer of 0.25",
    ]


def test_line_breaks_stay_and_long_lines_wrap_behind_the_bar() -> None:
    text = format_samples([rollout(1.0, completion="one\n\n" + "word " * 40)], 1)
    body = text[text.index("completion") :].splitlines()
    assert body[0] == "completion  │ one"
    assert body[1].rstrip() == "            │"
    assert len(body) == 5
    assert max(map(len, body)) <= 96


def test_model_text_cannot_reach_the_terminal_as_control_characters() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\rfake\x9b31m\u202e\u2028\ud800"
    text = format_samples([rollout(1.0, prompt=evil, completion=evil, error=evil)], 1)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert r"\x1b]0;owned\x07\x1b[2J\rfake\x9b31m\u202e\u2028\ud800" in text
    text.encode()  # a lone surrogate would fail here


def test_escaping_keeps_what_prints() -> None:
    assert escaped("naïve 漢字 → 🙂 ½") == "naïve 漢字 → 🙂 ½"
    assert escaped("a\nb\tc") == r"a\nb\tc"
    assert escaped("a\nb\tc", keep="\n") == "a\nb" + r"\tc"
