"""What other libraries quantized: AWQ with the right values, the rest refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.weights import load_model, require_finite

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]
TOKENS = mx.array([[3, 60, 5, 41]])
GROUP = 32
SIZES = {"hidden_size": 64, "intermediate_size": 192}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of columns in a word of AutoAWQ's


def _packed(codes: npt.NDArray[np.int64]) -> mx.array:
    """Return codes of four bits as AutoAWQ packs them: eight neighbours of a row in one word."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, column in enumerate(_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return mx.array(words.view(np.int32))


def quantize_with_awq(folder: Path) -> None:
    """Replace a checkpoint's projections by random AWQ weights, and write ``plain`` beside it."""
    generator = np.random.default_rng(0)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    packed = {name: array.astype(mx.float16) for name, array in weights.items()}
    plain = dict(packed)
    for name, array in weights.items():
        if "_proj" not in name:
            continue
        rows, columns = array.shape
        codes = generator.integers(0, 16, (columns, rows))
        zeros = generator.integers(0, 16, (columns // GROUP, rows))
        # Products of these scales with a zero point are exact in half precision.
        scales = generator.integers(1, 32, (columns // GROUP, rows)) / 1024
        values = (codes - np.repeat(zeros, GROUP, axis=0)) * np.repeat(scales, GROUP, axis=0)
        base = name.removesuffix(".weight")
        plain[name] = mx.array(values.T.astype(np.float32)).astype(mx.float16)
        del packed[name]
        packed[f"{base}.qweight"] = _packed(codes)
        packed[f"{base}.qzeros"] = _packed(zeros)
        packed[f"{base}.scales"] = mx.array(scales.astype(np.float16))
    mx.save_safetensors(str(folder / "model.safetensors"), packed, {"format": "pt"})
    (folder / "plain").mkdir()
    mx.save_safetensors(str(folder / "plain" / "model.safetensors"), plain, {"format": "pt"})
    (folder / "plain" / "config.json").write_bytes((folder / "config.json").read_bytes())


def test_awq_has_the_values_that_its_format_means(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig
) -> None:
    folder = tiny_checkpoint(**SIZES)
    quantize_with_awq(folder)
    edit_config(folder, quantization_config=AWQ)
    expected = load_model(folder / "plain", mx.float32)[0](TOKENS)
    model, config = load_model(folder)
    assert config["quantization"] == {"group_size": GROUP, "bits": 4}
    assert model.layers[0].mlp.up_proj.bits == 4
    assert mx.allclose(load_model(folder, mx.float32)[0](TOKENS), expected, atol=1e-5)


def test_awq_converts_to_the_same_values(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(**SIZES)
    quantize_with_awq(folder)
    edit_config(folder, quantization_config=AWQ)
    made = convert_checkpoint(folder, tmp_path / "out").path
    expected = load_model(folder / "plain", mx.float32)[0](TOKENS)
    assert mx.allclose(load_model(made, mx.float32)[0](TOKENS), expected, atol=1e-5)
    assert json.loads((made / "config.json").read_text())["quantization"]["bits"] == 4


@pytest.mark.parametrize("part", ["qweight", "scales", "qzeros"])
def test_awq_weights_of_the_wrong_shape_are_one_line(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, part: str
) -> None:
    folder = tiny_checkpoint(**SIZES)
    quantize_with_awq(folder)
    edit_config(folder, quantization_config=AWQ)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    name = f"model.layers.1.mlp.up_proj.{part}"
    weights[name] = weights[name][1:]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj has 192 rows .* AWQ"):
        load_model(folder)


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    "awq (bits 8, version gemm": {**AWQ, "bits": 8},
    "awq (bits 4, version gemv": {**AWQ, "version": "gemv"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, ": {"load_in_8bit": True, "_load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "aqlm": {"quant_method": "aqlm"},
    "a method without a name": {"weights": "int8"},
}


@pytest.mark.parametrize(("name", "settings"), METHODS.items(), ids=METHODS)
def test_other_methods_are_refused_by_name(
    tiny_checkpoint: CheckpointFactory,
    edit_config: EditConfig,
    name: str,
    settings: dict[str, Any],
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match="are quantized by ") as caught:
        load_model(folder)
    assert f"quantized by {name}" in str(caught.value)
    assert "get the model's original weights" in str(caught.value)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_null_is_as_absent(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, tmp_path: Path, key: str
) -> None:
    folder = tiny_checkpoint()
    expected = load_model(folder)[0](TOKENS)
    edit_config(folder, **{key: None})
    assert mx.array_equal(load_model(folder)[0](TOKENS), expected)
    made = convert_checkpoint(folder, tmp_path / "out").path
    assert key not in json.loads((made / "config.json").read_text())


def test_mlx_settings_under_the_other_name_are_read(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, tmp_path: Path
) -> None:
    from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint

    made = quantize_checkpoint(tiny_checkpoint(), tmp_path / "q", make_quantization(group_size=32))
    expected = load_model(made.path)[0](TOKENS)
    edit_config(made.path, quantization=...)
    require_finite(made.path)
    assert mx.array_equal(load_model(made.path)[0](TOKENS), expected)
