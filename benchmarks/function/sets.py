"""Function sets: what a model must still be able to do.

``build_set(name, data, tokenizer)`` makes a set from a folder of text, the same one each time.
Worked examples (shots) come from the training text, items from the held-out text. Documents for
long prompts are held-out textbooks and code.
"""

import contextlib
import dataclasses
import functools
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from judges import (
    CallsJudge,
    CodeJudge,
    ContainsJudge,
    Judge,
    NumberJudge,
    OverlapJudge,
    SQLJudge,
    last_number,
)
from prompts import Item, Message, Tokenizer, Turn, is_chat_model, question

Record = dict[str, Any]

SEED = 20251126
NUM_MATH_SHOTS = 8
NUM_SQL_SHOTS = 6
NUM_CALL_SHOTS = 2
NEEDLE_DEPTHS = (0.1, 0.5, 0.9)
NEEDLES_A_DEPTH = 10
NEEDLE_SIZES = {"needle-2k": 2000, "needle-4k": 4000, "needle-8k": 7600, "needle-16k": 15500}
DOCUMENT_TOKENS = 3000
CODE_READ_TOKENS = 3000
CODE_SCORED_TOKENS = 256
NUM_CODE_FILES = 60
NUM_SUMMARIES = 64
SUMMARY_MIN_CHARACTERS = 1200
NUM_CHATS = 60
CHAT_TURNS = 4
NUM_RECALLS = 40
RECALL_CHARACTERS = 2500

_CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Dublin", "Nairobi", "Quito", "Tallinn", "Perth",
    "Geneva", "Havana", "Riga", "Manila", "Porto", "Delhi", "Boston", "Naples", "Kyoto", "Zagreb",
)  # fmt: skip
_SYLLABLES = re.findall("..", "bakelimonurasetivozudafegilopu")


@dataclasses.dataclass(frozen=True)
class FunctionSet:
    """Items of one kind.

    Attributes:
        name: of the set.
        task: whose calibrated prior fits it.
        items: in a fixed, shuffled order, so that the first n are a sample.
        max_new_tokens: what an answer may take; 0: nothing is generated, the reference is scored.
    """

    name: str
    task: str
    items: tuple[Item, ...]
    max_new_tokens: int


class Data:
    """A folder of text: held-out and training records, and functions with their tests.

    ``eval/NAME.jsonl`` and ``sft/NAME.jsonl.xz`` hold ``prompt``, ``response`` and ``source``, or
    ``text``; ``function/mbpp.jsonl`` holds ``task_id``, ``prompt``, ``entry_point`` and ``test``.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def held_out(self, name: str) -> list[Record]:
        """Return the held-out records of a task or of a kind of document."""
        return self._records(f"eval/{name}.jsonl")

    def functions(self) -> list[Record]:
        """Return functions to write, with their tests."""
        return self._records("function/mbpp.jsonl")

    def training(self, name: str) -> list[Record]:
        """Return the training records of a task."""
        return self._records(f"sft/{name}.jsonl.xz")

    @functools.cache  # noqa: B019 - one Data a process
    def _records(self, name: str) -> list[Record]:
        path = self._folder / name
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            return [json.loads(line) for line in file]


def build_set(name: str, data: Data, tokenizer: Tokenizer) -> FunctionSet:
    """Return a function set by name; the same items in the same order at each call.

    Raises:
        ValueError: there is no such set.
    """
    if name in NEEDLE_SIZES:
        items = list(_needles(data, tokenizer, NEEDLE_SIZES[name]))
        return FunctionSet(name, "qa", _shuffled(items), 24)
    if name not in _SETS:
        known = ", ".join([*_SETS, *NEEDLE_SIZES])
        raise ValueError(f"no function set {name!r}; there are: {known}")
    task, max_new_tokens, build = _SETS[name]
    return FunctionSet(name, task, _shuffled(build(data, tokenizer)), max_new_tokens)


def _mbpp(data: Data, tokenizer: Tokenizer) -> list[Item]:
    references = {
        _function_head(record["prompt"].split("\n\n", 1)[-1]): record["response"]
        for record in data.held_out("coding")
    }
    items = []
    for record in data.functions():
        head = record["prompt"]
        body = _as_body(head, references.get(_function_head(head), ""))
        judge = CodeJudge(head, record["entry_point"], record["test"])
        if is_chat_model(tokenizer):
            messages = question(
                "Complete this Python function. Reply with the whole function in one code block."
                f"\n\n```python\n{head}```"
            )
            signature = head.split('"""')[0].rstrip()  # a docstring copied is no evidence
            reference = f"```python\n{signature}\n{body}\n```" if body else ""
        else:
            messages = (Message("text", head),)
            reference = f"{body}\n" if body else ""
        name = record["task_id"].replace("/", "-").lower()
        items.append(_item(name, messages, judge, reference))
    return items


def _math(data: Data, tokenizer: Tokenizer) -> list[Item]:
    if not is_chat_model(tokenizer):
        return _math_shots(data, tokenizer)
    ask = "\n\nThink step by step, and end with the answer as a number."
    return [
        _item(name, question(r["prompt"] + ask), judge, _worked(r["response"]))
        for name, r, judge in _number_problems(data)
    ]


