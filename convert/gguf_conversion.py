"""A GGUF file turned into an mlx-lm checkpoint directory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifp_mlx.convert.checkpoint_writer import ShardWriter, write_json
from ifp_mlx.convert.gguf_architectures import GGUFArchitecture, architecture_of, config_of
from ifp_mlx.convert.gguf_reader import GGUFFile, GGUFTensor
from ifp_mlx.convert.gguf_weights import GROUP_SIZE, packed_bits, read_dense, read_packed
from ifp_mlx.convert.progress import Progress


def converted_bytes(file: GGUFFile, dtype: mx.Dtype) -> int:
    """Return about how many bytes the converted weights take."""
    total = 0
    for tensor in file.tensors.values():
        values = math.prod(tensor.shape)
        bits = packed_bits(tensor)
        if bits is None:
            total += values * dtype.size
        else:
            total += values * bits // 8 + 2 * dtype.size * values // GROUP_SIZE
    return total


def write_gguf_checkpoint(
    file: GGUFFile, target: Path, dtype: mx.Dtype, progress: Progress
) -> None:
    """Write config, weights, tokenizer and generation settings into an existing directory.

    Matrices in Q4_0, Q4_1 and Q8_0 stay packed; all others are dequantized.

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
    layer_bits = {bits for t in file.tensors.values() if (bits := packed_bits(t)) is not None}
    default = {"group_size": GROUP_SIZE, "bits": min(layer_bits, default=4), "mode": "affine"}
    quantization: dict[str, Any] = dict(default)
    writer = ShardWriter(target)
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    done = 0
    for tensor in file.tensors.values():
        name = architecture.parameter_name(tensor.name)
        if name is not None:
            for parameter, array in _parameters(file, tensor, name, architecture, config):
                floating = mx.issubdtype(array.dtype, mx.floating)
                writer.add(parameter, array.astype(dtype) if floating else array)
            bits = packed_bits(tensor)
            if bits is not None and bits != default["bits"]:
                quantization[name.removesuffix(".weight")] = default | {"bits": bits}
        done += tensor.num_bytes
        progress("converting", done, total)
    writer.finish()
    if layer_bits:
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
) -> Iterator[tuple[str, mx.array]]:
    """Yield the (parameter name, array) pairs that one tensor becomes: one, or three if packed."""
    order = architecture.row_order(tensor.name, config)
    if packed_bits(tensor) is None:
        dense = read_dense(file, tensor)
        if architecture.norm_offset and name.endswith("norm.weight"):
            dense = dense - architecture.norm_offset
        yield name, dense if order is None else dense[order]
        return
    packed = read_packed(file, tensor)
    path = name.removesuffix(".weight")
    for part in ("weight", "scales", "biases"):
        array = getattr(packed, part)
        yield f"{path}.{part}", array if order is None else array[order]
