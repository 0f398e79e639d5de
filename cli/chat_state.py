"""A chat while it runs: who answers, what was said, and the record of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ifp_mlx.chat.session import Session, SessionSettings
from ifp_mlx.cli.answer import stream_answer
from ifp_mlx.cli.kv_options import KVFileOptions, KVFlags, begin_conversation
from ifp_mlx.cli.loading import (
    choose_subnetwork,
    describe_subnetwork,
    load_assistant,
    num_kept_units,
)
from ifp_mlx.cli.options import Amount, AssistantOptions, ModelOptions, SubnetOptions
from ifp_mlx.cli.terminal import plural, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.generation import GenerationStats
    from ifp_mlx.chat.kv_cache_file import KVCacheFile
    from ifp_mlx.chat.sampling import SamplingOptions
    from ifp_mlx.subnets.subnetwork import SubNetwork

_RETASK_MESSAGES = 4  # how much of the recent conversation /retask reads
_ROOM_FOR_ANSWER = 64  # tokens; with less left the context counts as full
_LONG_MESSAGE = 512
"""Tokens. Selecting by a shorter first message takes little, and the chat goes on with the part."""

_TEMPLATE_TOKENS = 16  # what a chat template puts around one message, generously

Messages = Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class ContextFull:
    """The next message leaves too little room: all amounts are tokens."""

    used: int
    needed: int
    context_length: int


class Chat:
    """One model, one sub-network, one conversation and its session on disk.

    Attributes:
        assistant: the loaded model.
        session: where every message is recorded; nothing else knows what was said.
        sampling: how tokens are drawn.
        answered_by: what gave the last reply.
        subnet: what answers; None until the first message selects it.
        unanswered: a message whose reply was lost when an earlier chat was killed. The next message
            takes its place.
        shows_statistics: print a line of measurements below each reply.

    Args:
        kv_file_options: a file that the first conversation's KV cache comes from, and goes to in
            the end.
    """

    def __init__(
        self,
        assistant_options: AssistantOptions,
        subnet_options: SubnetOptions,
        session: Session,
        sampling: SamplingOptions,
        kv_file_options: KVFileOptions,
    ):
        self._assistant_options = assistant_options
        self._choice = subnet_options
        self._amount = Amount()  # how much was kept before ``/dense``
        self.session = session
        self.sampling = sampling
        self.shows_statistics = True
        self.assistant: Assistant = load_assistant(
            assistant_options,
            task=subnet_options.task,
            preload=subnet_options.needs_dense_model,
        )
        self.subnet: SubNetwork | None = None
        self.answered_by: SubNetwork | None = None
        self.unanswered: str | None = None
        self._num_replaced = 0  # newest messages in the session that the next one replaces
        self._conversation: Conversation | None = None
        self._kv_flags = KVFlags(file=kv_file_options)
        self._kv_file: KVCacheFile | None = None
        self._adopt_session(session, subnet_options)
        if self.task is not None or self._choice.dense:
            self._select("")

    @property
    def task(self) -> str | None:
        """The task description, None if the first message selected."""
        return self._choice.task

    @property
    def system_prompt(self) -> str | None:
        """The system message, if there is one."""
        return self.session.settings.system_prompt

    @property
    def model_name(self) -> str:
        """The model as the user named it."""
        return self._assistant_options.source.model

    @property
    def messages(self) -> list[dict[str, str]]:
        """What has been said, without what the next message replaces."""
        return self.session.messages[: len(self.session.messages) - self._num_replaced]

    @property
    def stats(self) -> GenerationStats | None:
        """Measurements of the last reply."""
        return self._conversation.stats if self._conversation else None

    @property
    def last_answer(self) -> str | None:
        """The last reply, as far as it came."""
        answers = [m["content"] for m in self.messages if m["role"] == "assistant"]
        return answers[-1] if answers else None

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the conversation takes in the context."""
        if self.subnet is None or (self._conversation is None and not self.messages):
            return 0
        return self._ready("").num_tokens(self._with_system(self.messages))

    def context_full(self, text: str) -> ContextFull | None:
        """Return the amounts if ``text`` and an answer no longer fit the context, else None."""
        needed = len(self.assistant.tokenizer.encode(text)) + _TEMPLATE_TOKENS
        used, length = self.num_context_tokens, self.assistant.context_length
        if used + needed + _ROOM_FOR_ANSWER <= length:
            return None
        return ContextFull(used, needed, length)

    def ask(self, text: str, write: Callable[[str], None]) -> bool:
        """Stream the answer to a message; return whether Ctrl-C ended it early.

        The message is on disk before the answer begins, the answer as soon as it ends.
        """
        conversation = self._ready(text)
        # Not before all is ready: what is replaced stays until its replacement is on disk.
        self.session.add_message("user", text, replaces=self._num_replaced)
        self.unanswered, self._num_replaced = None, 0
        self.answered_by = self.subnet
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            messages = self._with_system(self.messages)
            return stream_answer(
                lambda on_read: conversation.reply(messages, self.sampling, on_read), take
            )
        finally:
            if pieces:
                self.session.add_message("assistant", "".join(pieces))
            else:
                self.session.drop_last(1)  # nothing was said: the question is taken back, too

    def prepare(self, text: str) -> None:
        """Select for the first message, so that what is said about it comes before the answer."""
        self._ready(text)

    def change_subnetwork(self, choice: SubnetOptions, text: str | None = None) -> float | None:
        """Go on with another sub-network; return the share of units that it has in common.

        Args:
            choice: task, amount or dense.
            text: what selects if there is no task; None takes the first message again.
        """
        former, former_choice = self.subnet, self._choice
        text = text or self._first_question()
        self._choice = choice
        if former is not None:
            self.assistant.release(former)
        try:
            if choice.task is None and text is None and not choice.dense:
                # An amount that does not fit is refused now, not at the next message.
                num_kept_units(self.assistant, choice.amount)
                self.subnet = None
            else:
                self._select(text or "")
        except BaseException:
            self._choice = former_choice  # refused, or stopped: all stays as it was
            if former is not None and not self.assistant.is_whole(former):
                self.subnet = None  # but for what the new one was being made of
            raise
        self._record_settings()
        if former is None or self.subnet is None:
            return None
        if former.selection is None or self.subnet.selection is None:
            return None
        return former.selection.mean_overlap(self.subnet.selection)

    def change_task(self, task: str) -> float | None:
        """Switch to a task; return the overlap with the former sub-network."""
        return self.change_subnetwork(self._sparse(task))

    def reselect(self) -> float | None:
        """Let the recent conversation select; return the overlap with the former sub-network.

        Raises:
            UsageError: nothing has been said yet.
        """
        recent = [m["content"] for m in self.messages[-_RETASK_MESSAGES:]]
        if not recent:
            raise UsageError("nothing has been said yet; /task TEXT names a task")
        return self.change_subnetwork(self._sparse(None), "\n\n".join(recent))

    def overlap_with(self, message: str) -> float | None:
        """Return how much the units that a message selects have in common with those in use.

        None for the whole model, which every message fits.
        """
        if self.subnet is None or self.subnet.selection is None:
            return None
        selected = self.assistant.select_for(message, self.subnet.num_kept_units)
        return self.subnet.selection.mean_overlap(selected)

    def change_amount(self, amount: Amount) -> float | None:
        """Keep another amount of units; return the overlap with the former sub-network."""
        return self.change_subnetwork(SubnetOptions(self.task, amount))

    def use_dense(self, wanted: bool) -> None:
        """Answer with the whole model, or with the task's sub-network again."""
        former = self._sparse(self.task)
        self.change_subnetwork(SubnetOptions(self.task, dense=True) if wanted else former)
        self._amount = former.amount

    def _sparse(self, task: str | None) -> SubnetOptions:
        """Return the choice of a sub-network for a task, as large as the latest one."""
        return SubnetOptions(task, self._amount if self._choice.dense else self._choice.amount)

    def change_system_prompt(self, text: str | None) -> None:
        """Set or remove the system message; the conversation stays."""
        settings = dataclasses.replace(self.session.settings, system_prompt=text)
        self.session.change_settings(settings)

    def change_model(self, name: str) -> None:
        """Load another model and go on with the same conversation."""
        source = ModelOptions(name, no_adapter=self._assistant_options.source.no_adapter)
        options = dataclasses.replace(self._assistant_options, source=source)
        self.assistant = load_assistant(options)
        self._assistant_options = options
        # Amounts are of the former model: take this one's default.
        self._amount = Amount()
        self._choice = SubnetOptions(self.task, dense=self._choice.dense)
        self._conversation, self.subnet = None, None
        self.change_subnetwork(self._choice)

    def change_session(self, session: Session) -> None:
        """Leave this session, which is saved, for another one."""
        self.session.close()
        self.session = session
        wanted = session.settings.model or self.model_name
        self._conversation = None
        self.unanswered, self._num_replaced = None, 0
        if wanted != self.model_name:
            self.change_model(wanted)
        self._adopt_session(session, SubnetOptions())
        self.subnet = None
        if self.task is not None or self._choice.dense:
            self._select("")

    def clear(self, folder: Path) -> None:
        """Begin a new session with the same settings; the old one stays on disk."""
        fresh = Session.new(folder, self.session.settings, recorded=self.session.recorded)
        self.session.close()
        self.session, self._conversation = fresh, None
        self.unanswered, self._num_replaced = None, 0
        if self.task is None and not self._choice.dense:
            self.subnet = None  # the next message selects

    def take_back(self) -> str:
        """Return the last message: the next one will replace it and its answer.

        Raises:
            UsageError: there is none.
        """
        if self.unanswered is not None:
            text, self.unanswered = self.unanswered, None
            return text
        messages = self.messages
        positions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not positions:
            raise UsageError("nothing has been said yet")
        self._num_replaced += len(messages) - positions[-1]
        return messages[positions[-1]]["content"]

    def drop_oldest(self, num_tokens: int) -> int:
        """Forget the oldest turns until ``num_tokens`` are free again; return how many turns."""
        conversation = self._ready("")
        messages = self.messages
        wanted = conversation.num_tokens(self._with_system(messages)) - num_tokens
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        ends = [*questions[1:], len(messages)]
        enough = (
            end
            for end in ends
            if conversation.num_tokens(self._with_system(messages[end:])) <= wanted
        )
        num_dropped = next(enough, len(messages))
        self.session.drop_first(num_dropped)
        return sum(question < num_dropped for question in questions)

    def save_kv_cache(self) -> None:
        """Write the KV cache to its file, if the user wants one and one sub-network made it.

        Raises:
            ResourceError: the file cannot be written.
        """
        path = self._kv_flags.file.prompt_cache_file
        if path is None or self._conversation is None or self.stats is None:
            return
        if self._kv_file is None:
            say(f"{path} stays as it was: several sub-networks took part in this chat")
            return
        self._kv_file.save(self._conversation.kv_cache)

    def _ready(self, text: str) -> Conversation:
        """Return the conversation, with a sub-network that is selected if there is none yet."""
        if self.subnet is None:
            first = self._first_question() or text
            is_long = len(self.assistant.tokenizer.encode(first)) > _LONG_MESSAGE
            is_open = self._assistant_options.selector == "auto"
            self._select(first, where_it_pays=is_long and is_open)
        assert self.subnet is not None
        if self._conversation is None:
            self._conversation, self._kv_file = begin_conversation(
                self.assistant, self.subnet, self._kv_flags
            )
        return self._conversation

    def _with_system(self, messages: Messages) -> Messages:
        """Return messages as the model reads them."""
        if self.system_prompt is None:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _first_question(self) -> str | None:
        """Return the message that selects where no task does."""
        questions = [m["content"] for m in self.messages if m["role"] == "user"]
        return questions[0] if questions else None

    def _select(self, text: str, *, where_it_pays: bool = False) -> None:
        self.subnet = choose_subnetwork(
            self.assistant, self._choice, text, where_it_pays=where_it_pays
        )
        say(describe_subnetwork(self.subnet))
        if self._conversation is not None:
            self.assistant.switch(self._conversation, self.subnet)
            self._kv_file = None  # the KV cache is now of several sub-networks
        self._record_settings()

    def _adopt_session(self, session: Session, wanted: SubnetOptions) -> None:
        """Take over what a session was chatting with, but for what the user wants otherwise."""
        settings = session.settings
        if session.messages:
            amount = wanted.amount
            if not amount.is_given and not wanted.dense:
                amount = Amount(keep_units=settings.num_kept_units)
            self._choice = SubnetOptions(
                wanted.task or settings.task,
                amount,
                wanted.dense or (settings.dense and not wanted.amount.is_given),
            )
            say(f"continuing {session.name}: {plural(len(session.messages), 'message')}")
        if session.messages and session.messages[-1]["role"] == "user":
            self.unanswered, self._num_replaced = session.messages[-1]["content"], 1
            say("its last message was not answered; /retry answers it")

    def _record_settings(self) -> None:
        dense = self._choice.dense
        kept = self.subnet.num_kept_units if self.subnet else self._choice.amount.keep_units
        kept = None if dense else kept
        settings = SessionSettings(self.model_name, self.task, kept, dense, self.system_prompt)
        if settings != self.session.settings:
            self.session.change_settings(settings)
