"""Final answers: extraction, canonical form, equality, plans; on real model solutions where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trlhf.evaluation.answers import canonical_answer, extract_answer, has_plan, same_answer

ROOT = Path(__file__).parents[2]
Rows = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def rows(shared_data: Callable[[str], Path]) -> Rows:
    """Return the rows of a real data set by its name."""
    return lambda name: [json.loads(line) for line in shared_data(name).read_text(encoding="utf-8").splitlines()]


CANONICAL = [
    ("13.0", "13"),
    ("007", "7"),
    ("-0.0", "0"),
    ("+5", "5"),
    ("\u22125", "-5"),
    (".50", "0.5"),
    ("$1,234.50", "1234.5"),
    ("\\$6", "6"),
    ("1,080,", "1080"),
    ("371,\\!043,\\!400", "371043400"),
    ("18 apples", "18"),
    ("8 of them are left", "8"),
    ("20 miles per hour", "20"),
    ("17\\text{ meters}", "17"),
    ("5km", "5"),
    ("156^\\circ", "156"),
    ("25\\%", "25"),
    ("5 pm", "5 pm"),
    ("3 million", "3 million"),
    ("2x", "2x"),
    ("2/4", "1/2"),
    ("4/2", "2"),
    ("-7/9", "-7/9"),
    ("1 1/2", "3/2"),
    ("3/4 cups", "3/4"),
    ("\\dfrac{2}{4}", "1/2"),
    ("-\\frac12", "-1/2"),
    ("1/0", "1/0"),
    ("x = 5", "5"),
    ("9 * 2 = 18", "18"),
    ("x \\le 3", "x\\le3"),
    ("(b)", "B"),
    ("c", "C"),
    ("B) 12 apples", "B"),
    ("(A)5(\u221a3 + 1)", "A"),
    ("\\text{(P)}", "P"),
    ("(a+b)", "(a+b)"),
    ("(3)", "3"),
    ("**18**", "18"),
    ("Sky  Blue.", "sky blue"),
    ("'Paris'", "paris"),
    ("mother-in-law", "mother-in-law"),
    ("3 red and 4 blue", "3 red and 4 blue"),
    ("( -5, \\sqrt{26} ]", "(-5,\\sqrt{26}]"),
    ("\\boxed{\\frac{1}{2}}", "1/2"),
    ("Wordy " * 60, " ".join(["wordy"] * 60)),
    ("", None),
    (" $ . ", None),
]


@pytest.mark.parametrize(("text", "expected"), CANONICAL)
def test_canonical_form(text: str, expected: str | None) -> None:
    assert canonical_answer(text) == expected
    assert expected is None or canonical_answer(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plan: multiply 4 by 7. 4 * 7 = 28. The answer is 28.", "28"),
        ("the answer is: $1,234.50. Great!", "1234.5"),
        ("The answer is blue.", "blue"),
        ("So the answer is (B).", "B"),
        ("The answer is that Janet makes $18 every day.", "18"),
        ("The answer is between 5 and 10 apples.", "between 5 and 10 apples"),
        ("The answer is \\boxed{5}.", "5"),
        ("The answer is:\n\n18", "18"),
        ("48/2 = <<48/2=24>>24 clips\n#### 72", "72"),
        ("9 * 2 = 18\nA: 1,800", "1800"),
        ("**Final answer:** 3/4 cup", "3/4"),
        ("The answer is <<2*3=6>>6 apples.", "6"),
        ("so \\boxed{\\frac{1}{2}} it is", "1/2"),
        ("\\boxed{5} at first, then \\boxed{6}", "6"),
        ("\\boxed{\\begin{pmatrix} 2 \\\\\n 3 \\end{pmatrix}}", "\\begin{pmatrix}2\\\\3\\end{pmatrix}"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("the answer is not 5.\n#### 7", "7"),
        ("#### 7\nI mean, the answer is", "7"),
        ("A: 18\nA:", "18"),
        ("She has 3 + 5 = 8 apples left", "8"),
        ("First 10. Then 10-5", "5"),
        ("It is -5", "-5"),
        ("It costs 3.5. Good", None),
        ("Each gets 3/6 of it.", "1/2"),
        ("The answer is", None),
        ("Hello there.", None),
        ("", None),
    ],
)
def test_extraction(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("13.0", "$13"),
        ("1/2", "0.5"),
        ("B", "(b)"),
        ("Blue.", "blue"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x+1", "1 + x"),
        ("x^2 + y^2", "y^2+x^2"),
        ("\\frac{\\sqrt{21}}{5}", "\\sqrt{21}/5"),
        ("1.2 \\times 10^{5}", "120000"),
        ("(0, \\frac{1}{2})", "(0,0.5)"),
    ],
)
def test_equal_answers(first: str, second: str) -> None:
    assert same_answer(first, second) and same_answer(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("3", "4"),
        ("0.333", "1/3"),
        ("5 am", "5 pm"),
        ("blue", "green"),
        ("A", "B"),
        ("(0,0)", "(0,1)"),
        ("2\\sqrt{3}", "3\\sqrt{2}"),
        ("3 * 4", "12"),
        ("2^{3}", "8"),
        ("blue", "3"),
        (None, None),
        (None, "3"),
        ("", ""),
    ],
)
def test_different_answers(first: str | None, second: str | None) -> None:
    assert not same_answer(first, second) and not same_answer(second, first)


def test_comparing_works_outside_the_main_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(same_answer("5\\sqrt{3}", "\\sqrt{75}")))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.parametrize(
    "bomb",
    [
        "9^9^9^9",
        "9**9**9**9",
        "(((99^{99})^{99})^{99})^{99}",
        "9^{99*99*99}",
        "2^{99999999}",
        "(99^{99})^{99^{9}}",
        "1000000!",
        "\\prod_{i=1}^{9} (i^{99})",
        "\\exp(\\exp(\\exp(99)))",
        "(" * 5000,
        "\\frac{" * 30,
        "9" * 10000,
        "1/" + "9" * 10000,
        "\\sqrt{" * 2000 + "}" * 2000,
        "\\boxed{" * 3000 + " " * 3000,
        "the answer is 5 " * 3000,
        "1/999," * 3000,
        " \n" * 10000,
    ],
)
def test_no_response_can_keep_the_comparison_busy(bomb: str) -> None:
    start = time.process_time()
    assert not same_answer(bomb, "\\sqrt{2}+1")
    extract_answer(bomb * 3)
    extract_answer(f"The answer is {bomb}. \\boxed{{{bomb}")
    has_plan(bomb)
    assert time.process_time() - start < 2  # 0.02 s is usual, after math-verify is loaded; a bomb takes for ever


def test_math_verify_is_loaded_only_when_needed_and_says_nothing() -> None:
    script = (
        "import sys; from trlhf.evaluation.answers import same_answer as same\n"
        "assert same('1,080', '$1080') and not same('blue', 'green') and 'math_verify' not in sys.modules\n"
        "assert same('1+x', 'x+1') and not same('}{^', '(')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plan: multiply 4 by 7, then add 5. 4 * 7 = 28.", True),
        ("**Plan:** add", True),
        ("First, we find the cost of the apples. 3*4=12.", True),
        ("To find the total, we add. 3 + 4 = 7", True),
        ("Let\u2019s call her age x. x = 3", True),
        ("I need to know the rate: 5 * 3 = 15", True),
        ("First, 3 * 4 = 12. So 12.", False),
        ("Janet sells 16 - 3 = 13 eggs. First she ate three.", False),
        ("Let's go to the beach!", False),
        ("The sky is blue.", False),
        ("Planes fly. They do.", False),
        ("", False),
    ],
)
def test_plans(text: str, expected: bool) -> None:
    assert has_plan(text) is expected


def test_agreement_with_the_flags_of_real_model_solutions(rows: Rows) -> None:
    checked, agreed, disagreements = 0, 0, []
    for row in rows("gsm8k/example_model_solutions.jsonl"):
        gold = extract_answer(row["ground_truth"])
        for solution in (value for value in row.values() if isinstance(value, dict)):
            checked += 1
            judged = same_answer(extract_answer(solution["solution"]), gold)
            agreed += judged == solution["is_correct"]
            if judged != solution["is_correct"]:
                disagreements.append((solution["solution"][-60:], gold))
    assert checked == 5276
    assert agreed / checked >= 0.99, f"{agreed} of {checked} ({agreed / checked:.4f}) agree; {disagreements[:5]}"


@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_gold_answers_of_gsm8k(rows: Rows, name: str, count: int) -> None:
    texts = [row["answer"] for row in rows(f"gsm8k/{name}.jsonl")]
    expected = [text.rsplit("####", 1)[1].strip().replace(",", "") for text in texts]
    assert [extract_answer(text) for text in texts] == expected and len(texts) == count


def test_gold_answers_of_math_are_found_in_their_solutions(rows: Rows) -> None:
    found = [(str(row["answer"]), extract_answer(row["other"]["solution"])) for row in rows("agieval/math.jsonl")]
    missed = [(gold, answer) for gold, answer in found if not same_answer(gold, answer)]
    assert len(missed) / len(found) <= 0.01, missed[:5]
    forms = [canonical_answer(gold) for gold, _ in found]
    assert all(form is not None and canonical_answer(form) == form for form in forms)
