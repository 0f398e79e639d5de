"""What comes back from the generation thread: text, until a stop, a deadline or a lost client."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from mlx_lm.server import GenerationContext, Response

from ifp_mlx.chat.grammar import GrammarProcessor
from ifp_mlx.server.api_error import APIError
from ifp_mlx.server.stop_strings import StopStrings
from ifp_mlx.server.tools import ToolCall, ToolFormat, ToolOffer

_POLL_S = 0.2  # how often a waiting request looks at the clock and at its client


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of an answer; ``is_reasoning`` for what the model thinks before it answers."""

    text: str
    is_reasoning: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability.

    Attributes:
        token: its id.
        logprob: natural logarithm.
        alternatives: ids and log probabilities of the likeliest tokens in its place.
        start: where its text begins in the answer, in characters.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    start: int


class Reader(Protocol):
    """Makes text of what the generation thread sends: ``(kind, text)`` in order."""

    def begin(self, context: GenerationContext) -> None:
        """Get ready."""

    def read(self, response: Response) -> list[tuple[str, str]]:
        """Return the text that is new; its kinds are normal, reasoning and tool."""


class ChatReader:
    """Takes out the markers around reasoning and, where tools are offered, around calls.

    Args:
        machine: mlx-lm's, which knows the markers.
    """

    def __init__(self, machine: Any):
        self._machine = machine
        self._state: Any = None

    def begin(self, context: GenerationContext) -> None:
        """Begin in the middle of reasoning if the prompt ends there."""
        self._state = self._machine.make_state(context.initial_state)

    def read(self, response: Response) -> list[tuple[str, str]]:
        """Return the text that is new."""
        self._state, segments = self._machine.split(self._state, response.text)
        if response.finish_reason is not None:
            self._state, rest, kind = self._machine.flush(self._state)
            segments.append((kind, rest))
        return list(segments)


class RawReader:
    """Takes out nothing, also not the space that an answer begins with, which mlx-lm drops.

    Args:
        detokenizer: mlx-lm's, fresh.
    """

    def __init__(self, detokenizer: Any):
        if "text" in vars(detokenizer):  # with text before it, no space is at the beginning
            detokenizer.text = " "
            detokenizer.offset = 1
        self._detokenizer = detokenizer

    def begin(self, context: GenerationContext) -> None:
        """Begin with nothing."""

    def read(self, response: Response) -> list[tuple[str, str]]:
        """Return the text that is new."""
        if response.finish_reason != "stop":  # the token that says so is no text
            self._detokenizer.add_token(response.token)
        if response.finish_reason is not None:
            self._detokenizer.finalize()
        return [("normal", self._detokenizer.last_segment)]


