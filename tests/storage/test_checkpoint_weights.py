"""Weights that do not fit their configuration: one clear error each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.weights import load_model, stored_tensors

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]


def test_pickled_weights_are_refused_with_advice(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*get"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\*\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 100, -1])
def test_truncated_weights_are_one_line(
    tiny_checkpoint: CheckpointFactory, kept_bytes: int
) -> None:
    folder = tiny_checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(
        CheckpointError, match=r"is (damaged: .*; download or convert|empty; download) it again"
    ):
        load_model(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(
    tiny_checkpoint: CheckpointFactory, bad: float
) -> None:
    folder = tiny_checkpoint()
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = bad
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=f"{name} holds values that are not numbers"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"vocab_size": 99}, {"tie_word_embeddings": False}], ids=str
)
def test_config_that_disagrees_with_the_weights_is_one_line(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, changes: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_layers", [2, 4, 2**30])
def test_layer_count_that_disagrees_is_refused_at_once(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, num_layers: int
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, num_hidden_layers=num_layers)
    with pytest.raises(CheckpointError, match=f"says {num_layers} layers, the weights have 3"):
        load_model(folder)


def packed_checkpoint(folder: Path) -> dict[str, mx.array]:
    """Quantize a checkpoint in place and return its arrays."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = quantize_model(*load_model(folder), group_size=32, bits=4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


PACKED_DAMAGE: dict[str, tuple[str, tuple[int, ...], str]] = {
    "more scales": ("scales", (192, 2), "has 4 bits in groups of 16, no format of mlx"),
    "scales do not divide": ("scales", (192, 3), "has 32 columns, which its packed weight"),
    "no scales": ("scales", (192, 0), "has 32 columns, which its packed weight"),
    "fewer rows": ("scales", (96, 1), "has 192 rows, its packed weight"),
    "flat scales": ("scales", (192,), "has 192 rows, its packed weight"),
    "wide codes": ("weight", (192, 64), "has 64 bits in groups of 32, no format of mlx"),
    "no codes": ("weight", (192, 0), "has 0 bits in groups of 32, no format of mlx"),
    "other rows": ("weight", (191, 4), "has 192 rows, its packed weight"),
    "flat codes": ("weight", (768,), "has scales but no packed weight"),
    "biases": ("biases", (192, 2), "shape"),
}


@pytest.mark.parametrize(("part", "shape", "message"), PACKED_DAMAGE.values(), ids=PACKED_DAMAGE)
def test_packed_weights_of_the_wrong_shape_are_one_line(
    tiny_checkpoint: CheckpointFactory, part: str, shape: tuple[int, ...], message: str
) -> None:
    folder = tiny_checkpoint()
    weights = packed_checkpoint(folder)
    name = f"model.layers.1.mlp.up_proj.{part}"
    damaged = weights | {name: mx.zeros(shape, weights[name].dtype)}
    mx.save_safetensors(str(folder / "model.safetensors"), damaged, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "config.json and the weights disagree" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"intermediate_size": 96}], ids=str)
def test_config_that_disagrees_with_packed_weights_is_one_line(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, changes: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    packed_checkpoint(folder)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"group_size": 32, "bits": 7, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "none"},
        {"group_size": 0, "bits": 4},
        {"group_size": 16, "bits": 4, "mode": "affine"},
        {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 0}},
        {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32}},
        [],
        "4",
    ],
    ids=str,
)
def test_quantization_settings_that_disagree_are_one_line(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, settings: object
) -> None:
    folder = tiny_checkpoint()
    packed_checkpoint(folder)
    edit_config(folder, quantization=settings, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", 3])
def test_index_must_not_name_files_outside(
    tiny_checkpoint: CheckpointFactory, file: object
) -> None:
    folder = tiny_checkpoint()
    write_index(folder, {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        stored_tensors(folder)


def test_index_must_agree_with_the_files(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    write_index(folder, {"model.norm.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        stored_tensors(folder)
    write_index(folder, {"nothing": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'nothing' is not in model\.safetensors"):
        stored_tensors(folder)
    write_index(folder, [])
    with pytest.raises(CheckpointError, match="has no weight_map"):
        stored_tensors(folder)


def test_a_tensor_in_two_files_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model-b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "model-a.safetensors")
    with pytest.raises(CheckpointError, match=r"is in model-a\..* and in model-b\..*; move away"):
        stored_tensors(folder)
