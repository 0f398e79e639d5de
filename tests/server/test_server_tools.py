"""Tools: offered, called, streamed, answered, by OpenAI's own client."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response
from mlx_lm.tool_parsers import mistral, qwen3_coder

from ifp_mlx.assistant import Assistant
from ifp_mlx.server.engine import Engine
from ifp_mlx.server.replies import Answers, ChatReader, Piece, Reply
from ifp_mlx.server.subnet_provider import EngineOptions
from ifp_mlx.server.tools import ToolCall, ToolFormat, ToolOffer, parse_tools

Running = Any
Serve = Callable[..., contextlib.AbstractContextManager[Running]]
MACHINE = TextStateMachine({"normal": []})
NO_LOGPROBS: Any = ()


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": f"do {name}", "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", city={"enum": ["Rome", "Oslo"]}, days={"type": "integer"})
ADD = tool("add", a={"type": "integer"}, b={"type": "integer"})
TEMPLATE = (  # as Qwen's: mlx-lm recognises its calls
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{% raw %}<tool_call>{% endraw %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["told-in-text", "native"])
def tooled(
    request: pytest.FixtureRequest,
    checkpoint_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    serve: Serve,
) -> Iterator[Running]:
    """Return servers of two models: one whose template knows no tools, one whose does."""
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    shutil.copytree(checkpoint_folder, folder)
    changes: list[tuple[str, dict[str, Any]]] = [("config.json", {"max_position_embeddings": 4096})]
    if request.param == "native":
        changes.append(("tokenizer_config.json", {"chat_template": TEMPLATE}))
    for name, change in changes:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    engine = Engine(lambda: (Assistant.load(folder), lambda task: 64), EngineOptions())
    assert engine._tool_format.is_native == (request.param == "native")
    try:
        with serve(engine) as running:
            yield running
    finally:
        engine.stop()


def ask(client: openai.OpenAI, messages: Any, *, stream: bool, **options: Any) -> Any:
    """Return the assistant's message as a dictionary, and why it ended."""
    answer: Any = client.chat.completions.create(
        model="tiny:mail", messages=messages, max_tokens=160, stream=stream, **options
    )
    if not stream:
        choice = answer.choices[0]
        return choice.message.model_dump(exclude_none=True), choice.finish_reason
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    reason = None
    for chunk in answer:
        choice = chunk.choices[0]
        message["content"] += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                function = {"name": delta.function.name, "arguments": ""}
                calls.append({"id": delta.id, "type": delta.type, "function": function})
            calls[delta.index]["function"]["arguments"] += delta.function.arguments
        reason = choice.finish_reason or reason
    return {**message, **({"tool_calls": calls} if calls else {})}, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_two_tools_in_three_turns(tooled: Running, stream: bool) -> None:
    client = tooled.client()
    messages: list[Any] = [{"role": "user", "content": "weather, then a sum"}]
    named = {"type": "function", "function": {"name": "add"}}
    for choice, name in (("required", None), (named, "add")):
        message, reason = ask(
            client, messages, stream=stream, tools=[WEATHER, ADD], tool_choice=choice,
            parallel_tool_calls=False,
        )  # fmt: skip
        assert reason == "tool_calls"
        assert not message.get("content")
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] in ({name} if name else {"get_weather", "add"})
        if call["function"]["name"] == "add":
            assert {type(value) for value in arguments.values()} == {int}
        else:
            assert arguments["city"] in ("Rome", "Oslo")
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "17"}]
    message, reason = ask(client, messages, stream=stream, tools=[WEATHER, ADD], tool_choice="none")
    assert reason in ("stop", "length")
    assert message["content"]
    assert "tool_calls" not in message


def test_a_call_is_streamed_as_name_and_arguments(tooled: Running) -> None:
    chunks = list(
        tooled.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "add"}], tools=[ADD],
            tool_choice="required", stream=True, max_tokens=160, parallel_tool_calls=False,
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks]
    first, second = [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0, "function", "add", "",
    )  # fmt: skip
    assert second.id is None
    assert json.loads(second.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_are_in_the_prompt(tooled: Running) -> None:
    client = tooled.client()
    messages: Any = [{"role": "user", "content": "hi"}]
    offers: list[Any] = [
        {}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}, {"tools": [ADD]},
    ]  # fmt: skip
    counts = [
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, **offer
        ).usage.prompt_tokens
        for offer in offers
    ]
    assert counts[0] == counts[1] == counts[2] < counts[3] - 100


def test_a_schema_that_is_no_schema_is_the_clients(tooled: Running) -> None:
    bad = tool("bad", x={"$ref": "#/nowhere"})
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as caught:
        ask(tooled.client(), [{"role": "user", "content": "hi"}], stream=False, tools=[bad])
    assert caught.value.param == "tools"


def test_what_cannot_be_enforced_of_arguments_is_left_to_the_model(tooled: Running) -> None:
    lenient = tool("open", url={"type": "string", "format": "made-up", "deprecated": True})
    message, _ = ask(
        tooled.client(), [{"role": "user", "content": "hi"}], stream=False, tools=[lenient],
        tool_choice="required",
    )  # fmt: skip
    assert "url" in json.loads(message["tool_calls"][0]["function"]["arguments"])


