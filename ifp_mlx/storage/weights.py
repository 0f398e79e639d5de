"""The weights of checkpoint directories: where each tensor is, and the model that they make.

A checkpoint is what mlx-lm and transformers call one: ``config.json``, ``model*.safetensors``,
tokenizer files. Everything is validated before mlx-lm reads it; what does not fit is one clear
``CheckpointError``. Nothing is unpickled, no code of the checkpoint is run.
"""

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.errors import CheckpointError, ConfigError, IFPError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.foreign_quantization import check_awq_layers, check_foreign_quantization
from ifp_mlx.storage.packed_layers import check_packed_layers, check_quantization
from ifp_mlx.storage.rope_check import check_rope_scaling
from ifp_mlx.storage.tensor_files import StoredTensor, read_header
from ifp_mlx.storage.tied_head import settle_head, without_tied_head
from ifp_mlx.storage.transformers_import import finish_importing_transformers
from ifp_mlx.storage.weight_files import INDEX, named, weight_files, weight_map
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.model_config import ModelConfig
from ifp_mlx.units.modules import unit_shape

_WRONG_TENSORS = re.compile(r"(Missing|Received) (\d+) parameters[^:]*: (.*)\.")
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a checkpoint directory is, from checked headers.

    Raises:
        CheckpointError: there are no weights, only pickled ones, or a file is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {tensors[name].path.name} and in {file.name}; "
                    "move away the file that does not belong to this model"
                )
            tensors[name] = tensor
    for name, file_name in weight_map(path).items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise CheckpointError(
                f"{path / INDEX}: tensor {name!r} is not in {file_name}; download both again"
            )
    return tensors


