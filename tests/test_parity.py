"""Models that transformers made give the same logits after conversion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.convert.conversion import convert_checkpoint
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


def write_transformers_model(
    folder: Path, family: str, changes: dict[str, Any], write_tokenizer: Callable[[Path], None]
) -> Any:
    """Write a tiny random transformers model with its own code; return the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **SIZES, **changes)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models have zero biases and unit norms, which would hide mix-ups.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_converted_logits_equal_transformers(
    tmp_path: Path,
    write_tokenizer: Callable[[Path], None],
    family: str,
    changes: dict[str, Any],
) -> None:
    original = write_transformers_model(tmp_path / "hf", family, changes, write_tokenizer)
    made = convert_checkpoint(tmp_path / "hf", tmp_path / "out")
    model, _ = load_model(made.path)
    ids = np.random.default_rng(1).integers(3, 264, (2, 40))
    with torch.no_grad():
        expected = original(torch.tensor(ids)).logits.float().numpy()
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.abs(expected).max() > 0.3
    assert np.abs(logits - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())
