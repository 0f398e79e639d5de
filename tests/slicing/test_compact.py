"""A compact model equals the dense one with the other units masked, for every family."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.errors import ArchitectureError, SelectionError
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import down_requantization_error, slice_model
from ifp_mlx.slicing.gather import with_unit_major_downs
from ifp_mlx.units import ffn

ModelFactory = Callable[..., nn.Module]

EXACT = 1e-5  # float32: only the order of a few hundred additions differs
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2, 38, 46, 26]])


def select_random(model: nn.Module, num_kept_units: int) -> Selection:
    shape = (len(ffn.ffn_modules(model)), ffn.num_units(model))
    scores = mx.random.uniform(shape=shape, key=mx.random.key(5))
    return Selection(top_k_indices(scores, num_kept_units), shape[1], "random")


def masked_logits(model: nn.Module, masks: mx.array) -> mx.array:
    masked = ffn.with_unit_masks(model)
    ffn.set_unit_masks(masked, masks)
    return masked(TOKENS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_kept_units", [192, 96, 64, 7])
@pytest.mark.parametrize("family", sorted(ffn.FAMILIES))
def test_slice_model_equals_masked_dense(
    tiny_model: ModelFactory, family: str, num_kept_units: int
) -> None:
    model = tiny_model(family)
    selection = select_random(model, num_kept_units)
    compact = slice_model(model, selection)
    expected = masked_logits(model, selection.mask())
    assert mx.abs(compact(TOKENS) - expected).max().item() <= EXACT
    assert ffn.num_units(compact) == num_kept_units


@pytest.mark.parametrize("family", sorted(ffn.FAMILIES))
def test_masking_changes_the_output(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    masked = masked_logits(model, select_random(model, 64).mask())
    assert mx.abs(masked - model(TOKENS)).max().item() > 100 * EXACT


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_mask_values_are_folded_into_the_compact_weights(
    tiny_model: ModelFactory, family: str
) -> None:
    model = tiny_model(family)
    hard = select_random(model, 96)
    values = mx.random.uniform(low=0.5, shape=hard.indices.shape, key=mx.random.key(3))
    soft = Selection(hard.indices, hard.num_units, "soft", mask_values=values)
    mask = np.zeros((hard.num_layers, hard.num_units), dtype=np.float32)
    for layer in range(hard.num_layers):
        mask[layer, np.array(hard.indices[layer])] = np.array(values[layer])
    expected = masked_logits(model, mx.array(mask))
    assert mx.abs(slice_model(model, soft)(TOKENS) - expected).max().item() <= EXACT


def test_compact_model_shares_everything_outside_the_ffn(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    compact = slice_model(model, select_random(model, 64))
    dense_arrays = dict(tree_flatten(model.parameters()))
    shared = {
        name for name, array in tree_flatten(compact.parameters()) if array is dense_arrays[name]
    }
    assert shared == {name for name in dense_arrays if ".mlp." not in name}


def test_slicing_gathers_once_a_projection(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = with_unit_major_downs(tiny_model("llama"))
    selection = select_random(model, 64)
    mx.eval(model.parameters(), selection.indices)
    compact = slice_model(model, selection)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *ffn.ffn_arrays(compact))
    primitives = re.findall(r'label ="([A-Za-z]+)"', (tmp_path / "graph.dot").read_text())
    launched = [
        name for name in primitives if name not in {"View", "Transpose", "Squeeze", "Slice"}
    ]
    assert launched == ["Gather"] * 3 * selection.num_layers


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_slicing_leaves_the_dense_model_as_it_was(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    before, args = model(TOKENS), model.args
    slice_model(model, select_random(model, 64))
    assert mx.array_equal(model(TOKENS), before)
    assert model.args == args


def test_per_sample_masks_equal_one_sample_at_a_time(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    masks = mx.stack([select_random(model, 64).mask(), mx.ones((3, 192))])
    together = masked_logits(model, masks)
    for sample in range(2):
        alone = masked_logits(model, masks[sample])[sample]
        assert mx.abs(together[sample] - alone).max().item() <= EXACT


def test_compensation_restores_the_mean_contribution_of_removed_units(
    tiny_model: ModelFactory,
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    calibration = calibrate(model, [CalibrationExample(TOKENS[0].tolist())])
    selection = select_random(model, 64)
    compact = slice_model(model, selection, compensation=calibration)
    removed = np.array(calibration.mean_activation[0]) * (1 - np.array(selection.mask()[0]))
    expected = np.array(model.layers[0].mlp.down_proj.weight) @ removed
    np.testing.assert_allclose(compact.layers[0].mlp.down_proj.bias, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_rows_are_gathered_bit_for_bit(tiny_model: ModelFactory, bits: int) -> None:
    model = tiny_model("llama", hidden_size=64)
    nn.quantize(model, group_size=32, bits=bits)
    selection = select_random(model, 96)
    compact = slice_model(model, selection)
    for layer in range(3):
        rows = np.array(selection.indices[layer])
        for name in ("gate_proj", "up_proj"):
            dense, cut = model.layers[layer].mlp[name], compact.layers[layer].mlp[name]
            for part in ("weight", "scales", "biases"):
                np.testing.assert_array_equal(np.array(cut[part]), np.array(dense[part])[rows])


def test_down_requantization_error_is_the_measured_one(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama", hidden_size=64)
    nn.quantize(model, group_size=32, bits=4)
    selection = select_random(model, 96)
    compact = slice_model(model, selection)
    squares = np.zeros(2)
    for layer in range(3):
        exact = np.array(ffn.dense_weight(model.layers[layer].mlp.down_proj))
        exact = exact[:, np.array(selection.indices[layer])]
        cut = np.array(ffn.dense_weight(compact.layers[layer].mlp.down_proj))
        squares += ((cut - exact) ** 2).sum(), (exact**2).sum()
    error = down_requantization_error(model, compact, selection)
    assert error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-4)
    assert 0 < error < 0.01  # 8 bits behind 4


def test_plain_weights_have_no_requantization_error(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    selection = select_random(model, 64)
    assert down_requantization_error(model, slice_model(model, selection), selection) == 0


def test_selection_of_another_shape_is_refused(tiny_model: ModelFactory) -> None:
    selection = select_random(tiny_model("llama"), 64)
    with pytest.raises(SelectionError, match="3 layers of 192 units, the model has 2 of 192"):
        slice_model(tiny_model("llama", num_hidden_layers=2), selection)


def test_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(ArchitectureError, match="'mixtral' is not supported; these are: cohere"):
        ffn.ffn_layout("mixtral")


def test_masks_with_another_number_of_layers_are_refused(tiny_model: ModelFactory) -> None:
    masked = ffn.with_unit_masks(tiny_model("llama"))
    with pytest.raises(SelectionError, match="masks have 2 layers, the model has 3"):
        ffn.set_unit_masks(masked, mx.ones((2, 192)))
