"""Chat as a person uses it, on a terminal."""

import functools
import json
import re
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.chat.session import Session

OpenTerminal = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def open_chat(open_ifp: OpenTerminal) -> OpenTerminal:
    """Return a function that opens ``ifp chat`` on a terminal, with its own home folder."""
    return functools.partial(open_ifp, "chat")


def test_lines_fit_80_columns_and_the_menu_has_the_terminals_own_colours(
    open_chat: OpenTerminal, endless_model: Path
) -> None:
    arguments = ("--model", endless_model, "--task", "say words", "--keep-units", "64", "-m", "3")
    with open_chat(*arguments, columns=80) as screen:
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        assert all(len(line) <= 80 for line in screen.lines())
        (line,) = [line for line in screen.lines() if "tok/s" in line]
        assert line.startswith("3 tokens (cut at --max-tokens)")
        assert "context" in line  # all of it on one line

        screen.wait_for_prompt()
        screen.press("/sa")
        screen.wait_for("give this chat a name")
        (number,) = [
            number
            for number, text in enumerate(screen.screen.display)
            if "give this chat a name" in text
        ]
        row = screen.screen.buffer[number]
        colours = {(row[column].fg, row[column].bg) for column in range(80)}
        assert colours == {("default", "default")}


def test_load_without_a_name_lists_the_chats(open_chat: OpenTerminal, endless_model: Path) -> None:
    arguments = ("--model", endless_model, "--dense", "-m", "3")
    with open_chat(*arguments, "--session", "first") as screen:
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        screen.wait_for_prompt()
        screen.press("/load", "Enter")
        screen.wait_for("2 messages")
        (line,) = [line for line in screen.lines() if "2 messages" in line]
        assert line.startswith("first ")
        assert line.endswith("hello")


def without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_chat_session_from_first_word_to_resume(
    open_chat: OpenTerminal, endless_model: Path, tmp_path: Path
) -> None:
    arguments = ("--model", endless_model, "--task", "say words", "--keep-units", "64")
    with open_chat(*arguments, "-m", "27") as screen:
        screen.wait_for_prompt()
        assert 'selected 64 of 192 FFN units for "say words"' in screen.text()

        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        # Rendered, not raw Markdown.
        assert "Alpha bravo charlie delta" in screen.text()
        assert "**" not in screen.text()
        assert "context" in screen.text()

        # Several lines: by Alt-Enter, by triple quotes, by pasting.
        screen.wait_for_prompt()
        screen.press("first line", "Alt-Enter", "second line", "Enter")
        screen.wait_for("tok/s", count=2)
        screen.wait_for_prompt()
        screen.press('"""third line', "Enter", 'fourth line"""', "Enter")
        screen.wait_for("tok/s", count=3)
        screen.wait_for_prompt()
        screen.paste("fifth line\nsixth line")
        screen.wait_for("sixth line")
        assert screen.text().count("tok/s") == 3  # pasting does not send
        screen.press("Enter")
        screen.wait_for("tok/s", count=4)

        # History: the arrow key brings the latest back, Ctrl-R searches.
        screen.wait_for_prompt()
        screen.press("Up")
        screen.wait_for("sixth line", count=2)
        screen.press("Ctrl-C", "Ctrl-R", "hel")
        screen.wait_for("hello", count=2)
        screen.press("Enter", "Ctrl-C")

        # A command is completed and runs; the conversation goes on.
        screen.wait_for_prompt()
        screen.press("/ta")
        screen.wait_for("show the task, or switch to another")
        screen.press("Tab", " count numbers", "Enter")
        screen.wait_for('for "count numbers"')
        screen.wait_for("the conversation goes on")

        screen.wait_for_prompt()
        screen.press("/save my-words", "Enter")
        screen.wait_for("saved as my-words")
        screen.wait_for_prompt()
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0

    folder = tmp_path / "home"
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600
    records = [json.loads(x) for x in (folder / "sessions/my-words.jsonl").read_text().splitlines()]
    asked = [r["content"] for r in records if r.get("role") == "user"]
    assert asked == [
        "hello",
        "first line\nsecond line",
        "third line\nfourth line",
        "fifth line\nsixth line",
    ]

    with open_chat("--resume", "-m", "5") as screen:
        screen.wait_for_prompt()
        assert "continuing my-words: 8 messages" in screen.text()
        assert 'cache hit for "count numbers"' in screen.text()
        assert "› fifth line" in screen.text()
        assert " 0/200,000" not in screen.text()  # the meter counts what was said before
        screen.press("and on", "Enter")
        screen.wait_for("tok/s")
        screen.press("/bye", "Enter")
        assert screen.wait_for_end() == 0


