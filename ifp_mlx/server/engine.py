"""mlx-lm's generation thread, made to serve sub-networks."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import queue
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    ResponseGenerator,
    SamplingArguments,
)

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.sampling import PENALTY_CONTEXT_SIZE
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.catalog import SubnetRequest
from ifp_mlx.server.replies import Reply
from ifp_mlx.server.requests import GenerationRequest, Sampling
from ifp_mlx.subnets.subnetwork import SubNetwork

Prepare = Callable[[], tuple[Assistant, int]]
"""Returns the assistant and how many units of each layer it keeps."""

MAX_KV_CACHES = 32


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What mlx-lm's ``ResponseGenerator`` reads from its command line, under the same names.

    Attributes:
        decode_concurrency: answers of one sub-network that are made together; 1 makes every answer
            alone.
        prompt_concurrency: prompts that are prefilled together.
        prefill_step_size: tokens of a prompt at a time.
        prompt_cache_bytes: for KV caches of earlier requests, which later ones go on from.
        kv_bits: None keeps keys and values as they are; quantizing them would turn batching off.
        kv_group_size: of no effect without ``kv_bits``.
        quantized_kv_start: of no effect without ``kv_bits``.
        chat_template_args: passed to the chat template.
    """

    decode_concurrency: int = 8
    prompt_concurrency: int = 8
    prefill_step_size: int = 512
    prompt_cache_bytes: int = 10**9
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    chat_template_args: dict[str, Any] = dataclasses.field(default_factory=dict)


class SubNetworkProvider:
    """Stands where mlx-lm's server has its ``ModelProvider``: what it loads are sub-networks.

    Only the generation thread calls its methods. It also makes the assistant there: an array that
    another thread's stream has yet to compute cannot be computed here.

    Args:
        prepare: returns the assistant and K.
        options: batching and memory.

    Attributes:
        assistant: done when ``prepare`` is; holds its exception if it failed.
        subnet: the sub-network in use.
        model_key: of the KV caches: those of one set of units fit no other.
    """

    def __init__(self, prepare: Prepare, options: EngineOptions):
        self.cli_args = options
        self.assistant: concurrent.futures.Future[Assistant] = concurrent.futures.Future()
        self.subnet: SubNetwork | None = None
        self.model: Any = None
        self.model_key: bytes | None = None
        self.tokenizer: Any = None
        self.processor = None  # no images
        self.draft_model = None
        self.is_batchable = False
        self._prepare = prepare
        self._num_kept_units = 0

    def load_default(self) -> None:
        """Make the assistant; called once, when the generation thread begins."""
        try:
            assistant, self._num_kept_units = self._prepare()
            self.tokenizer = assistant.tokenizer
            # mlx-lm asks before it loads a model. Sub-networks of one are of one kind, which is
            # known without the weights: of a model that does not fit they must not be loaded.
            self.is_batchable = self.cli_args.decode_concurrency > 1 and all(
                hasattr(layer, "merge") for layer in make_prompt_cache(assistant.skeleton)
            )
        except BaseException as error:  # who waits for the assistant must learn of it
            self.assistant.set_exception(error)
        else:
            self.assistant.set_result(assistant)

    def load(self, choice: SubnetRequest, adapter: str, draft: str) -> tuple[Any, Any]:
        """Make a sub-network the one in use; return its model and the tokenizer.

        Raises:
            IFPError: it cannot be selected or cut.
        """
        assistant = self.assistant.result()
        if choice.kind == "dense":
            subnet = assistant.dense()
        elif choice.kind == "task":
            subnet = assistant.subnetwork_for_task(choice.text, self._num_kept_units)
        else:
            subnet = assistant.subnetwork_for_prompt(choice.text, self._num_kept_units)
        units = "dense" if subnet.selection is None else subnet.selection.digest
        self.subnet = subnet
        self.model = subnet.model
        self.model_key = hashlib.sha256(units.encode()).digest()
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Let go of the model."""
        self.subnet = self.model = self.model_key = None


class _KVCaches(LRUPromptCache):
    """KV caches of earlier requests, with two faults of mlx-lm's (0.32.2) mended."""

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kind: Any
    ) -> None:
        """Keep a KV cache. Evaluates.

        It comes as slices, yet to be taken, of what a whole batch had, and would hold all of that
        in memory.
        """
        mx.eval([layer_cache.state for layer_cache in prompt_cache])
        super().insert_cache(model, tokens, prompt_cache, **kind)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the KV cache that goes furthest, and the rest of the tokens: at least one.

        When a prompt is exactly what an earlier request ended with, mlx-lm leaves nothing to
        compute logits from, and its generation thread dies of that.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, *tokens[-1:]]


