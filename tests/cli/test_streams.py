"""Text at the edges: bytes, encodings, closed, full and broken streams, read-only folders."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MAIN = "from ifp_mlx.cli.app import main; main()"
Outcome = tuple[int, bytes, bytes]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs ``ifp`` as a shell does, with redirections behind its words."""

    def run(words: str, redirections: str = "</dev/null", **environment: str) -> Outcome:
        command = f'"$PYTHON" -c "{MAIN}" {words} {redirections}'
        base = {**os.environ, "IFP_HOME": str(tmp_path / "home"), "PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            env={**base, **environment},
            timeout=120,
            preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL),
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def answer(word_model: Path) -> str:
    """Return the words of a command that answers."""
    return f"generate hi --dense -m 30 --model {word_model}"


@pytest.mark.slow
@pytest.mark.parametrize("words", ["generate $'caf\\xe9'", "cache add $'caf\\xe9'", "$'\\xff'"])
def test_an_argument_that_is_no_text_is_one_line(
    shell: Callable[..., Outcome], word_model: Path, words: str
) -> None:
    code, out, err = shell(f"{words} --model {word_model}")
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert b"is not UTF-8 text; write it in UTF-8" in err


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252"])
def test_what_the_encoding_of_the_output_lacks_is_replaced(
    shell: Callable[..., Outcome], tmp_path: Path, encoding: str
) -> None:
    from ifp_mlx.cli.terminal import prepare_streams  # noqa: F401

    program = (
        "import sys; from ifp_mlx.cli.terminal import prepare_streams, print_json; "
        "prepare_streams(); print('A\\u00e9\\U0001f600\\udce9'); print_json({'a': '\\u00e9'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    first, rest = done.stdout.split(b"\n", 1)
    assert first == "Aé😀\udce9".encode(encoding, errors="replace")
    assert rest.decode(encoding) == '{\n  "a": "%s"\n}\n' % (
        "é" if encoding == "utf-8" else "\\u00e9"
    )


@pytest.mark.slow
def test_the_c_locale_answers(shell: Callable[..., Outcome], answer: str, words: str) -> None:
    code, out, _ = shell(answer, LC_ALL="C")
    assert (code, out.decode().strip()) == (0, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirections",
    ["<&-", "</dev/null 2>&-", "<&- 2>&-", "</dev/null 2>/dev/full"],
)
def test_closed_and_full_streams_beside_the_answer_do_not_matter(
    shell: Callable[..., Outcome], answer: str, words: str, redirections: str
) -> None:
    code, out, _ = shell(answer, redirections)
    assert (code, out.decode().strip()) == (0, words)


@pytest.mark.slow
def test_closed_standard_output_is_no_traceback(shell: Callable[..., Outcome], answer: str) -> None:
    code, _, err = shell(answer, "<&- >&-")
    assert (code, err.count(b"\n")) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", " --json", " --stats"])
def test_a_full_device_is_one_line(shell: Callable[..., Outcome], answer: str, extra: str) -> None:
    code, _, err = shell(answer + extra, "</dev/null >/dev/full")
    assert code == 1
    assert err.splitlines()[-1] == b"ifp: cannot use standard output: No space left on device"


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_word(shell: Callable[..., Outcome], answer: str) -> None:
    _, _, err = shell(answer, "</dev/null | true")
    assert b"ifp:" not in err


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    shell: Callable[..., Outcome], small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = f"generate hi -m 3 --task sums --selector prompt --keep 0.67 --model {small_model}"
    code, _, err = shell(words, IFP_HOME=str(tmp_path / "file" / "home"))
    assert code == 0
    assert b"the sub-network is not cached: cannot write" in err


def test_standard_input_may_begin_with_a_byte_order_mark(
    ifp: Callable[..., object], small_model: Path
) -> None:
    words = ("generate", "--dense", "-m", "9", "--model", small_model)
    assert ifp(*words, stdin=b"\xef\xbb\xbfhi") == ifp(*words, stdin=b"hi")
