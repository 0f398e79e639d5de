"""GGUF files become checkpoints with the same values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten

from ifp_mlx.convert.checkpoint_writer import ShardWriter
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import ArchitectureError, CheckpointError, UsageError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.origin import read_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

GGUFFactory = Callable[..., Path]
ModelFactory = Callable[..., nn.Module]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"]
# One layer's FFN and attention in several kinds; K-quants need 256 columns.
MIXED = {
    "model.embed_tokens": Kind.Q8_0,
    "self_attn.q_proj": Kind.Q4_1,
    "self_attn.k_proj": Kind.Q8_0,
    "self_attn.v_proj": Kind.Q5_1,
    "self_attn.o_proj": Kind.F16,
    "mlp.gate_proj": Kind.Q4_0,
    "mlp.up_proj": Kind.BF16,
}
MESSAGES = [{"role": "user", "content": "12 naïve 你好"}]


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def reference_tensors(path: Path, names: list[str], config: dict[str, Any]) -> dict[str, Any]:
    """Read a GGUF file with the gguf package alone; loops put llama's rows back in order."""
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    name_map = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture),
        config["num_hidden_layers"],
    )
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    values = {}
    for name in names:
        tensor = by_name.pop(str(name_map.get_name(name, try_suffixes=(".weight", ".bias"))))
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        dense = dense.reshape([int(size) for size in tensor.shape][::-1])
        part = name.split(".")[-2]
        if architecture == "llama" and part in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
            head_dim = dense.shape[0] // heads
            ordered = np.empty_like(dense)
            for head in range(heads):
                for half in range(2):
                    for pair in range(head_dim // 2):
                        row = head * head_dim + half * head_dim // 2 + pair
                        ordered[row] = dense[head * head_dim + 2 * pair + half]
            dense = ordered
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            dense = dense - 1
        values[name] = dense
    assert not by_name, f"not converted: {list(by_name)}"
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_has_the_weights_that_were_written(
    tiny_gguf: GGUFFactory, tiny_model: ModelFactory, tmp_path: Path, family: str
) -> None:
    made = convert_checkpoint(tiny_gguf(family), tmp_path / "out", dtype=mx.float32)
    assert made.model_type == family
    loaded = arrays_of(load_model(made.path)[0])
    original = arrays_of(tiny_model(family, vocab_size=264))
    assert loaded.keys() == original.keys()
    for name in original:
        # Gemma's norms travel as 1 + weight in float32.
        assert mx.allclose(loaded[name], original[name], atol=2e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_config_gives_the_same_logits(
    tiny_gguf: GGUFFactory, tiny_model: ModelFactory, tmp_path: Path, family: str
) -> None:
    # GGUF does not say which layers of Gemma 3 look at everything: it always is each sixth.
    layers = {"num_hidden_layers": 7, "sliding_window_pattern": 6}
    sizes = layers if family == "gemma3_text" else {}
    path = tiny_gguf(family, **sizes)
    model, _ = load_model(convert_checkpoint(path, tmp_path / "out", dtype=mx.float32).path)
    tokens = mx.arange(3, 30)[None]  # longer than the sliding window
    expected = tiny_model(family, vocab_size=264, **sizes)(tokens)
    assert mx.allclose(model(tokens), expected, atol=1e-4)


@pytest.mark.parametrize("down", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0])
def test_converted_values_equal_an_independent_reading(
    tiny_gguf: GGUFFactory, tmp_path: Path, down: Kind
) -> None:
    path = tiny_gguf(kinds=MIXED | {"mlp.down_proj": down}, intermediate_size=256)
    made = convert_checkpoint(path, tmp_path / "out", dtype=mx.float32)
    model, config = load_model(made.path, mx.float32)
    loaded = arrays_of(model)
    reference = reference_tensors(path, list(loaded), config)
    for name, expected in reference.items():
        assert np.array_equal(np.array(loaded[name]), expected), name
        assert np.abs(expected).max() > 0, name


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_kinds_that_mlx_has_stay_packed(
    tiny_gguf: GGUFFactory, tmp_path: Path, kind: Kind, bits: int
) -> None:
    path = tiny_gguf("qwen2", kinds={"mlp.down_proj": kind, "self_attn.q_proj": Kind.Q8_0})
    model, config = load_model(convert_checkpoint(path, tmp_path / "out").path)
    down, query = model.layers[1].mlp.down_proj, model.layers[1].self_attn.q_proj
    assert (down.bits, down.group_size, query.bits) == (bits, 32, 8)
    assert isinstance(model.layers[1].mlp.up_proj, nn.Linear)
    assert config["quantization"]["group_size"] == 32


def test_half_precision_packed_values_are_exact_too(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    path = tiny_gguf(kinds={"mlp.up_proj": Kind.Q4_1})
    exact, _ = load_model(convert_checkpoint(path, tmp_path / "a", dtype=mx.float32).path)
    half, _ = load_model(convert_checkpoint(path, tmp_path / "b", dtype=mx.float16).path)
    for name in ("scales", "biases"):
        stored = half.layers[0].mlp.up_proj[name]
        assert stored.dtype == mx.float16
        assert mx.array_equal(stored.astype(mx.float32), exact.layers[0].mlp.up_proj[name])


def test_untied_output_and_weights_over_several_files(
    tiny_gguf: GGUFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardWriter, "shard_bytes", 60_000)
    path = tiny_gguf("qwen2", tie_word_embeddings=False)
    made = convert_checkpoint(path, tmp_path / "out")
    model, config = load_model(made.path)
    assert config["tie_word_embeddings"] is False
    assert "lm_head" in model
    assert len(list(made.path.glob("model-*-of-*.safetensors"))) > 2
    assert (made.path / "model.safetensors.index.json").exists()


def test_llama3_rope_scaling_is_recognised(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    head_dim, theta = 32, 500000.0
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "rope_theta": theta}
    divisors = []
    for pair in range(head_dim // 2):  # as Llama 3.1's reference code does, one at a time
        frequency = 1.0 / theta ** (2 * pair / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    factors = np.array(divisors, dtype=np.float32)
    path = append_tensor(tiny_gguf(**sizes), "rope_freqs.weight", factors)
    config = read_config(convert_checkpoint(path, tmp_path / "out").path).content
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 32.0
    other = append_tensor(tiny_gguf(name="b.gguf", **sizes), "rope_freqs.weight", factors * 2)
    with pytest.raises(CheckpointError, match="rope_freqs are not those of Llama 3"):
        convert_checkpoint(other, tmp_path / "other")


def append_tensor(path: Path, name: str, values: np.ndarray) -> Path:
    """Write the file again with one more tensor."""
    reader = gguf.GGUFReader(path)
    target = path.with_suffix(".more.gguf")
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", {"type": "linear", "rope_type": "linear", "factor": 4.0}),
        ("none", None),
    ],
)
def test_rope_scaling_of_the_metadata(
    tiny_gguf: GGUFFactory, tmp_path: Path, kind: str, expected: Any
) -> None:
    metadata = {"qwen2.rope.scaling.type": kind, "qwen2.rope.scaling.factor": 4.0}
    made = convert_checkpoint(tiny_gguf("qwen2", metadata=metadata), tmp_path / "out")
    assert read_config(made.path).content.get("rope_scaling") == expected


def test_conversion_brings_tokenizer_template_and_end_ids(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    made = convert_checkpoint(tiny_gguf(metadata={"general.license": "mit"}), tmp_path / "out")
    tokenizer = load_tokenizer(made.path)
    assert tokenizer.eos_token_ids == {2, 0}  # <|im_end|> and <|endoftext|>
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n12 naïve 你好<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    assert read_origin(made.path).licence == "mit"
    assert read_origin(made.path).source == "tiny.gguf"


# What cannot be converted


def test_unknown_pre_tokenizer_is_named(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    path = tiny_gguf(metadata={"tokenizer.ggml.pre": "brand-new"}, name="n.gguf")
    with pytest.raises(CheckpointError, match="has the pre-tokenizer 'brand-new'; known are: com"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ArchitectureError, match="architecture 'mamba'; GGUF files of these are"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.context_length": "long"}, "context_length is not one number"),
        ({"llama.attention.head_count": 0}, "attention.head_count is 0"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'; 'gpt2' and 'llama' can be rebuilt"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is no merge"),
        ({"tokenizer.ggml.merges": ["z q"]}, "merges do not fit its tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the same token twice"),
        ({"tokenizer.ggml.model": "llama"}, r"no tokenizer\.ggml\.scores"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_converted(
    tiny_gguf: GGUFFactory, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tiny_gguf(metadata=metadata), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_of_another_model_is_refused(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    path = append_tensor(tiny_gguf(), "blk.0.ssm_in.weight", np.ones((2, 32), dtype=np.float32))
    with pytest.raises(ArchitectureError, match=r"'blk\.0\.ssm_in\.weight'"):
        convert_checkpoint(path, tmp_path / "out")


def test_existing_target_is_kept(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert_checkpoint(tiny_gguf(), tmp_path / "out")
    convert_checkpoint(tiny_gguf(name="b.gguf"), tmp_path / "out", overwrite=True)
    assert read_config(tmp_path / "out").content["model_type"] == "llama"
