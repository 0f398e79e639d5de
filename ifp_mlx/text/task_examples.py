"""Examples of a task, as users have them: lines of text, or JSON lines with a prompt."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ifp_mlx.errors import DataError
from ifp_mlx.text.records import messages_of


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """One request of a task.

    Attributes:
        prompt: what is asked.
        answer: what should come, if that is known.
    """

    prompt: str
    answer: str | None = None


def read_task_examples(path: Path) -> list[TaskExample]:
    """Return the examples of a file, each once, in its order.

    A file whose name ends in ``.jsonl`` holds JSON objects with ``prompt`` or ``messages``, and
    ``answer`` or ``response`` if it is known; any other holds a prompt a line.

    Raises:
        DataError: the file cannot be read, or a line is no example; with file and line.
    """
    try:
        # Not splitlines: JSON may hold other line separators inside its strings.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the examples in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    is_json = path.suffix == ".jsonl"
    examples = [
        parse_example(line, f"{path}:{number}") if is_json else TaskExample(line.strip())
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f"{path} holds no example; write a request of the task on each line")
    return list(dict.fromkeys(examples))


def parse_example(line: str, where: str) -> TaskExample:
    """Return the example of a line of JSON.

    Raises:
        DataError: it is none; ``where`` begins the message.
    """
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{where}: no JSON object; fix the line")
    prompt, answer = record.get("prompt"), record.get("answer", record.get("response"))
    if isinstance(record.get("messages"), list):
        prompt, answer = _of_messages(record, prompt, answer)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{where}: no "prompt" and no "messages" with one; fix the line')
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    return TaskExample(prompt, answer)


def _of_messages(record: dict[str, Any], prompt: Any, answer: Any) -> tuple[Any, Any]:
    """Return the last question of a conversation, and its answer if there is one."""
    messages = [message for message in messages_of(record) if isinstance(message, dict)]
    questions = [at for at, message in enumerate(messages) if message.get("role") == "user"]
    if not questions:
        return prompt, answer
    after = messages[questions[-1] + 1 :]
    return messages[questions[-1]].get("content"), after[0].get("content") if after else answer
