"""Named arrays on disk: safetensors with a metadata header, written whole or not at all."""

from pathlib import Path
from typing import cast

import mlx.core as mx

from ifp_mlx.storage.files import atomic_path


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write ``arrays`` and ``metadata`` to a safetensors file. Evaluates.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, metadata)
        except RuntimeError as error:  # mlx reports a failed write so
            raise OSError(str(error)) from error


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays (lazy) and the metadata of a safetensors file.

    Raises:
        ValueError: the file is missing, damaged or not safetensors.
    """
    try:
        return cast(
            tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True)
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
