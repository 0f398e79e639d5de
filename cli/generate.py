"""``ifp generate``: one prompt, one answer."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.answer import answer_writer, stream_answer
from ifp_mlx.cli.loading import (
    ModelChoice,
    SubnetChoice,
    choose_subnetwork,
    describe_subnetwork,
    load_assistant,
)
from ifp_mlx.cli.prompts import read_prompt
from ifp_mlx.cli.statistics_line import full_statistics, statistics_record
from ifp_mlx.cli.terminal import print_json, say
from ifp_mlx.errors import UsageError


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. - reads standard input; piped text follows a prompt given here.",
            show_default=False,
        ),
    ] = None,
    task: options.Task = None,
    keep: options.Keep = None,
    keep_units: options.KeepUnits = None,
    selector: options.Selector = "auto",
    dense: options.Dense = False,
    compensate: options.Compensate = False,
    reuse: options.Reuse = None,
    no_cache: options.NoCache = False,
    exact_down: options.ExactDown = False,
    force: options.Force = False,
    lossless: options.Lossless = False,
    num_draft_tokens: options.NumDraftTokens = 4,
    model: options.Model = options.DEFAULT_MODEL,
    adapter: options.Adapter = None,
    no_adapter: options.NoAdapter = False,
    system_prompt: options.SystemPrompt = None,
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            "--raw",
            help="Continue the prompt as it is, without the chat template.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = 512,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    max_kv_size: Annotated[
        int | None,
        typer.Option(
            "--max-kv-size",
            metavar="N",
            min=1,
            help="Keep only this many positions.",
        ),
    ] = None,
    kv_bits: Annotated[
        int | None,
        typer.Option("--kv-bits", metavar="N", help="Quantize keys and values to 2, 4 or 8 bits."),
    ] = None,
    prompt_cache_file: options.PromptCacheFile = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print selection, speed and memory on stderr.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its statistics as JSON.")
    ] = False,
) -> None:
    """Answer one prompt and leave. Only the answer goes to standard output.

    Examples: ifp generate "Write a haiku about the sea" --keep 0.5 --stats;
    git diff | ifp generate --task "write commit messages" -
    """
    choice = SubnetChoice(task, keep, keep_units, dense)
    if lossless and dense:
        raise UsageError("--lossless checks a sub-network's draft; leave out --dense")
    if lossless and prompt_cache_file is not None:
        raise UsageError("--lossless has a KV cache of two models; leave out --prompt-cache-file")
    if ignore_chat_template and system_prompt is not None:
        raise UsageError(
            "--system-prompt needs the chat template; leave out --ignore-chat-template"
        )
    if prompt_cache_file is not None:
        from ifp_mlx.chat.kv_cache_file import check_kv_path

        check_kv_path(prompt_cache_file)

    from ifp_mlx.chat.conversation import Conversation, KVCacheOptions, SamplingOptions

    sampling = SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repetition_penalty, seed)
    text = read_prompt(prompt)
    assistant = load_assistant(
        ModelChoice(
            model, adapter, no_adapter, selector, compensate, reuse, not no_cache, force, exact_down
        ),
        preload=choice.needs_dense,
    )
    kv_options = KVCacheOptions(max_kv_size, kv_bits)
    subnet = choose_subnetwork(assistant, choice, text)
    say(describe_subnetwork(subnet))
    kv_file = None
    kept: tuple[list[Any], list[int]] | None = None
    if prompt_cache_file is not None:
        from ifp_mlx.chat.kv_cache_file import KVCacheFile

        options_of_kv = dataclasses.asdict(kv_options)
        kv_file = KVCacheFile(prompt_cache_file, assistant.kv_identity(subnet) | options_of_kv)
        kept = kv_file.load(say)
    conversation = Conversation(
        assistant.dense().model if lossless else subnet.model,
        assistant.tokenizer,
        assistant.context_length,
        system_prompt=system_prompt,
        kv_options=kv_options,
        kv_cache=kept[0] if kept else None,
        kv_token_ids=kept[1] if kept else (),
        draft_model=subnet.model if lossless else None,
        num_draft_tokens=num_draft_tokens,
    )
    answer = conversation.complete if ignore_chat_template else conversation.reply
    pieces: list[str] = []
    if as_json:
        interrupted = stream_answer(answer(text, sampling), pieces.append)
    else:
        with answer_writer(markdown=not ignore_chat_template) as write:
            interrupted = stream_answer(answer(text, sampling), write)
    measured = conversation.stats
    if kv_file is not None and measured is not None:
        kv_file.save(conversation.kv_cache, conversation.kv_token_ids)
    if as_json:
        record = statistics_record(subnet, measured) if measured else {}
        print_json({"answer": "".join(pieces), "model": str(assistant.model_path), **record})
    elif stats and measured:
        say(full_statistics(subnet, measured))
    if interrupted:
        raise KeyboardInterrupt
