import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from ifp_mlx.cli.app import make_app
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.gguf_export import export_gguf
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.errors import ArchitectureError, CheckpointError, UsageError
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

Factory = Callable[..., Path]
TOKENS = mx.arange(3, 30)[None]


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


@pytest.fixture
def converted(tiny_gguf: Factory, tmp_path: Path) -> Callable[..., Path]:
    """Return a factory: family -> a converted checkpoint, tokenizer with merges and all."""

    def make(family: str = "llama", **changes: Any) -> Path:
        path = tiny_gguf(family, **changes)
        return convert_checkpoint(path, tmp_path / "source", dtype=mx.float32).path

    return make


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {
        "num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), FAMILIES.items(), ids=FAMILIES)
def test_exported_gguf_converts_back_to_the_same_model(
    converted: Factory, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    source = converted(family, **changes)
    size = export_gguf(source, tmp_path / "out.gguf", "f32")
    assert size == (tmp_path / "out.gguf").stat().st_size
    again = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back", dtype=mx.float32).path
    expected, actual = arrays_of(load_model(source)[0]), arrays_of(load_model(again)[0])
    assert expected.keys() == actual.keys()
    for name in expected:
        # Gemma's norms travel as 1 + weight in float32.
        assert mx.allclose(actual[name], expected[name], atol=2e-7, rtol=0), name
    assert mx.allclose(load_model(again)[0](TOKENS), load_model(source)[0](TOKENS), atol=1e-4)


def test_exported_tokenizer_is_the_same(converted: Factory, tmp_path: Path) -> None:
    source = converted()
    export_gguf(source, tmp_path / "out.gguf")
    again = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back").path
    ours, back = load_tokenizer(source), load_tokenizer(again)
    for text in ("abab 1212 <|im_end|>ß", "  x\n\n", "漢字 12ab"):
        assert back.encode(text) == ours.encode(text)
    assert back.chat_template == ours.chat_template
    assert back.eos_token_ids == ours.eos_token_ids


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_exported_kinds_are_those_of_the_gguf_package(
    converted: Factory, tmp_path: Path, kind: str
) -> None:
    source = converted("qwen2")
    export_gguf(source, tmp_path / "out.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = tensors["blk.1.ffn_down.weight"]
    weights = arrays_of(load_model(source)[0])
    values = np.array(weights["model.layers.1.mlp.down_proj.weight"])
    expected = gguf.quants.quantize(values, down.tensor_type)
    assert down.tensor_type.name.lower() == kind
    assert np.array_equal(np.array(down.data).view(np.uint8), expected.view(np.uint8))
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_packed_checkpoints_are_written_dequantized(converted: Factory, tmp_path: Path) -> None:
    packed = quantize_checkpoint(
        converted(), tmp_path / "packed", make_quantization(bits=4, group_size=32)
    ).path
    export_gguf(packed, tmp_path / "out.gguf", "f32")
    back = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back", dtype=mx.float32).path
    expected = arrays_of(load_model(packed, mx.float32)[0])
    actual = arrays_of(load_model(back)[0])
    assert all(mx.array_equal(actual[name], expected[name]) for name in expected)


def test_llama3_rope_survives(converted: Factory, tmp_path: Path) -> None:
    source = converted(num_attention_heads=1, num_key_value_heads=1)
    config = json.loads((source / "config.json").read_text())
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    changed = config | {"rope_theta": 500000.0, "rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(changed))
    export_gguf(source, tmp_path / "out.gguf")
    back = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back").path
    assert json.loads((back / "config.json").read_text())["rope_scaling"] == scaling


def test_what_cannot_be_written_is_refused(
    tiny_checkpoint: Factory, converted: Factory, tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(ArchitectureError, match="phi3 models cannot be written as GGUF; these"):
        export_gguf(tiny_checkpoint("phi3", "phi3"), target)
    source = converted()
    with pytest.raises(UsageError, match="there is no GGUF type 'q2'; there are: f32"):
        export_gguf(source, target, "q2")
    config = json.loads((source / "config.json").read_text())
    scaled = config | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (source / "config.json").write_text(json.dumps(scaled))
    with pytest.raises(ArchitectureError, match="rope scaling 'dynamic' cannot be written"):
        export_gguf(source, target)
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    other = tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}
    (source / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"has a pre-tokenizer that llama\.cpp has no name"):
        export_gguf(source, target)
    other = tokenizer | {"model": tokenizer["model"] | {"byte_fallback": True}}
    (source / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="is not a byte-level BPE tokenizer"):
        export_gguf(source, target)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export_gguf(source, target)
    assert not target.exists()


def test_existing_file_is_kept(converted: Factory, tmp_path: Path) -> None:
    source = converted()
    target = tmp_path / "out.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        export_gguf(source, target)
    assert target.read_bytes() == b"mine"
    export_gguf(source, target, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_export_command_writes_gguf(
    converted: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))
    arguments = [
        "export", "--model", str(converted()), "-o", str(tmp_path / "out"), "--task", "sums",
        "--selector", "random", "--keep-units", "64", "--gguf", str(tmp_path / "out.gguf"),
        "--gguf-type", "f32",
    ]  # fmt: skip
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    back = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back", dtype=mx.float32).path
    expected = load_model(tmp_path / "out")[0](TOKENS)
    assert mx.allclose(load_model(back)[0](TOKENS), expected, atol=1e-4)