class _RequestQueue(queue.Queue[Any]):
    """Requests in the order that they came, but those for one sub-network together.

    mlx-lm ends a batch when a request for another model is next; without this, two tasks that take
    turns would never share a batch. Nobody starves: a batch takes in what waits at that moment and
    is ended by the first request for another sub-network.
    """

    _model: ModelDescription | None = None

    def _get(self) -> Any:
        waiting: collections.deque[Any] = self.queue
        same = (i for i, (_, _, args) in enumerate(waiting) if args.model == self._model)
        position = next(same, 0)
        request = waiting[position]
        del waiting[position]
        self._model = request[2].model
        return request


class Engine:
    """Turns requests into replies, on one thread.

    Args:
        prepare: called on that thread; returns the assistant and K.
        options: batching and memory.

    Raises:
        IFPError: whatever ``prepare`` raises.
    """

    def __init__(self, prepare: Prepare, options: EngineOptions):
        self._provider = SubNetworkProvider(prepare, options)
        self._replies: weakref.WeakSet[Reply] = weakref.WeakSet()
        caches = _KVCaches(MAX_KV_CACHES, options.prompt_cache_bytes)
        # It reads attributes and calls load: anything that has those will do.
        self._generator = ResponseGenerator(self._provider, caches)  # type: ignore[arg-type]
        self._generator.requests = _RequestQueue()
        try:
            assistant = self._provider.assistant.result()
        except BaseException:
            self.stop()
            raise
        self.context_length = assistant.context_length
        self._tokenizer = assistant.tokenizer

    @property
    def is_healthy(self) -> bool:
        """Whether the generation thread lives."""
        return bool(self._generator.is_healthy)

    def start(self, request: GenerationRequest, choice: SubnetRequest) -> Reply:
        """Hand a request to the generation thread; the reply fills while that works.

        Raises:
            APIError: 400, the prompt does not fit the context or the chat template.
        """
        num_prompt_tokens = self._count_prompt_tokens(request)
        room = self.context_length - num_prompt_tokens
        if room < 1:
            raise APIError(
                400,
                f"the prompt has {num_prompt_tokens} tokens, the model's context "
                f"{self.context_length}; shorten it",
                param="prompt" if request.messages is None else "messages",
                code="context_length_exceeded",
            )
        reply = Reply(request.stop, self._fingerprint)
        self._replies.add(reply)
        arguments = _generation_arguments(choice, request.sampling, min(request.max_tokens, room))
        self._generator.requests.put((reply, self._completion_request(request), arguments))
        return reply

    def stop(self) -> None:
        """End the generation thread and wait for that; replies in the making are cut off."""
        for reply in list(self._replies):
            reply.abandon()
        self._generator.stop_and_join()

    def _fingerprint(self) -> str:
        """Name the sub-network in use; called on the generation thread."""
        return f"ifp_{(self._provider.model_key or b'').hex()[:12]}"

    def _completion_request(self, request: GenerationRequest) -> CompletionRequest:
        if request.messages is None:
            return CompletionRequest("text", request.prompt or "", [], None, None)
        if self._tokenizer.chat_template is None:  # as Conversation does without a template
            text = "\n\n".join(message["content"] for message in request.messages)
            return CompletionRequest("text", text, [], None, None)
        messages = [dict(message) for message in request.messages]
        return CompletionRequest("chat", "", messages, None, None)

    def _count_prompt_tokens(self, request: GenerationRequest) -> int:
        completion = self._completion_request(request)
        if completion.request_type == "text":
            return len(self._tokenizer.encode(completion.prompt))
        try:
            return len(
                self._tokenizer.apply_chat_template(
                    completion.messages, add_generation_prompt=True, return_dict=False
                )
            )
        except TemplateError as error:
            raise APIError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _generation_arguments(
    choice: SubnetRequest, sampling: Sampling, max_tokens: int
) -> GenerationArguments:
    return GenerationArguments(
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
            logit_bias=None,
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
        top_logprobs=0,
        seed=sampling.seed,
        chat_template_kwargs=None,
    )
