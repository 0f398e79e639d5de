"""The JSON objects of an answer, as OpenAI's clients read them."""

import time
import uuid
from typing import Any

from ifp_mlx.server.replies import Piece, Reply


class ResponseShape:
    """The JSON objects of one answer, of chat or of plain completions, streamed or whole.

    Args:
        is_chat: ``/v1/chat/completions`` rather than ``/v1/completions``.
        model: the name that the client gave.
    """

    def __init__(self, *, is_chat: bool, model: str):
        self._is_chat = is_chat
        self._model = model
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, reasoning: str, reply: Reply) -> dict[str, Any]:
        """Return the whole answer."""
        if self._is_chat:
            message = {"role": "assistant", "content": text}
            if reasoning:
                message["reasoning"] = reasoning
            choice: dict[str, Any] = {"message": message}
        else:
            choice = {"text": text}
        body = self._body(reply, [_choice(choice, reply.finish_reason)], streamed=False)
        return {**body, "usage": usage(reply)}

    def opening(self, reply: Reply) -> dict[str, Any] | None:
        """Return the chunk that names the role; plain completions have none."""
        if not self._is_chat:
            return None
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, reply)

    def piece(self, piece: Piece, reply: Reply) -> dict[str, Any]:
        """Return the chunk for some text."""
        if not self._is_chat:
            return self._chunk({"text": piece.text}, reply)
        name = "reasoning" if piece.is_reasoning else "content"
        return self._chunk({"delta": {name: piece.text}}, reply)

    def closing(self, reply: Reply) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        choice: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return self._chunk(choice, reply, reply.finish_reason)

    def token_counts(self, reply: Reply) -> dict[str, Any]:
        """Return the last chunk of a stream whose client asked for the counts."""
        return {**self._body(reply, [], streamed=True), "usage": usage(reply)}

    def _chunk(
        self, choice: dict[str, Any], reply: Reply, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return self._body(reply, [_choice(choice, finish_reason)], streamed=True)

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


def usage(reply: Reply) -> dict[str, Any]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
