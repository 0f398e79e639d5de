"""KV caches of earlier requests, from which later ones go on, also after a restart."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.kv_cache_file import KVCacheFile
from ifp_mlx.errors import IFPError, UsageError

logger = logging.getLogger(__name__)

MAX_KV_CACHES = 32
_SUFFIX = ".safetensors"


class KVCacheFolder:
    """KV caches on disk, one file each.

    Args:
        path: is made if it is not there.
        max_bytes: of all files; the oldest go.

    Raises:
        UsageError: it cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int):
        self._path = path
        self._max_bytes = max_bytes
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {path}: {error.strerror}") from error

    def load(self, model_key: bytes) -> Iterator[KVCache]:
        """Yield what was kept for a sub-network, the oldest first."""
        for path in self._files(f"{_name(model_key)}-*"):
            try:
                kv_cache = self._file(path, model_key).load()
            except IFPError as error:
                logger.warning("%s", error)
                continue
            if kv_cache is not None:
                yield kv_cache

    def save(self, model_key: bytes, kv_cache: KVCache) -> None:
        """Keep a KV cache.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
            UsageError: the folder is gone.
        """
        tokens = hashlib.sha256(repr(kv_cache.token_ids).encode()).digest()
        path = self._path / f"{_name(model_key)}-{_name(tokens)}{_SUFFIX}"
        if path.exists():
            path.touch()
        else:
            self._file(path, model_key).save(kv_cache)

    def trim(self) -> None:
        """Delete the oldest files above the limit."""
        sizes = {path: path.stat().st_size for path in self._files("*")}
        total_bytes = sum(sizes.values())
        for path, num_bytes in sizes.items():
            if total_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= num_bytes

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self._path.glob(f"{pattern}{_SUFFIX}"), key=lambda path: path.stat().st_mtime)

    def _file(self, path: Path, model_key: bytes) -> KVCacheFile:
        return KVCacheFile(path, {"server": model_key.hex()})


class KVCaches(LRUPromptCache):
    """mlx-lm's, with two faults (of 0.32.2) mended, and a folder that outlives the process.

    Args:
        max_size: how many are kept.
        max_bytes: of all together.
        folder: where they are kept between two runs; None for nowhere.
    """

    def __init__(self, max_size: int, max_bytes: int = 2**63, folder: KVCacheFolder | None = None):
        super().__init__(max_size, max_bytes)
        self._folder = folder
        self._looked_up: set[Any] = set()

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kind: Any
    ) -> None:
        """Keep a KV cache. Evaluates.

        It comes as slices, yet to be taken, of what a whole batch had, and would hold all of that
        in memory.
        """
        mx.eval([layer_cache.state for layer_cache in prompt_cache])
        super().insert_cache(model, tokens, prompt_cache, **kind)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the KV cache that goes furthest, and the rest of the tokens: at least one.

        When a prompt is exactly what an earlier request ended with, mlx-lm leaves nothing to
        compute logits from, and its generation thread dies of that.
        """
        if self._folder is not None and model not in self._looked_up:
            self._looked_up.add(model)
            for kept in self._folder.load(model):
                self.insert_cache(model, kept.token_ids, kept.layers)
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, *tokens[-1:]]

    def save(self) -> None:
        """Write everything to the folder, the oldest first; what cannot be written is logged."""
        self._looked_up.clear()
        if self._folder is None:
            return
        try:
            for model, kv_cache in self._entries():
                self._folder.save(model, kv_cache)
            self._folder.trim()
        except (IFPError, OSError) as error:
            logger.warning("KV caches are not kept: %s", error)

    def _entries(self) -> Iterator[tuple[bytes, KVCache]]:
        for order in self._lru._lrus.values():
            for model, tokens in order:
                layers = self._trie.get(model, tokens).prompt_cache
                # States that do not count positions cannot be told to belong to the tokens.
                if all(getattr(layer, "offset", None) == len(tokens) for layer in layers):
                    yield model, KVCache(layers, list(tokens))


def _name(key: bytes) -> str:
    return key.hex()[:16]