def _math_shots(data: Data, tokenizer: Tokenizer) -> list[Item]:
    training = [r for r in data.training("math") if r["source"] == "gsm8k-train"]
    shots = [r | {"response": _worked(r["response"])} for r in _sample(training, NUM_MATH_SHOTS)]
    return [
        _item(name, (*_shown(shots), *question(r["prompt"])), judge, _worked(r["response"]))
        for name, r, judge in _number_problems(data)
    ]


def _sql(data: Data, tokenizer: Tokenizer) -> list[Item]:
    training = [r for r in data.training("sql") if r["source"].startswith("wikisql")]
    shown = _shown(_sample(training, NUM_SQL_SHOTS))
    return [
        _item(
            f"wikisql-{index}",
            (*shown, *question(r["prompt"])),
            SQLJudge(r["response"]),
            r["response"],
        )
        for index, r in enumerate(data.held_out("sql"))
        if r["source"].startswith("wikisql")
    ]


def _tools(data: Data, tokenizer: Tokenizer) -> list[Item]:
    training = [r for r in data.training("tool_use") if r["source"] == "bfcl-live_simple"]
    shown = _shown(_sample(training, NUM_CALL_SHOTS))
    return [
        _item(
            f"bfcl-{index}",
            (*shown, *question(r["prompt"])),
            CallsJudge(r["response"]),
            r["response"],
        )
        for index, r in enumerate(data.held_out("tool_use"))
        if r["source"].startswith("bfcl")
    ]


def _needles(data: Data, tokenizer: Tokenizer, num_tokens: int) -> Iterator[Item]:
    rng = random.Random(SEED)
    paragraphs = _paragraphs(data, tokenizer)
    for depth in NEEDLE_DEPTHS:
        for index in range(NEEDLES_A_DEPTH):
            city = _CITIES[index % len(_CITIES)]
            word = _code_word(rng)
            text = _haystack(paragraphs, num_tokens, rng)
            place = round(depth * len(text))
            fact = f"The secret code word of the {city} office is {word}."
            document = "\n\n".join([*text[:place], fact, *text[place:]])
            asked = (
                f"Read this text.\n\n{document}\n\n"
                f"What is the secret code word of the {city} office? Reply with the word only."
            )
            yield _item(f"depth-{depth}-{index}", question(asked), ContainsJudge(word), word)


def _document_questions(data: Data, tokenizer: Tokenizer) -> list[Item]:
    rng = random.Random(SEED)
    asked = [_passage_question(record) for record in data.held_out("qa")]
    questions = [found for found in asked if found is not None]
    passages = sorted({passage for passage, _, _ in questions})
    lengths = {passage: len(tokenizer.encode(passage)) for passage in passages}
    items = []
    for index, (passage, text, answer) in enumerate(questions):
        others = [other for other in passages if other[:200] != passage[:200]]
        rng.shuffle(others)
        document, total = [], lengths[passage]
        while others and total + lengths[others[-1]] <= DOCUMENT_TOKENS:
            document.append(others.pop())
            total += lengths[document[-1]]
        document.insert(round(len(document) * (index % 5) / 4), passage)
        prompt = (
            "Read the document and answer the question with a short span from it.\n\n"
            + "\n\n".join(document)
            + f"\n\nQuestion: {text}"
        )
        items.append(_item(f"passage-{index}", question(prompt), ContainsJudge(answer), answer))
    return items


def _code_files(data: Data, tokenizer: Tokenizer) -> list[Item]:
    items = []
    for index, record in enumerate(data.held_out("lm_python_code")):
        ids = tokenizer.encode(record["text"], add_special_tokens=False)
        ids = ids[: CODE_READ_TOKENS + CODE_SCORED_TOKENS]
        head = tokenizer.decode(ids[:-CODE_SCORED_TOKENS])
        rest = tokenizer.decode(ids[-CODE_SCORED_TOKENS:])
        if len(ids) >= CODE_READ_TOKENS // 2 and tokenizer.decode(ids) == head + rest:
            items.append(_item(f"file-{index}", (Message("text", head),), None, rest))
    return items[:NUM_CODE_FILES]


def _summaries(data: Data, tokenizer: Tokenizer) -> list[Item]:
    long = [
        (index, record)
        for index, record in enumerate(data.held_out("summarisation"))
        if len(record["prompt"]) >= SUMMARY_MIN_CHARACTERS
    ]
    return [
        _item(
            f"summary-{index}",
            question(r["prompt"]),
            OverlapJudge(r["response"]),
            r["response"],
        )
        for index, r in _sample(long, NUM_SUMMARIES)
    ]