def test_chat_ctrl_c_stops_the_reply_and_keeps_the_session(
    open_chat: OpenTerminal, endless_model: Path, tmp_path: Path
) -> None:
    with open_chat("--model", endless_model, "--dense", "--session", "cut") as screen:
        screen.wait_for_prompt()
        screen.press("/stats off", "Enter")
        screen.wait_for("below each reply is off")
        screen.press("/stats on", "Enter")
        screen.press("hello", "Enter")
        screen.wait_for("Alpha", count=3)
        screen.press("Ctrl-C")
        screen.wait_for("(stopped)")
        screen.wait_for_prompt()

        # The reply ends in a whole token, and the conversation goes on from the KV cache.
        # How much of the first reply there is depends on when it was stopped.
        seen = screen.text().count("foxtrot")
        screen.press("go on", "Enter")
        screen.wait_for("foxtrot", count=seen + 2)
        screen.press("Ctrl-C")
        screen.wait_for("(stopped)", count=2)
        screen.press("/stats", "Enter")
        screen.wait_for("more from the KV cache")

        # At the prompt Ctrl-C discards what was typed, and never leaves.
        screen.wait_for_prompt()
        screen.press("not this", "Ctrl-C")
        screen.wait_for_prompt()
        screen.press("Ctrl-C")
        screen.wait_for("Ctrl-D or /bye leaves")
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0
    lines = (tmp_path / "home/sessions/cut.jsonl").read_text().splitlines()
    messages = [json.loads(line) for line in lines if '"message"' in line]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"].startswith("Alpha bravo **charlie** delta")
    assert messages[2]["content"] == "go on"


