"""A conversation with one sub-network: it answers, and remembers what it has read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.nn as nn

from ifp_mlx.chat.chat_template import chat_ids
from ifp_mlx.chat.generation import Answer, GenerationStats
from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.prompt_reading import OnRead
from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``, as chat templates take it."""


class MissingShare(Protocol):
    """What a sub-network of a mixture shows of the experts that it lacks (``slicing.drift``)."""

    def reset(self) -> None:
        """Forget what was seen."""

    def share(self) -> float | None:
        """Return the share of gate weight that went to missing experts."""


class Conversation:
    """Answers messages with a sub-network; what was said is the caller's to keep.

    The KV cache is kept across turns: each reply prefills only what is new.

    Args:
        model: a compact or dense mlx-lm model.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        context_length: the most positions that the model was made for.
        kv_options: how keys and values are kept.
        kv_cache: one that holds something already, such as one read from a file.
        drift: what ``model`` shows of the experts that it lacks.

    Attributes:
        stats: measurements of the last reply, None before the first.
        kv_cache: keys and values so far, and the tokens that they are of.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "TokenizerWrapper",
        context_length: int,
        *,
        kv_options: KVCacheOptions | None = None,
        kv_cache: KVCache | None = None,
        drift: MissingShare | None = None,
    ):
        self.stats: GenerationStats | None = None
        self._model = model
        self._drift = drift
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._kv_options = kv_options or KVCacheOptions()
        self.kv_cache = kv_cache or KVCache.empty(model, self._kv_options)

    def reply(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions | None = None,
        on_read: OnRead | None = None,
    ) -> Iterator[str]:
        """Stream the answer to the last message, piece by piece. Evaluates.

        When the iterator is exhausted, closed or interrupted, ``stats`` describes what came.

        Args:
            messages: the whole conversation; the last message is the one to answer.
            sampling: how tokens are drawn; None is greedily.
            on_read: told, every half second or so, how much of the prompt is read.

        Raises:
            UsageError: the message is empty, or the conversation does not fit the context.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UsageError("the prompt is empty; say what you want")
        yield from self._stream(chat_ids(self._tokenizer, messages), sampling, on_read)

    @property
    def model(self) -> nn.Module:
        """What answers."""
        return self._model

    def complete(
        self, text: str, sampling: SamplingOptions | None = None, on_read: OnRead | None = None
    ) -> Iterator[str]:
        """Stream the continuation of raw text, without a chat template. Evaluates.

        Raises:
            UsageError: the text is empty or longer than the context.
        """
        if not text:
            raise UsageError("the prompt is empty; say what you want")
        yield from self._stream(list(self._tokenizer.encode(text)), sampling, on_read)

    def num_tokens(self, messages: Sequence[Message]) -> int:
        """Return how much of the context some messages take."""
        return len(chat_ids(self._tokenizer, messages)) if messages else 0

    def switch(self, model: nn.Module, drift: MissingShare | None = None) -> None:
        """Go on with another sub-network of the same dense model, and with what was read so far."""
        self._model = model
        self._drift = drift

    def _stream(
        self, ids: list[int], sampling: SamplingOptions | None, on_read: OnRead | None
    ) -> Iterator[str]:
        sampling = sampling or SamplingOptions()
        max_new_tokens = sampling.max_new_tokens
        if self._kv_options.max_kv_size is None:
            room = self._context_length - len(ids)
            if room < 1:
                raise UsageError(
                    f"the prompt has {len(ids)} tokens, the model's context "
                    f"{self._context_length}; shorten it or pass `max_kv_size`"
                )
            max_new_tokens = min(max_new_tokens, room)
        if self.kv_cache.trim_to(ids) is None:
            self.kv_cache = KVCache.empty(self._model, self._kv_options)
        answer = Answer(
            self._model,
            self._tokenizer,
            ids,
            self.kv_cache,
            sampling,
            self._kv_options,
            max_new_tokens,
            on_read,
        )
        if self._drift is not None:
            self._drift.reset()
        try:
            yield from answer
        finally:
            self.stats = answer.stats
            if self._drift is not None and self.stats is not None:
                self.stats = dataclasses.replace(self.stats, missing_share=self._drift.share())
