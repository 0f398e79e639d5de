"""Packed down projections that stay whole: exact, shared, and used where they are smaller."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, RandomSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing import kernel_check
from ifp_mlx.slicing.compact import CutOptions, slice_model, with_cut_downs
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_unit_file
from ifp_mlx.slicing.whole_down import WholeDown, is_smaller_whole, packed_bytes
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.kinds import UnitShape

ModelFactory = Callable[..., nn.Module]
CheckpointFactory = Callable[..., Path]

TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])
D, F, K = 64, 192, 64
EXACT = CutOptions(exact_down=True)
MODES = pytest.mark.parametrize(
    ("mode", "bits"), [("affine", 3), ("affine", 4), ("mxfp4", 4)], ids=["3", "4", "mxfp4"]
)


def make_down(mode: str = "affine", bits: int = 4, *, bias: bool = False) -> nn.Module:
    linear = nn.Linear(F, D, bias=bias)
    return nn.QuantizedLinear.from_linear(linear, 32, bits, mode=mode)  # type: ignore[no-any-return]


def select_random(num_kept_units: int = K) -> Selection:
    shape = UnitShape((0, 1, 2), F)
    named = NamedSelector(RandomSelector(shape, 5), SelectorSpec("random"), "ffn", shape)
    return select(named, (), num_kept_units)


def numpy_product(down: nn.Module, kept: mx.array, units: mx.array) -> np.ndarray:
    """Return the product of the kept columns in float64."""
    weight = mx.dequantize(
        down.weight, down.scales, down.get("biases"), group_size=32, bits=down.bits, mode=down.mode
    )
    columns = np.array(weight.astype(mx.float32), np.float64)[:, np.array(units)]
    product = np.array(kept, np.float64) @ columns.T
    return product + np.array(down.bias) if "bias" in down else product


@pytest.mark.parametrize("bias", [False, True])
@MODES
def test_whole_down_equals_the_product_of_the_kept_columns(
    mode: str, bits: int, bias: bool
) -> None:
    down = make_down(mode, bits, bias=bias)
    units = select_random().pick.indices[1]
    kept = mx.random.normal((2, 5, K), key=mx.random.key(1))
    expected = numpy_product(down, kept, units)
    whole = WholeDown(down, units)
    np.testing.assert_allclose(np.array(whole(kept)), expected, rtol=1e-4, atol=1e-5)


def test_units_are_no_parameters() -> None:
    whole = WholeDown(make_down(), select_random().pick.indices[0])
    assert set(whole.parameters()) == {"down"}


def test_the_smaller_form_is_known() -> None:
    down = make_down()  # 4 bits and a float32 scale and bias for each 32 values
    assert packed_bytes(down) == D * F // 2 + 2 * D * (F // 32) * 4
    smallest_k = packed_bytes(down) // (D * 4) + 1
    assert is_smaller_whole(down, smallest_k, mx.float32)
    assert not is_smaller_whole(down, smallest_k - 1, mx.float32)
    assert not is_smaller_whole(down, smallest_k, mx.bfloat16)
    assert not is_smaller_whole(nn.Linear(F, D), F, mx.float32)


def test_sub_networks_share_a_whole_down(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=4)
    compact = slice_model(model, select_random(), EXACT)
    down = compact.layers[1].mlp.down_proj
    assert isinstance(down, WholeDown)
    assert down.down.weight is model.layers[1].mlp.down_proj.weight
    few = slice_model(model, select_random(7), EXACT)
    assert not isinstance(few.layers[1].mlp.down_proj, WholeDown)


@pytest.mark.parametrize("unit_file", [False, True], ids=["rows", "unit-file"])
@pytest.mark.parametrize("num_kept_units", [K, 7], ids=["whole", "columns"])
def test_streamed_exact_downs_compute_what_sliced_ones_do(
    tiny_checkpoint: CheckpointFactory,
    tmp_path: Path,
    num_kept_units: int,
    unit_file: bool,
) -> None:
    packed = make_quantization(mode="mxfp4")
    path = quantize_checkpoint(tiny_checkpoint(hidden_size=D), tmp_path / "packed", packed).path
    if unit_file:
        write_unit_file(path)
    selection = select_random(num_kept_units)
    loaded = load_subnetwork(path, selection, options=EXACT).model
    expected = slice_model(load_model(path)[0], selection, EXACT)
    assert mx.array_equal(loaded(TOKENS), expected(TOKENS))


@MODES
def test_cut_downs_make_an_ordinary_model(tiny_model: ModelFactory, mode: str, bits: int) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=bits, mode=mode)
    compact = slice_model(model, select_random(), EXACT)
    cut = with_cut_downs(compact)
    assert type(cut.layers[0].mlp.down_proj) is nn.Linear
    assert cut.layers[0].mlp.down_proj.weight.shape == (D, K)
    np.testing.assert_allclose(np.array(cut(TOKENS)), np.array(compact(TOKENS)), atol=1e-5)


def test_wrong_kernels_are_replaced_in_a_whole_down(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=4)
    compact = slice_model(model, select_random(), EXACT)
    expected = compact(TOKENS)
    monkeypatch.setattr(kernel_check, "_is_right", lambda linear: False)
    replaced = kernel_check.check_quantized_kernels(compact)
    np.testing.assert_allclose(np.array(replaced(TOKENS)), np.array(expected), atol=1e-4)
