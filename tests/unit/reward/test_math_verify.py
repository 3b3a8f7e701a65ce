"""What math_verify takes for an answer, and for a right one."""

from __future__ import annotations

import pytest

from lorelei.reward.math_verify import score

# As MATH, DAPO, Big-Math, GSM8K and their like hold them.
GOLDS = [
    r"2\sqrt{3}",
    r"11\sqrt2",
    r"\frac{3}{4}",
    r"\dfrac{1}{2}",
    r"\frac12",
    r"3\frac{1}{2}",
    r"\left( 3, \frac{\pi}{2} \right)",
    r"(-\infty, 2)",
    r"(0, 1] \cup [2, \infty)",
    r"[0, 1)",
    r"\{1, 2, 3\}",
    "1, 2, 3",
    r"\pm 2",
    r"2 \pm \sqrt{3}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    "y = 2x + 3",
    "x=5",
    r"x \leq 3",
    "1 < x < 2",
    "x^2+2x+1",
    "6 - 5i",
    r"\log_2 3",
    r"0.\overline{3}",
    r"1{,}000",
    r"32,\!000",
    r"10\,000",
    "1 000",
    "1,234,567",
    "1,200",
    r"\$32{,}000",
    r"5\text{ cm}",
    "5 cm",
    r"90^\circ",
    r"12\%",
    "12",
    "-3",
    "0.5",
    "1.5 \\times 10^{8}",
    r"\text{Monday}",
    "Monday",
    "no solution",
    "A",
    r"\text{(C)}",
    r"\emptyset",
    "3:4",
    "11:00",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_gold_answer_equals_its_own_text(gold):
    for wrapped in (gold, f"${gold}$", rf"\boxed{{{gold}}}", f"Some work.\n#### {gold}"):
        for text in (rf"So it is $\boxed{{{gold}}}$.", rf"\[ \boxed{{{gold}}} \]"):
            assert score({"answer": wrapped}, text) == (1.0, {"parsed": 1.0}), (wrapped, text)


@pytest.mark.parametrize("gold", [g for g in GOLDS if g not in ("A", r"\text{(C)}")])
def test_gold_answer_equals_its_own_text_without_a_box(gold):
    assert score({"answer": gold}, f"I think.\nThe answer is {gold}")[0] == 1.0
    assert score({"answer": gold}, f"I think.\nThe answer is ${gold}$.")[0] == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"2\sqrt{3}", r"2 \cdot \sqrt 3"),
        (r"\frac{3}{4}", "0.75"),
        ("0.5", r"\frac{2}{4}"),
        (r"10\,000", "10000"),
        ("1 000", "1,000"),
        ("1,200", r"\$1200"),
        (r"5\text{ cm}", "5"),
        ("5", r"5\text{ cm}"),
        (r"90^\circ", "90"),
        ("y = 2x + 3", "2x + 3"),
        ("x=5", "5"),
        (r"\{1, 2\}", "2, 1"),
        ("1, 2", r"\{1, 2\}"),
        (r"\pm 2", "2, -2"),
        ("monday", r"\text{Monday}"),
        ("(1, 2)", r"\left(1, 2\right)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ],
)
def test_equal_answers_in_other_forms_are_right(gold, answer):
    assert score({"answer": gold}, rf"$\boxed{{{answer}}}$")[0] == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"2\sqrt{3}", "2"),
        (r"2\sqrt{3}", "3"),
        (r"(-\infty, 2)", "2"),
        ("6 - 5i", "5"),
        ("6 - 5i", "6"),
        (r"\frac{3}{4}", "3"),
        (r"\frac{3}{4}", "4"),
        ("1, 2, 3", "3"),
        (r"\{1, 2, 3\}", "1, 2"),
        ("y = 2x + 3", "3"),
        ("x^2+2x+1", "1"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "4"),
        (r"\pm 2", "2"),
        (r"10\,000", "0"),
        (r"10\,000", "10"),
        ("1 000", "0"),
        ("1 000", "1"),
        (r"1{,}000", "1"),
        (r"\log_2 3", "3"),
        ("3 \\text{ or } 5", "3"),
        ("stop", "pots"),
        ("11:00", "12:00"),
    ],
)
def test_part_of_an_answer_is_not_the_answer(gold, answer):
    for text in (rf"$\boxed{{{answer}}}$", f"The answer is ${answer}$", f"The answer is {answer}"):
        assert score({"answer": gold}, text)[0] == 0.0, text
    for text in (rf"$\boxed{{{gold}}}$", f"The answer is ${gold}$", f"The answer is {gold}"):
        assert score({"answer": answer}, text)[0] == 0.0, text


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        # not a number before the box, nor a part of a box that cannot be read or is not closed
        ("2", r"Let $x = 2$. So $\boxed{2\foo{3}}$", 0.0),
        ("2", r"Let $x = 2$. So $\boxed{", 0.0),
        ("12", r"12, that is \boxed{12", 0.0),
        ("5", r"\boxed{4}, no: \boxed{5}", 1.0),
        ("4", r"\boxed{4}, no: \boxed{5}", 0.0),
        ("1, 2", r"$\boxed{1}$ and $\boxed{2}$", 1.0),
        ("2", r"$\boxed{1}$ and $\boxed{2}$", 0.0),
        ("5", r"\boxed 5", 1.0),
        (r"\frac{1}{2}", r"\fbox{$\frac{1}{2}$}", 1.0),
        ("12", "We have $x$ apples. The answer is 12.", 1.0),
        ("1200", "It costs $1200.", 1.0),
        ("Monday", "The answer is Monday.", 1.0),
        ("Monday", "The answer is not Monday.", 0.0),
        ("7", "", 0.0),
    ],
)
def test_the_last_box_is_the_answer(gold, text, value):
    assert score({"answer": gold}, text)[0] == value


@pytest.mark.parametrize("gold", ["", "  ", "####", "$$", "work #### "])
def test_empty_gold_answer_is_an_error(gold):
    with pytest.raises(ValueError, match="is empty"):
        score({"answer": gold}, "12")


@pytest.mark.parametrize(
    ("thought", "said", "value"),
    [(r"\boxed{4}", r"\boxed{5}", 0.0), (r"\boxed{5}", r"\boxed{4}", 1.0), ("4", "", 0.0)],
)
def test_what_was_only_thought_is_no_answer(thought: str, said: str, value: float) -> None:
    whole = f"<think>{thought}</think>{said}"
    assert score({"answer": "4", "completion_answer": said}, whole)[0] == value
