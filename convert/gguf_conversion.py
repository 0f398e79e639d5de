"""A GGUF file turned into an mlx-lm checkpoint directory."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifp_mlx.convert.checkpoint_writer import ShardWriter, write_json
from ifp_mlx.convert.gguf_architectures import GGUFArchitecture, architecture_of, config_of
from ifp_mlx.convert.gguf_reader import GGUFFile, GGUFTensor
from ifp_mlx.convert.gguf_weights import GROUP_SIZE, packing_of, read_dense, read_packed
from ifp_mlx.convert.progress import Progress
from ifp_mlx.errors import CheckpointError


def converted_bytes(file: GGUFFile, dtype: mx.Dtype) -> int:
    """Return about how many bytes the converted weights take."""
    total = 0
    for tensor in file.tensors.values():
        values = math.prod(tensor.shape)
        packing = packing_of(tensor)
        if packing is None:
            total += values * dtype.size
        else:
            group_bytes = 1 if packing["mode"] == "mxfp4" else 2 * dtype.size  # scale and bias
            total += values * packing["bits"] // 8 + group_bytes * values // GROUP_SIZE
    return total


def write_gguf_checkpoint(
    file: GGUFFile, target: Path, dtype: mx.Dtype, progress: Progress
) -> None:
    """Write config, weights, tokenizer and generation settings into an existing directory.

    Matrices in Q4_0, Q4_1, Q8_0 and MXFP4, and stacks of such for experts, stay packed; all
    others are dequantized. Evaluates, one tensor at a time.

    Args:
        file: the source.
        target: an empty directory.
        dtype: of the dequantized values, and of the scales and biases of packed ones. With
            float32 every value is exactly the file's.
        progress: called after each tensor.

    Raises:
        ArchitectureError: the family is not supported.
        CheckpointError: the file is damaged or has a part that is not supported.
        ResourceError: the disk is full.
    """
    # Imports transformers, which takes more than a second.
    from ifp_mlx.convert.gguf_tokenizer import generation_config_of, tokenizer_of

    architecture = architecture_of(file)
    config = config_of(file)
    tokenizer = tokenizer_of(file)
    generation = generation_config_of(file)
    # The largest packed part of a language model is its FFN: let its bits be the model's.
    packings = [p for t in file.tensors.values() if (p := packing_of(t)) is not None]
    default = min(packings, key=lambda packing: packing["bits"], default={})
    quantization: dict[str, Any] = dict(default)
    writer = ShardWriter(target)
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    done = 0
    for tensor in file.tensors.values():
        name = architecture.parameter_name(tensor.name)
        if name is not None:
            arrays = _parameters(file, tensor, name, architecture, config, dtype)
            for parameter, array in arrays.items():
                writer.add(parameter, array)
            packing = packing_of(tensor)
            if packing is not None and packing != default:
                quantization[name.removesuffix(".weight")] = packing
        done += tensor.num_bytes
        progress("converting", done, total)
    writer.finish()
    if packings:
        config["quantization"] = config["quantization_config"] = quantization
    config |= generation
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    write_json(target / "config.json", config)
    write_json(target / "generation_config.json", generation)
    tokenizer.save_pretrained(target)
    # The class that transformers 5 writes is unknown to transformers 4; this one both know.
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(target / "tokenizer_config.json", settings)


def _parameters(
    file: GGUFFile,
    tensor: GGUFTensor,
    name: str,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Return the parameters that one tensor becomes: one, or if packed two or three. Evaluates."""
    if len(tensor.shape) == 3:  # expert by expert: dequantizing takes several times the memory
        experts = [
            _parameters(file, expert, name, architecture, config, dtype)
            for expert in tensor.split()
        ]
        return {key: mx.stack([expert[key] for expert in experts]) for key in experts[0]}
    if packing_of(tensor) is None:
        dense = read_dense(file, tensor)
        if architecture.norm_offset and name.endswith("norm.weight"):
            dense = dense - architecture.norm_offset
        arrays = {name: dense}
    else:
        path = name.removesuffix(".weight")
        arrays = {f"{path}.{part}": array for part, array in read_packed(file, tensor).items()}
    order = architecture.row_order(tensor.name, config)
    if order is not None and order.size != tensor.shape[0]:
        raise CheckpointError(
            f"{file.path} is damaged: tensor {tensor.name!r} has {tensor.shape[0]} rows, its heads "
            f"{order.size}"
        )
    for key, array in arrays.items():
        array = array if order is None else array[order]
        arrays[key] = array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
    mx.eval(arrays)
    for array in arrays.values():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} holds values that are not numbers; fetch the "
                "file again"
            )
    return arrays
