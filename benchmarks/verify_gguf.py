"""Compare a converted checkpoint with an independent reading of its GGUF file, value by value.

    python benchmarks/verify_gguf.py MODEL.gguf CHECKPOINT

The file is read with the gguf package's own reader and dequantized with its own functions;
nothing of ifp_mlx but the loader of the checkpoint takes part. Convert with --dtype float32,
where every value must be equal.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx.storage.weights import load_model


def in_hub_order(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Return llama's query or key rows as transformers orders them, row by row."""
    head_dim = rows.shape[0] // num_heads
    ordered = np.empty_like(rows)
    for head in range(num_heads):
        for half in range(2):
            for pair in range(head_dim // 2):
                source = head * head_dim + 2 * pair + half
                ordered[head * head_dim + half * head_dim // 2 + pair] = rows[source]
    return ordered


def reference(tensor: Any, architecture: str, name: str, config: dict[str, Any]) -> np.ndarray:
    """Return the values that one parameter must have, (rows, columns) or (rows,) float32."""
    dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    dense = dense.reshape([int(size) for size in tensor.shape][::-1])
    if architecture == "llama" and ".q_proj." in name:
        dense = in_hub_order(dense, config["num_attention_heads"])
    if architecture == "llama" and ".k_proj." in name:
        dense = in_hub_order(dense, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        dense = dense - 1
    return dense


def main() -> None:
    """Compare and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    reader = gguf.GGUFReader(arguments.gguf)
    architecture = str(reader.fields["general.architecture"].contents())
    model, config = load_model(arguments.checkpoint, mx.float32)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture),
        config["num_hidden_layers"],
    )
    left = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    num_values = num_different = 0
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    for name, array in parameters:
        tensor = left.pop(str(names.get_name(name, try_suffixes=(".weight", ".bias"))))
        expected = reference(tensor, architecture, name, config)
        different = int((np.array(array) != expected).sum())
        num_values += expected.size
        num_different += different
        if different:
            print(f"{name}: {different} of {expected.size} values differ")
    print(f"{num_values} values compared, {num_different} differ, {len(left)} tensors left over")
    raise SystemExit(bool(num_different or left))


if __name__ == "__main__":
    main()
