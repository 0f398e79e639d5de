"""Multiple choice, numeric answers, and the command that measures them."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import DataError
from ifp_mlx.evaluation.exact_match import Problem, exact_match, last_number, load_problems
from ifp_mlx.evaluation.multiple_choice import Question, choice_accuracy, load_questions
from ifp_mlx.evaluation.quality import HeldOutExample
from ifp_mlx.storage.tokenizer import load_tokenizer

VOCAB = 12


class ScriptedTrunk(nn.Module):
    """Its hidden states are the logits."""

    def __init__(self, table: mx.array):
        super().__init__()
        self._table = table

    def __call__(self, ids: mx.array) -> mx.array:
        return self._table[ids]


class ScriptedModel(nn.Module):
    """Gives each next token a set logit after each token: what it says is known beforehand."""

    def __init__(self, next_logits: dict[int, dict[int, float]]):
        super().__init__()
        table = np.zeros((VOCAB, VOCAB), dtype=np.float32)
        for token, logits in next_logits.items():
            for following, logit in logits.items():
                table[token, following] = logit
        self.model = ScriptedTrunk(mx.array(table))
        self.args = SimpleNamespace(model_type="llama")
        self.layers: list[nn.Module] = []

    def __call__(self, ids: mx.array, cache: object = None, **_: object) -> mx.array:
        logits: mx.array = self.model(ids)
        return logits


def question(choices: list[tuple[int, ...]], answer: int, prompt: int = 1) -> Question:
    return Question(HeldOutExample((prompt,), 1, "quiz"), tuple(choices), answer)


def test_choice_accuracy_of_a_scripted_model() -> None:
    # After 1 it says 2 or 3; after 2 always 4. A long likely answer loses to a short one as a
    # whole, and wins a token.
    model = ScriptedModel({1: {2: 5.0, 3: 4.9}, 2: {4: 3.0}, 4: {4: 3.0}})
    longer = question([(2, 4, 4, 4), (3,)], answer=0)
    plain = question([(5,), (2,)], answer=1)
    result = choice_accuracy(model, [longer, plain], None)
    assert result.accuracy == 0.5
    assert result.accuracy_per_token == 1.0
    assert result.chance == 0.5
    assert result.num_questions == 2


def test_questions_come_from_choices_and_from_lettered_options(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    records = [
        {"prompt": "Sky?", "choices": ["blue", "green"], "answer": 0},
        {"prompt": "Sum?\nOptions:\n(A) 3\n(B) 4\n(C) 5", "response": "(B)"},
        {"prompt": "Which?\n- A: cat\n\n- B: dog", "response": "#### B"},
        {"prompt": "Speed? Options: (A) 384 (B) 562", "response": "I think so\n#### A"},
        {"prompt": "Say hello.", "response": "Hello"},
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    questions = load_questions(path, tokenizer, 10)
    texts = [[tokenizer.decode(list(choice)) for choice in q.choices] for q in questions]
    assert texts == [["blue", "green"], ["(A)", "(B)", "(C)"], ["A", "B"]]
    assert [q.answer for q in questions] == [0, 1, 1]
    assert {q.prompt.domain for q in questions} == {"quiz"}
    assert "Sky?" in tokenizer.decode(list(questions[0].prompt.token_ids))
    assert len(load_questions(path, tokenizer, 2)) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "'prompt' is missing"),
        ({"prompt": "?"}, "'choices' is missing"),
        ({"prompt": "?", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"prompt": "?", "choices": ["a", 3], "answer": 0}, "at least two texts"),
        ({"prompt": "?", "choices": ["a", "b"], "answer": 2}, "not an index from 0 to 1"),
        ({"prompt": "?", "choices": ["a", "b"], "answer": "a"}, "not an index from 0 to 1"),
        ({"prompt": "?", "response": "fine"}, "no multiple-choice question"),
    ],
)
def test_bad_questions_are_one_error(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    record: dict[str, object],
    message: str,
) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        load_questions(path, load_tokenizer(tiny_checkpoint()), 10)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("3 apples and 4 pears make 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("minus: -0.5", "-0.5"),
        (".25", "0.25"),
        ("x = 12.50 dollars", "12.50"),
        ("use x2 and y3z", None),
        ("nothing", None),
        ("10, 20", "20"),
        ("72%", "72"),
        ("5-3", "3"),
    ],
)
def test_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_problems_come_from_answers_and_responses(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    records = [
        {"prompt": "6*7?", "answer": 42},
        {"prompt": "half?", "answer": "0.5"},
        {"prompt": "sum?", "response": "2+2 is 4\n#### 4"},
        {"prompt": "price?", "response": "It costs $1,200."},
        {"prompt": "which?", "response": "the 3 bears"},
        {"prompt": "letter?", "response": "#### A"},
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    problems = load_problems(path, load_tokenizer(tiny_checkpoint()), 10)
    assert [str(problem.answer) for problem in problems] == ["42", "0.5", "4", "1200"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": 4}, "'prompt' is missing"),
        ({"prompt": "?", "answer": "many"}, "'answer' is not a number"),
        ({"prompt": "?"}, "'answer' is missing"),
        ({"prompt": "?", "response": "hello"}, "no problem with a numeric answer"),
    ],
)
def test_bad_problems_are_one_error(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    record: dict[str, object],
    message: str,
) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        load_problems(path, load_tokenizer(tiny_checkpoint()), 10)


def test_exact_match_of_a_scripted_model() -> None:
    # 1 -> "4" "2" end; 7 -> "4" end: tokens 4 and 2 are digits, 0 ends.
    model = ScriptedModel({1: {4: 9.0}, 4: {2: 9.0}, 2: {0: 9.0}, 7: {5: 9.0}, 5: {0: 9.0}})
    tokenizer = SimpleNamespace(
        eos_token_ids={0}, decode=lambda ids: "".join(str(token) for token in ids)
    )
    problems = [
        Problem(HeldOutExample((1,), 1, "sums"), Decimal("42.0")),
        Problem(HeldOutExample((7,), 1, "sums"), Decimal("6")),
    ]
    assert exact_match(problems, lambda _: model, tokenizer, 5) == 0.5
    assert exact_match(problems, lambda _: model, tokenizer, 1) == 0.0  # cut after "4"


def run(arguments: list[str]) -> int:
    from ifp_mlx.cli.app import run as run_command

    return run_command(arguments)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for domain, words in {"sums": ("2+2", "3+5"), "songs": ("la", "sol")}.items():
        lines = [json.dumps({"prompt": word, "response": word[::-1]}) for word in words]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return folder


def test_eval_command_measures_everything_as_json(
    tiny_checkpoint: Callable[..., Path],
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiz, sums = tmp_path / "quiz.jsonl", tmp_path / "answers.jsonl"
    quiz.write_text(json.dumps({"prompt": "Sky?", "choices": ["blue", "red"], "answer": 0}))
    sums.write_text(json.dumps({"prompt": "6*7?", "answer": 42}))
    arguments = ["eval", "--data", str(texts), "--choices", str(quiz), "--numbers", str(sums)]
    arguments += ["--rows", "dense,prompt@64,random@0.34", "--kl", "--max-tokens", "4"]
    assert run([*arguments, "--model", str(tiny_checkpoint()), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_units"] == 192
    assert [row["row"] for row in report["rows"]] == ["dense", "prompt@64", "random@64"]
    for row in report["rows"]:
        assert set(row["domains"]) == {"sums", "songs"}
        assert row["mean_cross_entropy"]["documents"] is None
        assert row["multiple_choice"]["num_questions"] == 1
        assert row["exact_match"] in (0.0, 1.0)
    assert report["rows"][0]["domains"]["sums"]["top1"] == 1.0
    assert report["rows"][1]["domains"]["sums"]["kl"] > 0


def test_eval_command_has_a_useful_default(
    tiny_checkpoint: Callable[..., Path], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint("llama", intermediate_size=1280)
    assert run(["eval", "--data", str(texts), "--model", str(model)]) == 0
    captured = capsys.readouterr()
    rows = [line.split()[0] for line in captured.out.splitlines() if line.strip()]
    assert rows[1:4] == ["dense", "prompt@1216", "random@1216"]
    assert {"songs", "sums"} <= set(rows)
    assert "loading" not in captured.out


def test_eval_command_prints_markdown(
    tiny_checkpoint: Callable[..., Path], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--data", str(texts), "--model", str(tiny_checkpoint()), "--markdown"]
    assert run([*arguments, "--selector", "random", "--keep", "64", "--keep", "0.67"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| row | K | all tokens | instructions | songs | sums |"
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["192", "64", "128"]


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        ([], 2, "nothing to measure on"),
        (["--data", "TEXTS", "--rows", "dense", "--keep", "0.5"], 2, "--rows says everything"),
        (["--data", "TEXTS", "--json", "--markdown"], 2, "exclude each other"),
        (["--numbers", "TEXTS", "--markdown"], 2, "pass --data"),
        (["--data", "TEXTS", "--rows", "nice@0.5"], 2, "no selector 'nice'"),
        (["--data", "TEXTS", "--rows", "static@0.5"], 2, "needs a calibration"),
        (["--data", "TEXTS", "--selector", "prompt", "--per", "task"], 2, "task description of"),
        (["--data", "TEXTS", "--domains", "poems"], 1, "holds no .jsonl file"),
        (["--data", "TEXTS", "--per", "word"], 2, "--per"),
    ],
)
def test_eval_command_refuses(
    tiny_checkpoint: Callable[..., Path],
    texts: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    code: int,
    message: str,
) -> None:
    arguments = [str(texts) if word == "TEXTS" else word for word in extra]
    assert run(["eval", "--model", str(tiny_checkpoint()), *arguments]) == code
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert not captured.out
