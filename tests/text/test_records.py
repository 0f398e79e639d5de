"""Data files as editors and exporters leave them: read alike everywhere, nothing dropped unsaid."""

import codecs
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import DataError
from ifp_mlx.evaluation.exact_match import load_problems
from ifp_mlx.evaluation.multiple_choice import load_questions
from ifp_mlx.evaluation.quality import load_held_out
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.text.calibration_text import CalibrationLimits, calibration_examples
from ifp_mlx.text.examples import ExampleRules, tokenise_files
from ifp_mlx.text.records import BadLines, check_prompt_response, read_records

PAIR = {"prompt": "Add 1 and 2", "response": "3"}
LINE = json.dumps(PAIR)
SYSTEM = {"role": "system", "content": "be brief"}
CHAT = {
    "messages": [
        SYSTEM,
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "Add 1 and 2"},
        {"role": "assistant", "content": "so 3"},
    ]
}


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> ChatTokenizer:
    return load_tokenizer(tiny_checkpoint())


def read(path: Path, *, skip: bool = False) -> list[dict[str, Any]]:
    return list(read_records(path, check_prompt_response, BadLines(skip=skip)))


FORMS = {
    "byte order mark": codecs.BOM_UTF8 + f"{LINE}\n{LINE}\n".encode(),
    "CRLF": f"{LINE}\r\n{LINE}\r\n".encode(),
    "mark and CRLF": codecs.BOM_UTF8 + f"{LINE}\r\n\r\n{LINE}".encode(),
    "no last line feed": f"{LINE}\n{LINE}".encode(),
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("skip", [False, True])
def test_marks_and_line_ends_change_nothing(tmp_path: Path, content: bytes, skip: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert read(path, skip=skip) == [PAIR, PAIR]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("skip", [False, True])
def test_utf_16_is_called_by_its_name(tmp_path: Path, encoding: str, skip: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{LINE}\n".encode(encoding))
    with pytest.raises(DataError, match=r"a\.jsonl is UTF-16 .*convert it first, for example with"):
        read(path, skip=skip)


@pytest.mark.parametrize("content", [f"[{LINE}]", f"[\n  {LINE}\n]\n", f"\ufeff[ {LINE},\n{LINE}]"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_json_array_is_called_by_its_name(tmp_path: Path, content: str, skip: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json is one JSON array; write one object a line"):
        read(path, skip=skip)


def test_half_a_character_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud83d", "response": "x"}\n' + LINE + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: half a character"):
        read(path)
    bad = BadLines(skip=True)
    assert list(read_records(path, check_prompt_response, bad)) == [PAIR]
    assert bad.counts.total() == 1


def test_a_conversation_is_a_prompt_and_a_response_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    (record,) = read(path)
    assert record == {**CHAT, "prompt": "Add 1 and 2", "response": "so 3"}


def test_content_in_parts_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "1"}]
    answer = {"role": "assistant", "content": "1"}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}) + "\n")
    (record,) = read(path)
    assert (record["prompt"], record["response"]) == ("Add 1", "1")


def test_eval_reads_conversations_with_all_that_was_said(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    ((example,),) = load_held_out(tmp_path, tokenizer, 9).values()
    assert list(example.prompt_ids) == chat_ids(tokenizer, CHAT["messages"][:4])
    answer = tokenizer.encode("so 3", add_special_tokens=False)
    assert list(example.token_ids) == [*example.prompt_ids, *answer]


def test_exact_match_and_multiple_choice_read_conversations(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    problem = {"messages": [*CHAT["messages"][:4], {"role": "assistant", "content": "#### 3"}]}
    (tmp_path / "sums.jsonl").write_text(json.dumps(problem) + "\n")
    (found,) = load_problems(tmp_path / "sums.jsonl", tokenizer, 9)
    asked = {"role": "user", "content": "Which?\n(A) one\n(B) two"}
    question = {"messages": [SYSTEM, asked, {"role": "assistant", "content": "B"}]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(question) + "\n")
    (chosen,) = load_questions(tmp_path / "asked.jsonl", tokenizer, 9)
    assert list(found.prompt.prompt_ids) == chat_ids(tokenizer, CHAT["messages"][:4])
    assert list(chosen.prompt.prompt_ids) == chat_ids(tokenizer, [SYSTEM, asked])
    assert chosen.answer == 1


def test_calibration_and_training_read_marks_and_conversations(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + f"{LINE}\r\n{json.dumps(CHAT)}\r\n".encode())
    bad = BadLines()
    assert len(list(calibration_examples([path], tokenizer, CalibrationLimits(), bad))) == 2
    assert len(tokenise_files([path], [], tokenizer, ExampleRules(), bad)) == 2
    assert not bad.counts


def test_eval_says_what_it_leaves_out(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = json.dumps({"prompt": "x" * 900, "response": "y"})
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n{{oops\n{long}\n")
    with caplog.at_level(logging.WARNING, logger="ifp_mlx"):
        ((_,),) = load_held_out(tmp_path, tokenizer, 9).values()
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "a.jsonl: left out 2 lines: not JSON (1), outside the limits of the evaluation (1)"
    )


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_ROLES = st.sampled_from(["system", "user", "assistant", "tool"]) | _VALUES
_MESSAGE = st.fixed_dictionaries({"role": _ROLES, "content": st.text(max_size=5) | _VALUES})
_RECORDS = st.dictionaries(
    st.sampled_from(["prompt", "response", "messages", "text", "task"]),
    _VALUES | st.lists(_MESSAGE | _VALUES, max_size=4),
)


@hypothesis.given(record=_RECORDS)
def test_whatever_a_line_holds_it_is_used_or_counted(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_text(f"{json.dumps(record)}\n{LINE}\n", encoding="utf-8")
    bad = BadLines(skip=True)
    used = list(read_records(path, check_prompt_response, bad))
    assert len(used) + bad.counts.total() == 2
    assert all(isinstance(one["prompt"] + one["response"], str) for one in used)
