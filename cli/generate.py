"""``ifp generate``: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.cli import options
from ifp_mlx.cli.answer import answer_writer, stream_answer
from ifp_mlx.cli.kv_options import KVFlags, begin_conversation
from ifp_mlx.cli.loading import choose_subnetwork, describe_subnetwork, load_assistant
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.prompts import read_prompt
from ifp_mlx.cli.statistics_line import full_statistics, statistics_record
from ifp_mlx.cli.terminal import print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.chat.conversation import Conversation


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What is put around the prompt."""

    system_prompt: options.SystemPrompt = None
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            "--raw",
            help="Continue the prompt as it is, without the chat template.",
        ),
    ] = False

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.ignore_chat_template and self.system_prompt is not None:
            raise UsageError(
                "--system-prompt needs the chat template; leave out --ignore-chat-template"
            )

    def answer(
        self, conversation: Conversation, text: str, sampling: SamplingOptions
    ) -> Iterator[str]:
        """Stream the answer to a prompt, or its continuation."""
        if self.ignore_chat_template:
            return conversation.complete(text, sampling)
        messages = [{"role": "user", "content": text}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return conversation.reply(messages, sampling)


Schema = Annotated[
    Path | None,
    typer.Option(
        "--schema",
        metavar="FILE",
        help="Answer with JSON that fits the JSON schema in this file; no other token can come.",
    ),
]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is printed beside the answer."""

    stats: Annotated[
        bool, typer.Option("--stats", help="Print selection, speed and memory on stderr.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its statistics as JSON.")
    ] = False


@expands_options
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. - reads standard input; piped text follows a prompt given here.",
            show_default=False,
        ),
    ] = None,
    *,
    subnet_options: options.SubnetOptions,
    assistant_options: options.AssistantOptions,
    prompt_options: PromptOptions,
    schema: Schema = None,
    sampling_flags: options.SamplingFlags,
    kv_flags: KVFlags,
    output: OutputOptions,
) -> None:
    """Answer one prompt and leave. Only the answer goes to standard output.

    Examples: ifp generate "Write a haiku about the sea" --keep 0.5 --stats;
    git diff | ifp generate --task "write commit messages" -
    """
    sampling = sampling_flags.options
    if schema is not None:
        sampling = dataclasses.replace(sampling, schema=read_schema(schema))
    text = read_prompt(prompt)
    assistant = load_assistant(
        assistant_options,
        task=subnet_options.task,
        preload=subnet_options.needs_dense_model,
    )
    subnet = choose_subnetwork(assistant, subnet_options, text)
    say(describe_subnetwork(subnet))
    conversation, kv_file = begin_conversation(assistant, subnet, kv_flags)
    answer = prompt_options.answer(conversation, text, sampling)
    pieces: list[str] = []
    if output.as_json:
        interrupted = stream_answer(answer, pieces.append)
    else:
        is_prose = not prompt_options.ignore_chat_template and schema is None
        with answer_writer(markdown=is_prose) as write:
            interrupted = stream_answer(answer, write)
    measured = conversation.stats
    if kv_file is not None and measured is not None:
        kv_file.save(conversation.kv_cache)
    if output.as_json:
        record = statistics_record(subnet, measured) if measured else {}
        print_json({"answer": "".join(pieces), "model": str(assistant.model_path), **record})
    elif output.stats and measured:
        say(full_statistics(subnet, measured))
    if interrupted:
        raise KeyboardInterrupt
    if schema is not None and measured is not None and measured.finish_reason == "length":
        say("the answer ends before its JSON does; allow more with --max-tokens")


def read_schema(path: Path) -> dict[str, Any]:
    """Return the JSON schema in a file.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    try:
        schema = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{path} is no JSON schema; it must hold a JSON object")
    return schema
