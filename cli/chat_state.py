"""A chat while it runs: who answers, what was said, and the record of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ifp_mlx.chat.session import Session, SessionSettings
from ifp_mlx.cli.answer import stream_answer
from ifp_mlx.cli.loading import (
    ModelChoice,
    SubnetChoice,
    choose_subnetwork,
    describe_subnetwork,
    load_assistant,
    mean_overlap,
    num_kept_units,
)
from ifp_mlx.cli.terminal import plural, say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    import mlx.nn as nn

    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation, GenerationStats, SamplingOptions
    from ifp_mlx.chat.kv_cache_file import KVCacheFile
    from ifp_mlx.subnets.compact_models import SubNetwork

_RETASK_MESSAGES = 4  # how much of the recent conversation /retask reads
_ROOM_FOR_ANSWER = 64  # tokens; with less left the context counts as full
_TEMPLATE_TOKENS = 16  # what a chat template puts around one message, generously


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
        session: where every message is recorded.
        sampling: how tokens are drawn.
        answered_by: what gave the last reply.
        subnet: what answers; None until the first message selects it.
        unanswered: a message whose reply was lost when an earlier chat was killed. The next message
            takes its place.
        shows_statistics: print a line of measurements below each reply.
        num_draft_tokens: lossless: the sub-network drafts this many tokens, which the whole model
            checks; None lets the sub-network answer.
        rebuilds_kv: after a switch prefill the conversation again with the new sub-network.

    Args:
        kv_path: a file that the first conversation's KV cache comes from, and goes to in the end.
    """

    def __init__(
        self,
        model_choice: ModelChoice,
        subnet_choice: SubnetChoice,
        session: Session,
        sampling: SamplingOptions,
        *,
        rebuilds_kv: bool = False,
        num_draft_tokens: int | None = None,
        kv_path: Path | None = None,
    ):
        self._model_choice = model_choice
        self._choice = subnet_choice
        self._amount_choice = SubnetChoice()  # how much was kept before ``/dense``
        self.session = session
        self.sampling = sampling
        self.rebuilds_kv = rebuilds_kv
        self.shows_statistics = True
        self.num_draft_tokens = num_draft_tokens
        self.assistant: Assistant = load_assistant(model_choice, preload=subnet_choice.needs_dense)
        self.subnet: SubNetwork | None = None
        self.answered_by: SubNetwork | None = None
        self.unanswered: str | None = None
        self._num_replaced = 0  # newest messages in the session that the next one replaces
        self._conversation: Conversation | None = None
        self._kv_path = kv_path
        self._kv_file: KVCacheFile | None = None
        self._adopt_session(session, subnet_choice)
        if self.task is not None or self._choice.dense:
            self._select("")
            if session.messages:
                self._record_settings()

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
        return self._model_choice.model

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
        if self.messages and self.subnet is not None:
            return self._ready("").num_context_tokens  # of a resumed chat as well
        return self._conversation.num_context_tokens if self._conversation else 0

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
        num_before = len(conversation.messages)
        self.answered_by = self.subnet
        try:
            return stream_answer(conversation.reply(text, self.sampling), write)
        finally:
            if len(conversation.messages) > num_before:
                self.session.add_message("assistant", conversation.messages[-1]["content"])
            else:
                self.session.drop_last(1)  # nothing was said: the question is taken back, too

    def prepare(self, text: str) -> None:
        """Select for the first message, so that what is said about it comes before the answer."""
        self._ready(text)

    def change_subnetwork(self, choice: SubnetChoice, text: str | None = None) -> float | None:
        """Go on with another sub-network; return the share of units that it has in common.

        Args:
            choice: task, amount or dense.
            text: what selects if there is no task; None takes the first message again.
        """
        former, former_choice = self.subnet, self._choice
        text = text or self._first_question()
        self._choice = choice
        try:
            if choice.task is None and text is None and not choice.dense:
                num_kept_units(self.assistant, choice)  # refused now, not at the next message
                self.subnet = None
            else:
                self._select(text or "")
        except BaseException:
            self._choice = former_choice  # refused, or stopped: all stays as it was
            raise
        self._record_settings()
        if former is None or self.subnet is None:
            return None
        if former.selection is None or self.subnet.selection is None:
            return None
        return mean_overlap(former.selection, self.subnet.selection)

    def change_task(self, task: str) -> float | None:
        """Switch to a task; return the overlap with the former sub-network."""
        return self.change_subnetwork(self._sparse(task))

    def reselect(self, message: str | None = None) -> float | None:
        """Let the recent conversation select; return the overlap with the former sub-network.

        Args:
            message: what is about to be asked, which counts as recent.

        Raises:
            UsageError: nothing has been said yet.
        """
        recent = [m["content"] for m in self.messages[-_RETASK_MESSAGES:]]
        if message is not None:
            recent.append(message)
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
        return mean_overlap(self.subnet.selection, selected)

    def change_keep(self, keep: float | None, keep_units: int | None) -> float | None:
        """Keep another amount of units; return the overlap with the former sub-network."""
        return self.change_subnetwork(SubnetChoice(self.task, keep, keep_units))

    def use_dense(self, wanted: bool) -> None:
        """Answer with the whole model, or with the task's sub-network again."""
        former = self._sparse(self.task)
        self.change_subnetwork(SubnetChoice(self.task, dense=True) if wanted else former)
        self._amount_choice = former

    def _sparse(self, task: str | None) -> SubnetChoice:
        """Return the choice of a sub-network for a task, as large as the latest one."""
        former = self._amount_choice if self._choice.dense else self._choice
        return dataclasses.replace(former, task=task)

    def change_system_prompt(self, text: str | None) -> None:
        """Set or remove the system message; the conversation stays."""
        settings = dataclasses.replace(self.session.settings, system_prompt=text)
        self.session.change_settings(settings)
        self._restart_conversation()

    def change_model(self, name: str) -> None:
        """Load another model and go on with the same conversation."""
        choice = dataclasses.replace(self._model_choice, model=name, adapter=None)
        self.assistant = load_assistant(choice)
        self._model_choice = choice
        # Amounts are of the former model: take this one's default.
        self._amount_choice = SubnetChoice()
        self._choice = SubnetChoice(task=self.task, dense=self._choice.dense)
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
        self._adopt_session(session, SubnetChoice())
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
        if self._conversation is not None:
            self._conversation.drop_last_turn()
        return messages[positions[-1]]["content"]

    def drop_oldest(self, num_tokens: int) -> int:
        """Forget the oldest turns until ``num_tokens`` are free again; return how many turns."""
        conversation = self._ready("")
        target = conversation.num_context_tokens - num_tokens
        num_turns = 0
        while conversation.num_context_tokens > target and conversation.drop_first_turn():
            num_turns += 1
        kept = sum(1 for message in conversation.messages if message["role"] != "system")
        self.session.drop_first(len(self.messages) - kept)
        return num_turns

    def _ready(self, text: str) -> Conversation:
        if self.subnet is None:
            self._select(self._first_question() or text)
        assert self.subnet is not None
        if self._conversation is None:
            self._restart_conversation()
        assert self._conversation is not None
        return self._conversation

    def _first_question(self) -> str | None:
        """Return the message that selects where no task does."""
        questions = [m["content"] for m in self.messages if m["role"] == "user"]
        return questions[0] if questions else None

    def _select(self, text: str) -> None:
        self.subnet = choose_subnetwork(self.assistant, self._choice, text)
        say(describe_subnetwork(self.subnet))
        if self._conversation is not None:
            model, draft_model = self._models(self.subnet)
            # Unless it is rebuilt, the KV cache is now of several sub-networks.
            self._kv_file = self._new_kv_file(self.subnet) if self.rebuilds_kv else None
            self._conversation.switch(model, rebuild_kv=self.rebuilds_kv, draft_model=draft_model)

    def _models(self, subnet: SubNetwork) -> tuple[nn.Module, nn.Module | None]:
        """Return what answers and what drafts for it."""
        if self.num_draft_tokens is None or subnet.selection is None:
            return subnet.model, None
        return self.assistant.dense().model, subnet.model

    def _restart_conversation(self) -> None:
        from ifp_mlx.chat.conversation import DEFAULT_DRAFT_TOKENS, Conversation

        if self.subnet is None:
            self._conversation = None
            return
        model, draft_model = self._models(self.subnet)
        self._kv_file = self._new_kv_file(self.subnet)
        kept = self._kv_file.load(say) if self._kv_file is not None else None
        self._conversation = Conversation(
            model,
            self.assistant.tokenizer,
            self.assistant.context_length,
            system_prompt=self.system_prompt,
            messages=self.messages,
            kv_cache=kept[0] if kept else None,
            kv_token_ids=kept[1] if kept else (),
            draft_model=draft_model,
            num_draft_tokens=self.num_draft_tokens or DEFAULT_DRAFT_TOKENS,
        )

    def save_kv_cache(self) -> None:
        """Write the KV cache to its file, if the user wants one and one sub-network made it.

        Raises:
            ResourceError: the file cannot be written.
        """
        if self._kv_path is None or self._conversation is None or self.stats is None:
            return
        if self._kv_file is None:
            say(f"{self._kv_path} stays as it was: several sub-networks took part in this chat")
            return
        self._kv_file.save(self._conversation.kv_cache, self._conversation.kv_token_ids)

    def _new_kv_file(self, subnet: SubNetwork) -> KVCacheFile | None:
        if self._kv_path is None:
            return None
        from ifp_mlx.chat.conversation import KVCacheOptions
        from ifp_mlx.chat.kv_cache_file import KVCacheFile

        options = dataclasses.asdict(KVCacheOptions())
        return KVCacheFile(self._kv_path, self.assistant.kv_identity(subnet) | options)

    def _adopt_session(self, session: Session, wanted: SubnetChoice) -> None:
        """Take over what a session was chatting with, but for what the user wants otherwise."""
        settings = session.settings
        if session.messages:
            amount_wanted = wanted.keep is not None or wanted.keep_units is not None
            self._choice = SubnetChoice(
                wanted.task or settings.task,
                wanted.keep,
                wanted.keep_units if amount_wanted or wanted.dense else settings.num_kept_units,
                wanted.dense or (settings.dense and not amount_wanted),
            )
            say(f"continuing {session.name}: {plural(len(session.messages), 'message')}")
        if session.messages and session.messages[-1]["role"] == "user":
            self.unanswered, self._num_replaced = session.messages[-1]["content"], 1
            say("its last message was not answered; /retry answers it")

    def _record_settings(self) -> None:
        dense = self._choice.dense
        kept = self.subnet.num_kept_units if self.subnet else self._choice.keep_units
        kept = None if dense else kept
        self.session.change_settings(
            SessionSettings(self.model_name, self.task, kept, dense, self.system_prompt)
        )
