"""The ``ifp`` command: its sub-commands and what every one of them does with errors.

Library modules are imported inside commands, so that ``ifp --help`` and shell completion
answer without loading mlx; and a command line that names its command loads no other command.
"""

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from ifp_mlx import __version__
from ifp_mlx.cli.library_warnings import library_warnings_shown
from ifp_mlx.cli.terminal import complain, prepare_streams
from ifp_mlx.errors import IFPError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# Name -> function in the module of that name, or a group of commands.
_COMMANDS = {
    "pull": "pull",
    "chat": "chat",
    "generate": "generate",
    "fit": "fit",
    "cache": "app",
    "tasks": "tasks",
    "convert": "convert",
    "quantize": "quantize",
    "export": "export",
    "prepare": "prepare",
    "calibrate": "calibrate",
    "serve": "serve",
    "train": "train",
    "eval": "evaluate",
    "overlap": "overlap",
    "bench": "app",
    "doctor": "doctor",
}


def make_app(only: str | None = None) -> typer.Typer:
    """Return the command line.

    Args:
        only: the one command that it is made of; None makes it of all.
    """
    app = typer.Typer(
        name="ifp",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: Rich's tables leave too little room for the text
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(ifp)
    for name in _COMMANDS if only is None else [only]:
        command = getattr(importlib.import_module(f"ifp_mlx.cli.{name}"), _COMMANDS[name])
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
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
    """Chat with the part of a language model that your task needs.

    ifp picks the units that a task uses (FFN units, or experts of a mixture), slices them into a
    smaller model and talks with that. Answers go to standard output, everything else to standard error.
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
        app = make_app(words[0] if words and words[0] in _COMMANDS else None)
        with library_warnings_shown():
            code = app(arguments, prog_name="ifp", standalone_mode=False)
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
