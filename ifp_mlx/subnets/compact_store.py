"""Compact models on disk, ready to run: a known task starts as fast as a model of its size.

The cache of selections says which units a task keeps; cutting them out of the dense model means
to load that first, and to add an adapter's changes to it. Here the result is kept as well, for
models so small that this is cheap. What the sub-networks of one model share is one file, the FFN
units of each selection are another. Everything here can be deleted: it is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx.errors import CheckpointError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.storage.arrays import load_arrays, save_arrays
from ifp_mlx.storage.files import require_free_disk
from ifp_mlx.storage.tensor_files import read_header
from ifp_mlx.units import ffn

DEFAULT_MAX_BYTES = 2 * 10**9
"""About ten sub-networks of the default model in float32, half its units kept."""

_FORMAT_VERSION = "1"
_SHARED = "shared.safetensors"
_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class CompactModel:
    """A compact model and what is known about it.

    Attributes:
        model: of the same class as the dense model, ``intermediate_size`` K.
        requantization_error: as in ``CutModel``.
        total_parameters: of the dense model.
        seconds: what cutting or reading it took.
        from_disk: it was read whole, not cut.
    """

    model: nn.Module
    requantization_error: float
    total_parameters: int
    seconds: float
    from_disk: bool = False


class CompactStore:
    """The compact models of one dense model in one folder, least recently used first out.

    Args:
        folder: of all models; each has a sub-folder, created when the first is stored.
        identity: of the dense model, an adapter's changes and the way to compute: whatever
            changes a compact model's values.
        config: the dense checkpoint's config.json.
        max_bytes: budget for the whole folder.
        on_warning: called with one line when a damaged file was removed.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        config: dict[str, Any],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        on_warning: Callable[[str], None] = lambda line: None,
    ):
        text = json.dumps({"format_version": _FORMAT_VERSION, **identity}, sort_keys=True)
        self._root = folder
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._config = config
        self._max_bytes = max_bytes
        self._on_warning = on_warning
        self._shared: dict[str, mx.array] | None = None

    def is_known(self) -> bool:
        """Return whether a compact model of this dense model was ever stored, and some remain."""
        return (self._folder / _SHARED).exists()

    def load(self, selection: Selection) -> CompactModel | None:
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
            model = _build(
                self._config,
                {**self._shared, **arrays},
                selection.num_kept_units,
                json.loads(header["packed"]),
            )
            loaded = CompactModel(
                model,
                float(header["requantization_error"]),
                int(header["total_parameters"]),
                reading_s,  # building waits for the import of mlx-lm, if that still runs
                from_disk=True,
            )
        except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            self._on_warning(f"removed damaged weights from the cache: {reason}")
            self._shared = None
            for damaged in (path, self._folder / _SHARED):
                with contextlib.suppress(OSError):
                    damaged.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # a read-only cache still serves
            os.utime(path)
        return loaded

    def store(self, selection: Selection, compact: CompactModel) -> None:
        """Write a compact model, then remove the least recently used ones beyond the budget.

        A model that cannot be built again from its configuration and arrays alone is left out,
        and so is one that is larger than the whole budget.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        arrays = ffn.named_arrays(compact.model)
        packed = _packed_layers(compact.model)
        if not _is_rebuilt_alike(self._config, compact.model, selection.num_kept_units, packed):
            return
        inside = _ffn_prefixes(compact.model)
        own = {name: array for name, array in arrays.items() if name.startswith(inside)}
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
            "total_parameters": str(compact.total_parameters),
        }
        if self._shared is None:
            self._shared = shared
        path = self._path(selection)
        save_arrays(path, own, header)
        prune(self._root, self._max_bytes, keep=path)

    def _path(self, selection: Selection) -> Path:
        return self._folder / f"{selection_digest(selection)}{_SUFFIX}"


def selection_digest(selection: Selection) -> str:
    """Return a name for the units of a selection and their mask values."""
    digest = hashlib.sha256(np.asarray(selection.indices).tobytes())
    if selection.mask_values is not None:
        digest.update(np.asarray(selection.mask_values).tobytes())
    return digest.hexdigest()[:32]


def module_digest(model: nn.Module) -> str:
    """Return a hash of a model's parameters' names, types and shapes: how it is quantized."""
    shapes = [(name, str(a.dtype), a.shape) for name, a in ffn.named_arrays(model).items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()


def stored_bytes(folder: Path) -> int:
    """Return how much the compact models in a folder take."""
    return sum(path.stat().st_size for path in folder.glob(f"*/*{_SUFFIX}"))


def remove(folder: Path, selection: Selection) -> None:
    """Delete the compact models of a selection, whatever model they were cut from."""
    for path in folder.glob(f"*/{selection_digest(selection)}{_SUFFIX}"):
        path.unlink(missing_ok=True)
    _remove_lone_files(folder)


def prune(folder: Path, max_bytes: int, *, keep: Path | None = None) -> None:
    """Delete the least recently used compact models until the rest fits.

    Args:
        folder: of a ``CompactStore``.
        max_bytes: budget for all files together.
        keep: a file that stays whatever the budget says.
    """
    files = [path for path in folder.glob(f"*/*{_SUFFIX}") if path.name != _SHARED]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        if stored_bytes(folder) <= max_bytes:
            break
        if path != keep:
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


def _ffn_prefixes(model: nn.Module) -> tuple[str, ...]:
    layout = ffn.ffn_layout(model.args.model_type)
    return tuple(
        f"{layout.layers_path}.{layer}.{layout.ffn}." for layer in range(len(model.layers))
    )


def _packed_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return how each quantized layer is packed, by its dotted name."""
    return {
        name: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for name, module in _leaves(model)
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return cast(
        list[tuple[str, nn.Module]],
        tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module),
    )


def _is_rebuilt_alike(
    config: dict[str, Any], model: nn.Module, num_kept_units: int, packed: dict[str, Any]
) -> bool:
    """Return whether ``_build`` makes the same modules as ``model`` has."""
    try:
        rebuilt = _build(config, ffn.named_arrays(model), num_kept_units, packed)
    except ValueError:  # a family whose width no configuration says, or one with added biases
        return False
    kinds = [(name, type(module)) for name, module in _leaves(model)]
    return kinds == [(name, type(module)) for name, module in _leaves(rebuilt)]


def _build(
    config: dict[str, Any],
    arrays: dict[str, mx.array],
    num_kept_units: int,
    packed: dict[str, dict[str, Any]],
) -> nn.Module:
    """Return a model of the family with these arrays. Lazy.

    Raises:
        ValueError: the arrays do not fit the configuration.
    """
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(config)
    arguments = arguments_class.from_dict({**config, "intermediate_size": num_kept_units})
    model: nn.Module = model_class(arguments)
    if packed:
        nn.quantize(model, class_predicate=lambda name, _: packed.get(name, False))
    model.eval()
    model.load_weights(list(arrays.items()), strict=True)
    return model
