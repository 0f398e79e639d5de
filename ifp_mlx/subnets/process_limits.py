"""What a process may take of the machine's memory: the limits of a shell or of a container."""

import contextlib
import resource
from pathlib import Path

_CONTAINER_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def process_limit_bytes() -> int | None:
    """Return the most memory that this process may take; None if nothing limits it."""
    soft = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    limits = [limit for limit in soft if limit != resource.RLIM_INFINITY]
    for file in _CONTAINER_FILES:
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            limits.append(int(file.read_text()))
    return min(limits, default=None)
