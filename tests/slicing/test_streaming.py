"""A sub-network read from the disk is the one that slicing the whole model gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.errors import CheckpointError, SelectionError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, RandomSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions, slice_model
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_unit_file
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.positioned_reads import PositionedReader, to_array
from ifp_mlx.storage.tensor_files import read_header
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.families import FAMILIES
from ifp_mlx.units.kinds import UnitShape
from ifp_mlx.units.modules import clone_module, named_arrays

FFN = sorted(name for name, family in FAMILIES.items() if family.kind.name == "ffn")
CheckpointFactory = Callable[..., Path]

TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])
UNIT_FILE = pytest.mark.parametrize("unit_file", [False, True], ids=["rows", "unit-file"])


def select_random(num_kept_units: int, num_units: int = 192, num_layers: int = 3) -> Selection:
    shape = UnitShape(tuple(range(num_layers)), num_units)
    named = NamedSelector(RandomSelector(shape, 5), SelectorSpec("random"), "ffn", shape)
    return select(named, (), num_kept_units)


def store_as(path: Path, dtype: mx.Dtype) -> None:
    weights = {k: v.astype(dtype) for k, v in load_arrays(path / "model.safetensors")[0].items()}
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})


def quantize_checkpoint(path: Path, **quantization: Any) -> None:
    from mlx_lm.utils import quantize_model

    model, config = load_model(path)
    model, config = quantize_model(
        model,
        config,
        quantization["group_size"],
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
    )
    weights = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))


def assert_same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    wanted = dict(tree_flatten(expected.parameters()))
    found = dict(tree_flatten(actual.parameters()))
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype, name
        assert mx.array_equal(array, wanted[name]), name


@UNIT_FILE
@pytest.mark.parametrize(
    ("family", "num_kept_units"),
    [("llama", 192), ("llama", 7), *((family, 64) for family in FFN)],
)
def test_load_subnetwork_equals_slicing_the_loaded_model(
    tiny_checkpoint: CheckpointFactory, family: str, num_kept_units: int, unit_file: bool
) -> None:
    path = tiny_checkpoint(family)
    if unit_file:
        write_unit_file(path)
    selection = select_random(num_kept_units)
    loaded = load_subnetwork(path, selection)
    assert_same_parameters(loaded.model, slice_model(load_model(path)[0], selection))
    assert loaded.used_unit_file == unit_file
    assert loaded.requantization_error == 0


@UNIT_FILE
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_load_subnetwork_keeps_half_precision_bit_for_bit(
    tiny_checkpoint: CheckpointFactory, dtype: mx.Dtype, unit_file: bool
) -> None:
    path = tiny_checkpoint()
    store_as(path, dtype)
    if unit_file:
        write_unit_file(path)
    selection = select_random(64)
    expected = slice_model(load_model(path)[0], selection)
    assert_same_parameters(load_subnetwork(path, selection).model, expected)


@UNIT_FILE
@pytest.mark.parametrize("mode", ["affine-3", "affine-4", "affine-8", "mxfp4", "mxfp8", "nvfp4"])
def test_load_subnetwork_of_a_quantized_checkpoint_equals_slicing_it(
    tiny_checkpoint: CheckpointFactory, mode: str, unit_file: bool
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    kind, _, named_bits = mode.partition("-")
    group_size = 16 if kind == "nvfp4" else 32
    bits = int(named_bits or {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}[kind])
    quantize_checkpoint(path, group_size=group_size, bits=bits, mode=kind)
    if unit_file:
        write_unit_file(path)
    selection = select_random(64)
    for exact_down in (False, True):
        options = CutOptions(exact_down=exact_down)
        loaded = load_subnetwork(path, selection, options=options)
        assert loaded.used_unit_file == unit_file
        expected = slice_model(load_model(path)[0], selection, options)
        assert_same_parameters(loaded.model, expected)
        assert (loaded.requantization_error == 0) == exact_down


@UNIT_FILE
def test_load_subnetwork_dequantizes_to_the_asked_type(
    tiny_checkpoint: CheckpointFactory, unit_file: bool
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    quantize_checkpoint(path, group_size=32, bits=4)
    if unit_file:
        write_unit_file(path)
    selection = select_random(64)
    expected = slice_model(load_model(path, mx.float32)[0], selection)
    loaded = load_subnetwork(path, selection, dtype=mx.float32)
    assert_same_parameters(loaded.model, expected)


def test_unit_file_reads_little_more_than_the_kept_units(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    path = tiny_checkpoint()
    kept_bytes = 3 * 64 * 3 * 32 * 4  # layers, units, projections, D, float32
    selection = select_random(64)
    plain = load_subnetwork(path, selection)
    # Without it: gate and up of the kept units, and down of all 192.
    assert plain.unit_bytes_read == kept_bytes * 2 // 3 + 3 * 192 * 32 * 4
    write_unit_file(path)
    assert load_subnetwork(path, selection).unit_bytes_read == kept_bytes


def test_adapted_models_are_sliced_after_the_adapter(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint()

    def adapt(model: nn.Module) -> nn.Module:
        changed: nn.Module = clone_module(model)
        for layer in changed.layers:
            layer.mlp.up_proj.weight = layer.mlp.up_proj.weight * 2
            layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * 3
        return changed

    selection = select_random(64)
    loaded = load_subnetwork(path, selection, adapt=adapt)
    assert_same_parameters(loaded.model, slice_model(adapt(load_model(path)[0]), selection))
    assert loaded.unit_bytes_read is None


def test_tensors_stored_in_another_form_are_loaded_whole(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    path = tiny_checkpoint("gpt2")
    weights = load_arrays(path / "model.safetensors")[0]
    # transformers stores gpt2 without this prefix and its matrices the other way round.
    moved = {
        name.removeprefix("model."): mx.contiguous(array.T)
        if name.endswith("proj.weight") or "c_fc.weight" in name or "c_attn.weight" in name
        else array
        for name, array in weights.items()
    }
    mx.eval(moved)
    mx.save_safetensors(str(path / "model.safetensors"), moved, {"format": "pt"})
    selection = select_random(64)
    loaded = load_subnetwork(path, selection)
    assert loaded.unit_bytes_read is None
    assert_same_parameters(loaded.model, slice_model(load_model(path)[0], selection))


def test_sub_networks_share_everything_outside_the_ffn_with_their_base(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    path = tiny_checkpoint()
    base = load_model(path, lazy=True)[0]
    loaded = load_subnetwork(path, select_random(64), base=base)
    arrays = named_arrays(base)
    shared = {k for k, v in named_arrays(loaded.model).items() if v is arrays[k]}
    assert shared == {name for name in arrays if ".mlp." not in name}


def test_selection_for_another_model_is_refused_before_reading(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    with pytest.raises(SelectionError, match="3 layers of 96 units, the model has 3 layers of 192"):
        load_subnetwork(tiny_checkpoint(), select_random(64, num_units=96))


def test_stale_unit_file_is_ignored_with_a_warning(
    tiny_checkpoint: CheckpointFactory, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_checkpoint()
    write_unit_file(path)
    store_as(path, mx.float16)
    loaded = load_subnetwork(path, select_random(64))
    assert not loaded.used_unit_file
    assert len(caplog.messages) == 1
    advice = "belongs to other weights; run ifp convert MODEL --unit-major again"
    assert advice in caplog.messages[0]


def test_progress_counts_layers(tiny_checkpoint: CheckpointFactory) -> None:
    seen: list[tuple[int, int]] = []
    load_subnetwork(
        tiny_checkpoint(), select_random(64), on_layer=lambda done, of: seen.append((done, of))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_rows_of_a_tensor_are_the_ones_asked_for(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.array(values)})
    tensor = read_header(tmp_path / "a.safetensors")["a"]
    rows = np.array([0, 3, 4, 5, 19], dtype=np.int32)
    with PositionedReader() as reader:
        content = reader.rows(tensor, rows)
        assert reader.bytes_read == 5 * 12
    np.testing.assert_array_equal(np.array(to_array(content, "F32", (3,))), values[rows])


def test_rows_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.zeros((20, 3))})
    tensor = read_header(tmp_path / "a.safetensors")["a"]
    with PositionedReader() as reader, pytest.raises(CheckpointError, match="a has 20 rows"):
        reader.rows(tensor, np.array([3, 20], dtype=np.int32))


def test_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((20, 3))})
    tensor = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with PositionedReader() as reader, pytest.raises(CheckpointError, match="become shorter"):
        reader.rows(tensor, np.array([0, 19], dtype=np.int32))


def test_dtypes_without_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="FFN weights of dtype F64 cannot be read"):
        to_array(np.zeros((1, 8), dtype=np.uint8), "F64", (1,))
