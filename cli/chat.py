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
from ifp_mlx.cli.help_sections import ADVANCED
from ifp_mlx.cli.kv_options import KVFileOptions
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.presets import with_preset
from ifp_mlx.cli.terminal import (
    complain,
    is_interactive,
    keys_kept_for_the_prompt,
    plural,
    refuse_several_machines,
    say,
    status_console,
)
from ifp_mlx.errors import IFPError, UsageError

if TYPE_CHECKING:
    from ifp_mlx.chat.session import Session, SessionSettings
    from ifp_mlx.cli.chat_commands import ChatCommands
    from ifp_mlx.cli.chat_state import Chat, ContextFull
    from ifp_mlx.cli.plain_reader import Reader


def session_names() -> list[str]:
    """Return the names of the saved chats, the latest first."""
    from ifp_mlx.chat.session import list_sessions
    from ifp_mlx.storage.home import sessions_folder

    return [summary.name for summary in list_sessions(sessions_folder())]


@dataclasses.dataclass(frozen=True)
class ChatSamplingFlags(options.SamplingFlags):
    """How answers are drawn: in a chat they may be longer."""

    max_tokens: options.MaxTokens = 1024


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """Which chat, and whether it is recorded."""

    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest chat.")] = False
    session_name: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            autocompletion=session_names,
            help="Continue the chat of this name, or begin it.",
        ),
    ] = None
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep this chat off the disk.")] = False

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.resume and self.session_name is not None:
            raise UsageError("--resume continues the latest chat, --session a named one; give one")


@dataclasses.dataclass(frozen=True)
class TurnOptions:
    """What is looked at before a message is answered."""

    drift: Annotated[
        float,
        typer.Option(
            "--drift",
            metavar="OVERLAP",
            min=0.0,
            max=1.0,
            help="Suggest /retask when a message would select units of which less than this share "
            "is in use; 0 does not look. It costs one selection for each message.",
            rich_help_panel=ADVANCED,
        ),
    ] = 0.0
    drop_oldest: Annotated[
        bool,
        typer.Option(
            "--drop-oldest",
            help="When the conversation is longer than the model can read, forget its beginning "
            "without asking.",
            rich_help_panel=ADVANCED,
        ),
    ] = False


@expands_options
def chat(
    context: typer.Context,
    *,
    subnet_options: options.SubnetOptions,
    assistant_options: options.AssistantOptions,
    system_prompt: options.SystemPrompt = None,
    sampling_flags: ChatSamplingFlags,
    kv_file_options: KVFileOptions,
    session_options: SessionOptions,
    turn_options: TurnOptions,
) -> None:
    """Talk with a model in the terminal.

    Without --task the first message selects the part of the model that answers, unless it is long
    and that would take longer than it saves. /help in the chat
    lists its commands, Ctrl-C stops a reply, Ctrl-D leaves. Every message is saved as it is sent,
    and --resume continues the chat. Messages can be piped in, one on each line.

    Example: ifp chat --task "help me write Python"
    """
    refuse_several_machines("chat")
    from ifp_mlx.chat.session import SessionSettings
    from ifp_mlx.cli.chat_state import Chat

    wanted = with_preset(context, subnet_options, system_prompt, sampling_flags.options)
    subnet_options, system_prompt = wanted.subnet_options, wanted.system_prompt
    sampling = wanted.sampling
    session = _open_session(
        SessionSettings(
            assistant_options.source.model,
            subnet_options.task,
            subnet_options.amount.keep_units,
            subnet_options.dense,
            system_prompt,
        ),
        session_options,
    )
    if session.messages:
        # A chat goes on with its own model and system prompt, unless others are asked for.
        if session.settings.model and not _is_on_the_command_line(context, "model"):
            assistant_options = assistant_options.with_model(session.settings.model)
        if system_prompt is not None:
            session.change_settings(
                dataclasses.replace(session.settings, system_prompt=system_prompt)
            )
    with keys_kept_for_the_prompt() if is_interactive() else contextlib.nullcontext():
        conversation = Chat(assistant_options, subnet_options, session, sampling, kv_file_options)
        try:
            _ChatLoop(conversation, turn_options).run()
        finally:
            conversation.session.close()
            conversation.save_kv_cache()


def _is_on_the_command_line(context: typer.Context, name: str) -> bool:
    """Return whether a parameter was given as a flag, not only in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _open_session(settings: SessionSettings, wanted: SessionOptions) -> Session:
    from ifp_mlx.chat.session import Session, list_sessions, session_path
    from ifp_mlx.storage.home import sessions_folder

    folder, name = sessions_folder(), wanted.session_name
    if wanted.resume:
        summaries = list_sessions(folder)
        if not summaries:
            raise UsageError("there is no chat to resume; leave out --resume to begin one")
        name = summaries[0].name
    if name is not None and session_path(folder, name).exists():
        session = Session.load(folder, name)
        if not session.messages:  # emptied, or killed before its first message was whole
            session.change_settings(settings)
        return session
    return Session.new(folder, settings, name, recorded=not wanted.no_save)


class _ChatLoop:
    """Reads messages, shows answers, until the user leaves."""

    def __init__(self, chat: Chat, turn_options: TurnOptions):
        from ifp_mlx.cli.chat_commands import ChatCommands
        from ifp_mlx.storage.home import sessions_folder

        self._chat = chat
        self._options = turn_options
        self._commands: ChatCommands = ChatCommands(chat, sessions_folder(), options.model_names)
        self._toolbar_line = ""
        self._is_off_task = False
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
        self._notice_missing_experts()
        if sys.stdin.isatty():
            say("")  # some air before the next prompt

    def _notice_drift(self, text: str) -> None:
        """Compare what the message would select with what is in use, from the second one on."""
        if not self._options.drift or not self._chat.messages:
            return
        overlap = self._chat.overlap_with(text)
        if overlap is not None and overlap < self._options.drift:
            say(
                f"this message selects other units (overlap {overlap:.2f}); "
                "/retask reselects, then /retry"
            )

    def _notice_missing_experts(self) -> None:
        """Say once when a mixture's routers begin to want what the sub-network lacks."""
        from ifp_mlx.slicing.drift import leaves_task

        stats, subnet = self._chat.stats, self._chat.answered_by
        if stats is None or subnet is None or stats.missing_share is None:
            return
        was_off_task, share = self._is_off_task, stats.missing_share
        self._is_off_task = leaves_task(share, subnet.num_kept_units, subnet.num_units)
        if self._is_off_task and not was_off_task:
            say(
                f"this leaves the task: {share:.0%} of the routers' weight wanted experts that are "
                "not there; /retask selects anew, then /retry, or /keep keeps more"
            )

    def _make_room(self, full: ContextFull) -> bool:
        """Drop the oldest turns if the user wants that; return whether the message now fits."""
        amounts = (
            f"the context is full: {full.used:,} of {full.context_length:,} tokens, "
            f"this message needs {full.needed:,}"
        )
        if full.needed * 2 > full.context_length:
            raise UsageError(f"{amounts}; shorten the message")
        letter = "d"
        if not self._options.drop_oldest:
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
            used, width = self._chat.num_context_tokens, status_console().width
            say(turn_statistics(stats, used, length, width))

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
        from ifp_mlx.cli.statistics_line import chat_status

        chat = self._chat
        return chat_status(
            chat.subnet,
            chat.task,
            Path(chat.model_name).name,
            chat.num_context_tokens,
            chat.assistant.context_length,
            status_console().width,
        )
