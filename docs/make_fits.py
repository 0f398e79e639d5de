"""README.md's table of what fits on which Mac; make_readme.py writes it.

Sizes come from the published configurations of the models and the product's own prediction, as
``ifp doctor`` and ``ifp pull`` use it: nothing is downloaded or loaded.
"""

from typing import Any
from unittest import mock

import mlx.core as mx

from ifp_mlx.benchmarking.shapes import SHAPES
from ifp_mlx.subnets import memory
from ifp_mlx.subnets.fits import CONTEXT_TOKENS, skeleton
from ifp_mlx.units.model_config import ModelConfig

MACS = (8, 16, 24, 32)
LENT = 2 / 3  # of the memory of a Mac with up to 36 GB, to the GPU

FOUR_BITS = {"bits": 4, "group_size": 64, "mode": "affine"}
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 201088,
    "sliding_window": 128,
    "rope_theta": 150000,
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3-30B-A3B, 4 bits": (SHAPES["qwen3-30b-a3b"].config, FOUR_BITS),
    "gpt-oss-20b, MXFP4": (GPT_OSS_20B, {"quant_method": "mxfp4"}),
    "Qwen3-8B, 4 bits": (QWEN3_8B, FOUR_BITS),
    "Llama-3.1-8B, 4 bits": (SHAPES["llama-3.1-8b"].config, FOUR_BITS),
}


def cell(sizes: memory.CheckpointSizes, num_gigabytes: int) -> str:
    """Return what of a model fits on a Mac: all of it, so many units of each layer, or nothing."""
    available = int(num_gigabytes * 2**30 * LENT)
    kept = sizes.largest_k_that_fits(CONTEXT_TOKENS, available)
    if kept is None:
        return "no"
    amounts = sizes.amounts
    if kept == amounts.num_units:
        return "whole"
    share = kept / amounts.num_units
    gigabytes = sizes.predict(kept, CONTEXT_TOKENS).weights_bytes / 1e9
    return f"{share:.0%} of the {amounts.label}, {gigabytes:.1f} GB".replace("%", " %")


def table() -> str:
    """Return the table as Markdown."""
    # As on a Mac, where attention is one kernel and its scores never exist in memory.
    with mock.patch.object(memory.mx, "default_device", return_value=mx.gpu):
        return "\n".join(_lines()) + "\n"


def _lines() -> list[str]:
    lines = ["| | weights | " + " | ".join(f"{size} GB Mac" for size in MACS) + " |"]
    lines.append("|---" * (len(MACS) + 2) + "|")
    for name, (content, packing) in MODELS.items():
        config = ModelConfig.parse(content, name)
        model = skeleton(config, packing)
        assert model is not None
        sizes = memory.model_sizes(model, config)
        cells = [name, f"{sizes.dense_bytes / 1e9:.1f} GB", *(cell(sizes, mac) for mac in MACS)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
