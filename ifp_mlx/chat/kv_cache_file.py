"""The KV cache of a conversation in a file: the next process reads only what is new.

The file is mlx-lm's prompt cache. Its metadata say which tokens it holds and for which
sub-network: keys and values of another one would be silently wrong, so they are never used.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.errors import CheckpointError, UsageError
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.files import atomic_path
from ifp_mlx.storage.tensor_files import read_header

logger = logging.getLogger(__name__)

_FORMAT = "ifp-kv-cache-1"
_CLASSES = frozenset({"KVCache", "RotatingKVCache", "QuantizedKVCache"})


def check_kv_path(path: Path) -> None:
    """Refuse a path that a KV cache cannot be written to, before anything is computed for it.

    Raises:
        UsageError: it is not in a folder that can be written, or does not end in ``.safetensors``.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"`prompt_cache_file` {path} must end in .safetensors")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"`prompt_cache_file` {path} cannot be written there")


class KVCacheFile:
    """One file with keys and values.

    Args:
        path: may be absent.
        identity: all that the keys and values of given tokens depend on.

    Raises:
        UsageError: as ``check_kv_path``.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        check_kv_path(path)
        self.path = path
        text = json.dumps(identity, sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> KVCache | None:
        """Return the KV cache; None if there is nothing to use, which is logged.

        Raises:
            UsageError: the file is damaged, or is something else: it is not written over.
        """
        if not self.path.exists():
            return None
        try:
            read_header(self.path)
            metadata, cache = self._read()
        except (
            CheckpointError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            IndexError,
        ) as error:
            raise UsageError(
                f"{self.path} is damaged or no `prompt_cache_file`; delete it or name another one"
            ) from error
        if metadata["identity"] != self._identity:
            logger.warning("%s belongs to another sub-network; reading the prompt anew", self.path)
            return None
        return KVCache(cache, json.loads(metadata["token_ids"]))

    def save(self, kv_cache: KVCache) -> None:
        """Write keys and values, whole or not at all, for their owner alone.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        from mlx_lm.models.cache import save_prompt_cache

        metadata = {
            "format": _FORMAT,
            "identity": self._identity,
            "token_ids": json.dumps(kv_cache.token_ids),
        }
        with atomic_path(self.path, mode=0o600) as temporary:
            try:
                save_prompt_cache(str(temporary), kv_cache.layers, metadata)
            except RuntimeError as error:  # mlx reports a failed write so
                raise OSError(str(error)) from error

    def _read(self) -> tuple[dict[str, str], list[Any]]:
        from mlx_lm.models.cache import load_prompt_cache

        _, header = load_arrays(self.path)
        classes = {value for name, value in header.items() if name.startswith("1.")}
        if header.get("0.format") != _FORMAT or not classes <= _CLASSES:
            raise ValueError("not a KV cache")
        cache, metadata = load_prompt_cache(str(self.path), return_metadata=True)
        length = len(json.loads(metadata["token_ids"]))
        if any(part.offset != length for part in cache):
            raise ValueError("keys and tokens disagree")
        return metadata, cache
