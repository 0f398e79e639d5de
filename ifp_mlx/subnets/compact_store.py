"""Compact models on disk, ready to run: a known task starts as fast as a model of its size.

The cache of selections says which units a task keeps; cutting them out of the dense model means
to load that first, and to add an adapter's changes to it. Here the result is kept as well, for
models so small that this is cheap. What the sub-networks of one model share is one file, the FFN
units of each selection are another, both in the precision that the model itself is stored in.
Everything here can be deleted: it is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import CheckpointError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import CutModel, ModelSize
from ifp_mlx.slicing.forms import as_computed
from ifp_mlx.slicing.kernel_check import check_quantized_kernels
from ifp_mlx.storage import weights
from ifp_mlx.storage.arrays import load_arrays, save_arrays
from ifp_mlx.storage.files import FilesInUse, is_in_use, require_free_disk
from ifp_mlx.storage.tensor_files import read_header
from ifp_mlx.storage.transformers_import import finish_importing_transformers
from ifp_mlx.units.model_config import ModelConfig
from ifp_mlx.units.modules import leaf_modules, named_arrays, packed_leaves, unit_arrays

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2 * 10**9
"""About forty sub-networks of the default model, half its units kept."""

_FORMAT_VERSION = "4"
_SHARED = "shared.safetensors"
_SUFFIX = ".safetensors"


class CompactStore:
    """The compact models of one dense model in one folder, least recently used first out.

    Args:
        folder: of all models; each has a sub-folder, created when the first is stored.
        identity: of the dense model, an adapter's changes and the way to compute: whatever
            changes a compact model's values.
        config: of the dense checkpoint.
        max_bytes: budget for the whole folder.
        as_stored: models come out as they are stored, not in the form to compute with.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        config: ModelConfig,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        as_stored: bool = False,
    ):
        text = json.dumps({"format_version": _FORMAT_VERSION, **identity}, sort_keys=True)
        self._root = folder
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._config = config
        self._max_bytes = max_bytes
        self._as_stored = as_stored
        self._shared: dict[str, mx.array] | None = None
        self._in_use = FilesInUse()
        self._computed: nn.Module | None = None  # a loaded one, whose shared modules others take

    def is_known(self) -> bool:
        """Return whether a compact model of this dense model was ever stored, and some remain."""
        return (self._folder / _SHARED).exists()

    def load(self, selection: Selection) -> CutModel | None:
        """Return the compact model of a selection, or None. Evaluates; counts as a use.

        Files that are damaged are removed and reported; the caller makes them again.
        """
        path = self._path(selection)
        if not path.exists() or not self.is_known():
            return None
        start = time.perf_counter()
        try:
            if self._shared is None:
                self._shared = _read(self._folder / _SHARED)[0]
            arrays, header = _read(path)
            mx.eval(arrays, self._shared)
            reading_s = time.perf_counter() - start
            stored = _build(
                self._config,
                {**self._shared, **arrays},
                selection.num_kept_units,
                json.loads(header["packed"]),
            )
            model = stored
            if not self._as_stored:
                model = as_computed(stored, weights.automatic_dtype(stored), self._computed)
                mx.eval(model.parameters())
                model = self._computed = check_quantized_kernels(model)
            loaded = CutModel(
                model,
                ModelSize(*json.loads(header["source"])),
                requantization_error=float(header["requantization_error"]),
                seconds=reading_s,  # building waits for the import of mlx-lm, if that still runs
                is_stored=True,
            )
        except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("removed damaged weights from the cache: %s", reason)
            self._shared = self._computed = None
            for damaged in (path, self._folder / _SHARED):
                with contextlib.suppress(OSError):
                    damaged.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # a read-only cache still serves
            os.utime(path)
        self._in_use.hold(path)
        return loaded

    def store(self, selection: Selection, compact: CutModel) -> None:
        """Write a compact model, then remove the least recently used ones beyond the budget.

        A model that cannot be built again from its configuration and arrays alone is left out, and
        so are one that has no form as its source is stored and one larger than the whole budget.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        model = compact.stored
        if model is None:
            return
        arrays = named_arrays(model)
        packed = packed_leaves(model)
        if not _is_rebuilt_alike(self._config, model, selection.num_kept_units, packed):
            return
        own = unit_arrays(model)
        shared = {name: array for name, array in arrays.items() if name not in own}
        num_bytes = sum(array.nbytes for array in arrays.values())
        if num_bytes > self._max_bytes:
            return
        require_free_disk(self._root, num_bytes)
        if not self.is_known():
            save_arrays(self._folder / _SHARED, shared, {})
        header = {
            "packed": json.dumps(packed),
            "requantization_error": repr(compact.requantization_error),
            "source": json.dumps(dataclasses.astuple(compact.source)),
        }
        if self._shared is None:
            self._shared = shared
        path = self._path(selection)
        save_arrays(path, own, header)
        self._in_use.hold(path)
        prune(self._root, self._max_bytes, spare_used=True)

    def _path(self, selection: Selection) -> Path:
        return self._folder / f"{selection.digest}{_SUFFIX}"


def module_digest(model: nn.Module) -> str:
    """Return a hash of a model's parameters' names, types and shapes: how it is quantized."""
    shapes = [(name, str(a.dtype), a.shape) for name, a in named_arrays(model).items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def stored_bytes(folder: Path) -> int:
    """Return how much the compact models in a folder take."""
    return sum(path.stat().st_size for path in folder.glob(f"*/*{_SUFFIX}"))


def own_bytes(folder: Path, selection: Selection) -> int:
    """Return how much the compact models of a selection take, without what they share."""
    return sum(path.stat().st_size for path in folder.glob(f"*/{selection.digest}{_SUFFIX}"))


def remove(folder: Path, selection: Selection) -> None:
    """Delete the compact models of a selection, whatever model they were cut from."""
    for path in folder.glob(f"*/{selection.digest}{_SUFFIX}"):
        path.unlink(missing_ok=True)
    _remove_lone_files(folder)


def prune(folder: Path, max_bytes: int, *, spare_used: bool = False) -> None:
    """Delete the least recently used compact models until the rest fits.

    Args:
        folder: of a ``CompactStore``.
        max_bytes: budget for all files together.
        spare_used: those that a process uses stay, whatever the budget says.
    """
    files = [path for path in folder.glob(f"*/*{_SUFFIX}") if path.name != _SHARED]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        if stored_bytes(folder) <= max_bytes:
            break
        if not (spare_used and is_in_use(path)):
            path.unlink(missing_ok=True)
            _remove_lone_files(folder)


def _remove_lone_files(folder: Path) -> None:
    """Delete shared arrays that no compact model needs any more."""
    for shared in folder.glob(f"*/{_SHARED}"):
        if not any(path.name != _SHARED for path in shared.parent.glob(f"*{_SUFFIX}")):
            shared.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process is writing there
                shared.parent.rmdir()


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    read_header(path)  # mlx trusts headers
    return load_arrays(path)


def _is_rebuilt_alike(
    config: ModelConfig, model: nn.Module, num_kept_units: int, packed: dict[str, Any]
) -> bool:
    """Return whether ``_build`` makes the same modules as ``model`` has."""
    try:
        rebuilt = _build(config, named_arrays(model), num_kept_units, packed)
    except ValueError:  # a family whose width no configuration says, or one with added biases
        return False
    kinds = [(name, type(module)) for name, module in leaf_modules(model)]
    return kinds == [(name, type(module)) for name, module in leaf_modules(rebuilt)]


def _build(
    config: ModelConfig,
    arrays: dict[str, mx.array],
    num_kept_units: int,
    packed: dict[str, dict[str, Any]],
) -> nn.Module:
    """Return a model of the family with these arrays. Lazy.

    Raises:
        ValueError: the arrays do not fit the configuration.
    """
    finish_importing_transformers()
    from mlx_lm.utils import _get_classes

    content = config.content_for(num_kept_units)
    model_class, arguments_class = _get_classes(content)
    arguments = arguments_class.from_dict(content)
    model: nn.Module = model_class(arguments)
    if packed:
        nn.quantize(model, class_predicate=lambda name, _: packed.get(name, False))
    model.eval()
    model.load_weights(list(arrays.items()), strict=True)
    return model
