"""From a JSON body to a checked request; whatever does not fit is said in OpenAI's terms."""

import dataclasses
import json
import math
from typing import Any

from ifp_mlx.chat.conversation import Message
from ifp_mlx.server.api_error import APIError

MAX_STOP_STRINGS = 4
_ROLES = ("system", "developer", "user", "assistant")

# What would change the answer, and this server cannot do: better refused than ignored.
_UNSUPPORTED = {
    "tools": "tool calls are not supported; leave out tools",
    "functions": "function calls are not supported; leave out functions",
    "audio": "audio is not supported; leave out audio",
    "logprobs": "log probabilities are not supported; leave out logprobs",
    "top_logprobs": "log probabilities are not supported; leave out top_logprobs",
    "suffix": "filling in the middle is not supported; leave out suffix",
    "echo": "echo is not supported; leave it out",
    "logit_bias": "logit_bias is not supported; leave it out",
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the fields of the request, with OpenAI's and mlx-lm's names."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One request for text.

    Attributes:
        messages: the conversation; None for a plain completion.
        prompt: the text to continue; None for a conversation.
        model: as the client named it.
        task: a description that selects the sub-network.
        max_tokens: longest answer.
        sampling: how tokens are drawn.
        stop: strings that end the answer and are not part of it.
        stream: send the answer as it is made.
        include_usage: end a stream with the token counts.
    """

    messages: tuple[Message, ...] | None
    prompt: str | None
    model: str
    task: str | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def first_user_text(self) -> str:
        """The text that selects when neither the model's name nor ``task`` does."""
        if self.messages is None:
            return self.prompt or ""
        return next(m["content"] for m in self.messages if m["role"] == "user")


@dataclasses.dataclass(frozen=True)
class RequestDefaults:
    """What a request that does not say gets.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        context_length: of the model; also the most that ``max_tokens`` may ask for.
    """

    max_tokens: int
    temperature: float
    context_length: int


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        APIError: 400, not UTF-8, not JSON or not an object.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise APIError(400, "the body is not UTF-8; encode it so", code="invalid_utf8") from error
    except (ValueError, RecursionError) as error:
        raise APIError(400, "the body is not valid JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise APIError(400, "the body must be a JSON object", code="invalid_json")
    return body


def parse_chat_request(body: dict[str, Any], defaults: RequestDefaults) -> GenerationRequest:
    """Return a ``/v1/chat/completions`` request, checked.

    Raises:
        APIError: 400, with the field that is wrong.
    """
    return _parse(body, defaults, messages=_messages(body), prompt=None)


def parse_completion_request(body: dict[str, Any], defaults: RequestDefaults) -> GenerationRequest:
    """Return a ``/v1/completions`` request, checked.

    Raises:
        APIError: 400, with the field that is wrong.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return _parse(body, defaults, messages=None, prompt=_text(prompt, "prompt"))


def _parse(
    body: dict[str, Any],
    defaults: RequestDefaults,
    *,
    messages: tuple[Message, ...] | None,
    prompt: str | None,
) -> GenerationRequest:
    for name, message in _UNSUPPORTED.items():
        if body.get(name):
            raise APIError(400, message, param=name, code="unsupported_parameter")
    answer_format = body.get("response_format")
    if answer_format is not None and answer_format != {"type": "text"}:
        message = "only response_format {'type': 'text'} is supported"
        raise APIError(400, message, param="response_format", code="unsupported_parameter")
    _integer(body, "n", 1, 1, 1)
    stream = _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    name = "max_completion_tokens"
    if body.get(name) is None:
        name = "max_tokens"
    return GenerationRequest(
        messages=messages,
        prompt=prompt,
        model=_text(body.get("model"), "model"),
        task=None if body.get("task") is None else _text(body["task"], "task"),
        max_tokens=_integer(body, name, defaults.max_tokens, 1, defaults.context_length),
        sampling=Sampling(
            temperature=_number(body, "temperature", defaults.temperature, 0, 2),
            top_p=_number(body, "top_p", 1, 0, 1),
            top_k=_integer(body, "top_k", 0, 0, 2**31 - 1),
            min_p=_number(body, "min_p", 0, 0, 1),
            repetition_penalty=_number(body, "repetition_penalty", 0, 0, 10),
            presence_penalty=_number(body, "presence_penalty", 0, -2, 2),
            frequency_penalty=_number(body, "frequency_penalty", 0, -2, 2),
            seed=None if body.get("seed") is None else _integer(body, "seed", 0, 0, 2**63 - 1),
        ),
        stop=_stop(body),
        stream=stream,
        include_usage=stream and _boolean(options or {}, "include_usage"),
    )


def _messages(body: dict[str, Any]) -> tuple[Message, ...]:
    messages = body.get("messages")
    if messages is None:
        raise APIError(400, "messages is missing", param="messages", code="missing_parameter")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list with at least one message")
    checked = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    if all(message["role"] != "user" for message in checked):
        raise APIError(400, "messages must hold a message of the user", param="messages")
    return checked


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong(where, "an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}")
    if message.get("tool_calls"):
        raise APIError(400, _UNSUPPORTED["tools"], param=where, code="unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}.content") for part in content)
    if role == "assistant" and content in ("", None):
        return {"role": "assistant", "content": ""}
    # Chat templates know no "developer": it is OpenAI's newer word for "system".
    role = "system" if role == "developer" else role
    return {"role": role, "content": _text(content, f"{where}.content")}


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise APIError(400, f"{where} may hold parts of type 'text' only", param=where)
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong(where, "parts with a text")
    return text


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and len(stops) <= MAX_STOP_STRINGS
    if not fits or not all(isinstance(text, str) and text for text in stops):
        raise _wrong("stop", f"a string or a list of up to {MAX_STOP_STRINGS}, none of them empty")
    return tuple(stops)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise APIError(400, f"{name} is missing", param=name, code="missing_parameter")
    if not isinstance(value, str):
        raise _wrong(name, "a string")
    if not value.strip():
        raise APIError(400, f"{name} is empty", param=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise APIError(400, f"{name} holds half a surrogate pair", param=name) from error
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return bool(value)


def _integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        kind = f"{low}" if low == high else f"an integer from {low} to {high}"
        raise _wrong(name, kind)
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isnan(value):
        raise _wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _wrong(name: str, expected: str) -> APIError:
    return APIError(400, f"{name} must be {expected}", param=name, code="invalid_value")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
