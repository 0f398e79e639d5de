"""config.json of a checkpoint directory, and what makes a directory one."""

import json
from pathlib import Path
from typing import Any

from ifp_mlx.errors import CheckpointError
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
    check_links(path)
    content = read_json(path / "config.json")
    for key in ("model_file", "auto_map"):
        if key in content:
            raise CheckpointError(
                f"{path}/config.json wants to run Python code of the checkpoint ({key}), which is "
                f"never done; remove {key!r} from it if mlx-lm has this model built in"
            )
    generation = path / "generation_config.json"
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
        raise CheckpointError(f"{path} is not valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def check_links(path: Path) -> None:
    """Refuse links that leave the directory, except those of the hub's own cache layout.

    Raises:
        CheckpointError: names the link.
    """
    root = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for entry in path.iterdir():
        if entry.is_symlink():
            target = entry.resolve()
            if not any(target.is_relative_to(folder) for folder in allowed):
                raise CheckpointError(
                    f"{entry} is a link out of the checkpoint directory; copy the file instead"
                )
