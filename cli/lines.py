"""``ifp generate --lines``: many prompts, answered together in one process."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.chat.sampling import KVCacheOptions, SamplingOptions
from ifp_mlx.cli.answer import ctrl_c_asks
from ifp_mlx.cli.help_sections import MANY
from ifp_mlx.cli.measuring import measuring
from ifp_mlx.cli.prompts import PromptOptions, decode_input, read_stdin
from ifp_mlx.cli.terminal import plural, say
from ifp_mlx.errors import IFPError, UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.subnets.subnetwork import SubNetwork
    from ifp_mlx.text.prompt_lines import PromptLine

Record = dict[str, Any]
"""What JSON lines hold of one answer."""


@dataclasses.dataclass(frozen=True)
class LinesOptions:
    """Many prompts in one run."""

    lines: Annotated[
        Path | None,
        typer.Option(
            "--lines",
            metavar="FILE",
            help="Answer every line of this file, several at a time, in its order; blank lines are "
            "left out, and - stands for standard input. A file named .jsonl holds JSON objects "
            'with "prompt". An answer is printed on one line; with --json, as a line of JSON.',
            rich_help_panel=MANY,
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="With --lines: write the answers to this file, as JSON lines. Run again, it goes "
            "on where it was stopped.",
            rich_help_panel=MANY,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what says nothing without the other."""
        if self.output is not None and self.lines is None:
            raise UsageError("--output takes the answers of --lines; give a file of prompts")

    def read(self) -> list[PromptLine]:
        """Return the prompts.

        Raises:
            UsageError: the file cannot be read.
            DataError: it holds no prompts.
        """
        from ifp_mlx.text.prompt_lines import parse_prompt_lines

        assert self.lines is not None
        if str(self.lines) == "-":
            return parse_prompt_lines(read_stdin(), "standard input", is_json=False)
        try:
            content = self.lines.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {self.lines}: {error.strerror}") from error
        text = decode_input(content, source=str(self.lines))
        return parse_prompt_lines(text, str(self.lines), is_json=self.lines.suffix == ".jsonl")


@dataclasses.dataclass(frozen=True)
class LinesRun:
    """One run over many prompts.

    Attributes:
        assistant: of the model.
        subnet: answers each prompt; None where each selects its own.
        choose: returns the sub-network that a prompt selects.
        prompt_options: what is put around each prompt.
        sampling: how tokens are drawn.
        kv_options: how keys and values are kept.
    """

    assistant: Assistant
    subnet: SubNetwork | None
    choose: Callable[[str], SubNetwork]
    prompt_options: PromptOptions
    sampling: SamplingOptions
    kv_options: KVCacheOptions

    def answers(self, prompts: Sequence[PromptLine]) -> Iterator[tuple[int, Record]]:
        """Yield position and record of each prompt, as they are finished. Evaluates."""
        if self.subnet is not None and self.kv_options == KVCacheOptions():
            from ifp_mlx.chat.batch import can_batch

            conversation = self.assistant.converse(self.subnet)
            if can_batch(conversation.model):
                yield from self._together(conversation, prompts)
                return
        yield from self._one_by_one(prompts)

    def _together(
        self, conversation: Conversation, prompts: Sequence[PromptLine]
    ) -> Iterator[tuple[int, Record]]:
        from ifp_mlx.chat.batch import answer_together

        assistant = self.assistant
        all_ids = [self.prompt_options.ids(assistant, line.prompt) for line in prompts]
        fitting = []
        for position, ids in enumerate(all_ids):
            if len(ids) < assistant.context_length:
                fitting.append(position)
                continue
            problem = f"{len(ids)} tokens, the model's context is {assistant.context_length}"
            yield position, _record(prompts[position], error=problem)
        answers = answer_together(
            conversation.model,
            assistant.tokenizer,
            [all_ids[position] for position in fitting],
            self.sampling,
            assistant.context_length,
        )
        for answer in answers:
            position = fitting[answer.index]
            yield (
                position,
                _record(
                    prompts[position],
                    answer=answer.text,
                    prompt_tokens=answer.prompt_tokens,
                    generated_tokens=len(answer.token_ids),
                    finish_reason=answer.finish_reason,
                ),
            )

    def _one_by_one(self, prompts: Sequence[PromptLine]) -> Iterator[tuple[int, Record]]:
        conversation = None
        for position, line in enumerate(prompts):
            if conversation is None or self.subnet is None:
                subnet = self.subnet or self.choose(line.prompt)
                conversation = self.assistant.converse(subnet, self.kv_options)
            try:
                pieces = self.prompt_options.answer(conversation, line.prompt, self.sampling)
                text = "".join(pieces)
            except UsageError as error:  # longer than the context
                yield position, _record(line, error=str(error))
                continue
            stats = conversation.stats
            assert stats is not None
            yield (
                position,
                _record(
                    line,
                    answer=text,
                    prompt_tokens=stats.prompt_tokens,
                    generated_tokens=stats.generated_tokens,
                    finish_reason=stats.finish_reason,
                ),
            )