class Reply:
    """One answer in the making.

    Args:
        reader: makes text of tokens.
        stop: strings that end the answer.
        fingerprint: asked on the generation thread when it begins, for the sub-network's name.
        offer: what it may call.
        tool_format: how it writes calls.
        processor: what makes it fit a grammar.
        reads_bare_calls: an answer that is a call and nothing else needs no markers.
        index: among the answers to one request.
        prompt_index: of its prompt, among those of the request.

    Attributes:
        fingerprint: names the sub-network that answers; empty until it begins.
        prompt_tokens: of the whole prompt.
        cached_tokens: how many of them an earlier request had left in a KV cache.
        completion_tokens: so far.
        finish_reason: ``stop``, ``length`` or ``tool_calls`` once the answer is complete.
        logprobs: of the tokens so far.
        first_token_s: when the first token came, on the monotonic clock; None before.
    """

    def __init__(
        self,
        reader: Reader,
        stop: tuple[str, ...],
        fingerprint: Callable[[], str],
        *,
        offer: ToolOffer | None = None,
        tool_format: ToolFormat | None = None,
        processor: GrammarProcessor | None = None,
        reads_bare_calls: bool = False,
        index: int = 0,
        prompt_index: int = 0,
    ):
        self.index = index
        self.prompt_index = prompt_index
        self.fingerprint = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.first_token_s: float | None = None
        self.events: queue.Queue[Any] = queue.Queue()
        self._reader = reader
        self._ask_fingerprint = fingerprint
        self._stop = StopStrings(stop)
        self._offer = offer
        self._tool_format = tool_format
        self._processor = processor
        self._bare_text = "" if reads_bare_calls else None  # that may become a call as a whole
        self._call_text: str | None = None  # of a call that is being written
        self._num_calls = 0
        self._blank = ""  # at the end of the text so far; dropped if a call follows
        self._text_length = 0  # in characters, with stop strings and what is held back for them
        self._kept_length = 0  # without
        self._lock = threading.Lock()
        self._context: GenerationContext | None = None
        self._abandoned = False

    @property
    def has_begun(self) -> bool:
        """Whether it had its turn."""
        return self._context is not None

    def put(self, event: Any) -> None:
        """Take what the generation thread sends: a context, responses, then None; or an error."""
        if isinstance(event, GenerationContext):
            self.fingerprint = self._ask_fingerprint()
            with self._lock:
                self._context = event
                if self._abandoned:
                    event.stop()
        self.events.put((self, event))

    def abandon(self) -> None:
        """Tell the generation thread that nobody waits any more. It stops within a few tokens."""
        with self._lock:
            self._abandoned = True
            if self._context is not None:
                self._context.stop()

    def take(self, event: Any) -> Iterator[Piece | ToolCall]:
        """Yield what an event adds to the answer.

        Raises:
            APIError: 503 when the server stops before the answer is complete, 400 when a schema
                turned out to be too complex.
            IFPError: the sub-network could not be selected or cut.
        """
        if self.finish_reason is not None:
            return
        if isinstance(event, Exception):
            raise event
        if event is None:
            raise APIError(503, "the answer was cut off; the server is stopping")
        if isinstance(event, GenerationContext):
            self.prompt_tokens = len(event.prompt)
            self.cached_tokens = max(event.prompt_cache_count, 0)
            self._reader.begin(event)
        elif isinstance(event, Response):
            self.completion_tokens += 1
            self.first_token_s = self.first_token_s or time.monotonic()
            if self._processor is not None and self._processor.error:
                reason = self._processor.error
                raise APIError(400, f"the schema could not be followed to the end: {reason}")
            if event.finish_reason != "stop":
                self._note_logprob(event)
            yield from self._cut(self._reader.read(event), event.finish_reason)
            if self.finish_reason is not None:
                self.abandon()

    def _note_logprob(self, response: Response) -> None:
        likeliest = [(token["id"], token["logprob"]) for token in response.top_tokens]
        likeliest.sort(key=lambda pair: -pair[1])
        self.logprobs.append(
            TokenLogprob(response.token, response.logprob, tuple(likeliest), self._text_length)
        )

    def _cut(
        self, segments: list[tuple[str, str]], finish_reason: str | None
    ) -> Iterator[Piece | ToolCall]:
        for kind, text in segments:
            if kind == "tool":
                self._call_text = (self._call_text or "") + text
                continue
            if self._call_text is not None:
                yield from self._call(is_whole=True)
                if self.finish_reason is not None:
                    return
            if kind == "reasoning":
                if text:
                    yield Piece(text, is_reasoning=True)
                continue
            self._text_length += len(text)
            kept, stopped = self._stop.feed(text)
            self._kept_length += len(kept)
            if stopped:
                self.finish_reason = "stop"
                whole = self.logprobs
                self.logprobs = [token for token in whole if token.start < self._kept_length]
            yield from self._say(kept)
            if stopped:
                yield from self._end_bare_text()
                return
        if finish_reason is not None:
            self.finish_reason = finish_reason
            if self._call_text is not None:
                yield from self._call(is_whole=finish_reason == "stop")
            yield from self._say(self._stop.flush())
            yield from self._end_bare_text()
            if self._num_calls and finish_reason == "stop":
                self.finish_reason = "tool_calls"

    def _say(self, text: str) -> Iterator[Piece]:
        """Yield text; where a call may follow, without the blank lines before it."""
        if self._bare_text is not None:
            self._bare_text += text
            if not self._bare_text.strip() or self._bare_text.lstrip().startswith("{"):
                return
            text, self._bare_text = self._bare_text, None
        text = self._blank + text
        self._blank = ""
        if self._offer is not None:
            said = text.rstrip()
            if self.finish_reason is None or (self._num_calls and not said):
                text, self._blank = said, text[len(said) :]
        if text:
            yield Piece(text)

    def _end_bare_text(self) -> Iterator[Piece | ToolCall]:
        """Yield the call that an answer is as a whole, as some models write it; else the text."""
        if self._bare_text is None:
            return
        text, self._bare_text = self._bare_text, None
        assert self._tool_format is not None
        assert self._offer is not None
        names = {tool["function"]["name"] for tool in self._offer.tools}
        calls = self._tool_format.read(text, self._offer)
        if calls and all(call.name in names for call in calls):
            self._num_calls += len(calls)
            yield from calls
        else:
            yield from self._say(text)

    def _call(self, *, is_whole: bool) -> Iterator[Piece | ToolCall]:
        assert self._call_text is not None
        assert self._tool_format is not None
        assert self._offer is not None
        text, self._call_text = self._call_text, None
        calls = self._tool_format.read(text, self._offer)
        if not calls:  # no call after all: nothing of it is lost
            end = self._tool_format.end if is_whole else ""
            yield from self._say(self._tool_format.start + text + end)
            return
        self._blank = ""
        self._bare_text = None
        for call in calls if self._offer.in_parallel else calls[:1]:
            self._num_calls += 1
            yield call
        if not self._offer.in_parallel:
            self.finish_reason = "tool_calls"


