"""The JSON objects of an answer, as OpenAI's clients read them."""

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ifp_mlx.server.replies import Piece, Reply, TokenLogprob
from ifp_mlx.server.tools import ToolCall

_LEAST_LOGPROB = -9999.0  # OpenAI's number for a token that was impossible: JSON has no infinity


class ResponseShape:
    """The JSON objects of one request's answers, of chat or plain completions, streamed or whole.

    Args:
        is_chat: ``/v1/chat/completions`` rather than ``/v1/completions``.
        model: the name that the client gave.
        token_bytes: token id -> its bytes; None where no log probabilities are asked for.
        prompts: of plain completions that repeat them: each answer begins with its own.
    """

    def __init__(
        self,
        *,
        is_chat: bool,
        model: str,
        token_bytes: Callable[[int], bytes] | None = None,
        prompts: tuple[str, ...] = (),
    ):
        self._is_chat = is_chat
        self._model = model
        self._token_bytes = token_bytes
        self._prompts = prompts
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_calls: dict[int, int] = {}
        self._num_logprobs: dict[int, int] = {}
        self._text_offsets: dict[int, int] = {}

    def whole(
        self, pieces: Iterable[tuple[Reply, Piece | ToolCall]], replies: Sequence[Reply]
    ) -> dict[str, Any]:
        """Return the whole response; takes all pieces first."""
        said: dict[int, list[Piece | ToolCall]] = {}
        for reply, piece in pieces:
            said.setdefault(reply.index, []).append(piece)
        choices = [self._whole_choice(reply, said.get(reply.index, [])) for reply in replies]
        return {**self._body(replies[0], choices, streamed=False), "usage": usage(replies)}

    def opening(self, reply: Reply) -> dict[str, Any] | None:
        """Return the chunk that names the role, or the prompt that is repeated."""
        if self._is_chat:
            return self._chunk({"delta": {"role": "assistant", "content": ""}}, reply)
        if prompt := self._prompt(reply):
            return self._chunk({"text": prompt}, reply)
        return None

    def pieces(self, reply: Reply, piece: Piece | ToolCall) -> list[dict[str, Any]]:
        """Return the chunks for something new."""
        if isinstance(piece, ToolCall):
            return [self._chunk({"delta": delta}, reply) for delta in self._call(reply, piece)]
        if not self._is_chat:
            return [self._chunk({"text": piece.text}, reply)]
        name = "reasoning_content" if piece.is_reasoning else "content"
        return [self._chunk({"delta": {name: piece.text}}, reply)]

    def closing(self, reply: Reply) -> dict[str, Any]:
        """Return the chunk that says why an answer ended."""
        choice: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return self._chunk(choice, reply, reply.finish_reason)

    def token_counts(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return the last chunk of a stream whose client asked for the counts."""
        return {**self._body(replies[0], [], streamed=True), "usage": usage(replies)}

    def _whole_choice(self, reply: Reply, said: list[Piece | ToolCall]) -> dict[str, Any]:
        texts = [piece for piece in said if isinstance(piece, Piece)]
        calls = [piece for piece in said if isinstance(piece, ToolCall)]
        text = "".join(piece.text for piece in texts if not piece.is_reasoning)
        if not self._is_chat:
            content: dict[str, Any] = {"text": self._prompt(reply) + text}
            return self._choice(content, reply, reply.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [_call(call) for call in calls]
        if reasoning := "".join(piece.text for piece in texts if piece.is_reasoning):
            message["reasoning_content"] = reasoning
        return self._choice({"message": message}, reply, reply.finish_reason)

    def _call(self, reply: Reply, call: ToolCall) -> list[dict[str, Any]]:
        """Return a call's two deltas: its name, then its arguments."""
        index = self._num_calls.get(reply.index, 0)
        self._num_calls[reply.index] = index + 1
        whole = _call(call)
        opening = {"index": index, **whole, "function": {"name": call.name, "arguments": ""}}
        arguments = {"index": index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [opening]}, {"tool_calls": [arguments]}]

    def _prompt(self, reply: Reply) -> str:
        return self._prompts[reply.prompt_index] if self._prompts else ""

    def _chunk(
        self, content: dict[str, Any], reply: Reply, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = self._choice(content, reply, finish_reason)
        return self._body(reply, [choice], streamed=True)

    def _choice(
        self, content: dict[str, Any], reply: Reply, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": reply.index,
            **content,
            "logprobs": self._new_logprobs(reply),
            "finish_reason": finish_reason,
        }

    def _body(
        self, reply: Reply, choices: list[dict[str, Any]], *, streamed: bool
    ) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {
            "id": self._id,
            "object": f"{kind}.chunk" if self._is_chat and streamed else kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": reply.fingerprint,
            "choices": choices,
        }

    def _new_logprobs(self, reply: Reply) -> dict[str, Any] | None:
        """Return those of the tokens since the last chunk, in the form of the route."""
        if self._token_bytes is None:
            return None
        start = self._num_logprobs.get(reply.index, 0)
        tokens = reply.logprobs[start:]
        self._num_logprobs[reply.index] = start + len(tokens)
        if not self._is_chat:
            return self._flat_logprobs(reply, tokens)
        content = [
            {
                **self._token(token.token, token.logprob),
                "top_logprobs": [self._token(*pair) for pair in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        assert self._token_bytes is not None
        raw = self._token_bytes(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(raw),
        }

    def _flat_logprobs(self, reply: Reply, tokens: list[TokenLogprob]) -> dict[str, Any]:
        shaped = [self._token(token.token, token.logprob) for token in tokens]
        start = self._text_offsets.get(reply.index, len(self._prompt(reply)))
        offsets = list(itertools.accumulate((len(t["token"]) for t in shaped), initial=start))
        self._text_offsets[reply.index] = offsets[-1]
        alternatives = [[self._token(*pair) for pair in token.alternatives] for token in tokens]
        return {
            "tokens": [token["token"] for token in shaped],
            "token_logprobs": [token["logprob"] for token in shaped],
            "top_logprobs": [{t["token"]: t["logprob"] for t in each} for each in alternatives],
            "text_offset": offsets[:-1],
        }


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the token counts of a request; the answers to one prompt share it."""
    prompts = {reply.prompt_index: reply.prompt_tokens for reply in replies}
    prompt_tokens = sum(prompts.values())
    completion_tokens = sum(reply.completion_tokens for reply in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": max(r.cached_tokens for r in replies)},
    }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.identifier, "type": "function", "function": function}
