"""``ifp chat``: the loop of a conversation."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.cli import options
from ifp_mlx.cli.answer import answer_writer
from ifp_mlx.cli.loading import ModelChoice, SubnetChoice
from ifp_mlx.cli.terminal import (
    complain,
    is_interactive,
    keys_kept_for_the_prompt,
    plural,
    say,
)
from ifp_mlx.errors import IFPError, UsageError

if TYPE_CHECKING:
    from ifp_mlx.chat.session import Session, SessionSettings
    from ifp_mlx.cli.chat_commands import ChatCommands
    from ifp_mlx.cli.chat_state import Chat, ContextFull
    from ifp_mlx.cli.plain_reader import Reader


def chat(
    context: typer.Context,
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
    max_tokens: options.MaxTokens = 1024,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    prompt_cache_file: options.PromptCacheFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest chat.")] = False,
    session_name: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            autocompletion=options.session_names,
            help="Continue the chat of this name, or begin it.",
        ),
    ] = None,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Keep this chat off the disk.")
    ] = False,
    rebuild_kv: Annotated[
        bool,
        typer.Option(
            "--rebuild-kv",
            help="After a switch of task read the whole conversation again with the new "
            "sub-network, instead of going on from what the former one has read.",
        ),
    ] = False,
    drift: Annotated[
        float,
        typer.Option(
            "--drift",
            metavar="OVERLAP",
            min=0.0,
            max=1.0,
            help="Suggest /retask when a message selects units that have less than this in common "
            "with the sub-network in use; 0 does not look. Costs one selection a message.",
        ),
    ] = 0.0,
    auto_retask: Annotated[
        bool,
        typer.Option("--auto-retask", help="With --drift: reselect instead of suggesting it."),
    ] = False,
    drop_oldest: Annotated[
        bool,
        typer.Option(
            "--drop-oldest", help="When the context is full forget the oldest turns without asking."
        ),
    ] = False,
) -> None:
    """Talk with a model in the terminal.

    /help in the chat lists its commands. Ctrl-C stops a reply, Ctrl-D leaves. Every message is
    saved as it is sent; --resume continues. Messages can be piped in, one a line.
    """
    choice = SubnetChoice(task, keep, keep_units, dense)
    if lossless and prompt_cache_file is not None:
        raise UsageError("--lossless has a KV cache of two models; leave out --prompt-cache-file")
    if prompt_cache_file is not None:
        from ifp_mlx.chat.kv_cache_file import check_kv_path

        check_kv_path(prompt_cache_file)
    if auto_retask and not drift:
        raise UsageError("--auto-retask needs --drift OVERLAP, for example --drift 0.75")
    model_choice = ModelChoice(
        model, adapter, no_adapter, selector, compensate, reuse, not no_cache, force, exact_down
    )

    from ifp_mlx.chat.conversation import SamplingOptions
    from ifp_mlx.chat.session import SessionSettings
    from ifp_mlx.cli.chat_state import Chat

    sampling = SamplingOptions(max_tokens, temp, top_p, top_k, min_p, repetition_penalty, seed)
    settings = SessionSettings(model, task, keep_units, dense, system_prompt)
    session = _open_session(settings, resume, session_name, recorded=not no_save)
    if session.messages:
        # A chat goes on with its own model and system prompt, unless others are asked for.
        source = context.get_parameter_source("model")
        if source is None or source.name != "COMMANDLINE":
            model_choice = dataclasses.replace(model_choice, model=session.settings.model or model)
        if system_prompt is not None:
            session.change_settings(
                dataclasses.replace(session.settings, system_prompt=system_prompt)
            )
    with keys_kept_for_the_prompt() if is_interactive() else contextlib.nullcontext():
        conversation = Chat(
            model_choice,
            choice,
            session,
            sampling,
            rebuilds_kv=rebuild_kv,
            num_draft_tokens=num_draft_tokens if lossless else None,
            kv_path=prompt_cache_file,
        )
        loop = _ChatLoop(conversation, drops_oldest=drop_oldest, drift=drift, retasks=auto_retask)
        try:
            loop.run()
        finally:
            conversation.session.close()
            conversation.save_kv_cache()


def _open_session(
    settings: SessionSettings, resume: bool, name: str | None, *, recorded: bool
) -> Session:
    from ifp_mlx.chat.session import Session, list_sessions, session_path
    from ifp_mlx.storage.home import sessions_folder

    folder = sessions_folder()
    if resume and name is not None:
        raise UsageError("--resume continues the latest chat, --session a named one; give one")
    if resume:
        summaries = list_sessions(folder)
        if not summaries:
            raise UsageError("there is no chat to resume; leave out --resume to begin one")
        name = summaries[0].name
    if name is not None and session_path(folder, name).exists():
        session = Session.load(folder, name)
        if not session.messages:  # emptied, or killed before its first message was whole
            session.change_settings(settings)
        return session
    return Session.new(folder, settings, name, recorded=recorded)


class _ChatLoop:
    """Reads messages, shows answers, until the user leaves."""

    def __init__(self, chat: Chat, *, drops_oldest: bool, drift: float, retasks: bool):
        from ifp_mlx.cli.chat_commands import ChatCommands
        from ifp_mlx.storage.home import sessions_folder

        self._chat = chat
        self._drops_oldest = drops_oldest
        self._drift = drift
        self._retasks = retasks
        self._commands: ChatCommands = ChatCommands(chat, sessions_folder(), options.model_names)
        self._toolbar_line = ""
        self._reader: Reader = self._make_reader()

    def run(self) -> None:
        from ifp_mlx.cli.chat_commands import Leave

        if self._chat.session.messages:
            self._commands.show_recent()
        elif sys.stdin.isatty():
            say(f"{Path(self._chat.model_name).name} · /help for commands, Ctrl-D to leave")
        while True:
            try:
                text = self._next_message()
                if text.startswith("/"):
                    self._commands.run(text)
                elif text.strip():
                    self._answer(text)
            except (EOFError, Leave):
                break
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                say("Ctrl-D or /bye leaves")
            except IFPError as error:
                if not sys.stdin.isatty():
                    raise
                complain(str(error))
        self._say_goodbye()

    def _next_message(self) -> str:
        question, self._commands.question = self._commands.question, None
        if question is not None:
            say(f"› {question}")
            return question
        draft, self._commands.draft = self._commands.draft, ""
        self._toolbar_line = self._toolbar()  # not at every key: it counts the tokens
        return self._reader.read(draft)

    def _answer(self, text: str) -> None:
        self._chat.prepare(text)
        self._notice_drift(text)
        full = self._chat.context_full(text)
        if full is not None and not self._make_room(full):
            self._commands.draft = text
            return
        self._chat.prepare(text)  # a new chat selects anew
        with answer_writer(markdown=True) as write:
            stopped = self._chat.ask(text, write)
        if stopped and not sys.stdin.isatty():
            raise KeyboardInterrupt
        self._say_statistics()
        if sys.stdin.isatty():
            say("")  # some air before the next prompt

    def _notice_drift(self, text: str) -> None:
        """Compare what the message would select with what is in use, from the second one on."""
        if not self._drift or not self._chat.messages:
            return
        overlap = self._chat.overlap_with(text)
        if overlap is None or overlap >= self._drift:
            return
        drifted = f"this message selects other units (overlap {overlap:.2f})"
        if self._retasks:
            say(drifted)
            self._chat.reselect(text)
        else:
            say(f"{drifted}; /retask reselects, then /retry")

    def _make_room(self, full: ContextFull) -> bool:
        """Drop the oldest turns if the user wants that; return whether the message now fits."""
        amounts = (
            f"the context is full: {full.used:,} of {full.context_length:,} tokens, "
            f"this message needs {full.needed:,}"
        )
        if full.needed * 2 > full.context_length:
            raise UsageError(f"{amounts}; shorten the message")
        letter = "d"
        if not self._drops_oldest:
            try:
                say(amounts)
                choices = ["drop the oldest turns", "new chat", "cancel"]
                letter = self._reader.ask("Your choice:", choices)
            except EOFError:
                raise UsageError(f"{amounts}; --drop-oldest forgets the oldest turns") from None
        if letter == "n":
            self._commands.run("/clear")
        if letter == "d":
            # A quarter of the context at once: not again at the next message.
            wanted = max(full.needed, full.context_length // 4)
            num_turns = self._chat.drop_oldest(wanted)
            say(f"forgot the oldest {plural(num_turns, 'turn')}")
        return letter != "c"

    def _say_statistics(self) -> None:
        from ifp_mlx.cli.statistics_line import turn_statistics

        stats = self._chat.stats
        if self._chat.shows_statistics and stats is not None and sys.stderr.isatty():
            length = self._chat.assistant.context_length
            say(turn_statistics(stats, self._chat.num_context_tokens, length))

    def _say_goodbye(self) -> None:
        session = self._chat.session
        if session.messages and session.recorded and sys.stdin.isatty():
            say(f"saved as {session.name}; ifp chat --resume continues")

    def _make_reader(self) -> Reader:
        from ifp_mlx.cli.plain_reader import PROMPT, PlainReader

        if not is_interactive():
            return PlainReader(PROMPT if sys.stdin.isatty() else "")
        from ifp_mlx.cli.line_editor import CommandCompleter, LineEditor
        from ifp_mlx.storage.home import home_folder

        helps = {name: command.help for name, command in self._commands.table.items()}
        completer = CommandCompleter(helps, self._commands.values)
        return LineEditor(home_folder() / "history", completer, lambda: self._toolbar_line)

    def _toolbar(self) -> str:
        from ifp_mlx.cli.statistics_line import context_meter

        chat = self._chat
        meter = context_meter(chat.num_context_tokens, chat.assistant.context_length)
        units = f"{chat.subnet.num_kept_units}/{chat.subnet.num_units} units" if chat.subnet else ""
        return " · ".join(
            part for part in (meter, units, chat.task, Path(chat.model_name).name) if part
        )
