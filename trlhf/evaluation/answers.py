"""Final answers: found in a response, brought to one canonical form, and compared.

Everything that asks "is this the same answer?" (clusters, the ledger, the verifier, the evaluation) asks it here.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache

_MARKER = re.compile(
    r"(?P<sentence>\b[Aa]nswer\s+is\s*:?\s*)|####\s*|(?=(?P<boxed>\\f?boxed\s*\{))|"
    r"^[ \t*]*(?:A|(?:[Ff]inal[ \t]+)?[Aa]nswer)[ \t]*:[\s*]*",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
# Not a unit, although it may follow a number: it changes the value, or joins it to something else.
_NO_UNIT = r"(?:[ap]\.?m|hundred|thousand|million|billion|trillion|dozen|and|or|to|over|plus|minus|times|pi|sqrt|mod)\b"
_UNIT = (
    r"(?:\s*%|\s*(?:km|cm|mm|kg|mg|ml|lbs?|oz|ft|mph|hrs?|mins?|secs?)\b|"
    rf"(?:\s+(?!{_NO_UNIT})[a-z][a-z'/-]+(?:\^?[23])?){{1,6}})?"
)
_PLAIN_NUMBER = re.compile(rf"([+-]?)\s*({_NUMBER}){_UNIT}", re.IGNORECASE)
_FRACTION = re.compile(rf"([+-]?)\s*(?:([0-9]+)\s+)?({_DIGITS})\s*/\s*({_DIGITS}){_UNIT}", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w).])[+-]?\$?{_NUMBER}(?:/[0-9]+)?|{_NUMBER}(?:/[0-9]+)?")
_LATEX_FRACTION = re.compile(
    r"([+-]?\s*[0-9]*)\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
)
_CHOICE = re.compile(r"\(([A-J])\)(?!\s*[*/^+=-]).*|\(([a-z])\)(?:\s.*)?|([A-J])[).:]\s.*|\(?([A-Za-z])\)?", re.DOTALL)
_MATHS = re.compile(  # operators, LaTeX, brackets; square root, pi, infinity, union; 3-x, x-3, -x, 2x
    r"[\\^_{}=+*/<>()\[\]|\u221a\u03c0\u221e\u222a]|[0-9]\s*-\s*[0-9a-z]|[a-z]\s*-\s*[0-9]|^-|^[0-9.]+[a-z]$",
    re.IGNORECASE,
)
_SCIENTIFIC = r"[0-9.]+(?:\\times|\\cdot|\*|x)10\^\{?-?[0-9]{1,2}\}?"
_UNWORKED = re.compile(rf"(?!{_SCIENTIFIC}$)(?:[0-9.(){{}}*/^+x-]|\\times|\\cdot|\\div)+")
_CANONICAL_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[0-9]+)?")
_MOST_MARKERS = 8  # from the end of a response; together with the next limit it keeps the time linear in its length
_LONGEST_ANSWER = 300
_LONGEST_NUMBER = 60  # digits that are worth exact arithmetic; longer ones are compared as text
_LONGEST_EXPRESSION = 150
# What could keep a computer algebra system busy for ever (there is no time limit outside the main thread).
_ENDLESS = re.compile(r"!|\\?(?:sum|prod|int|lim|exp|gamma|binom|factorial)\b|[0-9]{61}", re.IGNORECASE)
_SMALL_POWER = re.compile(
    r"\^(?:-?[0-9]{1,2}(?![0-9.])|[a-z]|\{-?(?:[0-9]{1,2}|[a-z]|\\frac\{?[0-9]\}?\{?[0-9]\}?|[0-9]/[0-9])\})"
)
_POWER_OF_POWER = re.compile(r"[)}\]]\^|\^\{?-?\w+\}?\^")

_PLAN_OPENER = re.compile(
    r"(?:okay|ok|so|well|now|alright)?,?\s*(?:"
    r"first(?:ly)?\b|to (?:begin|start|find|solve|get|know|see|calculate|compute|determine|work|figure|answer)\b|"
    r"(?:we|i|you)(?:'ll| will| need| must| have to| can| should| want| start| first)\b|let's\b|let us\b|"
    r"(?:the|my|our) (?:plan|approach|first step)\b|step 1\b|start by\b|in order to\b)",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"=|[0-9)]\s*[-+*/\u00d7\u00f7]\s*\$?[0-9(]")


def extract_answer(text: str) -> str | None:
    """Return the canonical final answer of a response, None if it gives none.

    Looked for after the markers "(the) answer is" (up to the end of the sentence), "####" and, at the start of a line,
    "A:" or "Answer:" (up to the end of the line), and inside ``\\boxed{…}``; the last one in the text that is followed
    by an answer counts. Without any of them: the last number of the last sentence; and of a reply of one
    word, the word ("Yellow.").
    """
    text = _CALCULATOR.sub("", text).strip()
    for match in reversed(list(_MARKER.finditer(text))[-_MOST_MARKERS:]):
        span = text[match.end() :]
        span = (_boxed(span) or "") if match["boxed"] else span.split("\n", 1)[0]
        if match["sentence"] and (end := _SENTENCE_END.search(span)):
            span = span[: end.start()]
        answer = _from_span(span)
        if answer is not None:
            return answer
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    numbers = _NUMBER_IN_TEXT.findall(sentences[-1]) if sentences else []
    if numbers:
        return canonical_answer(numbers[-1])
    return canonical_answer(text.rstrip(".")) if len(text.split()) == 1 else None


def canonical_answer(text: str) -> str | None:
    """Write an answer in its one canonical form; None if nothing is left of it.

    Currency signs, units, thousands separators, leading and trailing zeros, a full stop and LaTeX wrapping go:
    ``"$1,080.00"`` → ``"1080"``, ``"0.50 km"`` → ``"0.5"``. A fraction stays one, in lowest terms (``"2/4"`` →
    ``"1/2"``); after an equals sign only the right-hand side counts; the letter of a choice is upper-cased (``"(b)"``
    → ``"B"``); other mathematics loses its spaces; any other text, and all of more than 300 characters, is casefolded.
    Canonical forms stay as they are.
    """
    if len(text) > _LONGEST_ANSWER:
        return " ".join(text.casefold().split()) or None
    text = _unwrap(text)
    text = re.split(r"(?<![<>!≤≥:\\])=", text)[-1].strip() or text
    text = re.sub(r"^\(([+-]?[0-9.]+)\)$", r"\1", text)
    if match := _PLAIN_NUMBER.fullmatch(text):
        return _decimal(match[1], match[2])
    if match := _FRACTION.fullmatch(_LATEX_FRACTION.sub(_slash, text)):
        return _lowest_terms(match[1], match[2] or "0", match[3], match[4]) or text
    if match := _CHOICE.fullmatch(text):
        return next(letter for letter in match.groups() if letter).upper()
    if _MATHS.search(text):
        return re.sub(r"\s+", "", text) or None
    return " ".join(text.casefold().split()).strip(" \"'\u2018\u2019\u201c\u201d,;:!?") or None


@lru_cache(maxsize=65536)
def same_answer(first: str | None, second: str | None) -> bool:
    """Say whether two answers are equal: by canonical strings, numbers by value, other mathematics by math-verify.

    A missing answer equals nothing. A number does not equal a calculation that was left undone ("3 * 4" is not "12":
    a policy would soon learn to stop there). An expression that a computer algebra system might never finish (towers of
    powers, factorials, sums, more than 150 characters) is compared as a string only.
    """
    left = canonical_answer(first) if first is not None else None
    right = canonical_answer(second) if second is not None else None
    if left is None or right is None:
        return False
    if left == right:
        return True
    if _is_number(left) and _is_number(right):
        return Fraction(left) == Fraction(right)
    expressions = (left, right)
    if any(not (_is_number(text) or _MATHS.search(text)) for text in expressions):
        return False  # a word or a letter is only ever equal to itself
    if any(map(_is_number, expressions)) and any(
        _UNWORKED.fullmatch(text) and not _is_number(text) for text in expressions
    ):
        return False
    return all(_finishes(text) for text in expressions) and _same_expression(left, right)


def has_plan(text: str) -> bool:
    """Say whether a response plans before it solves.

    Either it begins with "Plan" (the form that the embedded world teaches), or, in natural chain of thought, its first
    sentence states an approach ("First", "To find", "We need", "Let's", "I will" …) without calculating yet (no
    equation in it), and something follows. A heuristic for tables, not for rewards.
    """
    text = text.strip().replace("\u2019", "'")
    if re.match(r"\W*plan\b", text, re.IGNORECASE):
        return True
    parts = re.split(r"(?<=[.!?:])\s+|\n+", text, maxsplit=1)
    return len(parts) == 2 and _PLAN_OPENER.match(parts[0]) is not None and _EQUATION.search(parts[0]) is None


def _from_span(span: str) -> str | None:
    """Return the canonical answer of what follows a marker; of a wordy one, its only number."""
    boxed = _boxed(span)
    answer = canonical_answer(span if boxed is None else boxed)
    if answer is None or _is_number(answer) or len(answer.split()) <= 3:
        return answer
    numbers = {canonical_answer(number) for number in _NUMBER_IN_TEXT.findall(answer)}
    return numbers.pop() if len(numbers) == 1 else answer


def _boxed(text: str) -> str | None:
    r"""Return the inside of the last balanced ``\boxed{…}``."""
    found, stack = (-1, -1), []
    for match in re.finditer(r"\\f?boxed\s*\{|[{}]", text):
        if match[0] != "}":
            stack.append(match.end() if len(match[0]) > 1 else -1)
        elif stack and (start := stack.pop()) > found[0]:
            found = (start, match.start())
    return text[slice(*found)] if found[0] >= 0 else None


def _unwrap(text: str) -> str:
    """Take away what surrounds or decorates an answer without being part of it."""
    boxed = _boxed(text)
    text = (text if boxed is None else boxed).replace("\u2212", "-").replace("\u00a0", " ").replace("\\$", "")
    text = re.sub(r"[$£€¥`]|\\[()\[\]]|\\!|\\left(?![a-z])|\\right(?![a-z])|\^\s*\{?\\circ\}?|°", "", text)
    text = re.sub(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\[,;: ]|~", " ", text)
    return text.strip().strip("*").rstrip(".,;:!? ").strip(" *")


def _slash(match: re.Match[str]) -> str:
    """Write a LaTeX fraction of two whole numbers with a slash."""
    return f"{match[1]} {match[2] or match[3]}/{match[4] or match[5]}".strip()


def _decimal(sign: str, number: str) -> str:
    """Write a number without separators, leading zeros or trailing zeros after the point."""
    whole, _, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    text = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
    return f"-{text}" if sign == "-" and text != "0" else text


def _lowest_terms(sign: str, whole: str, numerator: str, denominator: str) -> str | None:
    """Write ``whole numerator/denominator`` as one fraction in lowest terms; None when that cannot be done."""
    numbers = [number.replace(",", "") for number in (whole, numerator, denominator)]
    if sum(map(len, numbers)) > _LONGEST_NUMBER or int(numbers[2]) == 0:
        return None
    value = int(numbers[0]) + Fraction(int(numbers[1]), int(numbers[2]))
    return str(-value if sign == "-" else value)


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST_NUMBER and _CANONICAL_NUMBER.fullmatch(text) is not None


def _finishes(text: str) -> bool:
    """Say whether a computer algebra system is sure to be done with an expression soon."""
    powers = text.replace("**", "^")
    if len(text) > _LONGEST_EXPRESSION or _ENDLESS.search(text):
        return False
    count = powers.count("^")
    return count == len(_SMALL_POWER.findall(powers)) and not (count > 1 and _POWER_OF_POWER.search(powers))


def _same_expression(left: str, right: str) -> bool:
    """Compare two expressions with math-verify, without its alarm signals (they need the main thread)."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it warns that the time limit is off, and logs each failure
    try:
        parsed = [parse(f"${text}$", parsing_timeout=None, raise_on_error=False) for text in (left, right)]
        return any(
            bool(verify(gold, guess, timeout_seconds=None, raise_on_error=False))
            for gold, guess in (parsed, parsed[::-1])
        )
    except (RecursionError, ValueError, TypeError, ArithmeticError, AttributeError):
        return False  # what cannot be read as mathematics is equal to nothing but itself