def load_model(
    path: Path, dtype: mx.Dtype | Literal["auto"] | None = None, *, lazy: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return an mlx-lm model and its configuration. Evaluates, unless ``lazy``.

    Args:
        path: a checkpoint directory.
        dtype: None keeps the weights as they are stored. A floating type dequantizes packed
            weights and casts. "auto" is float32 on the CPU, where it is the only fast type, as
            long as that takes at most half of the memory; on a GPU it keeps them as stored.
        lazy: leave the weights on disk until they are used; they are then not checked for NaN.

    Returns:
        The model in evaluation mode, and config.json with ``quantization`` as it now is.

    Raises:
        CheckpointError: damaged or missing weights, weights that disagree with config.json, or
            weights that are not finite.
        ConfigError: config.json lacks what the family needs.
        ArchitectureError: the family is not in the FFN table.
    """
    known = read_config(path)
    tensors = stored_tensors(path)
    added = check_foreign_quantization(known.content, path)
    _check_layer_count(path, known, tensors)
    # Here because mlx-lm brings transformers, which take more than a second.
    finish_importing_transformers()
    from mlx_lm.utils import _get_classes, dequantize_model
    from mlx_lm.utils import load_model as load_mlx_model

    settled = dataclasses.replace(known, content=settle_head(known, tensors, path))
    settings = {**settled.content, **added}
    is_tied = settled.settings.get("tie_word_embeddings") is not False
    built: list[nn.Module] = []

    def checked_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
        model_class, arguments_class = _get_classes(config)

        def build(arguments: Any) -> nn.Module:
            model: nn.Module = model_class(arguments)
            check_rope_scaling(model, known)
            check_packed_layers(model, tensors)
            check_awq_layers(model, tensors, settings)
            model.sanitize = functools.partial(_sanitized, model, tensors, is_tied)
            built.append(model)
            return model

        return build, arguments_class

    try:
        if "quantization" in settings:
            check_quantization(settings["quantization"])
        model, content = load_mlx_model(
            cast(Path, _Seen(path, next(iter(tensors.values())).path)),
            lazy=True,
            model_config=settings,
            get_model_classes=cast(Any, checked_classes),
        )
        del model.sanitize
    except IFPError:
        raise
    except Exception as error:  # mlx-lm reports a bad checkpoint with whatever comes first
        reason = _reason(error)
        if not built and not isinstance(error, ValueError):
            raise ConfigError(f"{path}/config.json does not make a model ({reason})") from error
        raise CheckpointError(
            f"{path}: config.json and the weights disagree ({reason}); "
            "get both again from where the model comes from"
        ) from error
    content = {
        key: value
        for key, value in content.items()
        if key in settings or (value is not None and key.startswith("quantization"))
    }
    if dtype == "auto":
        dtype = automatic_dtype(model)
    if dtype is not None:
        model = dequantize_model(model)
        content = {k: v for k, v in content.items() if not k.startswith("quantization")}
        model.set_dtype(dtype)
    if not lazy:
        require_finite(path)
        mx.eval(model.parameters())
    return model, content


def settled_config(path: Path) -> ModelConfig:
    """Return a checkpoint's configuration; what it leaves open about the head, the weights say.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: config.json does not fit.
        ArchitectureError: the family is not in the table.
    """
    known = read_config(path)
    return dataclasses.replace(known, content=settle_head(known, stored_tensors(path), path))


def stored_unit_shape(path: Path) -> UnitShape:
    """Return how many units a checkpoint has, counted in its headers; loads no weights.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    family = read_config(path).family
    tensors = stored_tensors(path)
    first = family.kind.parts[0]
    found = {
        layer: tensor
        for layer in sorted(_layer_numbers(tensors))
        if (tensor := tensors.get(family.array_name(layer, first, "weight"))) is not None
    }
    if found:
        rows = next(iter(found.values())).shape[0]
        return UnitShape(tuple(found), rows // first.stacked)
    return unit_shape(load_model(path, lazy=True)[0])  # stored as another library has it


def require_finite(path: Path) -> None:
    """Refuse a checkpoint with values that are not numbers. Evaluates, one tensor at a time.

    Looks at the tensors as they are stored: of packed weights only scales and biases are
    floating, which is a tenth of what they become.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, or a file is damaged.
    """
    for file in sorted({tensor.path for tensor in stored_tensors(path).values()}):
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        while arrays:
            name, array = arrays.popitem()
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{path}: {name} holds values that are not numbers (NaN or infinity); "
                    "download or convert the model again"
                )


def _reason(error: Exception) -> str:
    """Return what mlx says of a model and its weights as one line with a few names."""
    if isinstance(error, KeyError) and "." in str(error):  # an expert that is not there to stack
        return f"the weights lack {error.args[0]}"
    text = " ".join(str(error).split())
    found = _WRONG_TENSORS.fullmatch(text)
    if found is None:
        return text[:200]
    what = "lack" if found[1] == "Missing" else "have, and the model has no place for,"
    noun = "tensor" if found[2] == "1" else "tensors"
    return f"the weights {what} {found[2]} {noun}: {named(found[3].split(', '))}"


class _Seen:
    """A checkpoint directory as mlx-lm is to see it: with one weight file.

    It would read every ``model*.safetensors``, stray and broken ones, too.
    """

    def __init__(self, path: Path, file: Path):
        self._path = path
        self._file = file

    def __truediv__(self, name: str) -> str | Path:
        return glob.escape(str(self._file)) if "*" in name else self._path / name


def _sanitized(
    model: nn.Module, tensors: dict[str, StoredTensor], is_tied: bool, seen: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Return all weights as the model's own class wants them, for mlx-lm. Lazy."""
    del seen  # of one file
    files = dict.fromkeys(tensor.path for tensor in tensors.values())
    weights = {
        name: array
        for file in files
        for name, array in cast(dict[str, mx.array], mx.load(str(file))).items()
    }
    weights = without_tied_head(weights, model, is_tied=is_tied)
    own = getattr(type(model), "sanitize", lambda model, weights: weights)
    return cast(dict[str, mx.array], own(model, weights))


def _check_layer_count(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    numbers = _layer_numbers(tensors)
    expected = config.num_hidden_layers
    if numbers != set(range(min(expected, len(numbers) + 1))):
        raise CheckpointError(
            f"{path}: config.json says {expected} layers, the weights have {len(numbers)}"
        )


def _layer_numbers(tensors: dict[str, StoredTensor]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := _LAYER_NUMBER.search(name))}


def automatic_dtype(model: nn.Module) -> mx.Dtype | None:
    """Return the type that "auto" computes a model in: see ``load_model``. Evaluates nothing."""
    from mlx_lm.utils import get_total_parameters

    if mx.default_device() != mx.cpu:
        return None
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = int(get_total_parameters(model)) * 4 <= memory_bytes // 2
    return mx.float32 if fits else None
