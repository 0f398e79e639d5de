"""config.json of a checkpoint directory, and what makes a directory one."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.misnamed import what_it_is
from ifp_mlx.units.model_config import ModelConfig

_MAX_JSON_BYTES = 16_000_000


def read_config(path: Path) -> ModelConfig:
    """Return the checked configuration of a checkpoint directory.

    End-of-text ids of generation_config.json replace those of config.json, as in mlx-lm.

    Raises:
        CheckpointError: ``path`` is no checkpoint directory, or wants to run code of its own.
        ConfigError: config.json lacks a size or has one that is not a positive integer, or a
            setting that is not a number.
        ArchitectureError: the family is not in the table.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a checkpoint directory; ifp pull or ifp convert makes one"
        )
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} has no config.json; it is not a checkpoint that ifp pull or ifp convert made"
        )
    generation = path / "generation_config.json"
    check_links(path, [path / "config.json", generation])
    content = read_json(path / "config.json")
    if content.get("model_file") is not None:
        raise CheckpointError(
            f"{path}/config.json wants to run Python code of the checkpoint (model_file), which is "
            "never done; remove 'model_file' from it if mlx-lm has this model built in"
        )
    if generation.exists() and (end_ids := read_json(generation).get("eos_token_id")):
        content["eos_token_id"] = end_ids
    return ModelConfig.parse(content, path / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is too large or no object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any such file; download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        with path.open("rb") as file:
            what = what_it_is(path, file.read(64)) or "is not valid JSON; download it again"
        raise CheckpointError(f"{path} {what}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def check_links(path: Path, files: Iterable[Path]) -> None:
    """Refuse links that leave the directory, except those of the hub's own cache layout.

    There the files are links to ``blobs``; that folder, or a blob in it, may itself be a link to
    another disk.

    Args:
        path: a checkpoint directory.
        files: of it, those that are about to be read; others cannot do harm.

    Raises:
        CheckpointError: names the link, also one to a file that is gone.
    """
    root = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for file in files:
        if not file.is_symlink():
            continue
        if not file.exists():
            raise CheckpointError(f"{file} is a link to a file that is gone; download it again")
        first = Path(os.path.normpath(root / file.readlink()))
        allowed = [root] if blobs is None else [root, blobs.resolve()]
        target = file.resolve()
        if first.parent != blobs and not any(target.is_relative_to(one) for one in allowed):
            raise CheckpointError(
                f"{file} is a link out of the checkpoint directory; copy the file instead"
            )
