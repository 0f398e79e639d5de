"""A mixture of fewer experts equals the whole one whose other experts cannot be asked."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.errors import SelectionError
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.slicing.streaming import EarlierCut, load_subnetwork
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.families import FAMILIES
from ifp_mlx.units.modules import (
    named_arrays,
    unit_arrays,
    unit_layers,
    unit_shape,
)
from tests.masking import masked

ModelFactory = Callable[..., nn.Module]
CheckpointFactory = Callable[..., Path]

MIXTURES = sorted(name for name, family in FAMILIES.items() if family.kind.name == "expert")
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2, 38, 46, 26]])
EXACT = 1e-5  # float32: the routers of some families sum in another order


def difference(one: mx.array, other: mx.array) -> float:
    return float(np.abs(np.array(one) - np.array(other)).max())


def quantize(model: nn.Module) -> None:
    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=4, class_predicate=fits)


@pytest.mark.parametrize("num_kept_units", [8, 6, 4])
@pytest.mark.parametrize("family", MIXTURES)
def test_fewer_experts_equal_the_others_masked(
    tiny_model: ModelFactory, family: str, num_kept_units: int
) -> None:
    model = tiny_model(family)
    selection = select_random(model, num_kept_units, seed=3)
    compact = slice_model(model, selection)
    assert unit_shape(compact).num_units == num_kept_units
    found = compact(TOKENS)
    assert difference(found, masked(model, selection)(TOKENS)) <= EXACT
    if num_kept_units < 8:
        assert difference(found, model(TOKENS)) > 100 * EXACT
    else:
        assert mx.array_equal(found, model(TOKENS))


@pytest.mark.parametrize("family", MIXTURES)
def test_packed_experts_equal_the_others_masked(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    quantize(model)
    selection = select_random(model, 4, seed=3)
    compact = slice_model(model, selection)
    assert difference(compact(TOKENS), masked(model, selection)(TOKENS)) <= EXACT


def assert_same_parameters(found: nn.Module, expected: nn.Module) -> None:
    wanted = named_arrays(expected)
    arrays = named_arrays(found)
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert array.dtype == wanted[name].dtype, name
        assert mx.array_equal(array, wanted[name]), name


@pytest.mark.parametrize("family", MIXTURES)
def test_streamed_experts_are_those_of_the_loaded_model(
    tiny_checkpoint: CheckpointFactory, family: str
) -> None:
    path = tiny_checkpoint(family)
    model = load_model(path)[0]
    selection = select_random(model, 4, seed=3)
    loaded = load_subnetwork(path, selection)
    assert_same_parameters(loaded.model, slice_model(model, selection))
    kept_bytes = sum(array.nbytes for array in unit_arrays(loaded.model).values())
    assert loaded.unit_bytes_read == kept_bytes  # nothing else of the stacks


def test_streamed_packed_experts_are_those_of_the_loaded_model(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint

    source = tiny_checkpoint("gpt_oss")
    for mode in ("affine", "mxfp4"):
        path = tmp_path / mode
        quantize_checkpoint(source, path, make_quantization(mode=mode, group_size=32))
        model = load_model(path)[0]
        selection = select_random(model, 4, seed=3)
        loaded = load_subnetwork(path, selection)
        assert_same_parameters(loaded.model, slice_model(model, selection))
        cast = load_subnetwork(path, selection, dtype=mx.float32)
        whole = slice_model(load_model(path, mx.float32)[0], selection)
        assert_same_parameters(cast.model, whole)


def test_groups_must_stay_even(tiny_model: ModelFactory) -> None:
    model = tiny_model("deepseek_v3")
    indices = mx.array([[0, 1, 2, 7]] * 2, dtype=mx.int32)
    uneven = Selection((Pick("expert", (1, 2), indices, 8),), SelectorSpec("mine"))
    with pytest.raises(SelectionError, match="as many units in each of its 2 groups"):
        slice_model(model, uneven)


def test_a_selection_of_ffn_units_is_refused(tiny_model: ModelFactory) -> None:
    indices = mx.array([[0, 1, 2, 3]] * 3, dtype=mx.int32)
    other = Selection((Pick("ffn", (0, 1, 2), indices, 8),), SelectorSpec("mine"))
    with pytest.raises(SelectionError, match="selection is for"):
        slice_model(tiny_model("olmoe"), other)


@pytest.mark.parametrize("is_disposable", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "gemma4_text"])
def test_switching_reads_only_the_experts_that_differ(
    tiny_checkpoint: CheckpointFactory, family: str, is_disposable: bool
) -> None:
    path = tiny_checkpoint(family)
    model = load_model(path)[0]
    layers = tuple(unit_layers(model))
    before, after = (
        Selection(
            (Pick("expert", layers, mx.array([row] * len(layers), dtype=mx.int32), 8),),
            SelectorSpec("mine"),
        )
        for row in ([0, 2, 4, 6], [0, 3, 4, 7])
    )
    first = load_subnetwork(path, before)
    second = load_subnetwork(path, after, earlier=EarlierCut(before, first.model, is_disposable))
    assert_same_parameters(second.model, slice_model(model, after))
    assert first.unit_bytes_read is not None
    assert second.unit_bytes_read == first.unit_bytes_read // 2  # two experts of four are new
    if not is_disposable:
        assert_same_parameters(first.model, slice_model(model, before))