class Answers:
    """All the answers to one request.

    Args:
        replies: in the making.

    Attributes:
        replies: as given.
        started_s: on the monotonic clock.
    """

    def __init__(self, replies: Sequence[Reply]):
        self.replies = tuple(replies)
        self.started_s = time.monotonic()
        self._events: queue.Queue[Any] = queue.Queue()
        for reply in self.replies:
            reply.events = self._events

    def pieces(
        self, time_limit_s: float, check: Callable[[], None]
    ) -> Generator[tuple[Reply, Piece | ToolCall], None, None]:
        """Yield the answers' text as it comes, until all are complete.

        Args:
            time_limit_s: for all of them, waiting for their turn included.
            check: called several times a second; raises when there is no point in going on.

        Raises:
            APIError: 503 when none was begun in time, 504 when not all were finished.
            IFPError: the sub-network could not be selected or cut.
        """
        try:
            for reply, event in self._wait(time_limit_s, check):
                for piece in reply.take(event):
                    yield reply, piece
                if all(reply.finish_reason is not None for reply in self.replies):
                    return
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Tell the generation thread that nobody waits any more."""
        for reply in self.replies:
            reply.abandon()

    def _wait(self, time_limit_s: float, check: Callable[[], None]) -> Iterator[tuple[Reply, Any]]:
        deadline = time.monotonic() + time_limit_s
        next_check = 0.0
        while True:
            now = time.monotonic()
            if now >= next_check:
                check()
                next_check = now + _POLL_S
            if now >= deadline:
                raise self._too_late(time_limit_s)
            try:
                yield self._events.get(timeout=min(_POLL_S, deadline - now))
            except queue.Empty:
                continue

    def _too_late(self, time_limit_s: float) -> APIError:
        if not any(reply.has_begun for reply in self.replies):
            return APIError(
                503,
                f"the request waited {time_limit_s:g} s and never had its turn; try again later",
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        return APIError(504, f"the answer took more than {time_limit_s:g} s", code="timeout")
