import json
import stat
from pathlib import Path

import pytest

from ifp_mlx.chat.session import Session, SessionSettings, list_sessions
from ifp_mlx.errors import SessionError, UsageError

SETTINGS = SessionSettings(model="m", task="write words", num_kept_units=128)


def make_session(folder: Path, name: str = "talk", num_turns: int = 2) -> Session:
    session = Session.new(folder, SETTINGS, name)
    for turn in range(num_turns):
        session.add_message("user", f"question {turn}")
        session.add_message("assistant", f"answer {turn}")
    return session


def contents(session: Session) -> list[str]:
    return [message["content"] for message in session.messages]


def test_session_replays_what_was_recorded(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    session.add_message("user", 'zeile "eins"\nzwei \udc80 ☃')
    session.change_settings(SessionSettings(model="other", dense=True, system_prompt="be brief"))
    session.close()
    loaded = Session.load(tmp_path, "talk")
    assert loaded.messages == session.messages
    assert loaded.settings == SessionSettings(model="other", dense=True, system_prompt="be brief")


def test_session_continues_where_it_ended(tmp_path: Path) -> None:
    make_session(tmp_path).close()
    first = Session.load(tmp_path, "talk")
    first.add_message("user", "more")
    first.close()
    assert contents(Session.load(tmp_path, "talk"))[-2:] == ["answer 1", "more"]


def test_session_forgets_dropped_messages(tmp_path: Path) -> None:
    session = make_session(tmp_path, num_turns=3)
    session.drop_first(2)
    session.drop_last(1)
    session.close()
    loaded = Session.load(tmp_path, "talk")
    assert contents(loaded) == contents(session) == ["question 1", "answer 1", "question 2"]


def test_session_replaces_messages_in_one_record(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    before = contents(session)
    size = session.path.stat().st_size
    session.add_message("user", "asked anew", replaces=2)
    session.close()
    loaded = Session.load(tmp_path, "talk")
    loaded.close()
    assert contents(loaded) == contents(session) == [*before[:-2], "asked anew"]
    # However much of the record a crash leaves, the old messages or the new one are there.
    content = session.path.read_bytes()
    for length in range(size, len(content)):
        session.path.write_bytes(content[:length])
        cut = Session.load(tmp_path, "talk")
        cut.close()
        assert contents(cut) == before


def test_session_file_is_private(tmp_path: Path) -> None:
    session = make_session(tmp_path / "sessions")
    assert stat.S_IMODE(session.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(session.path.parent.stat().st_mode) == 0o700


def test_session_without_messages_leaves_no_file(tmp_path: Path) -> None:
    session = Session.new(tmp_path, SETTINGS, "empty")
    session.change_settings(SessionSettings(model="other"))
    session.close()
    assert list(tmp_path.iterdir()) == []


def test_unrecorded_session_leaves_no_file(tmp_path: Path) -> None:
    session = Session.new(tmp_path, SETTINGS, recorded=False)
    session.add_message("user", "secret")
    session.drop_last(1)
    assert session.messages == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost_bytes", [1, 5, 40])
def test_session_survives_a_torn_last_line(tmp_path: Path, lost_bytes: int) -> None:
    session = make_session(tmp_path)
    session.close()
    content = session.path.read_bytes()
    session.path.write_bytes(content[:-lost_bytes])
    loaded = Session.load(tmp_path, "talk")
    assert contents(loaded) == ["question 0", "answer 0", "question 1"]
    loaded.add_message("assistant", "again")
    loaded.close()
    assert contents(Session.load(tmp_path, "talk"))[-1] == "again"


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"kind": "unknown"}',
        '{"kind": "message"}',
        '{"kind": "settings", "x": 1}',
    ],
)
def test_session_names_the_damaged_line(tmp_path: Path, line: str) -> None:
    session = make_session(tmp_path)
    session.close()
    lines = session.path.read_text().splitlines()
    lines[3] = line
    session.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SessionError, match="damaged at line 4"):
        Session.load(tmp_path, "talk")
    assert list_sessions(tmp_path) == []


def test_session_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps({"kind": "start", "version": 99}) + "\n")
    with pytest.raises(SessionError, match="another version"):
        Session.load(tmp_path, "talk")


def test_session_is_open_in_one_chat_only(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    with pytest.raises(SessionError, match="open in another chat"):
        Session.load(tmp_path, "talk")
    session.close()
    assert len(Session.load(tmp_path, "talk").messages) == 4


def test_session_rename_keeps_recording(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    session.rename(tmp_path, "python-help")
    session.add_message("user", "after")
    session.close()
    assert contents(Session.load(tmp_path, "python-help"))[-1] == "after"
    assert not (tmp_path / "talk.jsonl").exists()


def test_session_names_do_not_collide(tmp_path: Path) -> None:
    make_session(tmp_path, "one").close()
    two = make_session(tmp_path, "two")
    with pytest.raises(UsageError, match="'one' exists already"):
        two.rename(tmp_path, "one")
    with pytest.raises(UsageError, match="'one' exists already"):
        Session.new(tmp_path, SETTINGS, "one")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 101])
def test_session_name_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a session's name"):
        Session.load(tmp_path, name)


def test_missing_session_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no session 'nothing'"):
        Session.load(tmp_path, "nothing")


def test_session_reports_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    session = Session.new(tmp_path / "file", SETTINGS, "talk")
    with pytest.raises(SessionError, match="cannot write"):
        session.add_message("user", "x")


def test_unnamed_sessions_get_different_names(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        session = Session.new(tmp_path, SETTINGS)
        session.add_message("user", "x")
        names.add(session.name)
    assert len(names) == 3


def test_list_sessions_puts_the_latest_first(tmp_path: Path) -> None:
    import os

    for age, name in ((300, "old"), (100, "new"), (200, "middle")):
        session = make_session(tmp_path, name)
        session.close()
        os.utime(session.path, (10_000 - age, 10_000 - age))
    summaries = list_sessions(tmp_path)
    assert [summary.name for summary in summaries] == ["new", "middle", "old"]
    assert summaries[0].title == "question 0"
    assert summaries[0].num_messages == 4
    assert summaries[0].task == "write words"
