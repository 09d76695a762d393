"""Worked solutions in GSM8K's notation become native chain of thought: a plan, the steps, the answer.

``Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 clips.\\n#### 72`` becomes
``Plan: divide, then add. Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips. The answer is 72.``

The plan says what the solution really does and nothing else: one operation for each calculator mark, in order. Where a
solution has no marks, its equations are read instead; where those hold unknowns, the plan is to set up an equation;
where there is nothing to read, it only counts the steps. A plan holds no digit, so it gives no result away.
"""

from __future__ import annotations

import re
from itertools import groupby

_MARK = re.compile(r"<<([^<>\n]*)>>")
_CUT_MARK = re.compile(r"<<[^\n]*")  # a sampled solution may break off inside a mark
_FINAL = re.compile(r"(?:####|^A:)[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "x": "multiply", "\u00d7": "multiply", "/": "divide"}
_OPERATOR = re.compile(r"(?<=[\d.)%])\s*([-+*/\u00d7x])\s*(?=[$(]*[.\d])")
_EQUATION = re.compile(r"[^=\n]*=")
_UNKNOWN = re.compile(
    r"(?i)\blet(?:['\u2019]s)?\b.*\b(?:be|say|represent|stand|call|=)|\b\d+[a-z]\s*[-+=]|=\s*\d*[a-z]\b"
)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ENDS = (".", "!", "?", ":", ";", ",")


def final_answer(solution: str) -> str | None:
    """Return the final answer after ``####`` (or ``A:``), thousands commas removed; None if the solution has none."""
    match = _FINAL.search(solution)
    return re.sub(r"(?<=\d),(?=\d)", "", match[1].strip()) if match else None


def is_worked_solution(text: str) -> bool:
    """Say whether a text uses GSM8K's notation."""
    return "####" in text or _MARK.search(text) is not None


def native_chain_of_thought(solution: str) -> str:
    """Return a worked solution as one line: plan, steps without calculator marks, "The answer is …".

    A solution that gives no final answer (a sampled one that broke off) gets no last sentence.
    """
    answer = final_answer(solution)
    body = _FINAL.sub("", solution) if answer is not None else solution
    steps = [_sentence(line) for line in _CUT_MARK.sub("", _MARK.sub("", body)).splitlines() if line.strip()]
    parts = [plan_of(body), *steps]
    if answer is not None:
        parts.append(f"The answer is {answer}.")
    return " ".join(parts)


def plan_of(solution: str) -> str:
    """Return one sentence that says which operations a worked solution goes through."""
    operations = [operation for mark in _MARK.findall(solution) if (operation := _operation(mark.split("=")[0]))]
    if not operations and _UNKNOWN.search(solution):
        return "Plan: set up an equation, then solve it."
    if not operations:
        sides = _EQUATION.findall(_CUT_MARK.sub("", solution))
        operations = [operation for side in sides if (operation := _operation(_OPERATOR.findall(side)))]
    if not operations:
        count = sum(1 for line in solution.splitlines() if line.strip())
        return "Plan: work it out in one step." if count <= 1 else f"Plan: work it out in {_word(count)} steps."
    return "Plan: " + ", then ".join(_times(name, len(list(run))) for name, run in groupby(operations)) + "."


def _operation(expression: str | list[str]) -> str:
    """Name what one step does: "add", or "divide and multiply" where it does several things at once."""
    signs = expression if isinstance(expression, list) else re.findall(r"(?<=[\d.)%\s])[-+*/]", expression)
    names = dict.fromkeys(_OPERATIONS[sign] for sign in signs)
    return " and ".join(names)


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} twice" if count == 2 else f"{name} {_word(count)} times"


def _word(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else "many"


def _sentence(line: str) -> str:
    line = " ".join(line.split())
    return line if line.endswith(_ENDS) else line + "."
