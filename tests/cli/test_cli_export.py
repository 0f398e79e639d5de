from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.storage import checkpoint

Run = Callable[..., Any]


def test_dequantized_export_of_a_packed_model_is_exact(
    ifp: Run, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of down are not quantized to 8 bits on the way to plain weights."""
    monkeypatch.setattr(checkpoint, "automatic_dtype", lambda model: None)  # as on a GPU
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    ifp("quantize", small_model, "-o", packed, "--bits", "4", "--group-size", "32")
    made = ifp("export", "--model", packed, "--task", "write words", "--keep-units", "128",
               "--dequantize", "-o", plain)  # fmt: skip
    assert made.code == 0
    assert "8 bits" not in made.stderr
    selection = mx.load(str(plain / "ifp" / "selection.safetensors"))
    source, exported = (mx.load(str(path / "model.safetensors")) for path in (packed, plain))
    for layer, units in enumerate(np.array(selection["indices"])):
        name = f"model.layers.{layer}.mlp.down_proj"
        parts = [source[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        columns = np.array(mx.dequantize(*parts, group_size=32, bits=4))[:, units]
        np.testing.assert_array_equal(np.array(exported[f"{name}.weight"]), columns)
