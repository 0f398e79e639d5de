"""A dense model that runs with one layer in memory at a time.

Selectors that read an instruction with the dense model need it for a moment only. Here each
decoder layer is read from the disk when it is called and dropped when it is done, so that a
model that does not fit in memory can still choose its own sub-network.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.modules import clone_module, named_arrays

_CHUNK_TOKENS = 64


def layerwise_model(
    path: Path, dtype: mx.Dtype | None = None, *, shared: nn.Module | None = None
) -> nn.Module:
    """Return a checkpoint's dense model, whose layers stay on the disk.

    It is used like any model. Everything outside the layers stays in memory once it was used.
    The arrays of its layers are placeholders: evaluating them loads them for good.

    Args:
        path: a checkpoint directory.
        dtype: as in ``load_model``.
        shared: the same model, loaded lazily in the same type; everything outside the layers is
            shared with it, and it is not changed. None loads what is needed.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if shared is None:
        shared = load_model(path, dtype, lazy=True)[0]
    model: nn.Module = clone_module(shared)
    layers = _LayersOnDisk(path, dtype, model)
    for index, layer in enumerate(model.layers):
        layer._on_disk = functools.partial(layers.read_into, index)
        layer_class: Any = type(layer)
        layer.__class__ = _layerwise_class(layer_class)
    return model


class _LayersOnDisk:
    def __init__(self, path: Path, dtype: mx.Dtype | None, model: nn.Module) -> None:
        self._path = path
        self._dtype = dtype
        self._placeholders = [named_arrays(layer) for layer in model.layers]
        self._unread: dict[int, nn.Module] = {}

    def read_into(self, index: int, layer: nn.Module) -> None:
        """Replace the placeholders in a copy of a layer, wrapped or not, by lazy arrays."""
        if index not in self._unread:  # a new pass over the model
            model = load_model(self._path, self._dtype, lazy=True)[0]
            self._unread = dict(enumerate(model.layers))
        fresh = named_arrays(self._unread.pop(index))
        placeholders = self._placeholders[index]
        _replace_arrays(layer, {id(placeholders[name]): array for name, array in fresh.items()})


@functools.cache
def _layerwise_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer = clone_module(self)
        self._on_disk(layer)
        outputs = []
        for part_args, part_kwargs in _row_by_row(args, kwargs):
            outputs.append(layer_class.__call__(layer, *part_args, **part_kwargs))
            mx.eval(outputs[-1])
        output = _joined(outputs)
        mx.eval(output)
        del layer
        mx.clear_cache()
        return output

    return type(f"Layerwise{layer_class.__name__}", (layer_class,), {"__call__": call})


def _row_by_row(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield a layer's arguments a few rows of the batch at a time.

    What a layer computes on the way takes more memory than the layer if it reads much at once.
    """
    num_rows, width = args[0].shape[:2]
    step = max(1, _CHUNK_TOKENS // width)
    for start in range(0, num_rows, step):

        def cut(value: Any, start: int = start) -> Any:
            # Masks for all rows alike have two axes.
            is_batched = isinstance(value, mx.array) and value.ndim > 2
            return value[start : start + step] if is_batched else value

        yield [cut(value) for value in args], {name: cut(v) for name, v in kwargs.items()}


def _joined(outputs: list[Any]) -> Any:
    """Return the outputs for parts of a batch as one: arrays joined, in tuples too."""
    if len(outputs) == 1 or outputs[0] is None:
        return outputs[0]
    if isinstance(outputs[0], mx.array):
        return mx.concatenate(outputs)
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(values)) for values in zip(*outputs, strict=True))
    return outputs[0]


def _replace_arrays(tree: Any, replacements: dict[int, mx.array]) -> None:
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(child, mx.array):
            if id(child) in replacements:
                # Not through __setattr__, which a module may define.
                dict.__setitem__(tree, key, replacements[id(child)])
        elif isinstance(child, dict | list):
            _replace_arrays(child, replacements)
