"""What would fit is said from a configuration alone, and is what the checkpoint itself takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from ifp_mlx.benchmarking.shapes import SHAPES
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.subnets import fits, memory
from ifp_mlx.subnets.fits import advice_before_fetching, skeleton, what_fits
from ifp_mlx.subnets.memory import checkpoint_sizes, model_sizes
from ifp_mlx.units.model_config import ModelConfig

CheckpointFactory = Callable[..., Path]
QWEN = SHAPES["qwen3-30b-a3b"].config
AT_4_BITS = {"quantization": {"bits": 4, "group_size": 64}}


def config(content: dict[str, Any]) -> ModelConfig:
    return ModelConfig.parse({"torch_dtype": "bfloat16", **content}, "config.json")


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine_memory_bytes", lambda: 64 * 10**9)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe"])
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_a_configuration_says_what_the_checkpoint_takes(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, family: str, mode: str | None
) -> None:
    path = tiny_checkpoint(family, hidden_size=64)
    if mode is not None:
        quantize_checkpoint(path, tmp_path / "packed", make_quantization(mode=mode, group_size=32))
        path = tmp_path / "packed"
    known = read_config(path)
    content = json.loads((path / "config.json").read_text())
    model = skeleton(known, content.get("quantization"), mx.float32)
    assert isinstance(model, nn.Module)
    assert model_sizes(model, known) == checkpoint_sizes(path)


def test_a_large_mixture_is_sized_in_no_memory() -> None:
    before = mx.get_active_memory()
    (line,) = advice_before_fetching(config(QWEN | AT_4_BITS), limit_bytes=11_500_000_000)
    assert line.startswith("17.2 GB, 128 experts, does not fit in 11.5 GB; 75 % 13.1 GB ")
    assert line.endswith("; 50 % 9.0 GB fits")
    assert mx.get_active_memory() - before < 10**6


def test_what_never_fits_is_sized_at_4_bits_too() -> None:
    plain, packed = advice_before_fetching(config(QWEN), limit_bytes=16_000_000_000)
    assert plain.startswith("61.1 GB, 128 experts, does not fit in 16.0 GB; 75 % 46.6 GB does not")
    assert packed.startswith("at 4 bits: 17.2 GB")
    assert "75 % 13.1 GB fits" in packed


def test_what_fits_whole_is_one_short_line() -> None:
    assert advice_before_fetching(config(QWEN | AT_4_BITS)) == ["17.2 GB, 128 experts, fits"]


def test_published_gpt_oss_is_packed_in_its_experts_alone() -> None:
    published = config(
        {
            "model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32,
            "num_experts_per_tok": 4, "vocab_size": 201088, "hidden_size": 2880,
            "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "sliding_window": 128, "rope_theta": 150000,
            "rms_norm_eps": 1e-5, "layer_types": ["sliding_attention", "full_attention"] * 12,
            "quantization_config": {"quant_method": "mxfp4"},
        }
    )  # fmt: skip
    (line,) = advice_before_fetching(published)
    assert line == "13.8 GB, 32 experts, fits"  # as its files on the hub


def test_another_librarys_packing_says_nothing() -> None:
    content = QWEN | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert advice_before_fetching(config(content)) == []


def test_a_configuration_that_makes_no_model_says_nothing() -> None:
    assert (
        advice_before_fetching(config(QWEN | {"head_dim": None, "num_experts_per_tok": []})) == []
    )


def test_amounts_that_fit_are_those_whose_peak_does(tiny_checkpoint: CheckpointFactory) -> None:
    sizes = checkpoint_sizes(tiny_checkpoint("qwen3_moe"))
    limit = sizes.predict(6, fits.CONTEXT_TOKENS).total_bytes
    found = what_fits(sizes, limit_bytes=limit)
    assert [fit.num_kept_units for fit in (found.whole, *found.parts)] == [8, 6, 4]
    assert [fit.fits for fit in (found.whole, *found.parts)] == [False, True, True]
    assert not what_fits(sizes, limit_bytes=1000).any_fits