def answer_lines(
    run: LinesRun, prompts: Sequence[PromptLine], output: Path | None, *, as_json: bool
) -> None:
    """Answer prompts and print or write the answers in their order.

    Args:
        run: how.
        prompts: which.
        output: takes JSON lines; the answers that it holds already are not made again.
        as_json: print JSON lines, where there is no file.

    Raises:
        UsageError: the file holds answers to other prompts, or something else.
        IFPError: some prompts could not be answered; their records say why.
    """
    num_done = 0 if output is None else _resume(output, prompts)
    if num_done:
        say(f"{output} holds {num_done:,} of {plural(len(prompts), 'answer')}; going on")
    left, waiting = prompts[num_done:], dict[int, Record]()
    next_position = num_failed = num_tokens = 0
    start_s = time.perf_counter()
    with _Writer(output, as_json=as_json) as write, ctrl_c_asks() as stopped, measuring() as show:
        answers = run.answers(left) if left else iter(())
        for position, record in answers:
            waiting[position] = record
            while next_position in waiting:
                write(waiting.pop(next_position))
                next_position += 1
            num_failed += "error" in record
            num_tokens += record.get("generated_tokens", 0)
            show("answering", next_position + len(waiting), len(left))
            if stopped():
                raise KeyboardInterrupt
    passed_s = time.perf_counter() - start_s
    say(
        f"{plural(len(left), 'answer')} in {passed_s:.1f} s, {num_tokens:,} tokens, "
        f"{num_tokens / passed_s:.1f} tokens/s"
    )
    if num_failed:
        raise IFPError(f"{plural(num_failed, 'prompt')} could not be answered; see the output")


def _record(line: PromptLine, **values: Any) -> Record:
    return {"line": line.number, "prompt": line.prompt, **values}


class _Writer:
    """Takes records in order: to a file, whole lines at a time, or to standard output."""

    def __init__(self, output: Path | None, *, as_json: bool):
        self._path, self._as_json = output, as_json or output is not None

    def __enter__(self) -> Callable[[Record], None]:
        self._file = sys.stdout
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
        return self._write

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def _write(self, record: Record) -> None:
        if self._as_json:
            text = json.dumps(record, ensure_ascii=False)
        else:
            text = " ".join(record.get("answer", "").split())
        self._file.write(f"{text}\n")
        self._file.flush()


def _resume(output: Path, prompts: Sequence[PromptLine]) -> int:
    """Return how many answers a file holds; what a killed run left of a line is cut off.

    Raises:
        UsageError: it holds answers to other prompts, or something else.
    """
    if not output.exists():
        return 0
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found = [json.loads(line)["prompt"] for line in whole.decode().splitlines()]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{output} holds something else; choose another name") from None
    if found != [line.prompt for line in prompts[: len(found)]]:
        raise UsageError(f"{output} holds answers to other prompts; choose another name")
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return len(found)
