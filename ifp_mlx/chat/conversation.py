"""A conversation with one sub-network: its messages and its KV cache."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # mlx-lm takes seconds to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_DRAFT_TOKENS = 4
"""Tokens that a sub-network proposes before the dense model checks them."""

PENALTY_CONTEXT_SIZE = 20
"""Tokens that penalties look back at, of the prompt as well; mlx-lm's default."""

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``, as chat templates take it."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. Names and defaults follow mlx-lm.

    Attributes:
        max_new_tokens: the longest reply, in tokens.
        temperature: 0 takes the most likely token each time.
        top_p: nucleus sampling; 0 or 1 turns it off.
        top_k: draw among this many; 0 turns it off.
        min_p: smallest share of the top token's probability; 0 turns it off.
        repetition_penalty: above 1 makes the latest tokens less likely; None turns it off.
        seed: makes drawing repeatable; None draws anew each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise UsageError(f"--temp must be 0 or more, not {self.temperature:g}")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"--top-p must be between 0 and 1, not {self.top_p:g}")
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < math.inf:
            raise UsageError(f"--repetition-penalty must be a number above 0, not {penalty:g}")


@dataclasses.dataclass(frozen=True)
class KVCacheOptions:
    """How keys and values are kept, as mlx-lm offers it.

    Attributes:
        max_kv_size: keep only this many positions (rotating); None keeps all.
        kv_bits: quantize keys and values to this many bits; None does not.
        kv_group_size: quantization group.
        quantized_kv_start: positions before quantization begins.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What one reply took.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        cached_prompt_tokens: how many of them were in the KV cache already.
        prompt_tps: prefill speed, tokens a second, over those that were not.
        generated_tokens: tokens of the reply.
        generation_tps: decoding speed, tokens a second.
        time_to_first_token_s: from the call to the first token.
        peak_memory_bytes: highest use of mlx's allocator so far.
        finish_reason: ``stop``, ``length`` or ``interrupted``.
        drafted_tokens: tokens that a draft model proposed.
        accepted_tokens: how many of them the model would have chosen itself.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    prompt_tps: float
    generated_tokens: int
    generation_tps: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    finish_reason: str
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Conversation:
    """Messages and the KV cache that belongs to them.

    The KV cache is kept across turns: each reply prefills only what is new. What is reused is
    decided by comparing token ids, so edited or dropped messages need no bookkeeping.

    Args:
        model: a compact or dense mlx-lm model.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        context_length: the most positions that the model was made for.
        system_prompt: becomes the first message.
        messages: an earlier conversation to go on with.
        kv_options: how keys and values are kept.
        kv_cache: a cache that holds ``kv_token_ids`` already, such as one read from a file.
        kv_token_ids: what ``kv_cache`` holds.
        draft_model: a sub-network of ``model`` that proposes tokens, which ``model`` then checks
            several at a time; greedy replies are those of ``model`` alone.
        num_draft_tokens: how many are proposed at a time.

    Raises:
        UsageError: a draft model with a rotating or quantized KV cache, which cannot go back.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "TokenizerWrapper",
        context_length: int,
        *,
        system_prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] = (),
        kv_options: KVCacheOptions | None = None,
        kv_cache: list[Any] | None = None,
        kv_token_ids: Sequence[int] = (),
        draft_model: nn.Module | None = None,
        num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    ):
        self.messages: list[Message] = [dict(message) for message in messages]
        if system_prompt is not None:
            self.messages.insert(0, {"role": "system", "content": system_prompt})
        self.context_length = context_length
        self.stats: GenerationStats | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._draft_model = draft_model
        self._num_draft_tokens = num_draft_tokens
        self._kv_options = kv_options or KVCacheOptions()
        if draft_model is not None and self._kv_options != KVCacheOptions():
            raise UsageError(
                "checking a draft needs a KV cache that can go back; leave out --max-kv-size and "
                "--kv-bits"
            )
        self.kv_cache = kv_cache or self._empty_kv_cache()
        self.kv_token_ids = list(kv_token_ids)

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the conversation takes in the context so far."""
        return len(self._prompt_ids(self.messages)) if self.messages else 0

    def reply(self, text: str, sampling: SamplingOptions) -> Iterator[str]:
        """Append a user message and stream the answer to it, piece by piece. Evaluates.

        When the iterator is exhausted, closed or interrupted, what was generated so far is in
        ``messages`` and in the KV cache, and ``stats`` describes it. If nothing was generated the
        user's message is taken back.

        Raises:
            UsageError: the message is empty, or the conversation no longer fits the context.
        """
        if not text.strip():
            raise UsageError("the prompt is empty; say what you want")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_ids = self._prompt_ids(messages)
        pieces: list[str] = []
        try:
            for piece in self._stream(prompt_ids, sampling):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def complete(self, text: str, sampling: SamplingOptions) -> Iterator[str]:
        """Stream the continuation of raw text, without a chat template. Evaluates.

        Raises:
            UsageError: the text is empty or longer than the context.
        """
        if not text:
            raise UsageError("the prompt is empty; say what you want")
        yield from self._stream(list(self._tokenizer.encode(text)), sampling)

    def switch(
        self, model: nn.Module, *, rebuild_kv: bool, draft_model: nn.Module | None = None
    ) -> None:
        """Go on with another sub-network of the same dense model.

        Args:
            model: the model that answers from now on.
            rebuild_kv: prefill the conversation again with the new model at the next reply,
                instead of going on from keys and values that the former one computed.
            draft_model: what drafts from now on, if anything does.
        """
        drafts_alike = (draft_model is None) == (self._draft_model is None)
        self._model, self._draft_model = model, draft_model
        if rebuild_kv or not drafts_alike:
            self.kv_cache = self._empty_kv_cache()
            self.kv_token_ids = []

    def drop_last_turn(self) -> Message | None:
        """Remove the last user message and all after it; return it, None if there is none."""
        for position in range(len(self.messages) - 1, -1, -1):
            if self.messages[position]["role"] == "user":
                message = self.messages[position]
                del self.messages[position:]
                return message
        return None

    def drop_first_turn(self) -> Message | None:
        """Remove the oldest user message and its answer; return it, None if there is none."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            return None
        message = self.messages[users[0]]
        end = users[1] if len(users) > 1 else len(self.messages)
        del self.messages[users[0] : end]
        return message

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _empty_kv_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        cache: list[Any] = make_prompt_cache(self._model, self._kv_options.max_kv_size)
        if self._draft_model is not None:  # mlx-lm takes both models' caches in one list
            cache += make_prompt_cache(self._draft_model)
        return cache

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            return list(self._tokenizer.encode(text))
        return list(
            self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        )

    def _stream(self, prompt_ids: list[int], sampling: SamplingOptions) -> Iterator[str]:
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        if len(prompt_ids) >= self.context_length and self._kv_options.max_kv_size is None:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context "
                f"{self.context_length}; shorten it or pass --max-kv-size"
            )
        self._require_quantizable_heads()
        num_cached = self._reuse_kv_cache(prompt_ids)
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        room = self.context_length - len(prompt_ids)
        if self._kv_options.max_kv_size is not None:
            room = sampling.max_new_tokens
        generated: list[int] = []
        num_accepted = 0
        response = None
        finish_reason = "interrupted"
        start = time.perf_counter()
        first_token_s = 0.0
        mx.reset_peak_memory()
        responses = stream_generate(
            self._model,
            self._tokenizer,
            prompt_ids[num_cached:],
            max_tokens=min(sampling.max_new_tokens, room),
            sampler=make_sampler(
                sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                top_k=sampling.top_k,
            ),
            logits_processors=self._logits_processors(sampling, prompt_ids, num_cached),
            prompt_cache=self.kv_cache,
            kv_bits=self._kv_options.kv_bits,
            kv_group_size=self._kv_options.kv_group_size,
            quantized_kv_start=self._kv_options.quantized_kv_start,
            draft_model=self._draft_model,
            num_draft_tokens=self._num_draft_tokens,
        )
        try:
            # Closed at once: a draft that was not accepted leaves the caches only then.
            with contextlib.closing(responses):
                for response in responses:
                    if not generated:
                        first_token_s = time.perf_counter() - start
                    generated.append(response.token)
                    num_accepted += response.from_draft
                    finish_reason = response.finish_reason or finish_reason
                    if response.text:
                        yield response.text
        finally:
            # Whatever stopped us, the caches themselves know how far they got.
            num_positions = min(cache.offset for cache in self.kv_cache)
            self.kv_token_ids = (prompt_ids + generated)[:num_positions]
            if response is not None:
                self.stats = GenerationStats(
                    prompt_tokens=len(prompt_ids),
                    cached_prompt_tokens=num_cached,
                    prompt_tps=response.prompt_tps,
                    generated_tokens=len(generated),
                    generation_tps=response.generation_tps,
                    time_to_first_token_s=first_token_s,
                    peak_memory_bytes=mx.get_peak_memory(),
                    finish_reason=finish_reason,
                    drafted_tokens=self._num_drafted(
                        len(generated) - num_accepted, ends_in_draft=response.from_draft
                    ),
                    accepted_tokens=num_accepted,
                )

    def _logits_processors(
        self, sampling: SamplingOptions, prompt_ids: list[int], num_cached: int
    ) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """Return mlx-lm's processors for these options, none if no option needs one.

        mlx-lm shows them the tokens that it was given: not what the KV cache holds already, and
        with a draft model only the last one of the prompt. What is missing is put in front, so
        that neither changes the words.
        """
        from mlx_lm.sample_utils import make_logits_processors

        processors = make_logits_processors(
            repetition_penalty=sampling.repetition_penalty,
            repetition_context_size=PENALTY_CONTEXT_SIZE,
        )
        num_unseen = num_cached if self._draft_model is None else len(prompt_ids) - 1
        unseen = mx.array(prompt_ids[:num_unseen][-PENALTY_CONTEXT_SIZE:], mx.uint32)

        def with_unseen(
            process: Callable[[mx.array, mx.array], mx.array],
        ) -> Callable[[mx.array, mx.array], mx.array]:
            return lambda tokens, logits: process(mx.concatenate([unseen, tokens]), logits)

        return [with_unseen(process) for process in processors]

    def _num_drafted(self, num_own_tokens: int, *, ends_in_draft: bool) -> int:
        if self._draft_model is None:
            return 0
        # Each check of a draft ends in a token of the model's own, unless the reply ends before.
        return (num_own_tokens + ends_in_draft) * self._num_draft_tokens

    def _require_quantizable_heads(self) -> None:
        args, group_size = self._model.args, self._kv_options.kv_group_size
        head_dim = getattr(args, "head_dim", None)
        if head_dim is None and hasattr(args, "num_attention_heads"):
            head_dim = args.hidden_size // args.num_attention_heads
        if self._kv_options.kv_bits is not None and head_dim and head_dim % group_size:
            raise UsageError(
                f"--kv-bits needs heads of a multiple of {group_size} values, this model's have "
                f"{head_dim}; leave it out"
            )

    def _reuse_kv_cache(self, prompt_ids: list[int]) -> int:
        """Trim the KV cache to the part that the prompt begins with; return its length."""
        from mlx_lm.models.cache import trim_prompt_cache

        common = 0
        for ours, theirs in zip(self.kv_token_ids, prompt_ids, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(prompt_ids) - 1)  # one token must be left to compute logits from
        for cache in self.kv_cache:
            trim_prompt_cache([cache], cache.offset - common)  # a draft's cache may be ahead
        if any(cache.offset != common for cache in self.kv_cache):
            self.kv_cache = self._empty_kv_cache()  # a rotated cache cannot go back
            common = 0
        self.kv_token_ids = self.kv_token_ids[:common]
        return common
