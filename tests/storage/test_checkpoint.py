"""Reading checkpoints: weights, tokenizer, rotary settings, identity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.errors import CheckpointError, IFPError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.identity import fingerprint
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]
TOKENS = mx.array([[3, 60, 5, 41]])


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def test_load_model_gives_the_weights_as_stored(
    tiny_checkpoint: CheckpointFactory, tiny_model: Callable[..., Any]
) -> None:
    folder = tiny_checkpoint("qwen2")
    model, config = load_model(folder)
    expected = mx.load(str(folder / "model.safetensors"))
    assert isinstance(expected, dict)
    loaded = arrays_of(model)
    assert loaded.keys() == expected.keys()
    assert all(mx.array_equal(loaded[name], expected[name]) for name in expected)
    assert config["model_type"] == "qwen2"
    assert not model.training


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_load_model_casts(tiny_checkpoint: CheckpointFactory, dtype: mx.Dtype) -> None:
    model, _ = load_model(tiny_checkpoint(), dtype)
    assert {array.dtype for array in arrays_of(model).values()} == {dtype}


def test_load_model_dequantizes_when_a_type_is_asked_for(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = load_model(tiny_checkpoint())
    quantized, config = quantize_model(model, config, group_size=32, bits=4)
    expected = quantized(TOKENS)
    packed = tmp_path / "packed"
    save_model(packed, quantized)
    save_config(config, packed / "config.json")
    kept, kept_config = load_model(packed)
    dense, dense_config = load_model(packed, mx.float32)
    assert mx.array_equal(kept(TOKENS), expected)
    assert "quantization" in kept_config
    assert not any(key.startswith("quantization") for key in dense_config)
    assert {array.dtype for array in arrays_of(dense).values()} == {mx.float32}
    assert mx.allclose(dense(TOKENS), expected, atol=1e-4)


def test_auto_type_is_float32_on_the_cpu(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves, {"format": "mlx"})
    model, _ = load_model(folder, "auto")
    expected = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert model.model.norm.weight.dtype == expected


def test_load_tokenizer_knows_template_and_end_ids(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == {2, 0}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_load_tokenizer_without_tokenizer_is_one_line(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_values_not_files(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    whole = fingerprint(folder)
    assert len(whole) == 64
    assert fingerprint(folder) == whole
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[:5], sorted(weights)[5:]), 1):
        part = {name: weights[name] for name in names}
        mx.save_safetensors(str(folder / f"model-{number}.safetensors"), part)
    edit_config(folder, torch_dtype="float32")
    assert fingerprint(folder) == whole


def test_fingerprint_changes_with_config_and_with_weights(
    tiny_checkpoint: CheckpointFactory,
    edit_config: EditConfig,
) -> None:
    folder = tiny_checkpoint()
    seen = {fingerprint(folder)}
    edit_config(folder, rope_theta=5000.0)
    seen.add(fingerprint(folder))
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    seen.add(fingerprint(folder))
    assert len(seen) == 3


def test_fingerprint_of_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(IFPError, match=r"has no config\.json"):
        fingerprint(tmp_path)


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base": ("llama", {"rope_type": "default", "rope_theta": 300.0}, {"rope_theta": 300.0}),
    "scaled": (
        "qwen2",
        {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "partial": (
        "stablelm",
        {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
        {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
    ),
    "two kinds of layers": (
        "gemma3_text",
        {"sliding_attention": {"rope_theta": 20.0}, "full_attention": {"rope_theta": 300.0}},
        {"rope_theta": 300.0, "rope_local_base_freq": 20.0},
    ),
}


@pytest.mark.parametrize(("family", "nested", "flat"), ROPES.values(), ids=ROPES)
def test_rope_parameters_of_transformers_5_are_read(
    tiny_checkpoint: CheckpointFactory,
    edit_config: EditConfig,
    family: str,
    nested: dict[str, Any],
    flat: dict[str, Any],
) -> None:
    removed = dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), ...)
    new = tiny_checkpoint(family, "new")
    edit_config(new, **removed, rope_parameters=nested)
    old = tiny_checkpoint(family, "old")
    edit_config(old, **flat)
    plain = tiny_checkpoint(family, "plain")
    expected = load_model(old)[0](TOKENS)
    assert mx.array_equal(load_model(new)[0](TOKENS), expected)
    assert not mx.allclose(load_model(plain)[0](TOKENS), expected, atol=1e-4)
    assert read_config(new).content["rope_theta"] == 300.0
