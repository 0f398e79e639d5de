"""IFP adapters: what training changed, kept apart from the base model.

A folder with ``adapter.json`` (the manifest) and safetensors shards: the predictor's head and the
changes of the language model's weights, as few-bit codes. With the public base checkpoint it
gives an instruction-following model, as a LoRA adapter does for mlx-lm.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ifp_mlx.adapters.delta_codes import GROUP_SIZE, DeltaCodes, decode_delta, encode_delta
from ifp_mlx.errors import AdapterError
from ifp_mlx.selection.predictor import HEAD_TOKENS, TAIL_TOKENS, PredictorHead, SparsityPredictor
from ifp_mlx.storage.files import staged_directory
from ifp_mlx.units.changed_linear import ChangedLinear
from ifp_mlx.units.modules import (
    clone_module,
    dequantized,
    is_packed,
    module_at,
    named_arrays,
)

FORMAT_VERSION = 1
MANIFEST = "adapter.json"

_SHARD_BYTES = 15_000_000
_SKETCH_VALUES = 256
_SKETCH_TENSORS = 8

_MAX_SKETCH_ERROR = 0.3
"""Relative distance to the base's sampled weights: 4-bit copies of it lie near 0.1, rounding to
half precision near 0.003, another model of the same shape near 1.4."""

_HEAD = "head."
_PLAIN = "plain."
_CODES = "codes."
_SCALES = "scales."
_SKETCH = "sketch."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter, read from disk.

    Attributes:
        manifest: what ``adapter.json`` says: base model, K, training run, licences, figures.
        arrays: every tensor of the shards, lazy.
        fingerprint: hash of the manifest, which holds those of the shards; goes into cache keys.
        verify: compares the shards with their checksums, once; raises ``AdapterError``.
    """

    manifest: dict[str, Any]
    arrays: dict[str, mx.array]
    fingerprint: str
    verify: Callable[[], None] = lambda: None

    @property
    def base_model(self) -> str:
        """The base checkpoint's public name."""
        return str(self.manifest["base_model"])

    @property
    def keep_units(self) -> tuple[int, ...]:
        """The K that it was trained for, ascending."""
        return tuple(sorted(self.manifest["keep_units"]))

    @property
    def has_predictor(self) -> bool:
        """Whether it scores units itself; one trained with a static mask does not."""
        return f"{_HEAD}prior" in self.arrays

    def check_base(self, model: nn.Module) -> None:
        """Check that a model is the adapter's base, in whatever precision. Evaluates.

        Raises:
            AdapterError: it is another model; the message names the right one. Or the adapter is
                damaged.
        """
        self.verify()
        parameters = named_arrays(model)
        for name, wanted in self.arrays.items():
            if not name.startswith(_SKETCH):
                continue
            path = name.removeprefix(_SKETCH)
            found = _float_weight(model, path, parameters)
            if found is None or found.size < wanted.size:
                raise AdapterError(f"the model is not {self.base_model}: it has no {path}")
            sample = _sample(found, wanted.size)
            distance = mx.linalg.norm(sample - wanted) / mx.linalg.norm(wanted)
            if not float(distance) < _MAX_SKETCH_ERROR:
                raise AdapterError(
                    f"this adapter was trained for {self.base_model}; the weights given are of "
                    "another model"
                )

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the trained model: the base with the adapter's changes added. Lazy.

        What is unchanged is shared with ``model``, which stays as it is. Packed layers that change
        come out as float32, to be packed again (``ChangedLinear``).

        Raises:
            AdapterError: the model is not the adapter's base.
        """
        self.check_base(model)
        trained: nn.Module = clone_module(model)
        parameters = named_arrays(model)
        changed: dict[str, mx.array] = {}
        for name, shape in self.manifest["changed"].items():
            base = _float_weight(model, name, parameters)
            if base is None or list(base.shape) != shape:
                raise AdapterError(f"the model is not {self.base_model}: {name} does not fit")
            if _PLAIN + name in self.arrays:
                delta = self.arrays[_PLAIN + name].astype(mx.float32)
            else:
                delta = decode_delta(self._codes(name), tuple(shape))
            dtype = parameters[name].dtype if _is_float(parameters[name]) else mx.float32
            changed[name] = (base + delta).astype(dtype)
        _dequantize_changed(trained, changed)
        trained.update(tree_unflatten(list(changed.items())))
        return trained

    def predictor(self, base_model: nn.Module) -> SparsityPredictor:
        """Return the predictor, which reads with the base model, not the trained one.

        Raises:
            AdapterError: the adapter holds no predictor, or not for this base.
        """
        self.check_base(base_model)
        head = {
            name.removeprefix(_HEAD): value.astype(mx.float32)
            for name, value in self.arrays.items()
            if name.startswith(_HEAD) and not name.endswith((".codes", ".scale"))
        }
        for name in {n.removesuffix(".codes") for n in self.arrays if n.endswith(".codes")}:
            scale = self.arrays[f"{name}.scale"].astype(mx.float32)
            codes = self.arrays[f"{name}.codes"].astype(mx.float32)
            head[name.removeprefix(_HEAD)] = codes * scale[:, None]
        if "prior" not in head:
            raise AdapterError("this adapter holds no predictor: it was trained with a static mask")
        module = PredictorHead(
            head["project.weight"].shape[1], head["prior"], head["project.weight"].shape[0]
        )
        module.load_weights(list(head.items()))
        return SparsityPredictor(base_model, module)

    def _codes(self, name: str) -> DeltaCodes:
        try:
            return DeltaCodes(
                self.arrays[_CODES + name], self.arrays[_SCALES + name], self.manifest["bits"]
            )
        except KeyError as error:
            raise AdapterError(f"the adapter is incomplete: {error} is missing") from None


def load_adapter(folder: Path, *, verify: bool = True) -> Adapter:
    """Return an adapter; its tensors are read when they are used.

    Args:
        folder: an adapter directory.
        verify: False compares checksums when the tensors are used, not now.

    Raises:
        AdapterError: the folder is missing, damaged, or of a newer format.
    """
    digest = hashlib.sha256()
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise AdapterError(
                f"{folder} has adapter format {version}, this version reads {FORMAT_VERSION}; "
                "update ifp-mlx"
            )
        digest.update(text)
        arrays: dict[str, mx.array] = {}
        for shard in manifest["shards"]:
            if "/" in shard or "\\" in shard:
                raise AdapterError(f"{folder}: shard name {shard!r} leaves the folder")
        check = functools.cache(functools.partial(_check_shards, folder, manifest["shards"]))
        if verify:
            check()
        for shard in manifest["shards"]:
            part = mx.load(str(folder / shard))
            assert isinstance(part, dict)
            arrays |= part
        for key in ("base_model", "keep_units", "changed", "bits"):
            manifest[key]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder} is no readable adapter: {error}") from error
    return Adapter(manifest, arrays, digest.hexdigest()[:16], check)


def _check_shards(folder: Path, checksums: dict[str, str]) -> None:
    for shard, checksum in checksums.items():
        try:
            content = (folder / shard).read_bytes()
        except OSError as error:
            raise AdapterError(f"{folder} is no readable adapter: {error}") from error
        if hashlib.sha256(content).hexdigest() != checksum:
            raise AdapterError(f"{folder / shard} is damaged: its checksum is wrong")


def save_adapter(
    folder: Path,
    base: nn.Module,
    weights: dict[str, mx.array],
    head: PredictorHead | None,
    manifest: dict[str, Any],
    *,
    bits: int = 2,
    overwrite: bool = False,
) -> None:
    """Write an adapter, whole or not at all. Evaluates.

    Args:
        folder: becomes the adapter.
        base: the model that training began with.
        weights: name -> trained tensor, as in the base; the others are unchanged.
        head: the predictor's head, or None for a model trained with one static mask.
        manifest: ``base_model`` and ``keep_units`` at least, and whatever says how it was made.
        bits: of a weight's change.
        overwrite: replace an existing folder.

    Raises:
        AdapterError: bits are out of range, or a tensor does not fit the base.
        UsageError: the folder exists and ``overwrite`` is not set.
    """
    parameters = named_arrays(base)
    arrays: dict[str, mx.array] = {}
    for name, trained in weights.items():
        original = _float_weight(base, name, parameters)
        if original is None or original.shape != trained.shape:
            raise AdapterError(f"{name} does not fit the base model")
        delta = trained.astype(mx.float32) - original
        if delta.ndim < 2 or delta.size % GROUP_SIZE:
            arrays[_PLAIN + name] = delta.astype(mx.float16)
            continue
        codes = encode_delta(delta, bits)
        arrays[_CODES + name], arrays[_SCALES + name] = codes.packed, codes.scales
    for name in _sketch_names(parameters, list(weights)):
        weight = _float_weight(base, name, parameters)
        assert weight is not None
        arrays[_SKETCH + name] = _sample(weight, min(_SKETCH_VALUES, weight.size))
    if head is not None:
        arrays |= _head_arrays(head)
    with staged_directory(folder, overwrite=overwrite) as staging:
        shards = {}
        for number, part in enumerate(_shards(arrays)):
            path = staging / f"adapter-{number:02d}.safetensors"
            mx.save_safetensors(str(path), part)
            shards[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        whole = {
            "format_version": FORMAT_VERSION,
            "bits": bits,
            "predictor_reads": f"first {HEAD_TOKENS} and last {TAIL_TOKENS} tokens",
            **manifest,
            "changed": {name: list(tensor.shape) for name, tensor in weights.items()},
            "shards": shards,
        }
        (staging / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")


def _head_arrays(head: PredictorHead) -> dict[str, mx.array]:
    """Return the head for disk: the large expansion as 8-bit codes, one scale a row."""
    arrays: dict[str, mx.array] = {}
    for name, value in named_arrays(head).items():
        if name != "expand.weight":
            arrays[_HEAD + name] = value.astype(mx.float16)
            continue
        scale = mx.maximum(mx.abs(value).max(axis=-1), 1e-8) / 127.0
        scale = scale.astype(mx.float16).astype(mx.float32)
        codes = mx.clip(mx.round(value / mx.maximum(scale, 1e-8)[:, None]), -127, 127)
        arrays[f"{_HEAD}{name}.codes"] = codes.astype(mx.int8)
        arrays[f"{_HEAD}{name}.scale"] = scale.astype(mx.float16)
    return arrays


def _shards(arrays: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = [{}]
    filled = 0
    for name in sorted(arrays):
        if filled and filled + arrays[name].nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = arrays[name]
        filled += arrays[name].nbytes
    return shards


def _sketch_names(parameters: dict[str, mx.array], changed: list[str]) -> list[str]:
    """Return some matrices, spread over the model, to know the base by."""
    names = sorted(name for name in changed if name.endswith(".weight") and ".layers." in name)
    names = [n for n in names if math.prod(parameters[n].shape) > _SKETCH_VALUES] or names
    step = max(1, len(names) // _SKETCH_TENSORS)
    return names[::step][:_SKETCH_TENSORS]


def _sample(weight: mx.array, count: int) -> mx.array:
    """Return ``count`` float32 values at fixed places of a tensor."""
    places = np.random.default_rng(0).integers(0, weight.size, size=count)
    return weight.reshape(-1)[mx.array(places)].astype(mx.float32)


def _float_weight(model: nn.Module, name: str, parameters: dict[str, mx.array]) -> mx.array | None:
    """Return a parameter as float32, dequantized where its layer is quantized."""
    if name not in parameters:
        return None
    if _is_float(parameters[name]):
        return parameters[name].astype(mx.float32)
    layer = module_at(model, name.rpartition(".")[0])
    return dequantized(layer, mx.float32)


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _dequantize_changed(model: nn.Module, changed: dict[str, mx.array]) -> None:
    """Replace packed linear layers whose weights change by plain ones, to be packed again."""
    for name, weight in changed.items():
        parent_path, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = module_at(model, parent_path)
        layer = parent.get(leaf)
        if is_packed(layer):
            parent[leaf] = ChangedLinear.of(weight, layer)