def _math_chats(data: Data, tokenizer: Tokenizer) -> list[Item]:
    turns = [item.turns[0] for item in _shuffled(_math(data, tokenizer))]
    return [
        Item(f"chat-{index}", tuple(turns[index * CHAT_TURNS : (index + 1) * CHAT_TURNS]))
        for index in range(min(NUM_CHATS, len(turns) // CHAT_TURNS))
    ]


def _recall_chats(data: Data, tokenizer: Tokenizer) -> list[Item]:
    rng = random.Random(SEED)
    texts = [record["text"][:RECALL_CHARACTERS] for record in data.held_out("lm_reference")]
    rng.shuffle(texts)
    problems = [turn for item in _shuffled(_math(data, tokenizer)) for turn in item.turns]
    functions = [turn for item in _shuffled(_mbpp(data, tokenizer)) for turn in item.turns]
    items = []
    for index in range(NUM_RECALLS):
        city, word = _CITIES[index % len(_CITIES)], _code_word(rng)
        opening = (
            f"The secret code word of the {city} office is {word}. Keep it in mind for later."
            f"\n\nSummarise this text in two sentences:\n\n{texts[index]}"
        )
        ending = f"What is the secret code word of the {city} office? Reply with the word only."
        items.append(
            Item(
                f"recall-{index}",
                (
                    Turn(question(opening), None),
                    problems[index],
                    functions[index],
                    Turn(question(ending), ContainsJudge(word), word),
                ),
            )
        )
    return items


_Builder = Callable[[Data, Tokenizer], list[Item]]
_SETS: dict[str, tuple[str, int, _Builder]] = {
    "mbpp": ("coding", 320, _mbpp),
    "math": ("math", 256, _math),
    "math-8shot": ("math", 256, _math_shots),
    "sql": ("sql", 64, _sql),
    "tools": ("tool_use", 128, _tools),
    "document-qa": ("qa", 32, _document_questions),
    "code-file": ("coding", 0, _code_files),
    "summary": ("summarisation", 112, _summaries),
    "math-chat": ("math", 256, _math_chats),
    "recall-chat": ("qa", 192, _recall_chats),
}
SET_NAMES = (*_SETS, *NEEDLE_SIZES)


def _sample(records: Sequence[Any], count: int) -> list[Any]:
    return random.Random(SEED).sample(list(records), min(count, len(records)))


def _shuffled(items: list[Item]) -> tuple[Item, ...]:
    return tuple(_sample(items, len(items)))


def _item(name: str, messages: tuple[Message, ...], judge: Judge | None, reference: str) -> Item:
    return Item(name, (Turn(messages, judge, reference),))


def _shown(records: Sequence[Record]) -> tuple[Message, ...]:
    """Return worked examples as messages."""
    return tuple(
        message
        for r in records
        for message in (Message("user", r["prompt"]), Message("assistant", r["response"]))
    )


def _number_problems(data: Data) -> Iterator[tuple[str, Record, NumberJudge]]:
    for index, record in enumerate(data.held_out("math")):
        if record["source"] in ("gsm8k-test", "svamp"):
            expected = last_number(record["response"])
            if expected is not None:
                yield f"{record['source']}-{index}", record, NumberJudge(expected)


def _worked(response: str) -> str:
    """Return a worked solution that ends in words, not in the data set's own mark."""
    return response.replace("\n#### ", "\nThe answer is ") + "."


def _function_head(text: str) -> str:
    return " ".join(text.split())


def _as_body(head: str, body: str) -> str:
    """Return a function body whose first line has the indent that it lost in the data."""
    docstring = re.search(r'^([ \t]+)"""', head, re.MULTILINE)
    for indent in (docstring[1] if docstring else "    ", "\t", "    ", "  ", " "):
        with contextlib.suppress(SyntaxError):
            compile(f"def f():\n{indent}{body}\n", "body", "exec")
            return indent + body
    return ""


def _code_word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(4))


def _paragraphs(data: Data, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Return prose paragraphs of held-out textbooks with their number of tokens."""
    texts = [r["text"] for name in ("lm_reference", "lm_science") for r in data.held_out(name)]
    paragraphs = [p.strip() for text in texts for p in text.split("\n\n")]
    return [(p, len(tokenizer.encode(p)) + 1) for p in paragraphs if 200 <= len(p) <= 2000]


def _haystack(
    paragraphs: Sequence[tuple[str, int]], num_tokens: int, rng: random.Random
) -> list[str]:
    """Return consecutive paragraphs from a random place on, about ``num_tokens`` together."""
    start = rng.randrange(len(paragraphs))
    text: list[str] = []
    total = 100  # for the question and the template
    for offset in range(len(paragraphs)):
        paragraph, size = paragraphs[(start + offset) % len(paragraphs)]
        if total + size > num_tokens:
            break
        text.append(paragraph)
        total += size
    return text


def _passage_question(record: Record) -> tuple[str, str, str] | None:
    """Return (passage, question, answer) of an extractive question, None for other records."""
    prompt, answer = record["prompt"], record["response"].strip()
    if record["source"].startswith("xquad"):
        match = re.fullmatch(r".*?\n\n(.*)\n\nQuestion: (.*)", prompt, re.DOTALL)
    elif record["source"].startswith("t0:quoref"):
        match = re.search(r"(?P<question>(?:What|Who|On what|Which)[^?]*\?)", prompt)
        passage = max(prompt.split("\n\n"), key=len)
        return (passage, match[1], answer) if match and answer in passage else None
    else:
        return None
    return (match[1], match[2], answer) if match else None
