"""A compact model equals the dense one with the other units masked, for every family."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import ArchitectureError, SelectionError
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units.families import FAMILIES, find_family
from ifp_mlx.units.masks import set_unit_masks, with_unit_masks
from ifp_mlx.units.modules import named_arrays, unit_arrays, unit_shape

FFN = sorted(name for name, family in FAMILIES.items() if family.kind.name == "ffn")
ModelFactory = Callable[..., nn.Module]

EXACT = 1e-5  # float32: only the order of a few hundred additions differs
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2, 38, 46, 26]])


def largest_difference(one: mx.array, other: mx.array) -> float:
    return float(np.abs(np.array(one) - np.array(other)).max())


def masked_logits(model: nn.Module, masks: mx.array) -> mx.array:
    masked = with_unit_masks(model)
    set_unit_masks(masked, masks)
    return masked(TOKENS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_kept_units", [192, 96, 64, 7])
@pytest.mark.parametrize("family", FFN)
def test_slice_model_equals_masked_dense(
    tiny_model: ModelFactory, family: str, num_kept_units: int
) -> None:
    model = tiny_model(family)
    selection = select_random(model, num_kept_units)
    compact = slice_model(model, selection)
    expected = masked_logits(model, selection.pick.mask())
    assert largest_difference(compact(TOKENS), expected) <= EXACT
    assert unit_shape(compact).num_units == num_kept_units


@pytest.mark.parametrize("family", FFN)
def test_masking_changes_the_output(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    masked = masked_logits(model, select_random(model, 64).pick.mask())
    assert largest_difference(masked, model(TOKENS)) > 100 * EXACT


def test_compact_model_shares_everything_outside_the_ffn(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    compact = slice_model(model, select_random(model, 64))
    dense_arrays = named_arrays(model)
    shared = {name for name, array in named_arrays(compact).items() if array is dense_arrays[name]}
    assert shared == {name for name in dense_arrays if ".mlp." not in name}


def test_slicing_gathers_once_a_projection(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = tiny_model("llama")
    selection = select_random(model, 64)
    mx.eval(model.parameters(), selection.pick.indices)
    compact = slice_model(model, selection)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *unit_arrays(compact).values())
    primitives = re.findall(r'label ="([A-Za-z]+)"', (tmp_path / "graph.dot").read_text())
    launched = [
        name
        for name in primitives
        if name not in {"View", "Transpose", "Squeeze", "Slice", "Broadcast"}
    ]
    assert sorted(set(launched)) == ["Gather", "GatherAxis"]
    assert len(launched) == 3 * len(selection.pick.layers)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_slicing_leaves_the_dense_model_as_it_was(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    before, args = model(TOKENS), model.args
    slice_model(model, select_random(model, 64))
    assert mx.array_equal(model(TOKENS), before)
    assert model.args == args


def test_per_sample_masks_equal_one_sample_at_a_time(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    masks = mx.stack([select_random(model, 64).pick.mask(), mx.ones((3, 192))])
    together = masked_logits(model, masks)
    for sample in range(2):
        alone = masked_logits(model, masks[sample])[sample]
        assert largest_difference(together[sample], alone) <= EXACT


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_rows_are_gathered_bit_for_bit(tiny_model: ModelFactory, bits: int) -> None:
    model = tiny_model("llama", hidden_size=64)
    nn.quantize(model, group_size=32, bits=bits)
    selection = select_random(model, 96)
    compact = slice_model(model, selection)
    for layer in range(3):
        rows = np.array(selection.pick.indices[layer])
        for name in ("gate_proj", "up_proj"):
            dense, cut = model.layers[layer].mlp[name], compact.layers[layer].mlp[name]
            for part in ("weight", "scales", "biases"):
                np.testing.assert_array_equal(np.array(cut[part]), np.array(dense[part])[rows])


def test_selection_of_another_shape_is_refused(tiny_model: ModelFactory) -> None:
    selection = select_random(tiny_model("llama"), 64)
    with pytest.raises(
        SelectionError, match="3 layers of 192 units, the model has 2 layers of 192"
    ):
        slice_model(tiny_model("llama", num_hidden_layers=2), selection)


def test_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(ArchitectureError, match="'dbrx' is not supported; these are: afmoe"):
        find_family("dbrx")


def test_masks_with_another_number_of_layers_are_refused(tiny_model: ModelFactory) -> None:
    masked = with_unit_masks(tiny_model("llama"))
    with pytest.raises(SelectionError, match="masks have 2 layers, the model has 3"):
        set_unit_masks(masked, mx.ones((2, 192)))
