"""From a JSON body to a checked request; whatever does not fit is said in OpenAI's terms."""

import dataclasses
from typing import Any

from ifp_mlx.server import fields
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.messages import ChatMessage, parse_messages
from ifp_mlx.server.tools import ToolOffer, parse_tools

MAX_ANSWERS = 16
MAX_ALTERNATIVES = 20
_NO_LIMIT = -1  # what clients send for "as many tokens as fit"

# What would change the answer, and this server cannot do: better refused than ignored.
_UNSUPPORTED = {
    "audio": "audio is not supported; leave out audio",
    "suffix": "filling in the middle is not supported; leave out suffix",
}
_TEMPLATE_ARGUMENTS = frozenset(  # that clients must not set: they are what this server is for
    {"conversation", "messages", "tools", "tokenize", "add_generation_prompt", "chat_template"}
    | {"return_dict", "return_tensors", "documents", "continue_final_message", "padding"}
    | {"truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)


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
    logit_bias: dict[int, float]
    seed: int | None


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One request for text.

    Attributes:
        messages: the conversation; None for plain completions.
        prompts: the texts to continue; empty for a conversation.
        model: as the client named it; empty for the model that is served.
        task: a description that selects the sub-network.
        keep: the share of units that it keeps.
        max_tokens: longest answer; None for what fits the context.
        sampling: how tokens are drawn.
        stop: strings that end the answer and are not part of it.
        stream: send the answer as it is made.
        include_usage: end a stream with the token counts.
        num_answers: to each prompt.
        num_alternatives: likeliest tokens to tell of beside each one's log probability; None for
            no log probabilities.
        tools: what the model may call.
        schema: the JSON schema that the answer must fit.
        echo: begin each answer with its prompt.
        template_arguments: for the chat template.
    """

    messages: tuple[ChatMessage, ...] | None
    prompts: tuple[str, ...]
    model: str
    task: str | None
    keep: float | None
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    num_answers: int
    num_alternatives: int | None
    tools: ToolOffer | None
    schema: dict[str, Any] | None
    echo: bool
    template_arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RequestDefaults:
    """What a request that does not say gets.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
    """

    max_tokens: int
    temperature: float


def parse_chat_request(body: dict[str, Any], defaults: RequestDefaults) -> GenerationRequest:
    """Return a ``/v1/chat/completions`` request, checked.

    Raises:
        APIError: 400, with the field that is wrong.
    """
    has_logprobs = fields.boolean(body, "logprobs")
    num_alternatives = fields.integer(body, "top_logprobs", 0, 0, MAX_ALTERNATIVES)
    if num_alternatives and not has_logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    template_arguments = fields.json_object(body, "chat_template_kwargs")
    if reserved := sorted(_TEMPLATE_ARGUMENTS & template_arguments.keys()):
        message = f"chat_template_kwargs cannot set {', '.join(reserved)}"
        raise APIError(400, message, param="chat_template_kwargs")
    tools, schema = parse_tools(body), _schema(body)
    if schema is not None and tools is not None and tools.must_call:
        message = "response_format has no effect on tool calls, which tool_choice demands"
        raise APIError(400, message, param="response_format")
    request = _parse(body, defaults, messages=parse_messages(body))
    return dataclasses.replace(
        request,
        num_alternatives=num_alternatives if has_logprobs else None,
        tools=tools,
        schema=schema,
        template_arguments=template_arguments,
    )


def parse_completion_request(body: dict[str, Any], defaults: RequestDefaults) -> GenerationRequest:
    """Return a ``/v1/completions`` request, checked.

    Raises:
        APIError: 400, with the field that is wrong.
    """
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt else [prompt]
    if len(prompts) > MAX_ANSWERS:
        raise fields.wrong("prompt", f"at most {MAX_ANSWERS} texts")
    if any(isinstance(text, int | list) for text in prompts):
        raise APIError(400, "prompt must be text, not token ids", param="prompt")
    num_alternatives = body.get("logprobs")
    if num_alternatives is not None and not isinstance(num_alternatives, bool):
        num_alternatives = fields.integer(body, "logprobs", 0, 0, MAX_ALTERNATIVES)
    else:  # some clients send chat's form
        num_alternatives = 0 if num_alternatives else None
    return dataclasses.replace(
        _parse(body, defaults, prompts=tuple(fields.text(text, "prompt") for text in prompts)),
        num_alternatives=num_alternatives,
        schema=_schema(body),
        echo=fields.boolean(body, "echo"),
    )


def _parse(
    body: dict[str, Any],
    defaults: RequestDefaults,
    *,
    messages: tuple[ChatMessage, ...] | None = None,
    prompts: tuple[str, ...] = (),
) -> GenerationRequest:
    for name, message in _UNSUPPORTED.items():
        if body.get(name):
            raise fields.unsupported(name, message)
    if "text" not in (fields.items(body, "modalities") or ["text"]):
        raise fields.unsupported("modalities", "only text comes from here; ask for that modality")
    num_answers = fields.integer(body, "n", 1, 1, MAX_ANSWERS)
    if fields.integer(body, "best_of", num_answers, 1, MAX_ANSWERS) != num_answers:
        raise fields.unsupported("best_of", "best_of is not supported; leave it out")
    if num_answers * len(prompts) > MAX_ANSWERS:
        raise fields.wrong("n", f"such that all prompts get at most {MAX_ANSWERS} answers")
    stream = fields.boolean(body, "stream")
    options = fields.json_object(body, "stream_options")
    return GenerationRequest(
        messages=messages,
        prompts=prompts,
        model=fields.optional_text(body, "model") or "",
        task=_task(body),
        keep=_keep(body),
        max_tokens=_max_tokens(body, defaults),
        sampling=_sampling(body, defaults),
        stop=_stop(body),
        stream=stream,
        include_usage=stream and fields.boolean(options, "include_usage"),
        num_answers=num_answers,
        num_alternatives=None,
        tools=None,
        schema=None,
        echo=False,
        template_arguments={},
    )


def _max_tokens(body: dict[str, Any], defaults: RequestDefaults) -> int | None:
    name = "max_completion_tokens"
    if body.get(name) is None:
        name = "max_tokens"
    hint = f", or {_NO_LIMIT} for as many as fit"
    value = fields.integer(body, name, defaults.max_tokens, _NO_LIMIT, 2**53, hint=hint)
    if value == 0:
        raise fields.wrong(name, f"at least 1{hint}")
    return None if value == _NO_LIMIT else value


def _sampling(body: dict[str, Any], defaults: RequestDefaults) -> Sampling:
    temperature = fields.number(body, "temperature", defaults.temperature, 0, 2)
    top_p = fields.number(body, "top_p", 1, 0, 1)
    seed = fields.integer(body, "seed", -1, -1, 2**64 - 1)
    return Sampling(
        temperature=temperature if top_p > 0 else 0.0,  # mlx-lm reads a top_p of 0 as "all"
        top_p=top_p,
        top_k=max(fields.integer(body, "top_k", 0, -1, 2**31 - 1), 0),
        min_p=fields.number(body, "min_p", 0, 0, 1),
        repetition_penalty=fields.number(body, "repetition_penalty", 0, 0, 10),
        presence_penalty=fields.number(body, "presence_penalty", 0, -2, 2),
        frequency_penalty=fields.number(body, "frequency_penalty", 0, -2, 2),
        logit_bias=_logit_bias(body),
        seed=None if seed == -1 else seed,
    )


def _logit_bias(body: dict[str, Any]) -> dict[int, float]:
    biases = fields.json_object(body, "logit_bias")
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in biases):
        raise fields.wrong("logit_bias", "an object of token ids and numbers from -100 to 100")
    return {int(token): fields.number(biases, token, 0, -100, 100) for token in biases}


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise fields.wrong("stop", "a string or a list of strings")
    return tuple(dict.fromkeys(text for text in stops if text))


def _task(body: dict[str, Any]) -> str | None:
    task = body.get("task")
    if task is not None and not fields.text(task, "task").strip():
        raise APIError(
            400, "task is empty; describe it in a sentence or leave it out", param="task"
        )
    return task


def _keep(body: dict[str, Any]) -> float | None:
    keep = fields.number(body, "keep", 1, 0, 1)
    if keep == 0:
        raise fields.wrong("keep", "a number above 0 up to 1")
    return None if body.get("keep") is None else keep


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    answer_format = fields.json_object(body, "response_format")
    match answer_format.get("type"):
        case None if not answer_format:
            return None
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            named = fields.json_object(answer_format, "json_schema")
            if not isinstance(named.get("schema"), dict):
                raise fields.wrong("response_format", "one whose json_schema has a schema")
            schema: dict[str, Any] = named["schema"]
            return schema
    raise fields.wrong("response_format", "of type 'text', 'json_object' or 'json_schema'")
