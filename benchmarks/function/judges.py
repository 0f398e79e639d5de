"""Judges: does an answer do what its prompt asked for?

A judge is a small frozen value with ``verdict(answer) -> float`` between 0 and 1; 1 is right::

    NumberJudge(18).verdict("She has **18** eggs left.")

All are pure functions of the answer, except that of code, which **runs what the model wrote**, in a
process of its own: no input, no output, limits on time, memory and files. Only the standard library
is used.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

CODE_SECONDS = 6.0
"""Time that a program has, its start included; the tests of MBPP need milliseconds."""

CODE_MEMORY_BYTES = 1 << 30

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_LIMITS = """
import resource as _r, sys as _s
for _name, _most in ("AS", {memory}), ("CPU", {seconds}), ("FSIZE", 0), ("CORE", 0):
    try:
        _r.setrlimit(getattr(_r, "RLIMIT_" + _name), (_most, _most))
    except ValueError:  # a lower limit is set; or macOS, which has none of memory
        pass
_s.setrecursionlimit(3000)
del _r, _s, _name, _most
"""


class Judge(Protocol):
    """Says how right an answer is."""

    def verdict(self, answer: str) -> float:
        """Return 0 (wrong) to 1 (right)."""


@dataclasses.dataclass(frozen=True)
class CodeJudge:
    """Right if the program made of the answer and a test ends with exit status 0.

    Attributes:
        prompt: the head of the function as the model was given it: signature and docstring.
        entry_point: the function's name.
        test: program text that raises if the function is wrong.
    """

    prompt: str
    entry_point: str
    test: str

    def verdict(self, answer: str) -> float:
        """Run the program."""
        program = extract_function(answer, self.prompt, self.entry_point)
        return float(run_program(f"{program}\n{self.test}"))


@dataclasses.dataclass(frozen=True)
class NumberJudge:
    """Right if the last number of the answer is the expected one."""

    expected: float

    def verdict(self, answer: str) -> float:
        """Compare numbers, not their spelling: 1,000 and 1000.0 are the same."""
        number = last_number(answer)
        return float(number is not None and math.isclose(number, self.expected, abs_tol=1e-3))


@dataclasses.dataclass(frozen=True)
class SQLJudge:
    """Right if the answer is the expected query; whitespace, case, quotes, brackets ignored."""

    expected: str

    def verdict(self, answer: str) -> float:
        """Compare the first query of the answer."""
        return float(normalised_sql(extract_sql(answer)) == normalised_sql(self.expected))


@dataclasses.dataclass(frozen=True)
class CallsJudge:
    """Right if the answer holds the expected tool calls as a JSON list.

    Attributes:
        expected: the reference answer, JSON text.
    """

    expected: str

    def verdict(self, answer: str) -> float:
        """Compare parsed calls; the case of strings and 5 against 5.0 do not matter."""
        calls = extract_json(answer)
        if isinstance(calls, dict):
            calls = [calls]
        return float(folded_json(calls) == folded_json(json.loads(self.expected)))


@dataclasses.dataclass(frozen=True)
class ContainsJudge:
    """Right if the expected words occur in the answer; case, articles, punctuation ignored."""

    expected: str

    def verdict(self, answer: str) -> float:
        """Look for whole words in order."""
        words, wanted = normalised_words(answer), normalised_words(self.expected)
        starts = range(len(words) - len(wanted) + 1)
        return float(any(words[start : start + len(wanted)] == wanted for start in starts))


@dataclasses.dataclass(frozen=True)
class OverlapJudge:
    """ROUGE-L: how much of the reference's wording the answer holds in order, an F score."""

    expected: str

    def verdict(self, answer: str) -> float:
        """Return the F score of the longest common subsequence of words."""
        words, wanted = normalised_words(answer), normalised_words(self.expected)
        common = longest_common_subsequence(words, wanted)
        return 2 * common / (len(words) + len(wanted)) if common else 0.0


def extract_function(answer: str, prompt: str, entry_point: str) -> str:
    """Return program text that defines the function an answer was asked for.

    Takes the first fenced block that defines it, else one that holds a body to put under the
    prompt, else the bare text. Fences that were cut off by the token limit end with the text.
    """
    definition = re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.M)
    blocks = [match[2] for match in _FENCE.finditer(answer)]
    for block in blocks:
        if definition.search(block):
            return _preamble(prompt) + block
    if blocks:
        return prompt + _indented(blocks[0])
    found = definition.search(answer)
    if found:
        imports = [line for line in answer[: found.start()].splitlines() if _is_import(line)]
        return "\n".join([_preamble(prompt), *imports, answer[found.start() :]])
    return prompt + _body(answer)


def run_program(program: str, seconds: float = CODE_SECONDS) -> bool:
    """Return whether a Python program ends with exit status 0 in time.

    It runs isolated (``-I -S``: standard library only), in an empty folder, without input; what it
    prints is thrown away and the files it writes stay empty.
    """
    limits = _LIMITS.format(memory=CODE_MEMORY_BYTES, seconds=math.ceil(seconds))
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"{limits}\nexec({program!r})"],
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()


def last_number(text: str) -> float | None:
    """Return the last number that a text names, None if there is none."""
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    return float(numbers[-1].replace(",", "")) if numbers else None


def extract_sql(answer: str) -> str:
    """Return the query of an answer: of a fenced block, or from its SELECT to an empty line."""
    block = _FENCE.search(answer)
    text = block[2] if block else answer
    start = re.search(r"\bselect\b", text, re.IGNORECASE)
    text = text[start.start() :] if start else text
    return re.split(r";\s*(?:\n|$)|\n\s*\n", text)[0]


def normalised_sql(query: str) -> str:
    """Return a query without what may be written in several ways: case, quotes, brackets."""
    return " ".join(re.sub(r"[\"'`()]", " ", query).casefold().split()).strip(" ;")


def extract_json(answer: str) -> Any:
    """Return the first JSON list or object of an answer, None if none is complete."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", answer):
        try:
            return decoder.raw_decode(answer, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def folded_json(value: Any) -> Any:
    """Return JSON with the strings folded: for comparing."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, list):
        return [folded_json(element) for element in value]
    if isinstance(value, dict):
        return {str(key): folded_json(element) for key, element in value.items()}
    return value


def normalised_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    words = re.findall(r"\w+", text.casefold())
    return [word for word in words if word not in ("a", "an", "the")]


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences."""
    if not Counter(a) & Counter(b):
        return 0
    lengths = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for index, y in enumerate(b, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if x == y else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]


def _preamble(prompt: str) -> str:
    """Return what a prompt defines before its function: imports and helpers."""
    start = re.search(r"^(?:async[ \t]+)?def ", prompt, re.M)
    return prompt[: start.start()] if start else ""


def _is_import(line: str) -> bool:
    return line.startswith(("import ", "from "))


def _indented(block: str) -> str:
    """Return a block as the body of a function."""
    lines = block.splitlines()
    if any(line and not line[0].isspace() for line in lines):
        lines = ["    " + line for line in lines]
    return "\n".join(lines)


def _body(answer: str) -> str:
    """Return the part of a bare continuation that belongs to the function: to column zero."""
    lines = answer.splitlines()
    for index, line in enumerate(lines):
        if index and line and not line[0].isspace() and not line.startswith(("#", ")", "]", "}")):
            lines = lines[:index]
            break
    return "\n".join(lines)
