from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.storage import weights
from ifp_mlx.storage.arrays import load_arrays

Run = Callable[..., Any]


def test_dequantized_export_of_a_packed_model_is_exact(
    ifp: Run, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of down are not quantized to 8 bits on the way to plain weights."""
    monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)  # as on a GPU
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    ifp("quantize", small_model, "-o", packed, "--bits", "4", "--group-size", "32")
    made = ifp("export", "--model", packed, "--task", "write words", "--keep-units", "128",
               "--dequantize", "-o", plain)  # fmt: skip
    assert made.code == 0
    assert "8 bits" not in made.stderr
    selection = load_arrays(plain / "ifp" / "selection.safetensors")[0]
    source, exported = (load_arrays(path / "model.safetensors")[0] for path in (packed, plain))
    for layer, units in enumerate(np.array(selection["ffn"])):
        name = f"model.layers.{layer}.mlp.down_proj"
        weight, scales, biases = (source[f"{name}.{p}"] for p in ("weight", "scales", "biases"))
        dense = mx.dequantize(weight, scales, biases, group_size=32, bits=4)
        columns = np.array(dense)[:, units]
        np.testing.assert_array_equal(np.array(exported[f"{name}.weight"]), columns)
