import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx import __version__

Run = Callable[..., Any]


def one_line(outcome: Any, *parts: str) -> bool:
    """Return whether stderr is one ``ifp:`` line that holds every part, and stdout is empty."""
    lines = outcome.stderr.splitlines()
    return (
        outcome.stdout == ""
        and len(lines) == 1
        and lines[0].startswith("ifp: ")
        and all(part in lines[0] for part in parts)
    )


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["generate", "--help"]])
def test_help_does_not_import_heavy_modules(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom ifp_mlx.cli.app import run\n"
        f"code = run({arguments!r})\n"
        "heavy = ('mlx', 'mlx.core', 'mlx_lm', 'transformers', 'numpy', 'rich', 'prompt_toolkit')\n"
        "print([name for name in heavy if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_a_command_line_loads_no_other_command() -> None:
    program = (
        "import sys\nfrom ifp_mlx.cli.app import run\nrun(['generate', '--help'])\n"
        "others = ('ifp_mlx.cli.train', 'ifp_mlx.cli.bench', 'ifp_mlx.cli.chat')\n"
        "print([name for name in others if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="mlx has a fast BLAS of its own there")
def test_a_missing_openblas_is_one_line_that_says_how_to_get_it(
    word_model: Path, tmp_path: Path
) -> None:
    program = (
        "import ctypes.util\nctypes.util.find_library = lambda name: None\n"
        "from ifp_mlx.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "generate", "hi", "--model", str(word_model)]
    environment = {**os.environ, "IFP_HOME": str(tmp_path)}
    environment.pop("IFP_NO_OPENBLAS", None)
    done = subprocess.run(
        [*command, "-m", "2"], capture_output=True, text=True, env=environment, stdin=0
    )
    advice = [line for line in done.stderr.splitlines() if "OpenBLAS" in line]
    assert advice == [
        "mlx computes with reference BLAS here, about 60 times as slowly as with OpenBLAS: "
        "install it, for example with apt install libopenblas0"
    ]
    assert done.stdout == "Alpha bravo\n"


def test_version_is_the_package_version(ifp: Run) -> None:
    outcome = ifp("--version")
    assert (outcome.code, outcome.stdout) == (0, f"ifp {__version__}\n")


def test_no_command_prints_the_help(ifp: Run) -> None:
    outcome = ifp()
    assert outcome.code == 2
    assert "Usage: ifp" in outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["chat", "--bogus"], "No such option: --bogus"),
        (
            ["generate", "x", "--max-tokens", "many"],
            "Input should be a valid integer",
        ),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "--keep", "0.5", "--keep-units", "64"], "exclude each other"),
        (["generate", "x", "--dense", "--keep", "0.5"], "--dense keeps every unit"),
        (["generate", "x", "--adapter", "a", "--no-adapter"], "exclude each other"),
        (["generate", "x", "--task", " "], "--task is empty"),
        (["generate", "x", "--raw", "--system-prompt", "s"], "--system-prompt needs"),
        (["chat", "--resume", "--session", "a"], "--resume continues the latest"),
        (["chat", "--resume"], "no chat to resume"),
        (["chat", "--session", "../x"], "cannot be a session's name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(ifp: Run, arguments: list[str], part: str) -> None:
    outcome = ifp(*arguments)
    assert outcome.code == 2
    assert one_line(outcome, part)


def test_interrupt_exits_130(ifp: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ifp_mlx.cli.generate.read_prompt", interrupted)
    assert ifp("generate", "x").code == 130


def test_closed_pipe_ends_quietly(word_model: Path, tmp_path: Path) -> None:
    # The reader is gone before the first word: every write fails.
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()"]
    done = subprocess.run(
        [*command, "generate", "hello", "--model", str(word_model)],
        stdout=write_end,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "IFP_HOME": str(tmp_path)},
    )
    os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("ifp ca", "1", {"cache", "calibrate"}),
        ("ifp generate --model ", "3", {"small"}),
        ("ifp chat --session ", "3", {"thesis"}),
    ],
)
def test_shell_completion_knows_commands_models_and_chats(
    tmp_path: Path, words: str, position: str, expected: set[str]
) -> None:
    from ifp_mlx.chat.session import Session, SessionSettings

    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.json").write_text("{}")
    session = Session.new(tmp_path / "sessions", SessionSettings("small"), "thesis")
    session.add_message("user", "x")
    session.close()
    asked = {"_IFP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    done = subprocess.run(
        [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, **asked, "IFP_HOME": str(tmp_path)},
    )
    assert set(done.stdout.split()) == expected
