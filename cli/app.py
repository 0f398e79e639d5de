"""The ``ifp`` command: its sub-commands and what every one of them does with errors.

Library modules are imported inside commands, so that ``ifp --help`` and shell completion
answer without loading mlx.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from ifp_mlx import __version__
from ifp_mlx.cli import (
    bench,
    cache,
    calibrate,
    chat,
    convert,
    doctor,
    eval,
    export,
    generate,
    overlap,
    prepare,
    pull,
    quantize,
    serve,
    tasks,
    train,
)
from ifp_mlx.cli.terminal import complain
from ifp_mlx.errors import IFPError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="ifp",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: Rich's tables leave too little room for the text
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ifp {__version__}")
        raise typer.Exit


@app.callback()
def ifp(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Chat with the part of a language model that your task needs.

    ifp picks the FFN units that a task uses, slices them into a smaller dense model and talks
    with that. Answers go to standard output, everything else to standard error.
    """
    from ifp_mlx.blas import prefer_openblas

    prefer_openblas()  # before any command imports mlx


app.command("pull")(pull.pull)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.add_typer(cache.app, name="cache")
app.command("tasks")(tasks.tasks)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("prepare")(prepare.prepare)
app.command("calibrate")(calibrate.calibrate)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("overlap")(overlap.overlap)
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)

# Typer carries its own copy of click, of which this exception is the public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; every expected error is one line."""
    try:
        code = app(arguments, prog_name="ifp", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: let that go nowhere, quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    sys.exit(run())
