"""Pictures of cached sub-networks, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ifp_mlx.cli.terminal import say
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.subnets.task_cache import CacheEntry


def draw_entry(path: Path, entry: CacheEntry, other: CacheEntry | None) -> None:
    """Write the picture of a cached sub-network, whole or not at all.

    Args:
        path: the file.
        entry: what is drawn.
        other: what it is compared with.

    Raises:
        UsageError: the file's name is not one of a picture, or the two are of different models.
        ResourceError: the file cannot be written.
        SelectionError: an entry is damaged.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError("pictures are SVG: give the file a name that ends in .svg")
    if other is not None and other.key.base != entry.key.base:
        raise UsageError(
            f"{entry.model_name} and {other.model_name} are different models: their units have "
            "nothing to do with each other"
        )

    from ifp_mlx.pictures.subnetwork import Subject, draw
    from ifp_mlx.pictures.unit_map import UnitMap
    from ifp_mlx.storage.files import write_bytes_atomically

    subjects = [
        Subject(drawn.key.task, UnitMap.of(drawn.load()))
        for drawn in (entry, other)
        if drawn is not None
    ]
    write_bytes_atomically(path, draw(*subjects).encode())
    say(f"drew {path}")
