"""Chat without a terminal: messages and commands piped in, one a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TWO_THIRDS = ("chat", "--keep", "0.67", "--max-tokens", "5")


def recorded(home: Path) -> list[dict[str, str]]:
    """Return the messages of the only session on disk."""
    (path,) = (home / "sessions").glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["kind"] == "message"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_chat_answers_each_piped_line(ifp: Run, word_model: Path, words: str, home: Path) -> None:
    outcome = ifp("chat", "--model", word_model, "--keep", "0.67", stdin="hello\n\nagain\n")
    assert outcome.code == 0
    assert outcome.stdout == f"{words}\n{words}\n"
    assert outcome.stderr.count("selected 128 of 192 FFN units for this prompt") == 1
    contents = [message["content"] for message in recorded(home)]
    assert contents == ["hello", words, "again", words]


def test_chat_joins_lines_between_triple_quotes(ifp: Run, word_model: Path, home: Path) -> None:
    ifp("chat", "--model", word_model, stdin='"""def f():\n    return 1\n"""\n')
    assert recorded(home)[0]["content"] == "def f():\n    return 1"


def test_chat_keeps_the_kv_cache_across_turns(ifp: Run, word_model: Path) -> None:
    outcome = ifp("chat", "--model", word_model, stdin="hello\nagain\n/stats\n")
    # Everything but the second question and the template around it was read in the first turn.
    assert "more from the KV cache" in outcome.stderr


def test_chat_task_switch_says_overlap_and_keeps_the_conversation(
    ifp: Run, small_model: Path, home: Path
) -> None:
    script = "hello\n/task count numbers\nagain\n/task\n"
    outcome = ifp(*TWO_THIRDS, "--model", small_model, "--task", "write words", stdin=script)
    assert outcome.code == 0
    assert 'selected 128 of 192 FFN units for "write words"' in outcome.stderr
    assert 'selected 128 of 192 FFN units for "count numbers"' in outcome.stderr
    assert "of the units are those of the former one; the conversation goes on" in outcome.stderr
    assert "task: count numbers" in outcome.stderr
    assert len(recorded(home)) == 4


def test_chat_retask_selects_from_the_conversation(ifp: Run, small_model: Path) -> None:
    script = "hello\n/retask\n"
    outcome = ifp(*TWO_THIRDS, "--model", small_model, "--task", "write words", stdin=script)
    assert "selected 128 of 192 FFN units for this prompt" in outcome.stderr


def test_chat_keep_and_dense_change_the_amount(ifp: Run, word_model: Path) -> None:
    script = "hello\n/keep 64\n/keep\n/keep 0.7\n/dense\n/dense off\n"
    errors = ifp("chat", "--model", word_model, stdin=script).stderr
    assert "selected 64 of 192" in errors
    assert "64 of 192 FFN units; /keep 0.5" in errors
    assert "--keep 0.7 is 128 of 192" in errors
    assert "dense: all 192 FFN units" in errors
    assert errors.rstrip().splitlines()[-1].startswith("selected 128 of 192")


def test_chat_dense_off_and_task_keep_the_amount(ifp: Run, word_model: Path) -> None:
    script = "hello\n/keep 64\n/dense\n/dense\n/dense off\n/dense\n/task count\n"
    lines = ifp(*TWO_THIRDS, "--model", word_model, stdin=script).stderr.splitlines()
    amounts = [line for line in lines if "selected" in line]
    assert ["64 of 192" in line for line in amounts] == [False, True, True, True]


def test_chat_stats_are_of_what_answered(ifp: Run, word_model: Path) -> None:
    errors = ifp(*TWO_THIRDS, "--model", word_model, stdin="hello\n/dense\n/stats\n").stderr
    assert "128/192 FFN units" in errors


def test_chat_retry_answers_the_same_message_again(
    ifp: Run, word_model: Path, words: str, home: Path
) -> None:
    outcome = ifp("chat", "--model", word_model, stdin="hello\n/retry\n/retry 0.01\n")
    assert outcome.stdout == f"{words}\n" * 3
    assert "at temperature 0 the same question gets the same answer" in outcome.stderr
    resumed = ifp("chat", "--resume", "--model", word_model, stdin="/stats\n")
    assert "2 messages" in resumed.stderr


def test_chat_system_prompt_is_part_of_the_conversation(ifp: Run, small_model: Path) -> None:
    def answer(*arguments: str, script: str = "hello\n") -> str:
        return str(ifp("chat", "--model", small_model, "--dense", "-m", "8", *arguments,
                       stdin=script).stdout)  # fmt: skip

    plain, brief = answer(), answer("--system-prompt", "be brief")
    assert plain != brief
    assert answer(script="/system be brief\nhello\n") == brief
    assert answer("--system-prompt", "be brief", script="/system off\nhello\n") == plain


def test_chat_penalizes_repetition_as_generate_does(ifp: Run, small_model: Path) -> None:
    arguments = ("--model", small_model, "--dense", "-m", "12")
    penalty = ("--repetition-penalty", "1.3")
    generated = ifp("generate", "hello", *arguments, *penalty)
    talked = ifp("chat", *arguments, *penalty, stdin="hello\n")
    assert (talked.code, talked.stdout) == (0, generated.stdout)
    assert talked.stdout != ifp("chat", *arguments, stdin="hello\n").stdout


def test_chat_refuses_a_penalty_that_is_none(ifp: Run, word_model: Path, home: Path) -> None:
    outcome = ifp("chat", "--model", word_model, "--repetition-penalty", "0", stdin="hello\n")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr == "ifp: --repetition-penalty must be a number above 0, not 0\n"
    assert not (home / "sessions").exists()


def test_chat_model_switch_keeps_the_conversation(
    ifp: Run, word_model: Path, small_model: Path, words: str, home: Path
) -> None:
    script = f"hello\n/model {small_model}\nagain\n/model\n"
    outcome = ifp("chat", "--model", word_model, "-m", "40", stdin=script)
    assert outcome.code == 0
    assert outcome.stdout.startswith(f"{words}\n")
    assert f"model: {small_model}" in outcome.stderr
    assert len(recorded(home)) == 4


def test_chat_save_and_load_by_name(ifp: Run, word_model: Path) -> None:
    saved = ifp("chat", "--model", word_model, stdin="hello\n/save greeting\n")
    assert "saved as greeting" in saved.stderr
    loaded = ifp("chat", "--model", word_model, stdin="other\n/load greeting\nmore\n/sessions\n")
    assert "continuing greeting: 2 messages" in loaded.stderr
    assert "greeting" in loaded.stderr
    assert "4 messages" in loaded.stderr
    again = ifp("chat", "--session", "greeting", "--model", word_model, stdin="")
    assert "continuing greeting: 4 messages" in again.stderr


def test_chat_resume_continues_the_latest(ifp: Run, word_model: Path, words: str) -> None:
    ifp("chat", "--model", word_model, "--task", "say words", "--keep-units", "64", stdin="one\n")
    outcome = ifp("chat", "--resume", stdin="two\n")  # the model is that of the session
    assert outcome.code == 0
    assert outcome.stdout == f"{words}\n"
    assert 'cache hit for "say words": 64 of 192' in outcome.stderr


def test_chat_clear_begins_a_new_session(ifp: Run, word_model: Path, home: Path) -> None:
    outcome = ifp("chat", "--model", word_model, stdin="one\n/clear\ntwo\n")
    assert "new chat (/load" in outcome.stderr
    assert len(list((home / "sessions").iterdir())) == 2


def test_chat_no_save_leaves_nothing_on_disk(ifp: Run, word_model: Path, home: Path) -> None:
    ifp("chat", "--model", word_model, "--no-save", "--no-cache", stdin="secret\n/clear\nx\n")
    assert not home.exists()


def test_chat_help_lists_every_command(ifp: Run, word_model: Path) -> None:
    errors = ifp("chat", "--model", word_model, stdin="/help\n").stderr
    for name in (
        "/task", "/retask", "/keep", "/dense", "/stats", "/system", "/model", "/save", "/load",
        "/sessions", "/clear", "/retry", "/edit", "/copy", "/help", "/bye",
    ):  # fmt: skip
        assert name in errors
    assert "[on|off]" in errors


def test_chat_bye_ends_before_the_next_line(ifp: Run, word_model: Path, words: str) -> None:
    assert ifp("chat", "--model", word_model, stdin="one\n/bye\ntwo\n").stdout == f"{words}\n"


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("/bogus\n", "no command /bogus; /help lists them"),
        ("/s\n", "did you mean /stats or /system or /save or /sessions?"),
        ("/rety\n", "did you mean /retry?"),
        ("/keep much\n", "/keep takes a ratio"),
        ("/keep 100\n", "nearest to 100: 64 or 128"),
        ("/dense maybe\n", "/dense off goes back"),
        ("/stats maybe\n", "/stats on, /stats off"),
        ("/retask\n", "nothing has been said yet"),
        ("/retry\n", "nothing has been said yet"),
        ("/edit\n", "nothing has been said yet"),
        ("/copy\n", "there is no answer to copy yet"),
        ("hello\n/copy code\n", "the last answer has no code block"),
        ("/save\n", "/save takes a name"),
        ("/save a/b\n", "cannot be a session's name"),
        ("/load nothing\n", "there is no session 'nothing'"),
        ("/model nothing\n", "there is no model 'nothing'"),
        (b"caf\xe9\n", "not UTF-8 text (byte 3 of a line)"),
    ],
    ids=lambda value: value.strip().decode("latin-1") if isinstance(value, bytes) else None,
)
def test_chat_reports_a_wrong_command_in_one_line(
    ifp: Run, word_model: Path, script: str | bytes, part: str
) -> None:
    outcome = ifp("chat", "--model", word_model, stdin=script)
    assert outcome.code in (1, 2)
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("ifp: ")
    assert part in last


def test_chat_full_context_is_never_silent(ifp: Run, short_model: Path, home: Path) -> None:
    script = "hello there\n" * 6
    refused = ifp("chat", "--model", short_model, "--dense", stdin=script)
    assert refused.code == 2
    assert "the context is full" in refused.stderr.splitlines()[-1]
    assert "--drop-oldest" in refused.stderr.splitlines()[-1]
    dropped = ifp("chat", "--model", short_model, "--dense", "--drop-oldest", stdin=script)
    assert dropped.code == 0
    assert "forgot the oldest" in dropped.stderr
    assert dropped.stdout.count("zulu") == 6


def test_chat_message_longer_than_the_context_is_refused(ifp: Run, short_model: Path) -> None:
    outcome = ifp("chat", "--model", short_model, "--dense", stdin="x" * 1000 + "\n")
    assert outcome.code == 2
    assert "shorten the message" in outcome.stderr


def test_chat_message_without_a_reply_can_be_answered_later(
    ifp: Run, word_model: Path, words: str, home: Path
) -> None:
    from ifp_mlx.chat.session import Session, SessionSettings

    session = Session.new(home / "sessions", SessionSettings(model=str(word_model)), "cut")
    session.add_message("user", "lost question")
    session.close()
    outcome = ifp("chat", "--session", "cut", stdin="/retry\n")
    assert "was not answered; /retry answers it" in outcome.stderr
    assert outcome.stdout == f"{words}\n"
    contents = [message["content"] for message in Session.load(home / "sessions", "cut").messages]
    assert contents == ["lost question", words]


def test_chat_new_message_replaces_one_without_a_reply(
    ifp: Run, word_model: Path, words: str, home: Path
) -> None:
    from ifp_mlx.chat.session import Session, SessionSettings

    session = Session.new(home / "sessions", SessionSettings(model=str(word_model)), "cut")
    session.add_message("user", "lost question")
    session.close()
    ifp("chat", "--session", "cut", stdin="another one\n")
    contents = [message["content"] for message in Session.load(home / "sessions", "cut").messages]
    assert contents == ["another one", words]


@pytest.mark.parametrize("pieces", [[], ["Alpha", " bravo"]], ids=["nothing", "a beginning"])
def test_chat_records_an_answer_as_far_as_it_came(
    ifp: Run, word_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str]
) -> None:
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.session import Session
    from ifp_mlx.errors import ResourceError

    def reply(self: Conversation, messages: Any, *_: object) -> Any:
        assert [message["content"] for message in messages] == ["be brief", "hello"]
        yield from pieces
        raise ResourceError("no memory")

    monkeypatch.setattr(Conversation, "reply", reply)
    arguments = ("--model", word_model, "--session", "cut", "--system-prompt", "be brief")
    outcome = ifp("chat", *arguments, stdin="hello\n")
    assert outcome.code == 1
    assert outcome.stdout.strip() == "".join(pieces)
    messages = Session.load(home / "sessions", "cut").messages
    # A question that got no answer at all is taken back.
    expected = ["hello", "Alpha bravo"] if pieces else []
    assert [message["content"] for message in messages] == expected


def test_a_long_first_message_is_answered_by_the_whole_model(
    ifp: Run, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = tiny_checkpoint(intermediate_size=1280, max_position_embeddings=4096)
    arguments = ("chat", "--model", model, "--no-save", "-m", "2")
    long = "a" * 600  # tokens: of this model, one is a character
    told = "to select a part for this prompt would take longer than it saves"
    errors = ifp(*arguments, stdin=f"{long}\n/retask\n").stderr
    before, _, after = errors.partition(told)
    assert after
    assert "selected" not in before
    assert "selected 1216 of 1280 FFN units for this prompt" in after  # /retask
    assert told not in ifp(*arguments, stdin="short\n").stderr
    assert told not in ifp(*arguments, "--keep-units", "64", stdin=f"{long}\n").stderr


def test_chat_drift_suggests_to_reselect(ifp: Run, small_model: Path) -> None:
    arguments = (*TWO_THIRDS, "--model", small_model, "--task", "write words", "--no-save")
    script = "hello\n0123456789 9876543210\n"
    suggested = ifp(*arguments, "--drift", "1", stdin=script)
    assert suggested.stderr.count("this message selects other units (overlap 0.") == 1
    assert "/retask reselects" in suggested.stderr
    silent = ifp(*arguments, "--drift", "0.01", stdin=script)
    assert "other units" not in silent.stderr


def test_chat_resume_takes_other_flags_over_its_own(
    ifp: Run, word_model: Path, small_model: Path, words: str, home: Path
) -> None:
    ifp("chat", "--model", word_model, "--task", "say words", "--keep-units", "64", stdin="one\n")
    assert "64 of 192" in ifp("chat", "--resume", stdin="two\n").stderr
    assert "128 of 192" in ifp("chat", "--resume", "--keep-units", "128", stdin="two\n").stderr
    assert "128 of 192" in ifp("chat", "--resume", stdin="two\n").stderr  # it was recorded
    assert 'for "count"' in ifp("chat", "--resume", "--task", "count", stdin="two\n").stderr
    assert "dense: all 192" in ifp("chat", "--resume", "--dense", stdin="two\n").stderr
    other = ifp("chat", "--resume", "--model", small_model, stdin="/model\n")
    assert f"model: {small_model}" in other.stderr


def test_chat_resume_without_a_task_selects_as_it_did(ifp: Run, small_model: Path) -> None:
    def overlap_line(outcome: Any) -> str:
        lines: list[str] = outcome.stderr.splitlines()
        return next(line for line in lines if "former one" in line)

    begun = ifp(*TWO_THIRDS, "--model", small_model, stdin="hello\n/task count\n")
    ifp(*TWO_THIRDS, "--model", small_model, "--session", "b", stdin="hello\n")
    resumed = ifp("chat", "--session", "b", "-m", "5", stdin="something else\n/task count\n")
    assert overlap_line(resumed) == overlap_line(begun)


def test_chat_refused_change_leaves_all_as_it_was(ifp: Run, word_model: Path) -> None:
    script = "hello\n/keep 100\n"
    refused = ifp("chat", "--model", word_model, "--session", "s", stdin=script)
    assert refused.code == 2
    assert "128 of 192" in ifp("chat", "--session", "s", stdin="/keep 0.7\n").stderr


def test_chat_says_once_that_it_leaves_its_task(
    ifp: Run, write_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts drawn at random are no better than chance, whatever is said."""
    mixture = write_tiny_checkpoint(tmp_path / "mixture", "olmoe")
    chat = ("chat", "--model", mixture, "--selector", "random", "--task", "write", "-m", "4")
    half = ifp(*chat, "--keep", "0.5", stdin="hello\nand more\nand again\n")
    assert half.code == 0
    assert half.stderr.count("this leaves the task: ") == 1
    assert "/retask selects anew, then /retry" in half.stderr
    whole = ifp(*chat, "--keep", "1", stdin="hello\n")
    assert "this leaves the task" not in whole.stderr
