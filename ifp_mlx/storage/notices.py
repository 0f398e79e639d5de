"""Warnings that are said once a process, however often their reason comes up."""

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless the same was logged before."""
    logger.warning("%s", message)
