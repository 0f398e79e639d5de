"""Tools that a request offers, and the calls that a model writes.

Chat templates describe tools to the model in the form that it was trained with, and mlx-lm knows
how calls in that form are read. A model whose template knows no tools is told of them in the system
message, in the form that most open models share: JSON between ``<tool_call>`` and ``</tool_call>``.
"""

import dataclasses
import json
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.tool_parsers import json_tools

from ifp_mlx.chat.grammar import Calls
from ifp_mlx.server import fields
from ifp_mlx.server.messages import ChatMessage

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_INTRODUCTION = (
    "You may call functions. Their signatures, one a line:\n{tools}\n\n"
    "To call one, write a JSON object with its name and its arguments between markers:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{...}}}}\n</tool_call>'
)


@dataclasses.dataclass(frozen=True)
class ToolOffer:
    """What a model may call, or must.

    Attributes:
        tools: as in the request, ``{"type": "function", "function": {...}}``.
        must_call: text alone is no answer.
        in_parallel: one answer may call several.
    """

    tools: tuple[dict[str, Any], ...]
    must_call: bool
    in_parallel: bool


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is a JSON object in a string, as OpenAI's clients expect it."""

    name: str
    arguments: str
    identifier: str


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How a model writes its calls.

    Attributes:
        start: the marker before a call.
        end: the marker after it; empty where a call goes on to the end of the answer.
        parse: from what stands between to one call or several.
        is_native: the model's template describes tools; otherwise the system message does.
    """

    start: str
    end: str
    parse: Callable[[str, Any], Any]
    is_native: bool

    @classmethod
    def of(cls, tokenizer: "TokenizerWrapper") -> "ToolFormat":
        """Return the format of a tokenizer's chat template, or the common one."""
        if tokenizer.has_tool_calling:
            start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
            return cls(start, end or "", tokenizer.tool_parser, is_native=True)
        start, end = json_tools.tool_call_start, json_tools.tool_call_end
        return cls(start, end, json_tools.parse_tool_call, is_native=False)

    @property
    def is_json(self) -> bool:
        """Whether a call is a JSON object with ``name`` and ``arguments``."""
        return self.parse is json_tools.parse_tool_call

    def calls(self, offer: ToolOffer) -> Calls:
        """Return what can be enforced of the calls."""
        functions = [tool["function"] for tool in offer.tools]
        schemas = {function["name"]: function["parameters"] for function in functions}
        return Calls(
            self.start,
            self.end,
            schemas if self.is_json else None,
            must_call=offer.must_call,
            in_parallel=offer.in_parallel,
        )

    def read(self, text: str, offer: ToolOffer) -> list[ToolCall]:
        """Return the calls in what stood between the markers; none if it is no call."""
        try:
            parsed = self.parse(text, list(offer.tools))
            calls = parsed if isinstance(parsed, list) else [parsed]
            return [_tool_call(call) for call in calls]
        except Exception:  # mlx-lm's parsers fail in many ways on what a model made up
            return []

    def describe(
        self, messages: Sequence[ChatMessage], offer: ToolOffer | None
    ) -> list[ChatMessage]:
        """Return messages with everything about tools as plain text."""
        plain = [self._as_text(message) for message in messages]
        if offer is None:
            return plain
        tools = "\n".join(json.dumps(tool["function"]) for tool in offer.tools)
        introduction = _INTRODUCTION.format(tools=tools)
        if plain[0]["role"] != "system":
            return [{"role": "system", "content": introduction}, *plain]
        system = "\n\n".join(filter(None, (plain[0]["content"], introduction)))
        return [{"role": "system", "content": system}, *plain[1:]]

    def _as_text(self, message: ChatMessage) -> ChatMessage:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            return {"role": "user", "content": content}
        calls = [
            f"{self.start}\n{json.dumps(call['function'], ensure_ascii=False)}\n{self.end}"
            for call in message.get("tool_calls", ())
        ]
        return {"role": message["role"], "content": "\n".join(filter(None, (content, *calls)))}


def parse_tools(body: dict[str, Any]) -> ToolOffer | None:
    """Return what a request offers to call; None for nothing.

    Raises:
        APIError: 400, with the field that is wrong.
    """
    if body.get("functions"):
        raise fields.unsupported("functions", "functions is the old form; send them as tools")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.items(body, "tools"))]
    choice = body.get("tool_choice")
    in_parallel = fields.boolean(body, "parallel_tool_calls", default=True)
    must_call = choice == "required"
    if isinstance(choice, dict):
        name = _chosen_name(choice)
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise fields.wrong("tool_choice", "one of the functions in tools")
        must_call, in_parallel = True, False
    elif choice not in (None, "none", "auto", "required"):
        raise fields.wrong("tool_choice", "'none', 'auto', 'required' or one of the functions")
    if must_call and not tools:
        raise fields.wrong("tool_choice", "'none' or 'auto' where there are no tools")
    if choice == "none" or not tools:
        return None
    return ToolOffer(tuple(tools), must_call, in_parallel)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise fields.wrong(where, "an object with type and function")
    if tool.get("type", "function") != "function":
        raise fields.unsupported(where, f"{where}.type must be 'function'; no other runs here")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise fields.wrong(f"{where}.function", "an object with name and parameters")
    name = fields.text(function.get("name"), f"{where}.function.name")
    if not name.strip():
        raise fields.wrong(f"{where}.function.name", "a name")
    described = {
        **fields.encodable(function, f"{where}.function"),
        "name": name,
        # Templates take both for granted.
        "description": fields.optional_text(function, "description") or "",
        "parameters": fields.json_object(function, "parameters")
        or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": described}


def _chosen_name(choice: dict[str, Any]) -> Any:
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, dict):
        raise fields.wrong("tool_choice", "'none', 'auto', 'required' or one of the functions")
    return function.get("name")


def _tool_call(call: Any) -> ToolCall:
    name, arguments = call["name"], call.get("arguments", {})
    if isinstance(arguments, str):  # some models write JSON into a string
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("not a call")
    identifier = call.get("id") or f"call_{uuid.uuid4().hex[:24]}"
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), str(identifier))
