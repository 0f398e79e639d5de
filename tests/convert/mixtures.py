"""Mixtures as the hub has them: one tensor an expert."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx

Weights = dict[str, mx.array]


def one_tensor_an_expert(
    folder: Path, change: Callable[[Weights], None] = lambda weights: None
) -> Path:
    """Take the stacks of a checkpoint apart, as transformers saves Qwen's mixtures; return it.

    Args:
        folder: with one weight file.
        change: of what is written, in place.
    """
    file = folder / "model.safetensors"
    weights: Weights = {}
    for name, array in cast(Weights, mx.load(str(file))).items():
        if ".switch_mlp." in name:
            for expert in range(array.shape[0]):
                weights[name.replace("switch_mlp", f"experts.{expert}")] = array[expert]
        else:
            weights[name] = array
    mx.eval(weights)
    change(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    return folder
