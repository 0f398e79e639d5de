"""From requests to replies: the prompt is read here, the rest is the generation thread's."""

import contextlib
import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import CompletionRequest

from ifp_mlx.chat.chat_template import accepted_messages
from ifp_mlx.chat.grammar import Grammar, Grammars
from ifp_mlx.errors import CheckpointError, IFPError, UsageError
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.catalog import SubnetRequest
from ifp_mlx.server.generator import Generator, Loaded, TokenizedPrompt, make_arguments
from ifp_mlx.server.kv_caches import MAX_KV_CACHES, KVCacheFolder, KVCaches
from ifp_mlx.server.replies import Answers, ChatReader, RawReader, Reader, Reply
from ifp_mlx.server.requests import GenerationRequest
from ifp_mlx.server.seen_subnets import SeenSubnets, SubnetFacts
from ifp_mlx.server.subnet_provider import EngineOptions, Prepare, SubNetworkProvider
from ifp_mlx.server.tools import ToolFormat

_POLL_S = 0.2  # how often a request that waits looks at the clock and at its client


class Engine:
    """Turns requests into replies, on one thread.

    Args:
        prepare: called on that thread; returns the assistant, and K for a task.
        options: batching and memory.
        seen: what ``prepare`` has noted of sub-networks already.

    Attributes:
        context_length: the most positions that the model was made for.
        seen: what is known of the sub-networks that were used.

    Raises:
        IFPError: whatever ``prepare`` raises.
    """

    def __init__(self, prepare: Prepare, options: EngineOptions, seen: SeenSubnets | None = None):
        self.seen = seen or SeenSubnets()
        self._provider = SubNetworkProvider(prepare, options, self.seen)
        self._replies: weakref.WeakSet[Reply] = weakref.WeakSet()
        self._reading = threading.Lock()  # tokenizers are not made for several threads
        folder = None
        if options.prompt_cache_folder is not None:
            folder = KVCacheFolder(options.prompt_cache_folder, options.prompt_cache_bytes)
        caches = KVCaches(MAX_KV_CACHES, options.prompt_cache_bytes, folder)
        self._generator = Generator(self._provider, caches)
        try:
            assistant = self._provider.first_assistant.result()
        except BaseException:
            self.stop()
            raise
        self.context_length = assistant.context_length
        self._tokenizer = assistant.tokenizer
        self._tool_format = ToolFormat.of(self._tokenizer)
        self._grammars = Grammars(self._tokenizer)
        self._machines = {tools: self._text_machine(tools) for tools in (False, True)}

    @property
    def is_healthy(self) -> bool:
        """Whether the generation thread lives."""
        return bool(self._generator.is_healthy)

    def start(self, request: GenerationRequest, choice: SubnetRequest) -> Answers:
        """Hand a request to the generation thread; the answers fill while that works.

        Raises:
            APIError: 400, the prompt does not fit the context or the chat template.
        """
        if any(token >= len(self._tokenizer) for token in request.sampling.logit_bias):
            message = f"logit_bias names a token that is not among the {len(self._tokenizer)} here"
            raise APIError(400, message, param="logit_bias")
        prompts = [self._read(completion, request) for completion in self._completions(request)]
        rooms = [self._room(len(tokenized[0]), request) for tokenized in prompts]
        grammar = self._grammar(request)
        replies, orders = [], []
        for index in range(len(prompts) * request.num_answers):
            prompt_index = index // request.num_answers
            tokenized, max_tokens = prompts[prompt_index], rooms[prompt_index]
            if request.max_tokens is not None:
                max_tokens = min(request.max_tokens, max_tokens)
            processor = None
            if grammar is not None:  # what a model thinks before it answers is free
                thinks = tokenized[3] == "reasoning"
                begins_after = self._tokenizer.think_end_tokens if thinks else ()
                processor = grammar.processor(max_tokens, begins_after)
            reply = Reply(
                self._reader(request),
                request.stop,
                self._fingerprint,
                offer=request.tools,
                tool_format=self._tool_format,
                processor=processor,
                reads_bare_calls=(
                    request.tools is not None
                    and request.schema is None
                    and self._tool_format.is_json
                ),
                index=index,
                prompt_index=prompt_index,
            )
            arguments = make_arguments(
                choice,
                request.sampling,
                max_tokens,
                tokenized=tokenized,
                processors=() if processor is None else (processor,),
                top_logprobs=request.num_alternatives or 0,
            )
            if arguments.seed is not None:  # answers to one prompt must differ
                arguments.seed = (arguments.seed + index) % 2**64
            replies.append(reply)
            orders.append((reply, CompletionRequest("text", "", [], None, None), arguments))
        answers = Answers(replies)
        for order in orders:
            self._replies.add(order[0])
            self._generator.requests.put(order)
        return answers

    def facts(
        self, choice: SubnetRequest, time_limit_s: float, check: Callable[[], None]
    ) -> SubnetFacts:
        """Return what is known of a sub-network, which is made if need be.

        Args:
            choice: which one.
            time_limit_s: for that, waiting for its turn included.
            check: called several times a second; raises when there is no point in going on.

        Raises:
            APIError: 503, it did not have its turn in time.
            IFPError: it cannot be selected or cut.
        """
        deadline = time.monotonic() + time_limit_s
        while (known := self.seen.get(choice)) is None:
            event = self._load(choice, deadline, check)
            if isinstance(event, IFPError):
                raise event
            if not isinstance(event, Loaded):
                raise RuntimeError(f"a sub-network was not loaded: {event!r}")
        return known

    def _load(self, choice: SubnetRequest, deadline: float, check: Callable[[], None]) -> Exception:
        events: queue.Queue[Exception] = queue.Queue()
        nothing = CompletionRequest("text", "", [], None, None)
        self._generator.requests.put((events, nothing, make_arguments(choice, None, 1)))
        while time.monotonic() < deadline:
            check()
            with contextlib.suppress(queue.Empty):
                return events.get(timeout=_POLL_S)
        raise APIError(
            503,
            "other answers are in work; ask again when they are done",
            code="overloaded",
            headers={"Retry-After": "5"},
        )

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token's text."""
        return self._grammars.token_bytes(token)

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Return what can be measured now: name -> what it is, and what returns its value."""
        kv_caches = self._generator.prompt_cache
        return {
            "memory_bytes": ("Memory that mlx uses.", mx.get_active_memory),
            "memory_peak_bytes": ("Most memory that mlx used.", mx.get_peak_memory),
            "kv_cache_bytes": ("KV caches of earlier requests.", lambda: kv_caches.nbytes),
            "model_loaded": ("1 while the model is in memory.", lambda: self._provider.is_loaded),
        }

    def stop(self) -> None:
        """End the generation thread and wait for that; replies in the making are cut off."""
        for reply in list(self._replies):
            reply.abandon()
        self._generator.stop_and_join()

    def _fingerprint(self) -> str:
        """Name the sub-network in use; called on the generation thread."""
        return f"ifp_{(self._provider.model_key or b'').hex()[:12]}"

    def _grammar(self, request: GenerationRequest) -> Grammar | None:
        """Return what an answer must look like, if that matters.

        Raises:
            APIError: 400, a schema cannot be enforced.
        """
        try:
            if request.tools is not None:
                calls = self._tool_format.calls(request.tools)
                return self._grammars.for_calls(calls, request.schema)
            if request.schema is not None:
                return self._grammars.for_schema(request.schema)
        except UsageError as error:
            name = "response_format" if request.tools is None else "tools"
            raise APIError(400, str(error), param=name) from error
        return None

    def _reader(self, request: GenerationRequest) -> Reader:
        if request.messages is None:
            return RawReader(self._tokenizer.detokenizer)
        return ChatReader(self._machines[request.tools is not None])

    def _text_machine(self, has_tools: bool) -> TextStateMachine:
        tokenizer = self._tokenizer
        machine: TextStateMachine = make_text_state_machine(
            SimpleNamespace(
                has_thinking=tokenizer.has_thinking,
                think_start=tokenizer.think_start,
                think_end=tokenizer.think_end,
                structural_markers=tokenizer.structural_markers,
                response_transitions=tokenizer.response_transitions if has_tools else {},
                has_tool_calling=has_tools,
                tool_call_start=self._tool_format.start,
                tool_call_end=self._tool_format.end,
            )
        )
        return machine

    def _completions(self, request: GenerationRequest) -> list[CompletionRequest]:
        if request.messages is None:
            return [CompletionRequest("text", text, [], None, None) for text in request.prompts]
        messages = [dict(message) for message in request.messages]
        tools: list[Any] | None = None if request.tools is None else list(request.tools.tools)
        if not self._tool_format.is_native:
            messages, tools = self._tool_format.describe(messages, request.tools), None
        if not self._tokenizer.has_chat_template:  # as Conversation does without a template
            text = "\n\n".join(message["content"] for message in messages)
            return [CompletionRequest("text", text, [], None, None)]
        return [CompletionRequest("chat", "", messages, tools, None)]

    def _read(self, completion: CompletionRequest, request: GenerationRequest) -> TokenizedPrompt:
        where = "prompt" if request.messages is None else "messages"
        try:
            with self._reading:
                tokenized = self._tokenize(completion, request.template_arguments)
        except Exception as error:  # a template is a program of others, and fails in any way
            reason = " ".join(str(error).split())[:300]
            raise APIError(
                400, f"the model's chat template refuses these messages: {reason}", param=where
            ) from error
        if not tokenized[0]:
            raise APIError(400, f"{where} is empty; say what you want", param=where)
        return tokenized

    def _tokenize(
        self, completion: CompletionRequest, template_arguments: dict[str, Any]
    ) -> TokenizedPrompt:
        try:
            return self._generator.tokenize(completion, template_arguments)
        except Exception:
            if completion.request_type == "text":
                raise
            try:
                accepted = accepted_messages(self._tokenizer, completion.messages)
            except CheckpointError as error:  # what the template said is what to tell
                raise error.__cause__ or error from error
            completion = dataclasses.replace(completion, messages=accepted)
            return self._generator.tokenize(completion, template_arguments)

    def _room(self, num_prompt_tokens: int, request: GenerationRequest) -> int:
        room = self.context_length - num_prompt_tokens
        if room < 1:
            raise APIError(
                400,
                f"the prompt has {num_prompt_tokens} tokens, the model's context "
                f"{self.context_length}; shorten it",
                param="prompt" if request.messages is None else "messages",
                code="context_length_exceeded",
            )
        return room
