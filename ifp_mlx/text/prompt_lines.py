"""Many prompts in one text: a line each, or JSON lines."""

import dataclasses

from ifp_mlx.errors import DataError
from ifp_mlx.text.task_examples import parse_example


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One prompt.

    Attributes:
        number: of its line, from 1.
        prompt: what is asked.
    """

    number: int
    prompt: str


def parse_prompt_lines(text: str, where: str, *, is_json: bool) -> list[PromptLine]:
    """Return the prompts of a text in their order, without blank lines.

    Args:
        text: lines of text, or of JSON objects with ``prompt`` or ``messages``.
        where: what messages call it.
        is_json: whether the lines are JSON.

    Raises:
        DataError: there is none, or a line is no JSON object with a prompt.
    """
    prompts = [
        PromptLine(
            number, parse_example(line, f"{where}:{number}").prompt if is_json else line.strip()
        )
        # Not splitlines: JSON may hold other line separators inside its strings.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{where} holds no prompt; write one on each line")
    return prompts
