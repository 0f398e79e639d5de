"""A mixture of bits, another in each layer: the same values through convert, prepare and export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.export import export_checkpoint
from ifp_mlx.convert.gguf_export import export_gguf
from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.convert.model_card import ModelCard
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_unit_file
from ifp_mlx.storage.weights import load_model

TOKENS = mx.array([[3, 60, 5, 41, 99]])
KEPT = 128
CARD = ModelCard("org/base", "mit", "x", "random", KEPT, 192, 3, "FFN units", 10, 20)


def _form(path: str) -> dict[str, Any] | bool:
    """Return how a module is packed: three widths, two groups, one layer and the head plain."""
    if "layers.2" in path or "norm" in path or "embed" in path:
        return False
    layer = 3 if "layers.0" in path else 6
    bits = 8 if "down_proj" in path else 4 if "self_attn" in path else layer
    return {"bits": bits, "group_size": 64 if "gate_proj" in path else 32, "mode": "affine"}


@pytest.fixture
def mixture(tiny_checkpoint: Callable[..., Path]) -> Path:
    """Return a checkpoint whose modules are packed each in its own form."""
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=192)
    model, config = load_model(folder)
    nn.quantize(model, class_predicate=lambda path, m: hasattr(m, "to_quantized") and _form(path))
    paths = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    forms: dict[str, Any] = {path: _form(path) for path in paths}
    config["quantization"] = {"bits": 4, "group_size": 32, "mode": "affine", **forms}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays_of(model), {"format": "mlx"})
    return folder


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def test_convert_keeps_every_form_and_value(mixture: Path, tmp_path: Path) -> None:
    expected = arrays_of(load_model(mixture)[0])
    made, config = load_model(convert_checkpoint(mixture, tmp_path / "out").path)
    arrays = arrays_of(made)
    assert arrays.keys() == expected.keys()
    assert all(mx.array_equal(arrays[name], expected[name]) for name in expected)
    assert {v["bits"] for v in config["quantization"].values() if isinstance(v, dict)} == {
        3, 4, 6, 8
    }  # fmt: skip


@pytest.mark.parametrize("prepared", [False, True])
def test_streaming_gives_what_slicing_gives(mixture: Path, prepared: bool) -> None:
    model, _ = load_model(mixture)
    selection = select_random(model, KEPT, seed=3)
    expected = slice_model(model, selection)(TOKENS)
    if prepared:
        write_unit_file(mixture)
    read = load_subnetwork(mixture, selection)
    assert read.used_unit_file == prepared
    assert mx.array_equal(read.model(TOKENS), expected)


def test_export_is_the_compact_model(mixture: Path, tmp_path: Path) -> None:
    model, _ = load_model(mixture)
    selection = select_random(model, KEPT, seed=3)
    compact = slice_model(model, selection)
    expected = compact(TOKENS)
    made = export_checkpoint(compact, selection, mixture, tmp_path / "out", CARD)
    assert mx.allclose(load_model(made.path)[0](TOKENS), expected, atol=1e-5)


def test_gguf_export_has_the_dequantized_values(mixture: Path, tmp_path: Path) -> None:
    export_gguf(mixture, tmp_path / "m.gguf", "f32")
    file = GGUFFile(tmp_path / "m.gguf")
    dense = arrays_of(load_model(mixture, mx.float32)[0])
    for name, part in (("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down", "down")):
        for layer in range(3):
            tensor = file.tensors[f"blk.{layer}.{name}.weight"]
            values = gguf.quants.dequantize(file.blocks(tensor), tensor.kind)
            expected = np.array(dense[f"model.layers.{layer}.mlp.{part}_proj.weight"])
            np.testing.assert_array_equal(values, expected)