def test_chat_killed_at_any_moment_loses_only_the_reply_in_flight(
    open_chat: OpenTerminal, endless_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "home/sessions"
    arguments = ("--model", endless_model, "--session", "cut", "--keep-units", "64", "-m", "30")
    with open_chat(*arguments) as screen:
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        screen.kill()  # between two turns

    with open_chat("--resume") as screen:
        screen.wait_for("continuing cut: 2 messages")
        screen.kill()  # before the prompt

    with open_chat("--resume", "-m", "100000") as screen:
        screen.wait_for_prompt()
        screen.press("second", "Enter")
        screen.wait_for("Alpha", count=4)
        screen.kill()  # in the reply

    with open_chat("--resume", "-m", "5") as screen:
        screen.wait_for_prompt()
        assert "continuing cut: 3 messages" in screen.text()
        assert "its last message was not answered; /retry answers it" in screen.text()
        screen.press("/edit", "Enter")
        screen.wait_for("› second", count=2)
        screen.kill()  # while the message is being edited

    with open_chat("--resume", "-m", "5") as screen:
        screen.wait_for_prompt()
        assert "continuing cut: 3 messages" in screen.text()
        screen.press("/retry", "Enter")
        screen.wait_for("tok/s")
        screen.wait_for_prompt()
        screen.press("/edit", "Enter")
        screen.wait_for("› second", count=3)
        screen.kill()  # an answered message is being edited

    with open_chat("--resume") as screen:
        screen.wait_for_prompt()
        assert "continuing cut: 4 messages" in screen.text()
        screen.press("/task count numbers", "Enter")
        screen.kill()  # in the switch

    with open_chat("--resume") as screen:
        screen.wait_for_prompt()
        assert "continuing cut: 4 messages" in screen.text()
        screen.press("/save kept", "Enter")
        screen.kill()  # in the renaming
    (path,) = folder.iterdir()
    assert path.stem in ("cut", "kept")

    session = Session.load(folder, path.stem)
    session.add_message("user", "bravo " * 20_000)  # takes seconds to read
    session.add_message("assistant", "Read.")
    session.close()
    with open_chat("--resume") as screen:
        screen.wait_for_prompt()
        screen.press("third", "Enter")
        while '"third"' not in path.read_text():
            screen.wait_for("third")
        screen.kill()  # in the prefill
        assert "Alpha" not in screen.text().partition("› third")[2]

    messages = Session.load(folder, path.stem).messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert [message["content"][:6] for message in messages[::2]] == [
        "hello",
        "second",
        "bravo ",
        "third",
    ]


def test_chat_edit_and_retry_replace_the_last_turn(
    open_chat: OpenTerminal, word_model: Path, tmp_path: Path
) -> None:
    with open_chat("--model", word_model, "--dense", "--session", "edited") as screen:
        screen.wait_for_prompt()
        screen.press("helo", "Enter")
        screen.wait_for("tok/s")
        screen.press("/edit", "Enter")
        screen.wait_for("› helo", count=2)
        screen.press(" world", "Enter")
        screen.wait_for("tok/s", count=2)
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0
    lines = (tmp_path / "home/sessions/edited.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["start", "settings", "message", "message", "message", "message"]
    edited = json.loads(lines[-2])
    assert (edited["content"], edited["replaces"]) == ("helo world", 2)


def test_chat_ctrl_g_opens_the_users_editor(
    open_chat: OpenTerminal, word_model: Path, tmp_path: Path
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho "from the editor" >> "$1"\n')
    editor.chmod(0o755)
    with open_chat("--model", word_model, "--dense", EDITOR=str(editor), VISUAL="") as screen:
        screen.wait_for_prompt()
        screen.press("typed, then ", "Ctrl-G")
        screen.wait_for("from the editor")
        assert "tok/s" not in screen.text()  # it can still be changed
        screen.press("Ctrl-C", "Ctrl-D")
        assert screen.wait_for_end() == 0


def test_chat_full_context_asks_what_to_do(open_chat: OpenTerminal, short_model: Path) -> None:
    with open_chat("--model", short_model, "--dense") as screen:
        for turn in range(1, 5):
            screen.wait_for_prompt()
            screen.press("hello", "Enter")
            screen.wait_for("tok/s", count=turn)
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("the context is full")
        screen.wait_for("Your choice:")
        screen.press("c", "Enter")
        screen.wait_for("› hello", count=6)  # the message is back for editing
        screen.press("Enter")
        screen.wait_for("Your choice:", count=2)
        screen.press("d", "Enter")
        screen.wait_for("forgot the oldest")
        screen.wait_for("tok/s", count=5)
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0


def test_chat_fits_forty_columns(
    open_chat: OpenTerminal, endless_model: Path, tmp_path: Path
) -> None:
    arguments = ("--model", endless_model, "-m", "300", "--session", "narrow")
    with open_chat(*arguments, columns=40, rows=16) as screen:
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        # Longer than the screen: it has scrolled, nothing is missing or drawn twice.
        answer = json.loads((tmp_path / "home/sessions/narrow.jsonl").read_text().splitlines()[-1])
        assert without_space(answer["content"].replace("**", "")) in without_space(screen.text())
        screen.press("/help", "Enter")
        screen.wait_for("Ctrl-C stops a")
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0


def test_chat_without_colour_sends_no_colour(open_chat: OpenTerminal, word_model: Path) -> None:
    with open_chat("--model", word_model, "--dense", NO_COLOR="1") as screen:
        screen.wait_for_prompt()
        screen.press("hello", "Enter")
        screen.wait_for("tok/s")
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0
        assert not re.search(rb"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;5)[;m]", screen.received)


def test_chat_dumb_terminal_gets_plain_text(open_chat: OpenTerminal, word_model: Path) -> None:
    with open_chat("--model", word_model, "--dense", TERM="dumb") as screen:
        screen.wait_for("›")
        screen.press("hello", "\n")
        screen.wait_for("Alpha bravo **charlie** delta")
        screen.press("Ctrl-D")
        assert screen.wait_for_end() == 0
        assert b"\x1b[" not in screen.received
