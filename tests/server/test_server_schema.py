"""Answers that must be JSON, or fit a schema."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import openai
import pydantic
import pytest

from ifp_mlx.chat.grammar import Calls, GrammarProcessor, Grammars
from ifp_mlx.errors import UsageError
from ifp_mlx.storage.tokenizer import load_tokenizer

Running = Any
MESSAGES: Any = [{"role": "user", "content": "describe somebody"}]


class Address(pydantic.BaseModel):
    city: str
    zip_code: str | None


class Person(pydantic.BaseModel):
    name: str
    age: int
    role: str = pydantic.Field(json_schema_extra={"enum": ["admin", "user"]})
    tags: list[str]
    addresses: list[Address]


def schema_format(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def ask(running: Running, answer_format: Any, **options: Any) -> Any:
    options = {"model": "tiny:mail", "messages": MESSAGES, "max_tokens": 200, **options}
    return running.client().chat.completions.create(response_format=answer_format, **options)


def test_answers_fit_a_schema(running: Running) -> None:
    answer_format = schema_format(Person.model_json_schema())
    for temperature, count in ((0.0, 1), (1.0, 12)):
        answer = ask(running, answer_format, temperature=temperature, n=count)
        for choice in answer.choices:
            person = Person.model_validate_json(choice.message.content)
            assert person.role in ("admin", "user")
            assert choice.finish_reason == "stop"


def test_answers_in_a_stream_and_of_plain_completions_fit_too(running: Running) -> None:
    answer_format = schema_format(Person.model_json_schema())
    chunks = list(ask(running, answer_format, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert Person.model_validate_json(text)
    answer = running.client().completions.create(
        model="tiny", prompt="A person: ", max_tokens=200,
        extra_body={"response_format": answer_format},
    )  # fmt: skip
    assert Person.model_validate_json(answer.choices[0].text)


def test_openais_client_parses_what_it_asked_for(running: Running) -> None:
    parsed = running.client().chat.completions.parse(
        model="tiny:mail", messages=MESSAGES, response_format=Person, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


@pytest.mark.parametrize("max_tokens", [12, 60, 200])
def test_any_object_is_closed_before_the_limit(running: Running, max_tokens: int) -> None:
    for seed in range(3):
        answer = ask(
            running, {"type": "json_object"}, max_tokens=max_tokens, temperature=1.0, seed=seed
        )
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_answers_with_and_without_a_schema_share_a_batch(running: Running) -> None:
    import concurrent.futures

    def one(index: int) -> bool:
        if index % 2:
            answer = ask(running, {"type": "json_object"}, max_tokens=40)
            return isinstance(json.loads(answer.choices[0].message.content), dict)
        plain = ask(running, {"type": "text"}, max_tokens=40)
        return len(plain.choices[0].message.content) > 0

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(12)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "spaceship"}, "cannot be enforced"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.org/schema"}, "cannot be enforced"),
        ({"type": "string", "pattern": "(("}, "cannot be enforced"),
        ({"enum": []}, "cannot be enforced"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    running: Running, schema: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        ask(running, schema_format(schema))
    assert caught.value.param == "response_format"
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]


def test_what_goes_wrong_on_the_way_ends_that_answer_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("too complex")

    with monkeypatch.context() as patch:
        patch.setattr(GrammarProcessor, "_allowed", fail)
        with pytest.raises(openai.BadRequestError, match="too complex"):
            ask(running, {"type": "json_object"})
    assert json.loads(ask(running, {"type": "json_object"}).choices[0].message.content) is not None


def test_a_schema_and_a_demand_for_a_call_exclude_each_other(running: Running) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="no effect on tool calls"):
        ask(running, schema_format({"type": "object"}), tools=tools, tool_choice="required")


def test_langchain_gets_an_object(running: Running) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model="tiny:mail", base_url=running.url, api_key="none", max_tokens=200, max_retries=0
    )
    try:
        assert model.invoke("hello").content
        person = model.with_structured_output(Person, method="json_schema").invoke("somebody")
        assert isinstance(person, Person)
    finally:
        model.root_client.close()


@pytest.fixture(scope="module")
def grammars(checkpoint_folder: Path) -> Grammars:
    return Grammars(load_tokenizer(checkpoint_folder))


def decode(grammars: Grammars, grammar: Any, wishes: str, max_tokens: int = 100) -> str:
    """Return an answer of a model that would like to write ``wishes`` and then goes on with x."""
    processor = grammar.processor(max_tokens)
    ids, text = [0], b""
    for index in range(max_tokens):
        wish = wishes.encode()[index : index + 1] or b"x"
        logits = mx.zeros((1, 264)).at[:, grammars._tokens.tokenize_bytes(wish)[0]].add(1.0)
        token = cast(int, mx.argmax(processor(mx.array(ids), logits), axis=-1).item())
        ids.append(token)
        if token == 2:
            break
        text += grammars.token_bytes(token)
    assert not processor.error
    return text.decode()


def test_a_string_is_closed_in_time(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    for max_tokens in (12, 30, 99):
        text = decode(grammars, grammars.for_schema(schema), '{"a": "}]xx', max_tokens)
        value = json.loads(text)["a"]
        assert max_tokens - 20 < len(value) + 10 <= max_tokens


def test_what_is_nested_is_closed_in_time(grammars: Grammars) -> None:
    tree = {
        "type": "object",
        "properties": {"child": {"$ref": "#"}, "name": {"type": "string"}},
        "required": ["name"],
    }
    text = decode(grammars, grammars.for_schema(tree), '{"child": ' * 40, 240)
    depth, node = 0, json.loads(text)
    while "child" in node:
        depth, node = depth + 1, node["child"]
    assert depth > 3


def test_definitions_of_one_function_do_not_reach_another(grammars: Grammars) -> None:
    def arguments(kind: str) -> Any:
        properties = {"x": {"$ref": "#/$defs/X"}}
        return {
            "type": "object", "properties": properties, "required": ["x"],
            "additionalProperties": False, "$defs": {"X": {"type": kind}},
        }  # fmt: skip

    calls = Calls(
        "<c>", "</c>", {"a": arguments("boolean"), "b": arguments("null")},
        must_call=True, in_parallel=False,
    )  # fmt: skip
    grammar = grammars.for_calls(calls)
    assert decode(grammars, grammar, '<c>\n{"name": "b", ') == (
        '<c>\n{"name": "b", "arguments": {"x": null}}\n</c>'
    )
    assert '{"x": true}' in decode(grammars, grammar, '<c>\n{"name": "a", "arguments": {"x": t')


def test_any_text_needs_no_grammar_but_a_marker_does(grammars: Grammars) -> None:
    free = Calls("[T]", "", None, must_call=False, in_parallel=True)
    assert grammars.for_calls(free) is None
    forced = Calls("[T]", "", None, must_call=True, in_parallel=True)
    assert decode(grammars, grammars.for_calls(forced), "no", 9).startswith("[T]x")
    either = grammars.for_calls(free, {"type": "boolean"})
    assert decode(grammars, either, "true") == "true"
    assert decode(grammars, either, "[", 9).startswith("[T]x")


def test_what_a_model_thinks_first_is_free(grammars: Grammars) -> None:
    grammar = grammars.for_schema({"type": "boolean"})
    processor = grammar.processor(50, begins_after=[5, 6])
    logits = mx.zeros((1, 264))
    tokens = [1]
    for token in (9, 5, 5, 6):
        assert mx.isfinite(processor(mx.array(tokens), logits)).all().item()
        tokens.append(token)
    assert not mx.isfinite(processor(mx.array(tokens), logits)).all().item()


def test_a_schema_is_checked_by_the_library(grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="the schema cannot be enforced"):
        grammars.for_schema({"type": 5})
