"""Chats on disk: one JSON line for each thing that happened, so that a crash loses nothing older.

A session is the replay of its file. Every change is one appended line; nothing is rewritten.
A process that is killed can leave at most one unfinished last line, which the next reader drops.
Files hold what people typed: they are readable by their owner only (mode 0600).
"""

import dataclasses
import datetime
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, Self

from ifp_mlx.errors import SessionError, UsageError

FORMAT_VERSION = 1
_SUFFIX = ".jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class SessionSettings:
    """What a chat runs with.

    Attributes:
        model: name or path, as ``--model`` takes it.
        task: the task description, or None if the first message selects.
        num_kept_units: K, or None for the default.
        dense: chat with the whole model.
        system_prompt: the system message, if any.
    """

    model: str
    task: str | None = None
    num_kept_units: int | None = None
    dense: bool = False
    system_prompt: str | None = None


@dataclasses.dataclass(frozen=True)
class SessionSummary:
    """One line of a listing: name, when it last changed (UTC), size and its first words."""

    name: str
    modified: datetime.datetime
    num_messages: int
    task: str | None
    title: str


class Session:
    """A chat that is recorded as it happens.

    Attributes:
        path: the file.
        settings: the latest settings.
        recorded: False keeps the chat off the disk.
        messages: what is left of the conversation, as ``{"role": ..., "content": ...}``.
    """

    def __init__(self, path: Path, settings: SessionSettings, *, recorded: bool = True):
        self.path = path
        self.recorded = recorded
        self.settings = settings
        self.messages: list[dict[str, str]] = []
        self._descriptor: int | None = None

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return self.path.stem

    @classmethod
    def new(
        cls,
        folder: Path,
        settings: SessionSettings,
        name: str | None = None,
        *,
        recorded: bool = True,
    ) -> Self:
        """Return an empty session. Its file appears with the first message.

        Raises:
            UsageError: the name cannot be a file name, or is taken.
        """
        path = session_path(folder, name or _timestamp_name(folder))
        if name is not None and path.exists():
            raise UsageError(f"a session {name!r} exists already; choose another name")
        return cls(path, settings, recorded=recorded)

    @classmethod
    def load(cls, folder: Path, name: str) -> Self:
        """Return a recorded session, ready to be continued.

        Raises:
            SessionError: there is no such session, it is damaged or open in another chat.
        """
        path = session_path(folder, name)
        if not path.is_file():
            raise SessionError(f"there is no session {name!r}")
        session = cls(path, SessionSettings(model=""))
        # Locked before it is read: what another chat appends meanwhile would be missed.
        session._open()
        try:
            session._replay()
        except BaseException:
            session.close()
            raise
        return session

    def add_message(self, role: str, content: str, *, replaces: int = 0) -> None:
        """Append one message, in the place of the newest ``replaces`` (which stay in the file).

        One record does both: a crash leaves the old messages or the new one.

        Raises:
            SessionError: the disk is full or the file cannot be written.
        """
        record: dict[str, Any] = {"kind": "message", "role": role, "content": content}
        self._record(record | ({"replaces": replaces} if replaces else {}))

    def change_settings(self, settings: SessionSettings) -> None:
        """Record other settings; before the first message nothing is written yet."""
        self.settings = settings
        if self._descriptor is not None:
            self._record({"kind": "settings", **dataclasses.asdict(settings)})

    def drop_last(self, count: int) -> None:
        """Forget the ``count`` newest messages (they stay in the file)."""
        self._record({"kind": "drop_last", "count": count})

    def drop_first(self, count: int) -> None:
        """Forget the ``count`` oldest messages (they stay in the file)."""
        self._record({"kind": "drop_first", "count": count})

    def rename(self, folder: Path, name: str) -> None:
        """Give the session a name to find it again.

        Raises:
            UsageError: the name cannot be a file name, or is taken.
            SessionError: the file cannot be renamed.
        """
        path = session_path(folder, name)
        if path == self.path:
            return
        if path.exists():
            raise UsageError(f"a session {name!r} exists already; choose another name")
        if self.path.exists():
            try:
                self.path.rename(path)
            except OSError as error:
                raise SessionError(f"cannot rename to {path}: {error.strerror}") from error
        self.path = path

    def close(self) -> None:
        """Release the file for other chats."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _record(self, record: dict[str, Any]) -> None:
        if self.recorded:
            if self._descriptor is None:
                self._open()
                self._append({"kind": "start", "version": FORMAT_VERSION})
                self._append({"kind": "settings", **dataclasses.asdict(self.settings)})
            self._append(record)
        self._apply(record)

    def _append(self, record: dict[str, Any]) -> None:
        assert self._descriptor is not None
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            # One write a line, at the end of the file: a kill cannot mix or tear older lines.
            if os.write(self._descriptor, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._descriptor)
        except OSError as error:
            raise SessionError(
                f"cannot write {self.path}: {error.strerror}; `no_save` chats without a record"
            ) from error

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise SessionError(
                f"cannot write {self.path}: {error.strerror}; `no_save` chats without a record"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise SessionError(f"session {self.name!r} is open in another chat") from None
        self._descriptor = descriptor

    def _replay(self) -> None:
        assert self._descriptor is not None
        content = self.path.read_bytes()
        whole_bytes = content.rfind(b"\n") + 1
        if whole_bytes != len(content):
            # A killed writer's last line. Cut it off, or the next record would be glued to it.
            os.ftruncate(self._descriptor, whole_bytes)
        for number, record in _records(self.path, content[:whole_bytes]):
            try:
                self._apply(record)
            except (KeyError, TypeError) as error:
                raise _damaged(self.path, number) from error

    def _apply(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "start":
                if record["version"] != FORMAT_VERSION:
                    raise SessionError(f"{self.path} was written by another version of ifp")
            case "settings":
                values = {key: value for key, value in record.items() if key != "kind"}
                self.settings = SessionSettings(**values)
            case "message":
                del self.messages[len(self.messages) - int(record.get("replaces", 0)) :]
                self.messages.append({"role": record["role"], "content": record["content"]})
            case "drop_last":
                del self.messages[len(self.messages) - int(record["count"]) :]
            case "drop_first":
                del self.messages[: int(record["count"])]
            case kind:
                raise KeyError(kind)


def session_path(folder: Path, name: str) -> Path:
    """Return where a session of this name is kept.

    Raises:
        UsageError: the name cannot be a file name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a session's name; use letters, digits, dots, dashes, underscores"
        )
    return folder / f"{name}{_SUFFIX}"


