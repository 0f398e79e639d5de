"""An exported sub-network of every mixture is, in mlx-lm alone, the compact model."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from ifp_mlx.convert.export import export_checkpoint
from ifp_mlx.convert.model_card import ModelCard
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.weights import load_model, stored_tensors
from ifp_mlx.units.families import FAMILIES
from ifp_mlx.units.modules import is_packed, packed_leaves, unit_shape

CheckpointFactory = Callable[..., Path]
MIXTURES = sorted(name for name, family in FAMILIES.items() if family.kind.name == "expert")
TOKENS = mx.array([[3, 60, 5, 41, 99, 12, 7, 200]])
KEPT, NUM_EXPERTS = 4, 8
CARD = ModelCard("org/base", "mit", "write", "random", KEPT, NUM_EXPERTS, 3, "experts", 10, 20)


def mlx_lm_model(folder: Path) -> nn.Module:
    """Load the folder with mlx-lm alone."""
    from mlx_lm.utils import load_model as load_mlx_model

    return load_mlx_model(folder)[0]


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"], ids=["plain", "4-bit", "mxfp4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_exported_experts_are_the_compact_model_in_mlx_lm(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str, mode: str | None
) -> None:
    source = tiny_checkpoint(family)
    if mode is not None:
        packing = make_quantization(mode=mode, group_size=32)
        source = quantize_checkpoint(source, tmp_path / "packed", packing).path
    selection = select_random(load_model(source, lazy=True)[0], KEPT, seed=3)
    compact = load_subnetwork(source, selection).model
    expected = compact(TOKENS)
    made = export_checkpoint(compact, selection, source, tmp_path / "out", CARD)
    assert made.is_plain == (mode is None)
    assert mx.array_equal(compact(TOKENS), expected)  # the exported model still is there
    model = mlx_lm_model(made.path)
    assert mx.array_equal(model(TOKENS), expected)
    assert unit_shape(model).num_units == KEPT
    assert packed_leaves(model) == packed_leaves(compact)
    config = read_config(made.path)
    assert [config.settings[key] for key in config.family.kind.config_fields] == [KEPT]


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_quantized_while_exported_are_those_of_the_plain_ones(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint(family)
    selection = select_random(load_model(source, lazy=True)[0], KEPT, seed=3)
    packing = make_quantization(group_size=32)
    compact = load_subnetwork(source, selection).model
    made = export_checkpoint(
        compact, selection, source, tmp_path / "out", CARD, quantization=packing
    )
    whole = quantize_checkpoint(source, tmp_path / "packed", packing).path
    expected = load_subnetwork(whole, selection).model
    found = mlx_lm_model(made.path)
    assert mx.array_equal(found(TOKENS), expected(TOKENS))
    assert any(is_packed(module) for _, module in found.named_modules())


def test_an_exported_mixture_goes_back_to_plain_weights(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    packing = make_quantization(group_size=32)
    source = quantize_checkpoint(tiny_checkpoint("olmoe"), tmp_path / "packed", packing).path
    selection = select_random(load_model(source, lazy=True)[0], KEPT, seed=3)
    made = export_checkpoint(
        load_subnetwork(source, selection).model,
        selection, source, tmp_path / "out", CARD, dequantize=True,
    )  # fmt: skip
    assert made.is_plain
    assert not any(name.endswith(".scales") for name in stored_tensors(made.path))
    expected = load_subnetwork(source, selection, dtype=mx.float32).model
    assert mx.array_equal(mlx_lm_model(made.path)(TOKENS), expected(TOKENS))
