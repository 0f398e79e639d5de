"""Judges: what counts as right."""

import pytest
from judges import (
    CallsJudge,
    CodeJudge,
    ContainsJudge,
    NumberJudge,
    OverlapJudge,
    SQLJudge,
    last_number,
    run_program,
)

HEAD = 'def double(x):\n    """\n    Double it.\n    """\n'
CODE = CodeJudge(HEAD, "double", "def check(f):\n    assert f(4) == 8\n\ncheck(double)\n")


@pytest.mark.parametrize(
    "answer",
    [
        "Sure!\n\n```python\ndef double(x):\n    return 2 * x\n```\n\nIt doubles.",
        "```\nimport math\n\ndef double(x):\n    return 2 * x\n```",
        "```py\ndef double(x):\n    return 2 * x",  # cut off
        "```python\nprint(1)\n```\nThen\n```python\ndef double(x):\n    return 2 * x\n```",
        "def double(x):\n    return 2 * x\n",
        "    return 2 * x\n\nprint(double(",  # a base model goes on
        "```python\nreturn 2 * x\n```",
        "Here:\r\n```python \ndef double(x):\n    return 2 * x\n  ```",
    ],
)
def test_right_functions_in_any_dress(answer: str) -> None:
    assert CODE.verdict(answer) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef double(x):\n    return x\n```",
        "I cannot.",
        "",
        "```python\ndef double(x):\n    return input()\n```",
        "```python\nimport sys\ndef double(x):\n    sys.exit(1)\n```",
    ],
)
def test_wrong_functions(answer: str) -> None:
    assert CODE.verdict(answer) == 0


def test_programs_are_stopped_and_do_not_see_the_terminal() -> None:
    assert not run_program("while True: pass", seconds=0.3)
    assert not run_program("import os, time; os.fork(); time.sleep(60)", seconds=0.3)
    assert not run_program("[0] * (1 << 34)")
    assert run_program("print('x' * 100000)")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = **7**.", 7),
        ("It costs $1,234.50.", 1234.5),
        (r"\boxed{18}", 18),
        ("-5", -5),
        ("none", None),
        ("12%", 12),
        ("10 - 3 = 7", 7),
        ("2/3 of 18 is 12.0", 12),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers() -> None:
    assert NumberJudge(18).verdict("The answer is $18.00.") == 1
    assert NumberJudge(18).verdict("18 then 19") == 0


def test_sql() -> None:
    sql = SQLJudge("SELECT Nationality FROM 1-10 WHERE Player = 'Terrence Ross'")
    query = 'select nationality\nFROM 1-10 WHERE player = "Terrence Ross";'
    assert sql.verdict(f"```sql\n{query}\n```") == 1
    assert sql.verdict("SELECT Player FROM 1-10") == 0
    count = SQLJudge("SELECT COUNT Driver FROM t WHERE Margin = '2'")
    assert count.verdict("SELECT COUNT(Driver) FROM t WHERE Margin = 2") == 1
    assert count.verdict("SELECT COUNT(*) FROM t WHERE Margin = 2") == 0


def test_tool_calls() -> None:
    calls = CallsJudge('[{"name": "f", "arguments": {"x": 5, "c": "San Francisco"}}]')
    answer = '[{"name": "f", "arguments": {"c": "san francisco", "x": 5.0}}]'
    assert calls.verdict(f"```json\n{answer}\n```") == 1
    assert calls.verdict('{"name": "f", "arguments": {"x": 5, "c": "San Francisco"}}') == 1
    assert calls.verdict('[{"name": "f", "arguments": {"x": 5}}]') == 0
    assert calls.verdict("[") == 0


def test_words() -> None:
    assert ContainsJudge("the Order of Deacons").verdict("It is the order of deacons.") == 1
    assert ContainsJudge("velmora").verdict("velmorama") == 0
    assert OverlapJudge("one two three").verdict("one two three") == 1
    assert OverlapJudge("one two three").verdict("four") == 0
    assert OverlapJudge("one two three four").verdict("one three") == pytest.approx(2 / 3)
