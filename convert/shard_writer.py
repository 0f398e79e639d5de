"""Weights written shard by shard, so that no more than one shard is in memory."""

import json
from pathlib import Path

import mlx.core as mx

from ifp_mlx.errors import ResourceError

SHARD_BYTES = 1 << 30


class ShardWriter:
    """Writes ``model*.safetensors`` and, for several files, their index into a directory.

    Add arrays in order, then call ``finish``. Arrays are evaluated when their shard is full.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[str, mx.array] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, array: mx.array) -> None:
        """Take one array; an array larger than a shard gets a shard of its own."""
        if self._pending and self._pending_bytes + array.nbytes > self._shard_bytes:
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
            path = self._directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

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
