"""The slash commands of a chat."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

from ifp_mlx.chat.session import Session, list_sessions
from ifp_mlx.cli.chat_state import Chat
from ifp_mlx.cli.clipboard import copy_to_clipboard
from ifp_mlx.cli.loading import describe_subnetwork
from ifp_mlx.cli.options import Amount
from ifp_mlx.cli.statistics_line import context_meter, full_statistics
from ifp_mlx.cli.terminal import plural, say, status_console, title
from ifp_mlx.errors import UsageError

_RECENT_CHARACTERS = 300  # of each message of the last exchange, shown when a chat goes on


@dataclasses.dataclass(frozen=True)
class Command:
    """One slash command.

    Attributes:
        arguments: what may follow it, as shown in the help.
        help: one line.
        run: does it, given the text after the command.
        values: what completion offers after it.
    """

    arguments: str
    help: str
    run: Callable[[str], None]
    values: Callable[[], Iterable[str]] = tuple


class Leave(Exception):
    """The user wants to end the chat."""


class ChatCommands:
    """Runs slash commands on a chat.

    Attributes:
        draft: text that the next prompt begins with (``/edit``).
        question: a message to ask at once (``/retry``).
    """

    def __init__(self, chat: Chat, sessions_folder: Path, models: Callable[[], list[str]]):
        self._chat = chat
        self._sessions_folder = sessions_folder
        self.draft = ""
        self.question: str | None = None
        self.table = {
            "/task": Command("[TEXT]", "show the task, or switch to another", self._task, _tasks),
            "/retask": Command("", "reselect from the recent conversation", self._retask),
            "/keep": Command("[RATIO|UNITS]", "show or change how much is kept", self._keep),
            "/dense": Command("[off]", "answer with the whole model", self._dense, _on_off),
            "/stats": Command("[on|off]", "show measurements, or the line", self._stats, _on_off),
            "/system": Command("[TEXT|off]", "show or set the system prompt", self._system),
            "/model": Command("[NAME]", "show or change the model", self._model, models),
            "/save": Command("NAME", "give this chat a name", self._save),
            "/load": Command(
                "[NAME]", "list the saved chats, or continue one", self._load, self._names
            ),
            "/sessions": Command("", "list the saved chats", self._sessions),
            "/clear": Command("", "begin a new chat", self._clear),
            "/retry": Command("[TEMP]", "answer the last message again", self._retry),
            "/edit": Command("", "change the last message and send it again", self._edit),
            "/copy": Command("[code]", "copy the last answer, or its code", self._copy, _code),
            "/help": Command("", "show this", self._help),
            "/bye": Command("", "leave; so does Ctrl-D", self._bye),
        }

    def run(self, line: str) -> None:
        """Run one line that starts with a slash.

        Raises:
            UsageError: there is no such command, or its argument is wrong.
            Leave: the user wants to go.
        """
        name, _, argument = line.strip().partition(" ")
        name = {"/exit": "/bye", "/quit": "/bye", "/?": "/help"}.get(name, name)
        if name not in self.table:
            near = [known for known in self.table if known.startswith(name)]
            near = near or difflib.get_close_matches(name, self.table, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else "/help lists them"
            raise UsageError(f"no command {name}; {hint}")
        self.table[name].run(argument.strip())

    def values(self, name: str) -> Iterable[str]:
        """Return what completion offers after a command."""
        command = self.table.get(name)
        return command.values() if command else ()

    def _task(self, text: str) -> None:
        if not text:
            if self._chat.subnet is None:
                say("no task: the next message selects the sub-network")
            else:
                say(f"task: {self._chat.task or 'none, the first message selected'}")
                say(describe_subnetwork(self._chat.subnet))
            return
        _say_overlap(self._chat.change_task(text), kept="the conversation goes on")

    def _retask(self, _: str) -> None:
        _say_overlap(self._chat.reselect(), kept="the conversation goes on")

    def _keep(self, text: str) -> None:
        if not text:
            assistant, subnet = self._chat.assistant, self._chat.subnet
            kept = subnet.num_kept_units if subnet else "default"
            units = f"{assistant.num_units} {assistant.kind.label}"
            say(f"{kept} of {units}; /keep 0.5 or /keep 768 changes it")
            return
        number = _number(text, "/keep takes a ratio like 0.5 or a number of units like 768")
        is_ratio = "." in text or number <= 1
        amount = Amount(keep=number) if is_ratio else Amount(keep_units=int(number))
        _say_overlap(self._chat.change_amount(amount))

    def _dense(self, text: str) -> None:
        if text not in ("", "on", "off"):
            raise UsageError("/dense answers with the whole model, /dense off goes back")
        self._chat.use_dense(text != "off")

    def _stats(self, text: str) -> None:
        if text in ("on", "off"):
            self._chat.shows_statistics = text == "on"
            say(f"the line below each reply is {text}")
        elif text:
            raise UsageError("/stats shows the last reply's measurements; /stats on, /stats off")
        elif self._chat.stats is None or self._chat.answered_by is None:
            say("no reply to measure yet")
        else:
            say(full_statistics(self._chat.answered_by, self._chat.stats))
            say(context_meter(self._chat.num_context_tokens, self._chat.assistant.context_length))

    def _system(self, text: str) -> None:
        if not text:
            say(f"system prompt: {self._chat.system_prompt or 'none'}")
            return
        self._chat.change_system_prompt(None if text == "off" else text)
        say("no system prompt from now on" if text == "off" else "system prompt set")

    def _model(self, text: str) -> None:
        if not text:
            say(f"model: {self._chat.model_name} ({self._chat.assistant.model_path})")
            return
        self._chat.change_model(text)

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save takes a name; the chat is recorded in any case")
        self._chat.session.rename(self._sessions_folder, text)
        say(f"saved as {text}; ifp chat --session {text} continues it")

    def _load(self, text: str) -> None:
        if not text:
            self._sessions("")
            return
        if text == self._chat.session.name:
            raise UsageError(f"{text} is the chat you are in")
        self._chat.change_session(Session.load(self._sessions_folder, text))
        self.show_recent()

    def _names(self) -> Iterable[str]:
        return [summary.name for summary in list_sessions(self._sessions_folder)]

    def _sessions(self, _: str) -> None:
        summaries = list_sessions(self._sessions_folder)
        if not summaries:
            say("no saved chats")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for _column in range(4):
            table.add_column(overflow="fold")
        for summary in summaries:
            table.add_row(
                summary.name,
                f"{summary.modified.astimezone():%d %b %H:%M}",
                plural(summary.num_messages, "message"),
                Text(title(summary.title)),
            )
        status_console().print(table)

    def _clear(self, _: str) -> None:
        former = self._chat.session
        self._chat.clear(self._sessions_folder)
        kept = f" (/load {former.name} returns)" if former.messages and former.recorded else ""
        say(f"new chat{kept}")

    def _retry(self, text: str) -> None:
        if text:
            number = _number(text, "/retry takes a temperature like 0.7, or nothing")
            self._chat.sampling = dataclasses.replace(self._chat.sampling, temperature=number)
        elif self._chat.sampling.temperature == 0 and self._chat.unanswered is None:
            say("at temperature 0 the same question gets the same answer; try /retry 0.7")
        self.question = self._chat.take_back()

    def _edit(self, _: str) -> None:
        self.draft = self._chat.take_back()

    def _copy(self, text: str) -> None:
        answer = self._chat.last_answer
        if answer is None:
            raise UsageError("there is no answer to copy yet")
        if text not in ("", "code"):
            raise UsageError("/copy copies the last answer, /copy code its last code block")
        if text == "code":
            blocks = code_blocks(answer)
            if not blocks:
                raise UsageError("the last answer has no code block")
            answer = blocks[-1]
        way = copy_to_clipboard(answer)
        say(f"copied {plural(len(answer), 'character')} ({way})")

    def _help(self, _: str) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(style="dim")
        for name, command in self.table.items():
            table.add_row(Text(f"{name} {command.arguments}"), command.help)
        console = status_console()
        console.print(table)
        say(
            'Enter sends; Alt-Enter, Ctrl-J or """ begin a new line; Ctrl-G opens your editor; '
            "Ctrl-R searches; Ctrl-C stops a reply."
        )

    def _bye(self, _: str) -> None:
        raise Leave

    def show_recent(self) -> None:
        """Show the beginnings of the last exchange of a continued chat."""
        console = status_console()
        for message in self._chat.session.messages[-2:]:
            text = message["content"].strip()
            if len(text) > _RECENT_CHARACTERS:
                text = f"{text[:_RECENT_CHARACTERS]}…"
            mark = "› " if message["role"] == "user" else ""
            console.print(f"{mark}{text}", style="dim", markup=False)


def code_blocks(markdown: str) -> list[str]:
    """Return the contents of the fenced code blocks of a Markdown text."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(markdown) if token.type == "fence"]


def _tasks() -> Iterable[str]:
    from ifp_mlx.storage.home import subnet_cache_folder
    from ifp_mlx.subnets.task_cache import TaskCache

    return sorted({entry.key.task for entry in TaskCache(subnet_cache_folder()).entries()})


def _on_off() -> Iterable[str]:
    return ("on", "off")


def _code() -> Iterable[str]:
    return ("code",)


def _number(text: str, advice: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(advice) from None


def _say_overlap(overlap: float | None, *, kept: str = "") -> None:
    parts = [] if overlap is None else [f"{overlap:.0%} of the units are those of the former one"]
    if kept:
        parts.append(kept)
    if parts:
        say("; ".join(parts))
