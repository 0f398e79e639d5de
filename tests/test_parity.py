"""Models that transformers made give the same logits after conversion, and mixtures after a cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.storage.weights import load_model

torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
pytestmark = pytest.mark.parity

# Two float32 implementations of the same sums; logits are of order 1.
TOLERANCE = 2e-5
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A rotary base that is nobody's default: losing it must show.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }
}  # fmt: skip
_SCALED = {"rope_theta": 500.0, "factor": 4.0}
_YARN = {**_SCALED, "rope_type": "yarn", "original_max_position_embeddings": 32}
# Longer texts than the original length, so that the long factors count.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {**_SCALED, "rope_type": "linear"}}),
    "linear, qwen2": ("qwen2", {"rope_parameters": {**_SCALED, "rope_type": "linear"}}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {**_SCALED, "rope_type": "dynamic"},
        },
    ),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "yarn with betas": (
        "qwen3",
        {"head_dim": 16, "rope_parameters": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": 32, "rope_parameters": _LONGROPE},
    ),
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, **ROPE}),
    "llama untied, biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, **ROPE},
    ),
    "llama 3.1": ("llama", {"tie_word_embeddings": True, **LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None, **ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, **ROPE}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False, **ROPE}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 64, **ROPE},
    ),
    "phi3": ("phi3", {"tie_word_embeddings": False, **ROPE}),
}

NUM_EXPERTS = 8
# No width is another's: a swapped pair of axes must fail.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
            "norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [1], **ROPE,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, **ROPE}),
    "mixtral": ("mixtral", {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, **ROPE}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "head_dim": 16,
            "intermediate_size": 96, "sliding_window": 16,
            # The published models are not truncated, but mlx-lm and llama.cpp truncate theirs.
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": 32,
            },
        },
    ),
}  # fmt: skip


def write_transformers_model(
    folder: Path, family: str, changes: dict[str, Any], write_tokenizer: Callable[[Path], None]
) -> Any:
    """Write a tiny random transformers model with its own code; return the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models have zero biases and unit norms, which would hide mix-ups.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "gpt_oss":
        pack_experts(folder, model)
    write_tokenizer(folder)
    return model


def pack_experts(folder: Path, model: Any) -> None:
    """Pack the experts of a GPT-OSS model and its checkpoint as OpenAI publishes them, in MXFP4.

    transformers writes them unpacked, which mlx-lm cannot read. The model gets the rounded values,
    as transformers itself unpacks them.
    """
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            rows = mx.array(parameter.detach().transpose(1, 2).contiguous().numpy())
            words, scales, *_ = mx.quantize(rows, group_size=32, bits=4, mode="mxfp4")
            packed = np.array(words).view(np.uint8)
            blocks = torch.tensor(packed.reshape(*scales.shape, -1))  # (E, rows, groups, bytes)
            exponents = torch.tensor(np.array(scales))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
            del tensors[name]
            values = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
            parameter.data.copy_(values)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(content))


def assert_same_logits(model: Any, original: Any) -> None:
    ids = np.random.default_rng(1).integers(3, 264, (2, 40))
    with torch.no_grad():
        expected = original(torch.tensor(ids)).logits.float().numpy()
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.abs(expected).max() > 0.3
    assert np.abs(logits - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("family", "changes"),
    (MODELS | ROPES | MIXTURES).values(),
    ids=[*MODELS, *ROPES, *MIXTURES],
)
def test_converted_logits_equal_transformers(
    tmp_path: Path,
    write_tokenizer: Callable[[Path], None],
    family: str,
    changes: dict[str, Any],
) -> None:
    original = write_transformers_model(tmp_path / "hf", family, changes, write_tokenizer)
    made = convert_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert_same_logits(load_model(made.path)[0], original)


@pytest.mark.parametrize(("family", "changes"), MIXTURES.values(), ids=MIXTURES)
def test_half_of_the_experts_equals_transformers_without_the_others(
    tmp_path: Path,
    write_tokenizer: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
) -> None:
    original = write_transformers_model(tmp_path / "hf", family, changes, write_tokenizer)
    made = convert_checkpoint(tmp_path / "hf", tmp_path / "out")
    model, _ = load_model(made.path)
    selection = select_random(model, NUM_EXPERTS // 2, seed=5)
    routers = [
        parameter
        for name, parameter in original.named_parameters()
        if name.endswith((".gate.weight", ".router.weight"))
    ]
    lost = [torch.tensor(row == 0) for row in np.array(selection.pick.mask())]
    linear = torch.nn.functional.linear

    def without_experts(x: Any, weight: Any, bias: Any = None) -> Any:
        """Every family's router calls ``linear`` with its own weight, before it chooses."""
        logits = linear(x, weight, bias)
        for router, mask in zip(routers, lost, strict=True):
            if weight is router:
                logits = logits.masked_fill(mask, -torch.inf)
        return logits

    compact = slice_model(model, selection)
    with pytest.raises(AssertionError):  # the others counted for something
        assert_same_logits(compact, original)
    monkeypatch.setattr(torch.nn.functional, "linear", without_experts)
    assert_same_logits(compact, original)
