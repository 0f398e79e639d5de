"""One readable line a request."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass
class RequestRecord:
    """What is known of a request when it is over.

    Attributes:
        method: of HTTP.
        path: without what follows a ``?``.
        status: of the answer; 0 if the client left before one.
        model: as the client named it.
        task: that the sub-network was selected for; empty for the whole model.
        prompt_tokens: of all prompts.
        cached_tokens: how many of them were in a KV cache.
        completion_tokens: of all answers.
        first_token_s: from the request to the first token; None if none came.
        elapsed_s: from the request to the last token.
        finish_reason: of the first answer.
        error: why it was refused or failed; the first line of what the client was told.
        cause: what the client was not told.
        is_of_page: the page asked for it, which it does often.
    """

    method: str
    path: str
    status: int = 0
    model: str = ""
    task: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    elapsed_s: float = 0.0
    finish_reason: str = ""
    error: str = ""
    cause: str = ""
    is_of_page: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed, all answers together; None for fewer than two tokens."""
        if self.first_token_s is None or self.completion_tokens < 2:
            return None
        decoding_s = self.elapsed_s - self.first_token_s
        return (self.completion_tokens - 1) / decoding_s if decoding_s > 0 else None

    @property
    def is_server_error(self) -> bool:
        """Whether the server is to blame."""
        return self.status >= 500 or bool(self.cause)

    def line(self) -> str:
        """Return it as a line, whatever clients put into names."""
        parts = [f"{self.method} {self.path} {self.status or 'client left'}"]
        if self.model:
            parts.append(self.model)
        if self.task:
            parts.append(f"task {_shortened(self.task)!r}")
        if self.prompt_tokens:
            cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
            parts.append(f"{self.prompt_tokens}{cached} + {self.completion_tokens} tokens")
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s:.2f} s")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        if self.finish_reason:
            parts.append(self.finish_reason)
        if self.error:
            parts.append(_shortened(self.error, 300))
        if self.cause:
            parts.append(f"cause: {_shortened(self.cause, 500)}")
        return f"{time.strftime('%H:%M:%S')} {_printable(', '.join(parts))}"


class RequestLog:
    """Writes lines about requests.

    Args:
        write: takes a line.
        only_server_errors: leave out all others.
    """

    def __init__(self, write: Callable[[str], None], *, only_server_errors: bool = False):
        self._write = write
        self._only_server_errors = only_server_errors

    def note(self, record: RequestRecord) -> None:
        """Write a request's line; of what the page shows there is one only if it is refused."""
        is_quiet = self._only_server_errors or (record.is_of_page and record.status < 400)
        if record.is_server_error or not is_quiet:
            self._write(record.line())


def _shortened(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _printable(text: str) -> str:
    """Return text that cannot move the cursor of a terminal, or begin a line of its own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
