"""Adapters: written, read, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from ifp_mlx.adapters.adapter import Adapter, load_adapter, save_adapter
from ifp_mlx.adapters.delta_codes import decode_delta, encode_delta
from ifp_mlx.errors import AdapterError, UsageError
from ifp_mlx.selection.predictor import PredictorHead

# Relative error of Gaussian changes in 64-weight groups, measured: 0.34, 0.19, 0.10.
_CODE_ERRORS = {2: 0.37, 3: 0.21, 4: 0.12}

_MANIFEST: dict[str, Any] = {"base_model": "tiny", "keep_units": [96, 64]}
_SIZES = {"hidden_size": 64}


@pytest.fixture
def base(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model(**_SIZES)


@pytest.fixture
def trained(base: nn.Module) -> dict[str, mx.array]:
    return {
        name: value + 0.01 * mx.random.normal(value.shape)
        for name, value in dict(tree_flatten(base.parameters())).items()
        if ".layers." in name
    }


@pytest.fixture
def head() -> PredictorHead:
    head = PredictorHead(128, mx.random.normal((3, 192)), rank=8)
    head.expand.weight = mx.random.normal(head.expand.weight.shape)
    return head


@pytest.fixture
def adapter(
    tmp_path: Path, base: nn.Module, trained: dict[str, mx.array], head: PredictorHead
) -> Adapter:
    save_adapter(tmp_path / "adapter", base, trained, head, _MANIFEST, bits=4)
    return load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_come_back_near(bits: int) -> None:
    delta = 0.02 * mx.random.normal((24, 128))
    found = decode_delta(encode_delta(delta, bits), (24, 128))
    error = mx.linalg.norm(found - delta) / mx.linalg.norm(delta)
    assert float(error) < _CODE_ERRORS[bits]


def test_codes_of_a_group_on_the_grid_are_exact() -> None:
    delta = mx.array([[-0.75, -0.25, 0.25, 0.75] * 16])
    assert mx.array_equal(decode_delta(encode_delta(delta, 2), (1, 64)), delta)


@pytest.mark.parametrize(
    ("shape", "bits", "reason"), [((2, 64), 5, "2, 3 or 4"), ((3, 21), 2, "groups of 64")]
)
def test_codes_refuse_what_does_not_fit(shape: tuple[int, ...], bits: int, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        encode_delta(mx.zeros(shape), bits)


def test_applied_adapter_is_the_trained_model(
    adapter: Adapter, base: nn.Module, trained: dict[str, mx.array]
) -> None:
    before = dict(tree_flatten(base.parameters()))
    after = dict(tree_flatten(adapter.apply(base).parameters()))
    for name, wanted in trained.items():
        change = mx.linalg.norm(wanted - before[name])
        assert float(mx.linalg.norm(after[name] - wanted) / change) < _CODE_ERRORS[4]
    # What was not trained is the base's own array, and the base stays as it is.
    assert after["model.embed_tokens.weight"] is before["model.embed_tokens.weight"]
    assert mx.array_equal(dict(tree_flatten(base.parameters()))[name], before[name])


def test_predictor_comes_back_near(adapter: Adapter, base: nn.Module, head: PredictorHead) -> None:
    predictor = adapter.predictor(base)
    features = mx.random.normal((4, 128))
    # Eight-bit codes of the expansion, half precision elsewhere.
    assert mx.allclose(predictor.head(features), head(features), atol=0.05)
    assert adapter.keep_units == (64, 96)


def test_adapter_knows_its_base_in_other_precisions(adapter: Adapter, base: nn.Module) -> None:
    from ifp_mlx.units.modules import clone_module

    half = clone_module(base)
    half.set_dtype(mx.bfloat16)
    assert adapter.apply(half).layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    quantized = clone_module(base)
    nn.quantize(quantized, 64, 4)
    layer = adapter.apply(quantized).layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear)
    wanted = adapter.apply(base).layers[0].mlp.up_proj.weight
    # The base's own 4-bit error stays.
    assert float(mx.linalg.norm(layer.weight - wanted) / mx.linalg.norm(wanted)) < 0.15


def test_adapter_refuses_another_model(
    adapter: Adapter, tiny_model: Callable[..., nn.Module]
) -> None:
    other = tiny_model(**_SIZES)
    other.update(tree_map(lambda array: array[::-1], other.parameters()))
    with pytest.raises(AdapterError, match="trained for tiny"):
        adapter.apply(other)


def test_adapter_refuses_another_shape(
    adapter: Adapter, tiny_model: Callable[..., nn.Module]
) -> None:
    with pytest.raises(AdapterError, match="not tiny"):
        adapter.predictor(tiny_model(num_hidden_layers=1, **_SIZES))


def test_adapter_without_predictor_says_so(
    tmp_path: Path, base: nn.Module, trained: dict[str, mx.array]
) -> None:
    save_adapter(tmp_path / "a", base, trained, None, _MANIFEST)
    with pytest.raises(AdapterError, match="static mask"):
        load_adapter(tmp_path / "a").predictor(base)


def test_damaged_shard_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    shard = next((tmp_path / "adapter").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AdapterError, match="checksum"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 99}, "adapter format 99"),
        ({"shards": {"../x": ""}}, "leaves the folder"),
        ({"shards": 3}, "no readable adapter"),
        ({"base_model": None}, ""),
    ],
)
def test_bad_manifest_is_refused(
    adapter: Adapter, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "adapter" / "adapter.json"
    manifest = json.loads(path.read_text()) | change
    if change == {"base_model": None}:
        del manifest["base_model"]
        reason = "base_model"
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match=reason):
        load_adapter(tmp_path / "adapter")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no readable adapter"):
        load_adapter(tmp_path / "nothing")


def test_existing_folder_is_kept(
    adapter: Adapter, tmp_path: Path, base: nn.Module, trained: dict[str, mx.array]
) -> None:
    with pytest.raises(UsageError, match="exists"):
        save_adapter(tmp_path / "adapter", base, trained, None, _MANIFEST)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, base: nn.Module) -> None:
    with pytest.raises(AdapterError, match="does not fit the base"):
        save_adapter(tmp_path / "a", base, {"model.norm.weight": mx.zeros((3,))}, None, _MANIFEST)
    assert not (tmp_path / "a").exists()
