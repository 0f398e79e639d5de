"""What the library logs as a warning: one line each on standard error."""

import contextlib
import logging
from collections.abc import Iterator

from ifp_mlx.cli.flag_names import in_flags
from ifp_mlx.cli.terminal import say

_LIBRARY = "ifp_mlx"


class _StatusLines(logging.Handler):
    """Says each record in one line, like everything else that is no answer."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        say(in_flags(" ".join(record.getMessage().split())))


@contextlib.contextmanager
def library_warnings_shown() -> Iterator[None]:
    """Show warnings of this library's loggers within the block; other loggers stay as they are."""
    logger = logging.getLogger(_LIBRARY)
    lines = _StatusLines(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False  # not once more by the root's handlers
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.propagate = propagated
