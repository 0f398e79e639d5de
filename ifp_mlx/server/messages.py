"""The messages of a conversation, from what clients send to what chat templates take."""

import json
from typing import Any

from ifp_mlx.server import fields
from ifp_mlx.server.api_error import APIError

ChatMessage = dict[str, Any]
"""role and content, both text; an assistant's ``tool_calls``, a tool's ``name``."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def parse_messages(body: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """Return the conversation of a request.

    Content that is missing, null or an empty list is empty text. The arguments of earlier tool
    calls become objects, as templates expect them.

    Raises:
        APIError: 400, with the message that is wrong.
    """
    messages = body.get("messages")
    if messages is None:
        raise APIError(400, "messages is missing", param="messages", code="missing_parameter")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "a list with at least one message")
    checked = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    names = {
        call["id"]: call["function"]["name"]
        for message in checked
        for call in message.get("tool_calls", ())
    }
    for message in checked:
        if message["role"] == "tool" and "name" not in message:
            message["name"] = names.get(message.get("tool_call_id"), "")
    return tuple(checked)


def system_text(messages: tuple[ChatMessage, ...]) -> str:
    """Return what the system messages at the beginning say."""
    texts = []
    for message in messages:
        if message["role"] != "system":
            break
        texts.append(message["content"])
    return "\n\n".join(text for text in texts if text.strip())


def _message(message: Any, where: str) -> ChatMessage:
    if not isinstance(message, dict):
        raise fields.wrong(where, "an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise fields.wrong(f"{where}.role", f"one of {', '.join(_ROLES)}")
    checked: ChatMessage = {
        # Chat templates know no "developer": it is OpenAI's newer word for "system". A "function"
        # is an older word for "tool".
        "role": {"developer": "system", "function": "tool"}.get(role, role),
        "content": _content(message.get("content"), f"{where}.content"),
    }
    if role == "assistant" and message.get("tool_calls"):
        calls = fields.items(message, "tool_calls")
        checked["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    if checked["role"] == "tool":
        for name in ("tool_call_id", "name"):
            if message.get(name) is not None:
                checked[name] = fields.text(message[name], f"{where}.{name}")
    return checked


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_text_part(part, where) for part in content)
    return fields.text(content, where)


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return fields.text(part, where)
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
        raise APIError(400, f"{where} may hold parts of type 'text' only", param=where)
    text = part.get("refusal" if part["type"] == "refusal" else "text")
    if not isinstance(text, str):
        raise fields.wrong(where, "parts with a text")
    return fields.text(text, where)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise fields.wrong(where, "an object with id, type and function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise fields.wrong(
                f"{where}.function.arguments", "a JSON object in a string"
            ) from error
    if arguments is not None and not isinstance(arguments, dict):
        raise fields.wrong(f"{where}.function.arguments", "a JSON object in a string")
    identifier = call.get("id")
    return {
        "id": "" if identifier is None else fields.text(identifier, f"{where}.id"),
        "type": "function",
        "function": {
            "name": fields.text(function["name"], f"{where}.function.name"),
            "arguments": fields.encodable(arguments or {}, f"{where}.function.arguments"),
        },
    }
