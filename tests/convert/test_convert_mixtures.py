"""Mixtures from the hub: experts are stacked while they are written, and what is wrong is said."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.convert.checkpoint_writer import ShardWriter
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.errors import ArchitectureError, CheckpointError, IFPError
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.storage.weights import load_model, stored_tensors
from ifp_mlx.units.modules import named_arrays
from tests.convert.mixtures import Weights, one_tensor_an_expert

CheckpointFactory = Callable[..., Path]
UP = "model.layers.0.mlp.experts.3.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
KEPT = 4


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe"])
def test_experts_are_stacked(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    expected = named_arrays(load_model(tiny_checkpoint(family, "stacked"))[0])
    source = one_tensor_an_expert(tiny_checkpoint(family, "apart"))
    assert any(".experts.7." in name for name in stored_tensors(source))
    made = convert_checkpoint(source, tmp_path / "made")
    assert not any(".experts.7." in name for name in stored_tensors(made.path))
    found = named_arrays(load_model(made.path)[0])
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], array) for name, array in expected.items())


def test_experts_are_stacked_and_quantized_at_once(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    packing = make_quantization(group_size=32)
    stacked = tiny_checkpoint("qwen3_moe", "stacked")
    expected = quantize_checkpoint(stacked, tmp_path / "expected", packing).path
    source = one_tensor_an_expert(tiny_checkpoint("qwen3_moe", "apart"))
    made = convert_checkpoint(source, tmp_path / "made", quantization=packing).path
    found = named_arrays(load_model(made)[0])
    for name, array in named_arrays(load_model(expected)[0]).items():
        assert mx.array_equal(found[name], array), name


@pytest.mark.parametrize("bits", [None, 4])
def test_converting_holds_a_shard_and_a_layer(
    tiny_checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
) -> None:
    """Of eight layers of 3 MB; the default shard of 1 GB would hold them all."""
    sizes = {"num_hidden_layers": 8, "num_experts": 32, "hidden_size": 128}
    source = one_tensor_an_expert(tiny_checkpoint("qwen3_moe", **sizes))
    tensors = stored_tensors(source)
    layer = sum(t.num_bytes for name, t in tensors.items() if name.startswith("model.layers.0."))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    assert total > 7 * layer
    monkeypatch.setattr(ShardWriter, "shard_bytes", 10**6)
    packing = None if bits is None else make_quantization(bits=bits, group_size=32)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_checkpoint(source, tmp_path / "made", quantization=packing)
    assert mx.get_peak_memory() - before < 2 * layer


def test_a_sub_network_of_experts_that_are_apart(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    stacked = tiny_checkpoint("qwen3_moe", "stacked")
    selection = select_random(load_model(stacked)[0], KEPT, seed=3)
    apart = one_tensor_an_expert(tiny_checkpoint("qwen3_moe", "apart"))
    tokens = mx.array([[3, 14, 15, 9, 26, 5]])
    expected = load_subnetwork(stacked, selection).model(tokens)
    assert mx.array_equal(load_subnetwork(apart, selection).model(tokens), expected)


def _without_one_matrix(weights: Weights) -> None:
    del weights[UP]


def _without_an_expert(weights: Weights) -> None:
    for name in [name for name in weights if ".layers.2.mlp.experts.7." in name]:
        del weights[name]


def _with_one_expert_too_many(weights: Weights) -> None:
    weights[UP.replace("experts.3", "experts.8")] = weights[UP]


def _with_another_shape(weights: Weights) -> None:
    weights[UP] = mx.zeros((5, 32))


def _with_another_router(weights: Weights) -> None:
    weights[ROUTER.replace("gate", "router")] = weights.pop(ROUTER)


def _with_a_router_for_fewer(weights: Weights) -> None:
    weights[ROUTER] = mx.array(weights[ROUTER][:6])


def _with_nan(weights: Weights) -> None:
    weights[UP] = weights[UP] * mx.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_one_matrix, f"the weights lack {UP}"),
        (_without_an_expert, "the weights lack model.layers.2.mlp.experts.7."),
        (_with_one_expert_too_many, "no place for, 1 tensor: model.layers.0.mlp.experts.8.up_proj"),
        (_with_another_shape, "All arrays must have the same shape"),
        (_with_another_router, "no place for, 1 tensor: model.layers.0.mlp.router.weight"),
        (_with_a_router_for_fewer, rf"\(8, 32\) but received shape \(6, 32\) .* {ROUTER}"),
        (_with_nan, "mlp.switch_mlp.up_proj.weight holds values that are not numbers"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_") or "",
)
def test_a_damaged_mixture_is_refused_in_one_line(
    tiny_checkpoint: CheckpointFactory,
    tmp_path: Path,
    change: Callable[[Weights], None],
    message: str,
) -> None:
    source = one_tensor_an_expert(tiny_checkpoint("qwen3_moe"), change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_checkpoint(source, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", ["cut off", "wrong header"])
def test_a_damaged_file_of_experts_is_refused(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, damage: str
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    selection = select_random(load_model(source)[0], KEPT)
    file = source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1000] if damage == "cut off" else b"\xff" * 64 + content[64:])
    for operation in (
        lambda: load_subnetwork(source, selection),
        lambda: convert_checkpoint(source, tmp_path / "made"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            operation()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("family", ["llama4", "hunyuan", "longcat_flash", "dbrx", "phixtral"])
def test_mixtures_that_are_left_out_are_refused_by_name(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": family}))
    with pytest.raises(ArchitectureError, match=f"model_type '{family}' is not supported"):
        convert_checkpoint(source, tmp_path / "made")


def test_transformers_5_calls_the_number_of_experts_otherwise(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = one_tensor_an_expert(tiny_checkpoint("qwen3_moe"))
    config = json.loads((source / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    (source / "config.json").write_text(json.dumps(config))
    made = convert_checkpoint(source, tmp_path / "made").path
    written = json.loads((made / "config.json").read_text())  # as mlx-lm reads it
    assert written["num_experts"] == 8
    assert "num_local_experts" not in written


@pytest.mark.parametrize("count", [0, -8, "8", None, 6])
def test_a_wrong_number_of_experts_is_refused(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, count: object
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_experts": count}))
    with pytest.raises(IFPError, match=r"num_experts|Expected shape"):
        convert_checkpoint(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()
