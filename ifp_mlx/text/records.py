"""Records from JSON-lines files or the hub: one clear error with file and line.

A record is a document (``text``), a pair (``prompt``, ``response``) or a conversation
(``messages``). A conversation is a pair as well, wherever one is wanted: its last answer is the
response, and what was said before it is the question.
"""

import codecs
import collections
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ifp_mlx.errors import DataError
from ifp_mlx.text.hub_records import HubSource

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 4_000_000
"""A longer line is a damaged file rather than an example."""


_ARRAY_START = re.compile(rb"\s*\[\s*(\{|$)")


class BadLines:
    """What to do with lines that cannot be used: stop at the first, or skip and count.

    Attributes:
        skip: skip instead of stopping.
        counts: reason -> number of lines skipped so far.
    """

    def __init__(self, *, skip: bool = False):
        self.skip = skip
        self.counts: collections.Counter[str] = collections.Counter()

    def report(self, path: Path, line_number: int, reason: str) -> None:
        """Count a bad line.

        Raises:
            DataError: lines are not to be skipped; the message has file and line.
        """
        if not self.skip:
            raise DataError(
                f"{path}:{line_number}: {reason}; fix the line, or pass `skip_bad_lines`"
            )
        self.counts[reason] += 1

    def warn(self, path: Path) -> None:
        """Log how many lines of a file were left out, and why; for callers that show no counts."""
        if self.counts:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.counts.items())
            logger.warning("%s: left out %d lines: %s", path, self.counts.total(), reasons)


def read_records(
    path: Path, check: Callable[[dict[str, Any]], str | None], bad: BadLines
) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl or .jsonl.xz file, or of a data set of the hub, in order.

    Args:
        path: the file, or ``hub:OWNER/NAME[:SPLIT]``.
        check: returns why a record cannot be used, or None.
        bad: what to do with lines that cannot.

    Raises:
        DataError: the file is missing, damaged or holds no usable record.
    """
    good = 0
    hub = HubSource.parse(path)
    for number, record, reason in _rows(hub) if hub else _lines(path):
        record = _with_prompt_and_response(record)
        reason = reason or check(record)
        if reason is not None:
            bad.report(path, number, reason)
            continue
        good += 1
        yield record
    if not good:
        raise DataError(f"{path} holds no usable record")


def _rows(hub: HubSource) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    for number, row in enumerate(hub.rows(), start=1):
        yield number, row, None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """Yield (line number, record, why it is none) of the lines with something on them.

    Raises:
        DataError: the file cannot be read, or is no UTF-8 text at all.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    _refuse_utf_16(path, line)
                    line = line.removeprefix(codecs.BOM_UTF8)
                    _refuse_array(path, line)
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield number, {}, f"line over {MAX_LINE_BYTES} bytes"
                elif line.strip():
                    yield number, *_parse(line)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}") from error


def is_usable_text(value: object) -> bool:
    """Tell whether a field is a string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def check_prompt_response(record: dict[str, Any]) -> str | None:
    """Return why a record is not prompt and response, nor a ``messages`` conversation."""
    if "messages" in record:
        return _check_messages(record["messages"])
    for field in ("prompt", "response"):
        if not is_usable_text(record.get(field)):
            return f"field {field!r} is missing or empty"
    return None


def messages_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """Return a checked record as a conversation."""
    messages: list[dict[str, str]] = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["response"]},
    ]
    return messages


def question_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """Return what a checked record's response answers: all that was said before it."""
    if "messages" not in record:
        return [{"role": "user", "content": record["prompt"]}]
    messages = messages_of(record)
    return messages[: _last_answer(messages)]


def check_document(record: dict[str, Any]) -> str | None:
    """Return why a record is not a document."""
    return None if is_usable_text(record.get("text")) else "field 'text' is missing or empty"


def _check_messages(messages: object) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "field 'messages' is not a list of messages"
    for message in messages:
        if not isinstance(message, dict) or not is_usable_text(message.get("content")):
            return "a message has no content"
        if message.get("role") not in ("system", "user", "assistant"):
            return f"a message has the role {message.get('role')!r}"
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        return "a conversation needs a user message and an answer to it"
    return None


def _last_answer(messages: list[dict[str, str]]) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _with_prompt_and_response(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which a conversation also has the two fields that a pair has."""
    if "messages" not in record:
        return record
    messages = record["messages"]
    if isinstance(messages, list):
        messages = [_with_plain_content(message) for message in messages]
    if _check_messages(messages) is not None:
        return record  # the check says so
    question = messages[: _last_answer(messages)]
    prompt = [message["content"] for message in question if message["role"] == "user"][-1]
    response = messages[len(question)]["content"]
    return {**record, "messages": messages, "prompt": prompt, "response": response}


def _with_plain_content(message: Any) -> Any:
    """Return a message whose content, if it is a list of text parts, is one text."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _refuse_utf_16(path: Path, line: bytes) -> None:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:4]:
        raise DataError(
            f"{path} is UTF-16 text; convert it first, for example with iconv -f UTF-16 -t UTF-8"
        )


def _refuse_array(path: Path, line: bytes) -> None:
    if _ARRAY_START.match(line):
        raise DataError(
            f"{path} is one JSON array; write one object a line first, for example with jq -c '.[]'"
        )


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError):
        return {}, "not JSON"
    if not isinstance(record, dict):
        return {}, "not a JSON object"
    if b"\\u" in line:  # the only way to write half a character
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return {}, "half a character, a lone surrogate"
    return record, None
