"""Packed down projections that stay whole: exact, shared, and used where they are smaller."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing import kernel_check
from ifp_mlx.slicing.compact import slice_model, with_cut_downs
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_side_file
from ifp_mlx.slicing.whole_down import WholeDown, is_smaller_whole, packed_bytes
from ifp_mlx.storage.checkpoint import load_model

ModelFactory = Callable[..., nn.Module]
CheckpointFactory = Callable[..., Path]

TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])
D, F, K = 64, 192, 64
MODES = pytest.mark.parametrize(
    ("mode", "bits"), [("affine", 3), ("affine", 4), ("mxfp4", 4)], ids=["3", "4", "mxfp4"]
)


def make_down(mode: str = "affine", bits: int = 4, *, bias: bool = False) -> nn.Module:
    linear = nn.Linear(F, D, bias=bias)
    return nn.QuantizedLinear.from_linear(linear, 32, bits, mode=mode)  # type: ignore[no-any-return]


def select_random(num_kept_units: int = K, values: bool = False) -> Selection:
    indices = top_k_indices(mx.random.uniform(shape=(3, F), key=mx.random.key(5)), num_kept_units)
    factors = mx.random.uniform(low=0.5, shape=indices.shape, key=mx.random.key(3))
    return Selection(indices, F, "random", mask_values=factors if values else None)


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
    units = select_random().indices[1]
    kept = mx.random.normal((2, 5, K), key=mx.random.key(1))
    expected = numpy_product(down, kept, units)
    whole = WholeDown(down, units)
    np.testing.assert_allclose(np.array(whole(kept)), expected, rtol=1e-4, atol=1e-5)


def test_factors_multiply_the_activations() -> None:
    down, selection = make_down("mxfp4"), select_random(values=True)
    units, factors = selection.indices[0], selection.mask_values[0]  # type: ignore[index]
    kept = mx.random.normal((1, 5, K), key=mx.random.key(1))
    expected = numpy_product(down, kept * factors, units)
    whole = WholeDown(down, units, factors)
    np.testing.assert_allclose(np.array(whole(kept)), expected, rtol=1e-4, atol=1e-5)
    assert whole(kept.astype(mx.bfloat16)).dtype == mx.bfloat16  # not that of the factors


def test_units_are_no_parameters() -> None:
    whole = WholeDown(make_down(), select_random().indices[0])
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
    compact = slice_model(model, select_random(), exact_down=True)
    down = compact.layers[1].mlp.down_proj
    assert isinstance(down, WholeDown)
    assert down.down.weight is model.layers[1].mlp.down_proj.weight
    few = slice_model(model, select_random(7), exact_down=True)
    assert not isinstance(few.layers[1].mlp.down_proj, WholeDown)


@pytest.mark.parametrize("side_file", [False, True], ids=["rows", "side-file"])
@pytest.mark.parametrize("num_kept_units", [K, 7], ids=["whole", "columns"])
@pytest.mark.parametrize("values", [False, True], ids=["hard", "soft"])
def test_streamed_exact_downs_compute_what_sliced_ones_do(
    tiny_checkpoint: CheckpointFactory,
    tmp_path: Path,
    num_kept_units: int,
    side_file: bool,
    values: bool,
) -> None:
    packed = make_quantization(mode="mxfp4")
    path = quantize_checkpoint(tiny_checkpoint(hidden_size=D), tmp_path / "packed", packed).path
    if side_file:
        write_side_file(path)
    selection = select_random(num_kept_units, values)
    loaded = load_subnetwork(path, selection, exact_down=True).model
    expected = slice_model(load_model(path)[0], selection, exact_down=True)
    assert mx.array_equal(loaded(TOKENS), expected(TOKENS))


def test_compensation_leaves_the_shared_down_as_it_is(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=4)
    means = mx.random.normal((3, F), key=mx.random.key(2))
    calibration = Calibration(mx.zeros((3, F)), means, {}, 100)
    selection = select_random()
    compact = slice_model(model, selection, compensation=calibration, exact_down=True)
    assert "bias" not in model.layers[0].mlp.down_proj
    removed = np.array(means * (1 - selection.mask()), np.float64)[0]
    expected = numpy_product(model.layers[0].mlp.down_proj, mx.array(removed), mx.arange(F))
    bias = compact.layers[0].mlp.down_proj.down.bias
    np.testing.assert_allclose(np.array(bias), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("values", [False, True], ids=["hard", "soft"])
@MODES
def test_cut_downs_make_an_ordinary_model(
    tiny_model: ModelFactory, mode: str, bits: int, values: bool
) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=bits, mode=mode)
    compact = slice_model(model, select_random(values=values), exact_down=True)
    cut = with_cut_downs(compact)
    assert type(cut.layers[0].mlp.down_proj) is nn.Linear
    assert cut.layers[0].mlp.down_proj.weight.shape == (D, K)
    np.testing.assert_allclose(np.array(cut(TOKENS)), np.array(compact(TOKENS)), atol=1e-5)


def test_wrong_kernels_are_replaced_in_a_whole_down(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", hidden_size=D)
    nn.quantize(model, group_size=32, bits=4)
    compact = slice_model(model, select_random(), exact_down=True)
    expected = compact(TOKENS)
    monkeypatch.setattr(kernel_check, "_is_right", lambda linear: False)
    replaced = kernel_check.check_quantized_kernels(compact, lambda line: None)
    np.testing.assert_allclose(np.array(replaced(TOKENS)), np.array(expected), atol=1e-4)