JSON_FORMAT = ToolFormat.of(SimpleNamespace(has_tool_calling=False))  # type: ignore[arg-type]
OFFER = ToolOffer((WEATHER, ADD), must_call=False, in_parallel=True)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def replied(
    text: str, *, offer: ToolOffer | None = OFFER, reason: str = "stop", size: int = 3
) -> tuple[list[Piece | ToolCall], Reply]:
    """Return what becomes of a model's text that comes in pieces."""
    transitions = {
        "normal": [("<tool_call>", "tool")] if offer else [],
        "tool": [("</tool_call>", "normal")],
    }
    reader = ChatReader(TextStateMachine(transitions))
    reply = Reply(
        reader, (), lambda: "ifp_x", offer=offer, tool_format=JSON_FORMAT,
        reads_bare_calls=offer is not None,
    )  # fmt: skip
    answers = Answers([reply])
    reply.put(GenerationContext(True, False, lambda *_: {}, MACHINE, "normal", [1], 0))
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for piece in pieces:
        reply.put(Response(piece, 1, 0.0, None, NO_LOGPROBS))
    reply.put(Response("", 2, 0.0, reason, NO_LOGPROBS))
    return [piece for _, piece in answers.pieces(5, lambda: None)], reply


def said(pieces: list[Piece | ToolCall]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece))


def called(pieces: list[Piece | ToolCall]) -> list[tuple[str, Any]]:
    return [(p.name, json.loads(p.arguments)) for p in pieces if isinstance(p, ToolCall)]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_text_and_calls_are_told_apart(size: int) -> None:
    pieces, reply = replied(f"Let me see.\n\n{CALL}\n{CALL}\n", size=size)
    assert said(pieces) == "Let me see."
    assert called(pieces) == [("add", {"a": 1, "b": 2})] * 2
    identifiers = {piece.identifier for piece in pieces if isinstance(piece, ToolCall)}
    assert len(identifiers) == 2
    assert reply.finish_reason == "tool_calls"


def test_one_call_ends_an_answer_where_one_is_asked_for() -> None:
    pieces, reply = replied(
        f"{CALL}\n{CALL} and so on", offer=ToolOffer((ADD,), must_call=False, in_parallel=False)
    )
    assert len(called(pieces)) == 1
    assert said(pieces) == ""
    assert reply.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call> so',
        "plain text \n\n",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    pieces, reply = replied(text)
    assert said(pieces) == text
    assert not called(pieces)
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 1000])
def test_an_answer_that_is_a_call_needs_no_markers(size: int) -> None:
    """Qwen2.5-Coder leaves them out."""
    pieces, reply = replied('\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n', size=size)
    assert called(pieces) == [("add", {"a": 1, "b": 2})]
    assert said(pieces) == ""
    assert reply.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "other", "arguments": {}}',
        '{"name": "Ada", "age": 36}',
        '{"name": "add", "arguments": {"a": 1}} is how',
        "{ braces",
        "",
    ],
)
def test_an_object_that_is_no_call_stays_text(text: str) -> None:
    pieces, reply = replied(text)
    assert said(pieces) == text
    assert not called(pieces)
    assert reply.finish_reason == "stop"


def test_a_stop_string_in_an_object_loses_nothing_before_it() -> None:
    reader = ChatReader(MACHINE)
    reply = Reply(
        reader, ("}",), lambda: "ifp_x", offer=OFFER, tool_format=JSON_FORMAT, reads_bare_calls=True
    )
    answers = Answers([reply])
    reply.put(GenerationContext(True, False, lambda *_: {}, MACHINE, "normal", [1], 0))
    reply.put(Response('{"a": 1}', 1, 0.0, None, NO_LOGPROBS))
    assert said([piece for _, piece in answers.pieces(5, lambda: None)]) == '{"a": 1'


def test_a_call_that_was_cut_off_stays_text() -> None:
    text = '<tool_call>\n{"name": "add", "argu'
    pieces, reply = replied(text, reason="length")
    assert said(pieces) == text
    assert reply.finish_reason == "length"


def test_markers_are_text_where_no_tools_are_offered() -> None:
    pieces, reply = replied(f"so: {CALL}", offer=None)
    assert said(pieces) == f"so: {CALL}"
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("parser", "text", "calls"),
    [
        (mistral, 'add[ARGS]{"a": 1}', [("add", {"a": 1})]),
        (mistral, '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]',
         [("a", {}), ("b", {"x": 1})]),
        (qwen3_coder, "<function=add>\n<parameter=a>\n5\n</parameter>\n</function>",
         [("add", {"a": 5})]),
        (qwen3_coder, "nothing of the kind", []),
    ],
)  # fmt: skip
def test_other_formats_are_read_by_mlx_lm(parser: Any, text: str, calls: Any) -> None:
    tool_format = ToolFormat("<", ">", parser.parse_tool_call, is_native=True)
    assert not tool_format.is_json
    read = tool_format.read(text, OFFER)
    assert [(call.name, json.loads(call.arguments)) for call in read] == calls


def test_tools_are_told_in_the_system_message() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_call_id": "c", "name": "add", "content": "1"},
    ]  # fmt: skip
    told = JSON_FORMAT.describe(messages, OFFER)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("be brief\n\n")
    assert '"get_weather"' in told[0]["content"]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in told[2]["content"]
    assert "<tool_response>\n1\n" in told[3]["content"]
    assert JSON_FORMAT.describe(messages[1:2], OFFER)[0]["role"] == "system"
    assert JSON_FORMAT.describe(messages[:2], None) == messages[:2]


def test_a_choice_decides_what_is_offered() -> None:
    tools = [WEATHER, ADD]
    assert parse_tools({"tools": tools, "tool_choice": "none"}) is None
    assert parse_tools({"tools": [], "tool_choice": "auto"}) is None
    required = parse_tools({"tools": tools, "tool_choice": "required"})
    assert required is not None
    assert (required.must_call, len(required.tools)) == (True, 2)
    chosen = {"type": "function", "function": {"name": "add"}}
    named = parse_tools({"tools": tools, "tool_choice": chosen})
    assert named is not None
    assert [t["function"]["name"] for t in named.tools] == ["add"]
