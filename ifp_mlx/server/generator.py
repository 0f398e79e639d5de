"""mlx-lm's generation thread, with prompts that are read and processors that are made elsewhere."""

import collections
import copy
import dataclasses
import gc
import queue
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm.server
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    ResponseGenerator,
    SamplingArguments,
)

from ifp_mlx.chat.sampling import PENALTY_CONTEXT_SIZE
from ifp_mlx.server.catalog import SubnetRequest
from ifp_mlx.server.kv_caches import KVCaches
from ifp_mlx.server.requests import Sampling
from ifp_mlx.server.subnet_provider import UNLOAD, SubNetworkProvider

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
TokenizedPrompt = tuple[list[int], list[list[int]], list[str], str, None]
"""mlx-lm's: all ids, their segments and what those are, the state that the answer begins in, and no
images."""


@dataclasses.dataclass
class Arguments(GenerationArguments):
    """mlx-lm's arguments, and what it has no place for.

    Attributes:
        tokenized: the prompt.
        processors: applied to the logits after mlx-lm's own.
    """

    tokenized: TokenizedPrompt | None = None
    processors: tuple[LogitsProcessor, ...] = ()


class Generator(ResponseGenerator):
    """mlx-lm's generation thread. It takes tokens and processors from the arguments.

    Args:
        provider: of sub-networks.
        kv_caches: of earlier requests.
    """

    def __init__(self, provider: SubNetworkProvider, kv_caches: KVCaches):
        # It reads attributes and calls load: anything that has those will do.
        super().__init__(provider, kv_caches)  # type: ignore[arg-type]
        # mlx-lm makes processors from numbers alone. This is the one place where it asks for them,
        # and what it gets for arguments of its own is unchanged.
        mlx_lm.server._make_logits_processors = _all_processors
        self.requests = RequestQueue(provider)
        self._kv_caches = kv_caches
        self._provider = provider

    def tokenize(
        self, request: CompletionRequest, template_arguments: dict[str, Any]
    ) -> TokenizedPrompt:
        """Return a prompt's tokens, as mlx-lm splits them up. Called on a client's thread."""
        arguments = make_arguments(SubnetRequest("dense"), None, 1)
        arguments.chat_template_kwargs = template_arguments
        tokenizer = self._provider.tokenizer
        tokenized: TokenizedPrompt = super()._tokenize(tokenizer, request, arguments)
        return tokenized

    def _generate(self) -> None:
        super()._generate()
        self._kv_caches.save()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> TokenizedPrompt:
        if args.tokenized is None and args.model.model is not UNLOAD:
            raise Loaded
        if args.tokenized is None:  # nothing holds the model any more
            self._kv_caches.save()
            self._kv_caches.trim_to(n_sequences=0)
            gc.collect()
            mx.clear_cache()
            raise Unloaded
        tokenized: TokenizedPrompt = copy.deepcopy(args.tokenized)  # mlx-lm takes segments out
        return tokenized


class Loaded(Exception):
    """Instead of an answer: the sub-network is there, and nothing was asked."""


class Unloaded(Exception):
    """Instead of an answer: the model has left memory."""


class RequestQueue(queue.Queue[Any]):
    """Requests in the order that they came, but those for one sub-network together.

    mlx-lm ends a batch when a request for another model is next; without this, two tasks that take
    turns would never share a batch. Nobody starves: a batch takes in what waits at that moment and
    is ended by the first request for another sub-network.

    Where the server was idle for long, a request to unload the model comes out.

    Args:
        provider: says whether a model is loaded, and how long it is kept.
    """

    def __init__(self, provider: SubNetworkProvider):
        super().__init__()
        self._provider = provider
        self._model: ModelDescription | None = None
        self._last_s = time.monotonic()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next request. mlx-lm waits, instead of looking, only if it has nothing else.

        Raises:
            queue.Empty: there is none.
        """
        try:
            request = super().get(block, timeout)
        except queue.Empty:
            if block and self._is_idle():
                return queue.Queue(), CompletionRequest("text", "", [], None, None), _UNLOAD
            self._last_s = self._last_s if block else time.monotonic()
            raise
        self._last_s = time.monotonic()
        return request

    def _is_idle(self) -> bool:
        keep_alive_s = self._provider.cli_args.keep_alive_s
        if keep_alive_s is None or not self._provider.is_loaded:
            return False
        return time.monotonic() - self._last_s > keep_alive_s

    def _get(self) -> Any:
        waiting: collections.deque[Any] = self.queue
        same = (i for i, (_, _, args) in enumerate(waiting) if args.model == self._model)
        position = next(same, 0)
        request = waiting[position]
        del waiting[position]
        self._model = request[2].model
        return request


def make_arguments(
    choice: SubnetRequest, sampling: Sampling | None, max_tokens: int, **more: Any
) -> Arguments:
    """Return mlx-lm's arguments for an answer; greedy where ``sampling`` is None."""
    sampling = sampling or Sampling(0, 1, 0, 0, 0, 0, 0, {}, None)
    return Arguments(
        # mlx-lm compares it and hands it to the provider, nothing else.
        model=ModelDescription(model=choice, draft="", adapter=""),  # type: ignore[arg-type]
        sampling=SamplingArguments(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            xtc_probability=0.0,
            xtc_threshold=0.0,
        ),
        logits=LogitsProcessorArguments(
            logit_bias=sampling.logit_bias,
            repetition_penalty=sampling.repetition_penalty,
            repetition_context_size=PENALTY_CONTEXT_SIZE,
            presence_penalty=sampling.presence_penalty,
            presence_context_size=PENALTY_CONTEXT_SIZE,
            frequency_penalty=sampling.frequency_penalty,
            frequency_context_size=PENALTY_CONTEXT_SIZE,
        ),
        stop_words=[],  # Reply cuts at stop strings: tokens do not always fall on their borders
        max_tokens=max_tokens,
        num_draft_tokens=0,
        logprobs=False,
        seed=sampling.seed,
        chat_template_kwargs=None,
        **{"top_logprobs": 0, **more},
    )


_UNLOAD = make_arguments(UNLOAD, None, 1)
_make_processors = mlx_lm.server._make_logits_processors


def _all_processors(args: Any) -> list[LogitsProcessor]:
    return [*_make_processors(args), *getattr(args, "processors", ())]
