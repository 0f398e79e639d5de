"""Chat templates of the real world: they refuse, they break, and they say so in one line."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from ifp_mlx.chat.chat_template import ChatTokenizer, accepted_messages, chat_ids
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.notices import warn_once
from ifp_mlx.storage.tokenizer import load_tokenizer

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
PLAIN = f"{{% for m in messages %}}{TURN}{{% endfor %}}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
MORE = {"role": "user", "content": "and?"}


@pytest.fixture
def with_template(tiny_checkpoint: Callable[..., Path]) -> Callable[[Any], Path]:
    """Return a factory: a chat template -> a tiny checkpoint with it; None removes it."""

    def make(template: Any) -> Path:
        folder = tiny_checkpoint()
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings["chat_template"] = template
        if template is None:
            del settings["chat_template"]
        path.write_text(json.dumps(settings))
        return folder

    return make


def rendered(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.decode(chat_ids(tokenizer, messages))  # type: ignore[attr-defined]
    return text


FOLDED = {"role": "user", "content": "be brief\n\nhi"}
REFUSALS: dict[str, tuple[str, list[dict[str, str]], list[dict[str, str]]]] = {
    "system": (NO_SYSTEM, [SYSTEM, USER], [FOLDED]),
    "system in a conversation": (NO_SYSTEM, [SYSTEM, USER, ANSWER, MORE], [FOLDED, ANSWER, MORE]),
    "turns": (
        ALTERNATE,
        [USER, MORE, ANSWER, MORE],
        [{"role": "user", "content": "hi\n\nand?"}, ANSWER, MORE],
    ),
    "both": (
        NO_SYSTEM + ALTERNATE,
        [SYSTEM, USER, MORE],
        [{"role": "user", "content": "be brief\n\nhi\n\nand?"}],
    ),
    "system alone": (NO_SYSTEM, [SYSTEM], [{"role": "user", "content": "be brief"}]),
    "nothing refused": ("", [SYSTEM, USER, MORE], [SYSTEM, USER, MORE]),
}


@pytest.mark.parametrize(("head", "messages", "taken"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_template_refuses_is_said_in_a_form_that_it_takes(
    with_template: Callable[[Any], Path],
    head: str,
    messages: list[dict[str, str]],
    taken: list[dict[str, str]],
) -> None:
    tokenizer = load_tokenizer(with_template(head + PLAIN))
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in taken)
    assert rendered(tokenizer, messages) == expected
    assert accepted_messages(tokenizer, messages) == taken


def test_a_folded_system_message_is_said_once(
    with_template: Callable[[Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    tokenizer = load_tokenizer(with_template(NO_SYSTEM + PLAIN))
    with caplog.at_level(logging.WARNING, logger="ifp_mlx"):
        for _ in range(3):
            chat_ids(tokenizer, [SYSTEM, USER])
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template takes no system message; it is put in front of the first user message"
    ]


BROKEN = {
    "syntax": ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
    "no end": ("{% for m in messages %}\n{{ m.content }}", "line 2"),
    "undefined": ("{{ date_string.x }}" + PLAIN, "'date_string' is undefined"),
    "type": ("{{ messages + 1 }}", "can only concatenate list"),
    "filter": ("{{ messages | nofilter }}", "No filter named 'nofilter'"),
    "division": ("{{ 1 // 0 }}", "by zero"),
    "endless": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "refuses all": ("{{ raise_exception('only tools') }}", "only tools"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize(("template", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_template_is_one_line_that_names_it(
    with_template: Callable[[Any], Path], template: str, reason: str
) -> None:
    folder = with_template(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="its chat template cannot be used") as caught:
        chat_ids(tokenizer, [SYSTEM, USER])
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_templates_without_a_default_are_listed(
    with_template: Callable[[Any], Path],
) -> None:
    templates = [{"name": name, "template": PLAIN} for name in ("rag", "tool_use")]
    tokenizer = load_tokenizer(with_template(templates))
    with pytest.raises(CheckpointError, match="has the chat templates rag, tool_use but none nam"):
        chat_ids(tokenizer, [USER])


def test_the_only_named_template_is_the_one(with_template: Callable[[Any], Path]) -> None:
    tokenizer = load_tokenizer(with_template([{"name": "chat", "template": PLAIN}]))
    assert rendered(tokenizer, [USER]) == "<|im_start|>user\nhi<|im_end|>\n"


def test_without_a_template_contents_are_paragraphs(with_template: Callable[[Any], Path]) -> None:
    tokenizer = load_tokenizer(with_template(None))
    assert rendered(tokenizer, [SYSTEM, USER]) == "be brief\n\nhi"


def test_templates_are_tried_when_a_model_is_converted(
    with_template: Callable[[Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_template("{{ date_string.x }}")
    with caplog.at_level(logging.WARNING, logger="ifp_mlx"):
        convert_checkpoint(folder, tmp_path / "out")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'out'}: its chat template cannot be used")


_PIECES = st.sampled_from(
    [
        "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.role.x.y }}",
        "{% if messages[0]['role'] == 'system' %}", "{% endif %}", "{{ raise_exception('no') }}",
        "{{ messages[5]['content'] }}", "{% set x = messages[1:] %}", "{{ x }}", "{{ bos_token }}",
        "{{ strftime_now('%Y') }}", "{{ messages | tojson }}", "{{ none + 1 }}", "{%", "}}", "é😀",
        "{{ tools[0] }}", "{% break %}", "{% generation %}", "{{ '' | trim('a', 'b', 'c') }}",
    ]
)  # fmt: skip
_MESSAGES = st.lists(st.sampled_from([SYSTEM, USER, ANSWER, MORE]), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def any_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_checkpoint: Callable[..., Path]
) -> Any:
    return load_tokenizer(write_tiny_checkpoint(tmp_path_factory.mktemp("any") / "tiny"))


@hypothesis.given(pieces=st.lists(_PIECES, max_size=8), messages=_MESSAGES)
def test_whatever_a_template_does_is_ids_or_one_line(
    any_tokenizer: Any, pieces: list[str], messages: list[dict[str, str]]
) -> None:
    any_tokenizer.chat_template = "".join(pieces)
    problem = ""
    try:
        assert chat_ids(any_tokenizer, messages) is not None
    except CheckpointError as error:
        problem = str(error)
    assert "\n" not in problem
