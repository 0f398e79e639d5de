"""Where a prompt comes from: the command line, a pipe, or both."""

import os
import stat
import sys

from ifp_mlx.errors import UsageError


def read_prompt(prompt: str | None) -> str:
    """Return the prompt: the argument, what is piped in (``-``), or the argument and then the pipe.

    Raises:
        UsageError: there is none, or the input is no UTF-8 text.
    """
    if prompt == "-" or prompt is None:
        if prompt is None and not _is_piped():
            raise UsageError("no prompt; give one, or - to read standard input")
        text = read_stdin()
    elif _is_piped():
        piped = read_stdin()
        text = f"{prompt}\n\n{piped}" if piped.strip() else prompt
    else:
        text = prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def read_stdin() -> str:
    """Return all of standard input.

    Raises:
        UsageError: it is no UTF-8 text.
    """
    return decode_input(sys.stdin.buffer.read()).rstrip("\n")


def decode_input(content: bytes, where: str = "") -> str:
    """Return bytes of standard input as text; ``where`` completes the message: " of a line".

    Raises:
        UsageError: they are no UTF-8 text.
    """
    try:
        return content.decode("utf-8-sig")  # some pipes begin with a mark
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text (byte {error.start}{where}); convert it first, "
            "for example with iconv -t UTF-8"
        ) from error


def _is_piped() -> bool:
    # Not just "no terminal": reading a device that nobody writes to would wait for ever.
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
