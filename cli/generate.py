"""``ifp generate``: prompts answered, without a conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.cli import options
from ifp_mlx.cli.answer import OnRead, answer_writer, stream_answer
from ifp_mlx.cli.kv_options import KVFlags, begin_conversation
from ifp_mlx.cli.lines import LinesOptions, LinesRun, answer_lines
from ifp_mlx.cli.loading import choose_subnetwork, describe_subnetwork, load_assistant
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.presets import with_preset
from ifp_mlx.cli.prompts import PromptOptions, read_prompt
from ifp_mlx.cli.statistics_line import full_statistics, statistics_record
from ifp_mlx.cli.terminal import print_json, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.subnets.subnetwork import SubNetwork


Schema = Annotated[
    Path | None,
    typer.Option(
        "--schema",
        metavar="FILE",
        help="Answer with JSON that fits the JSON schema in this file, and nothing else.",
    ),
]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is printed beside the answer."""

    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Also say on standard error how fast that was, and in how much memory."
        ),
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its measurements as JSON.")
    ] = False


@expands_options
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to answer. A - in it stands for standard input, which is read as well if "
            "there is no prompt.",
            show_default=False,
        ),
    ] = None,
    *,
    subnet_options: options.SubnetOptions,
    assistant_options: options.AssistantOptions,
    prompt_options: PromptOptions,
    schema: Schema = None,
    lines_options: LinesOptions,
    sampling_flags: options.SamplingFlags,
    kv_flags: KVFlags,
    output: OutputOptions,
) -> None:
    """Answer one prompt, or many, and leave. Only answers go to standard output.

    Without --task the whole model answers, except where a prompt is so long that the answer comes
    sooner if the prompt itself selects a part first.

    Examples: ifp generate "Write a haiku about the sea";
    git diff | ifp generate --task "write commit messages" "Write a commit message:" -;
    ifp generate --lines questions.txt -o answers.jsonl
    """
    wanted = with_preset(
        context, subnet_options, prompt_options.system_prompt, sampling_flags.options
    )
    subnet_options, sampling = wanted.subnet_options, wanted.sampling
    if not prompt_options.ignore_chat_template:
        prompt_options = PromptOptions(wanted.system_prompt)
    if schema is not None:
        sampling = dataclasses.replace(sampling, schema=read_schema(schema))
    if lines_options.lines is not None:
        if prompt:
            raise UsageError("--lines brings the prompts; leave out the other one")
        _answer_lines(
            lines_options, subnet_options, assistant_options, prompt_options, sampling, kv_flags,
            output,
        )  # fmt: skip
        return
    text = read_prompt(prompt or ())
    assistant = load_assistant(
        assistant_options,
        task=subnet_options.task,
        preload=subnet_options.needs_dense_model,
    )
    where_it_pays = assistant_options.selector == "auto"
    subnet = choose_subnetwork(assistant, subnet_options, text, where_it_pays=where_it_pays)
    say(describe_subnetwork(subnet))
    conversation, kv_file = begin_conversation(assistant, subnet, kv_flags)

    def begin(on_read: OnRead) -> Iterator[str]:
        return prompt_options.answer(conversation, text, sampling, on_read)

    pieces: list[str] = []
    if output.as_json:
        interrupted = stream_answer(begin, pieces.append)
    else:
        is_prose = not prompt_options.ignore_chat_template and schema is None
        with answer_writer(markdown=is_prose) as write:
            interrupted = stream_answer(begin, write)
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


def _answer_lines(
    lines_options: LinesOptions,
    subnet_options: options.SubnetOptions,
    assistant_options: options.AssistantOptions,
    prompt_options: PromptOptions,
    sampling: SamplingOptions,
    kv_flags: KVFlags,
    output: OutputOptions,
) -> None:
    """Answer many prompts with one sub-network; with one for each if they are to select."""
    if kv_flags.file.prompt_cache_file is not None:
        raise UsageError("--prompt-cache-file keeps one conversation; leave it out with --lines")
    prompts = lines_options.read()
    assistant = load_assistant(
        assistant_options, task=subnet_options.task, preload=subnet_options.needs_dense_model
    )

    def choose(text: str) -> SubNetwork:
        return choose_subnetwork(assistant, subnet_options, text)

    each_selects = subnet_options.task is None and not subnet_options.dense
    if each_selects and not subnet_options.amount.is_given and assistant.keeps_whole:
        each_selects = False
        subnet_options = options.SubnetOptions(dense=True)
    subnet = None if each_selects else choose("")
    if subnet is None:
        say("each prompt selects its own sub-network, so they are answered one by one")
    else:
        say(describe_subnetwork(subnet))
    run = LinesRun(assistant, subnet, choose, prompt_options, sampling, kv_flags.options)
    answer_lines(run, prompts, lines_options.output, as_json=output.as_json)


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
