"""Claim: 20,000 conversations against 100,000 evaluation items take at most 5 minutes and 4 GB, and nothing is missed.

``python benchmarks/contamination.py`` makes both from a word chain of real English (Python's own language reference),
plants copies with a known number of edits, runs ``stage=check`` on them as a command of its own, and compares what it
lists with what was planted and, on a sample of the items, with a brute-force comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from provenance import RESULTS, ROOT, provenance
from rapidfuzz.distance import Levenshtein

from trlhf.contamination.near import near_duplicates
from trlhf.contamination.texts import normalise
from trlhf.files import write_json

LEVELS = (100, 99, 98, 97, 96)  # the last is below all: similarity must not list it
EXCHANGES, USER, ASSISTANT = (1, 5), (20, 80), (80, 200)  # of a conversation: turns; words of one
QUESTION, ANSWER = (30, 100), (20, 120)  # of an evaluation item: words; half of the items have an answer
Turns = list[str]


class Chain:
    """Random English: each word follows one that it follows in Python's language reference.

    Args:
        rng: draws the words.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        words = " ".join(topics.values()).split()
        self._next: defaultdict[str, list[str]] = defaultdict(list)
        for word, following in zip(words, [*words[1:], words[0]], strict=True):
            self._next[word].append(following)
        self._word = words[0]

    def text(self, words: tuple[int, int]) -> str:
        """Return a text of so many words, at least and at most."""
        said = []
        for _ in range(self.rng.randint(*words)):
            self._word = self.rng.choice(self._next[self._word])
            said.append(self._word)
        return " ".join(said)

    def conversation(self) -> Turns:
        """Return the turns of the user and of the assistant."""
        return [self.text(words) for _ in range(self.rng.randint(*EXCHANGES)) for words in (USER, ASSISTANT)]


def copy_at(level: int, question: str, rng: random.Random) -> str:
    """Return a question with as many characters replaced as its similarity to the original needs to be at a level."""
    length = len(question)
    least, most = ((100 - level - 1) * length // 100 + 1, (100 - level) * length // 100) if level < 100 else (0, 0)
    copy = list(question)
    for i in rng.sample(range(length), rng.randint(least, most)):
        copy[i] = "\u2021"  # stands nowhere else
    return "".join(copy)


def make(folder: Path, conversations: int, items: int, planted: int, seed: int) -> dict[int, int]:
    """Write both sets; return line of the training file → level for the rows that hold a copy of a question."""
    rng = random.Random(seed)
    chain = Chain(rng)
    questions = [normalise(chain.text(QUESTION)) for _ in range(items)]
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number, question in enumerate(questions):
            answer = {"answer": chain.text(ANSWER)} if number % 2 else {}
            file.write(json.dumps({"question": question, **answer}) + "\n")
    lines = rng.sample(range(1, conversations + 1), planted)
    levels = {line: LEVELS[i % len(LEVELS)] for i, line in enumerate(lines)}
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for line in range(1, conversations + 1):
            turns = chain.conversation()
            if line in levels:
                turns[2 * rng.randrange(len(turns) // 2)] = copy_at(levels[line], rng.choice(questions), rng)
            chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            file.write(json.dumps({"messages": chat}) + "\n")
    return levels


def run_check(folder: Path) -> dict[str, Any]:
    """Run the command; return its wall-clock and processor seconds, its peak memory and its metrics."""
    command = [sys.executable, "-m", "trlhf", "stage=check", "data=file", f"data.sft={folder / 'train.jsonl'}"]
    command += [f"check.against=[{folder / 'test.jsonl'}]", f"run.dir={folder / 'run'}"]
    begun = time.monotonic()
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "metrics": json.loads((folder / "run/check/metrics.json").read_text()),
    }


def found_as_planted(folder: Path, levels: dict[int, int]) -> dict[str, Any]:
    """Compare the list with what was planted, level by level."""
    listed = {}
    for line in (folder / "run/check/offending.jsonl").read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        listed[int(one["row"].rpartition(":")[2])] = one["level"]
    expected = {line: level if level >= 97 else None for line, level in levels.items()}
    wrong = {line: (level, listed.get(line, "none")) for line, level in expected.items() if listed.get(line) != level}
    return {
        "planted": dict(sorted(Counter(levels.values()).items(), reverse=True)),
        "at_another_level": wrong,
        "not_planted_but_similar": sum(level is not None and line not in levels for line, level in listed.items()),
        "not_planted_by_ngrams": sum(level is None and line not in levels for line, level in listed.items()),
    }


def brute_force(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Compare some questions with every turn of every user, one by one, and with what the filter finds."""
    rows = _rows(folder / "train.jsonl")
    turns = list({normalise(turn["content"]) for row in rows for turn in row["messages"] if turn["role"] == "user"})
    questions = [normalise(row["question"]) for row in _rows(folder / "test.jsonl")]
    marked = {turn for turn in turns if "\u2021" in turn}
    rng = random.Random(seed)
    close = {match.test for match in near_duplicates(marked, questions)}
    sample = [*rng.sample(questions, count), *rng.sample(sorted(close), min(count, len(close)))]
    expected = {
        (turn, question)
        for question in sample
        for turn in turns
        if 100 * Levenshtein.distance(turn, question, score_cutoff=len(question)) <= 3 * max(len(turn), len(question))
    }
    found = {(match.train, match.test) for match in near_duplicates(turns, sample)}
    return {
        "questions": len(sample),
        "comparisons": len(sample) * len(turns),
        "pairs": len(expected),
        "missed": len(expected - found),
        "invented": len(found - expected),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--planted", type=int, default=500)
    parser.add_argument("--brute", type=int, default=50, help="questions of each kind that are compared by brute force")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "contamination.json")
    asked = parser.parse_args(arguments)
    result = {**provenance(), "sizes": {name: getattr(asked, name) for name in ("conversations", "items", "seed")}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        levels = make(folder, asked.conversations, asked.items, asked.planted, asked.seed)
        sizes = {f"{path.stem}_mb": round(path.stat().st_size / 1e6, 1) for path in folder.glob("*.jsonl")}
        measured = run_check(folder)
        measured["metrics"]["sets"] = {Path(key).name: value for key, value in measured["metrics"]["sets"].items()}
        result |= {"files": sizes, **measured, "found": found_as_planted(folder, levels)}
        result["brute_force"] = brute_force(folder, asked.brute, asked.seed)
    write_json(asked.out, result)
    print(json.dumps({key: result[key] for key in ("seconds", "processor_seconds", "peak_gb", "found", "brute_force")}))


def _rows(path: Path) -> Iterator[Any]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