def list_sessions(folder: Path) -> list[SessionSummary]:
    """Return all readable sessions of a folder, the latest first."""
    summaries = []
    for path in folder.glob(f"*{_SUFFIX}"):
        session = Session(path, SessionSettings(model=""))
        try:
            content = path.read_bytes()
            for _, record in _records(path, content[: content.rfind(b"\n") + 1]):
                session._apply(record)
            modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
        except (OSError, SessionError, KeyError, TypeError):
            continue  # damaged or just removed: /load says what is wrong with it
        questions = [m["content"] for m in session.messages if m["role"] == "user"]
        summaries.append(
            SessionSummary(
                name=session.name,
                modified=modified,
                num_messages=len(session.messages),
                task=session.settings.task,
                title=" ".join(questions[0].split()) if questions else "",
            )
        )
    return sorted(summaries, key=lambda summary: summary.modified, reverse=True)


def _records(path: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _damaged(path, number) from error
        if not isinstance(record, dict) or "kind" not in record:
            raise _damaged(path, number)
        records.append((number, record))
    return records


def _damaged(path: Path, line: int) -> SessionError:
    return SessionError(f"{path} is damaged at line {line}; remove that line to load the rest")


def _timestamp_name(folder: Path) -> str:
    base = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    name, count = base, 1
    while session_path(folder, name).exists():
        count += 1
        name = f"{base}-{count}"
    return name
