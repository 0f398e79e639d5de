"""The files of a checkpoint directory: weights shard by shard, config, tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ifp_mlx.errors import CheckpointError, ResourceError
from ifp_mlx.storage.config_file import check_links
from ifp_mlx.storage.tokenizer import TOKENIZER_FILES

_COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")


class ShardWriter:
    """Writes ``model*.safetensors`` and, for several files, their index into a directory.

    Add arrays in order, then call ``finish``. Arrays are evaluated when their shard is full.
    """

    shard_bytes = 1 << 30

    def __init__(self, directory: Path):
        self._directory = directory
        self._pending: dict[str, mx.array] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, array: mx.array) -> None:
        """Take one array; an array larger than a shard gets a shard of its own."""
        if self._pending and self._pending_bytes + array.nbytes > self.shard_bytes:
            self._write_pending()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def finish(self) -> None:
        """Write what is left, give the shards their final names and write the index.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        self._write_pending()
        total = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            name = "model.safetensors"
            if total > 1:
                name = f"model-{number:05d}-of-{total:05d}.safetensors"
            self._temporary_path(number).rename(self._directory / name)
            weight_map.update(dict.fromkeys(names, name))
        if total > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self._directory / "model.safetensors.index.json", index)

    def _temporary_path(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"

    def _write_pending(self) -> None:
        path = self._temporary_path(len(self._shards) + 1)
        try:
            mx.save_safetensors(str(path), self._pending, metadata={"format": "mlx"})
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"cannot write {path}: {error}") from error
        self._shards.append(list(self._pending))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def write_model(
    model: nn.Module,
    config: dict[str, Any],
    target: Path,
    *,
    dtype: mx.Dtype | None = None,
    on_bytes: Callable[[int], None] = lambda done: None,
) -> int:
    """Write a model's weights and config.json into an existing directory; return their bytes.

    The model is emptied: each array is let go as soon as it is written, so that a model loaded
    lazily never is in memory as a whole.

    Args:
        model: an mlx-lm model; its parameters are gone afterwards.
        config: the content of config.json; ``torch_dtype`` is set to what is written.
        target: an empty directory.
        dtype: of floating arrays; None keeps theirs.
        on_bytes: called with the bytes written so far.

    Raises:
        CheckpointError: a value is NaN or infinite.
        ResourceError: the disk is full.
    """
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    model.clear()
    parameters.reverse()
    writer = ShardWriter(target)
    floating_types, done = set(), 0
    while parameters:
        name, array = parameters.pop()
        if mx.issubdtype(array.dtype, mx.floating):
            array = array if dtype is None else array.astype(dtype)
            floating_types.add(str(array.dtype).removeprefix("mlx.core."))
            if not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{name} holds values that are not numbers (NaN or infinity); "
                    "nothing was written"
                )
        writer.add(name, array)
        done += array.nbytes
        on_bytes(done)
    writer.finish()
    if len(floating_types) == 1:
        config = config | {"torch_dtype": floating_types.pop()}
    write_json(target / "config.json", config)
    return writer.total_bytes


def model_bytes(model: nn.Module, dtype: mx.Dtype | None = None) -> int:
    """Return how many bytes ``write_model`` will write."""
    total = 0
    for _, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        casts = dtype is not None and mx.issubdtype(array.dtype, mx.floating)
        total += array.size * dtype.size if casts and dtype is not None else array.nbytes
    return int(total)


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence of a checkpoint.

    Raises:
        CheckpointError: one of them is a link out of the checkpoint directory.
        ResourceError: the disk is full.
    """
    files = [source / name for name in _COPIED_FILES]
    check_links(source, files)
    for name in _COPIED_FILES:
        if (source / name).is_file():
            try:
                shutil.copyfile(source / name, target / name)
            except OSError as error:
                reason = error.strerror or error
                raise ResourceError(f"cannot write {target / name}: {reason}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its keys in order.

    Raises:
        ResourceError: the disk is full.
    """
    text = json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
