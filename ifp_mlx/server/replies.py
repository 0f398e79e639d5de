"""What comes back from the generation thread: text, until a stop, a deadline or a lost client."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mlx_lm.server import GenerationContext, Response

from ifp_mlx.server.api_error import APIError

_POLL_S = 0.2  # how often a waiting request looks at the clock and at its client


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of an answer; ``is_reasoning`` for what the model thinks before it answers."""

    text: str
    is_reasoning: bool


class StopStrings:
    """Cuts streamed text where one of some strings begins, wherever the tokens' borders are."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""  # the end of the text so far, which may be the beginning of a stop

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain to stay, and whether a stop string was met."""
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:  # the one that is complete first: what follows must not matter
            self._held = ""
            return text[: min(found)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """Return what was held back; the text is over."""
        held, self._held = self._held, ""
        return held


class Reply:
    """An answer in the making: the queue between the generation thread and one client's thread.

    Args:
        stop: strings that end the answer.
        fingerprint: asked on the generation thread when it begins, for the sub-network's name.

    Attributes:
        fingerprint: names the sub-network that answers; empty until it begins.
        prompt_tokens: of the whole prompt.
        cached_tokens: how many of them an earlier request had left in a KV cache.
        completion_tokens: so far.
        finish_reason: ``stop`` or ``length`` once the answer is complete.
    """

    def __init__(self, stop: tuple[str, ...], fingerprint: Callable[[], str]):
        self.fingerprint = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self._ask_fingerprint = fingerprint
        self._events: queue.Queue[Any] = queue.Queue()
        self._stop = StopStrings(stop)
        self._lock = threading.Lock()
        self._context: GenerationContext | None = None
        self._abandoned = False

    def put(self, event: Any) -> None:
        """Take what the generation thread sends: a context, responses, then None; or an error."""
        if isinstance(event, GenerationContext):
            self.fingerprint = self._ask_fingerprint()
            with self._lock:
                self._context = event
                if self._abandoned:
                    event.stop()
        self._events.put(event)

    def abandon(self) -> None:
        """Tell the generation thread that nobody waits any more. It stops within a few tokens."""
        with self._lock:
            self._abandoned = True
            if self._context is not None:
                self._context.stop()

    def pieces(
        self, time_limit_s: float, check: Callable[[], None]
    ) -> Generator[Piece, None, None]:
        """Yield the answer's text as it comes, until it is complete.

        Args:
            time_limit_s: for the whole answer, waiting for its turn included.
            check: called several times a second; raises when there is no point in going on.

        Raises:
            APIError: 503 when the answer was not begun in time, 504 when it was not finished.
            IFPError: the sub-network could not be selected or cut.
        """
        try:
            yield from self._pieces(time.monotonic() + time_limit_s, time_limit_s, check)
        finally:
            self.abandon()

    def _pieces(
        self, deadline: float, time_limit_s: float, check: Callable[[], None]
    ) -> Iterator[Piece]:
        machine: Any = None  # mlx-lm's, which takes out the markers around what a model thinks
        state: Any = None
        for event in self._wait(deadline, time_limit_s, check):
            if isinstance(event, GenerationContext):
                self.prompt_tokens = len(event.prompt)
                self.cached_tokens = max(event.prompt_cache_count, 0)
                machine = event.text_sm
                state = machine.make_state(event.initial_state)
            elif isinstance(event, Response):
                self.completion_tokens += 1
                state, segments = machine.split(state, event.text)
                if event.finish_reason is not None:
                    state, rest, kind = machine.flush(state)
                    segments.append((kind, rest))
                    self.finish_reason = event.finish_reason
                yield from self._cut(segments)
                if self.finish_reason is not None:
                    return

    def _cut(self, segments: list[tuple[str, str]]) -> Iterator[Piece]:
        for kind, text in segments:
            if kind == "reasoning":
                if text:
                    yield Piece(text, is_reasoning=True)
                continue
            text, stopped = self._stop.feed(text)
            if text:
                yield Piece(text, is_reasoning=False)
            if stopped:
                self.finish_reason = "stop"
                return
        if self.finish_reason is not None and (text := self._stop.flush()):
            yield Piece(text, is_reasoning=False)

    def _wait(
        self, deadline: float, time_limit_s: float, check: Callable[[], None]
    ) -> Iterator[Any]:
        next_check = 0.0
        while True:
            now = time.monotonic()
            if now >= next_check:
                check()
                next_check = now + _POLL_S
            if now >= deadline:
                raise self._too_late(time_limit_s)
            try:
                event = self._events.get(timeout=min(_POLL_S, deadline - now))
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                raise APIError(503, "the answer was cut off; the server is stopping")
            yield event

    def _too_late(self, time_limit_s: float) -> APIError:
        if self._context is None:
            return APIError(
                503,
                f"the request waited {time_limit_s:g} s and never had its turn; try again later",
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        return APIError(504, f"the answer took more than {time_limit_s:g} s", code="timeout")


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
