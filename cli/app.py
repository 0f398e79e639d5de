"""The ``ifp`` command: its sub-commands and what every one of them does with errors.

Library modules are imported inside commands, so that ``ifp --help`` and shell completion
answer without loading mlx; and a command line that names its command loads no other command.
"""

import atexit
import contextlib
import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from ifp_mlx import __version__
from ifp_mlx.cli.help_sections import (
    DEVELOPERS,
    MODELS,
    TALK,
    TASKS,
    CommandGroup,
)
from ifp_mlx.cli.library_warnings import library_warnings_shown
from ifp_mlx.cli.terminal import complain, prepare_streams, say
from ifp_mlx.errors import IFPError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class _Command:
    """Where a command is: a module of this package, a function or a group of commands in it.

    Attributes:
        module: without the package's name.
        attribute: of the module.
        section: of the help; None hides the command.
    """

    module: str
    attribute: str
    section: str | None


_COMMANDS = {
    "pull": _Command("pull", "pull", TALK),
    "chat": _Command("chat", "chat", TALK),
    "generate": _Command("generate", "generate", TALK),
    "serve": _Command("serve", "serve", TALK),
    "doctor": _Command("doctor", "doctor", TALK),
    "cache": _Command("cache", "app", TASKS),
    "fit": _Command("fit", "fit", TASKS),
    "task": _Command("presets", "app", TASKS),
    "models": _Command("models", "app", MODELS),
    "convert": _Command("convert", "convert", MODELS),
    "quantize": _Command("quantize", "quantize", MODELS),
    "export": _Command("export", "export", MODELS),
    "calibrate": _Command("calibrate", "calibrate", DEVELOPERS),
    "train": _Command("train", "train", DEVELOPERS),
    "eval": _Command("eval", "evaluate", DEVELOPERS),
    "bench": _Command("bench", "app", DEVELOPERS),
    "tasks": _Command("task_tree", "tasks", None),
    "prepare": _Command("prepare", "prepare", None),
    "overlap": _Command("overlap", "overlap", None),
}
_FORMER = {
    "tasks": "ifp cache list --tree",
    "prepare": "ifp convert MODEL --unit-major",
    "overlap": "ifp eval --overlap",
}
"""Names of an earlier release, which still work, and what is called so now."""

_ELSEWHERE = {
    "list": "ifp models list shows the models here, ifp cache list the tasks that are ready",
    "ls": "ifp models list shows the models here, ifp cache list the tasks that are ready",
    "run": "ifp chat --model MODEL talks with a model, ifp pull MODEL fetches one",
    "rm": "ifp models rm removes a model, ifp cache rm a task's sub-network",
    "show": "ifp models show describes a model, ifp cache show a task's sub-network",
    "ask": 'ifp generate "..." answers one prompt, ifp chat talks',
    "benchmark": "ifp bench measures speed, ifp eval quality",
}
"""What other programs call their commands, and where it is here."""


def make_app(only: str | None = None) -> typer.Typer:
    """Return the command line.

    Args:
        only: the one command that it is made of; None makes it of all.
    """
    app = CommandGroup(
        name="ifp",
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog="ifp COMMAND --help explains a command; so does ifp help COMMAND.")(ifp)
    for name in _COMMANDS if only is None else [only]:
        row = _COMMANDS[name]
        command = getattr(importlib.import_module(f"ifp_mlx.cli.{row.module}"), row.attribute)
        placed: dict[str, Any] = {"rich_help_panel": row.section, "hidden": row.section is None}
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, **placed)
        else:
            app.command(name, **placed)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ifp {__version__}")
        raise typer.Exit


def ifp(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Run a language model on this machine, cut down to what your task needs.

    A model's layers consist of thousands of units, and one task uses some of them far more than the
    others. ifp keeps those, for a task that you describe in a sentence, as a smaller model: the
    task's sub-network.

    Answers go to standard output, everything else to standard error.

    To begin: ifp pull smollm2-135m, then ifp chat --task "help me write Python"
    """
    from ifp_mlx.blas import prefer_openblas

    prefer_openblas()  # before any command imports mlx


# Typer carries its own copy of click, of which this exception is the public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; every expected error is one line."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _refuse_bytes(words)
        if words[:1] == ["help"]:
            words = [*words[1:], "--help"]
        name = words[0] if words and not words[0].startswith("-") else None
        if name is not None and name not in _COMMANDS:
            raise UsageError(f"No such command {name!r}. {_where(name)}")
        if name in _FORMER:
            say(f"ifp {name} is now called {_FORMER[name]}")
        app = make_app(name)
        with library_warnings_shown():
            code = app(words, prog_name="ifp", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except IFPError as error:
        complain(str(error))
        return EXIT_FAILED
    except (_CommandLineError, typer.Abort) as error:
        return _report_command_line(error)
    except OSError as error:  # of a file no one took care of, or standard output's
        what = error.filename if error.filename is not None else "standard output"
        complain(f"cannot use {what}: {error.strerror or error}")
        return EXIT_FAILED


def _where(name: str) -> str:
    """Return where to find what a word that is no command may mean."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    shown = [known for known, command in _COMMANDS.items() if command.section]
    near = difflib.get_close_matches(name, shown)
    return f"Did you mean {' or '.join(near)}?" if near else "ifp --help lists them"


def _refuse_bytes(words: Sequence[str]) -> None:
    """Refuse a command line with bytes that are no text in the terminal's encoding.

    Raises:
        UsageError: shows the argument.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode(errors="replace").decode()
            raise UsageError(
                f"{shown!r} is not UTF-8 text; write it in UTF-8, or convert it with iconv -t UTF-8"
            ) from None


def _report_command_line(error: Exception) -> int:
    message = getattr(error, "format_message", lambda: "stopped")()
    context = getattr(error, "ctx", None)
    if isinstance(error, _UsageError) and context is not None:
        message = f"{' '.join(message.split())} (see {context.command_path} --help)"
    complain(" ".join(message.split()))
    return int(getattr(error, "exit_code", EXIT_FAILED))


def main() -> NoReturn:
    """Entry point of the installed command."""
    # transformers loads torch wherever it is installed, which takes seconds; nothing here uses it.
    # None makes it look absent.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    prepare_streams()
    try:
        code = run()
    except SystemExit as ended:  # shell completion ends so
        code = ended.code if isinstance(ended.code, int) else EXIT_FAILED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = EXIT_FAILED
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process without finalizing the interpreter.

    mlx keeps random state for each thread that draws. If such a thread has ended, as the server's
    generation thread has by now, the end of the interpreter is an abort: "terminate called without
    an active exception", exit code 134 (mlx 0.32.4).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)
