"""GGUF metadata of the real world: unset ids, empty tokens, every form of rope scaling, parts."""

import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.gguf_export import export_gguf
from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.errors import CheckpointError, IFPError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

GGUFFactory = Callable[..., Path]
EditConfig = Callable[..., None]
TOKENS = mx.array([[3, 60, 5, 41, 7, 9]])
UNSET = 0xFFFFFFFF
NUM_MUTATIONS = int(os.environ.get("IFP_TEST_MUTATIONS", "150"))


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("value", [UNSET, 264, 4000, -1, 2.0, True, "2"], ids=str)
@pytest.mark.parametrize("key", ["eos", "bos", "unknown", "padding", "eot"])
def test_special_ids_that_are_no_tokens_are_warned_about_and_dropped(
    tiny_gguf: GGUFFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key: str,
    value: Any,
) -> None:
    path = rewritten(tiny_gguf(), {f"tokenizer.ggml.{key}_token_id": value})
    with caplog.at_level(logging.WARNING, logger="ifp_mlx"):
        made = convert_checkpoint(path, tmp_path / "out")
    (message,) = messages_of(caplog)
    assert f"tokenizer.ggml.{key}_token_id is {value}, not one of 264 tokens; it is" in message
    tokenizer = load_tokenizer(made.path)
    assert tokenizer.eos_token_ids == {0, 2}  # by the names of the tokens, whatever the file says
    assert tokenizer.bos_token == (None if key == "bos" else "<|im_start|>")


def rewritten(path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """Replace metadata of a GGUF file, and add tensors; ``...`` removes a key."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], kind)
    for key, value in changes.items():
        if value is not ...:
            kind = gguf.GGUFValueType.get_type(value)
            is_wide = type(value) is int and value >= 2**31
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if is_wide else kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".new").replace(path)


def test_empty_tokens_are_warned_about_and_dropped(
    tiny_gguf: GGUFFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_gguf()
    tokens = GGUFFile(path).metadata["tokenizer.ggml.tokens"]
    rewritten(path, {"tokenizer.ggml.tokens": [*tokens[:-3], "", "", ""]})
    with caplog.at_level(logging.WARNING, logger="ifp_mlx"):
        made = convert_checkpoint(path, tmp_path / "out")
    assert "3 tokens of its vocabulary are empty; they are left out" in messages_of(caplog)[0]
    text = "Add 1 and 12: ä 😀"
    tokenizer = load_tokenizer(made.path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    export_gguf(made.path, tmp_path / "back.gguf", "f32")
    back = GGUFFile(tmp_path / "back.gguf").metadata["tokenizer.ggml.tokens"]
    assert back == [*tokens[:-3], "[PAD0]", "[PAD1]", "[PAD2]"]


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
LINEAR = {"type": "linear", "factor": 4.0}
YARN_64 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, LINEAR,
    ),
    "factor alone": ({"llama.rope.scaling.factor": 4.0}, LINEAR),
    "legacy": ({"llama.rope.scale_linear": 4.0}, LINEAR),
    "legacy, 1": ({"llama.rope.scale_linear": 1.0}, None),
    "none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    "linear without factor": ({"llama.rope.scaling.type": "linear"}, None),
    "yarn": ({**YARN, "llama.rope.scaling.original_context_length": 64}, YARN_64),
    "yarn of its context": ({**YARN, "llama.context_length": 64}, YARN_64),
    "yarn with betas": (
        {
            **YARN, "llama.rope.scaling.original_context_length": 64,
            "llama.rope.scaling.yarn_beta_fast": 16.0, "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
        {**YARN_64, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "scaling"), SCALINGS.values(), ids=SCALINGS)
def test_every_form_of_rope_scaling_is_applied(
    tiny_gguf: GGUFFactory,
    edit_config: EditConfig,
    tmp_path: Path,
    metadata: dict[str, Any],
    scaling: dict[str, Any] | None,
) -> None:
    plain = convert_checkpoint(tiny_gguf(name="plain.gguf"), tmp_path / "plain").path
    unscaled = load_model(plain)[0](TOKENS)
    if scaling is not None:
        edit_config(plain, rope_scaling=scaling)
    expected = load_model(plain)[0](TOKENS)
    made = convert_checkpoint(rewritten(tiny_gguf(), metadata), tmp_path / "out").path
    assert mx.array_equal(load_model(made)[0](TOKENS), expected)
    assert (scaling is None) == bool(mx.allclose(unscaled, expected, atol=1e-4).item())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.rope.scaling.factor": -2.0}, "rope scaling 'linear' by -2"),
        ({"llama.rope.dimension_count": 4}, "positions in 4 of 8 values of a head"),
        ({**YARN, "llama.rope.scaling.attn_factor": 1.3}, "rope scaling with attn_factor"),
        ({**YARN, "llama.rope.scaling.yarn_ext_factor": 0.5}, "rope scaling with yarn_ext_factor"),
        ({**YARN, "llama.rope.scaling.yarn_log_multiplier": 0.1}, "with yarn_log_multiplier"),
    ],
    ids=str,
)
def test_rope_scaling_that_cannot_be_said_is_refused(
    tiny_gguf: GGUFFactory, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.* it cannot be converted"):
        convert_checkpoint(rewritten(tiny_gguf(), metadata), tmp_path / "out")


def llama3_factors(factor: float = 8.0) -> np.ndarray[Any, Any]:
    """Return Llama 3's divisors for heads of 8 values, computed as its reference code does."""
    divisors = []
    for exponent in range(0, 8, 2):
        wavelength = 2 * np.pi * 500_000.0 ** (exponent / 8)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rope_factors_are_read_as_what_they_are(
    tiny_gguf: GGUFFactory, tmp_path: Path, dtype: type[np.floating[Any]]
) -> None:
    factors = {"rope_freqs.weight": llama3_factors().astype(dtype)}
    path = rewritten(tiny_gguf(), {"llama.rope.freq_base": 500_000.0}, factors)
    made = convert_checkpoint(path, tmp_path / "out").path
    scaling = read_config(made).content["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)


@pytest.mark.parametrize("factors", [[1, 2, 3, 4], [np.nan] * 4, [0] * 4, [np.inf] * 4, [8] * 3])
def test_rope_factors_of_another_kind_are_refused(
    tiny_gguf: GGUFFactory, tmp_path: Path, factors: list[float]
) -> None:
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    path = rewritten(tiny_gguf(), {"llama.rope.freq_base": 500_000.0}, tensors)
    with pytest.raises(CheckpointError, match="its rope_freqs are not those of Llama 3"):
        convert_checkpoint(path, tmp_path / "out")


def test_rope_factors_along_with_a_scaling_are_refused(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    factors = {"rope_freqs.weight": llama3_factors()}
    path = rewritten(tiny_gguf(), {"llama.rope.scaling.factor": 4.0}, factors)
    with pytest.raises(CheckpointError, match="'linear' along with rope_freqs"):
        convert_checkpoint(path, tmp_path / "out")


NO_MODELS = {
    "m.gguf": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "e.gguf": (b"", "is empty; download it again"),
    "w.gguf": (b"<!DOCTYPE html><html>", "is a web page, not the file itself"),
    "o.gguf": (b"tjgg" + bytes(60), "from before GGUF; get a GGUF file"),
    "sha256-" + "0" * 64: (b'{"model_format":"gguf"}', "a blob of Ollama's, but not the one with"),
    "m.gguf.part2of3": (b"\x01" * 64, "is not a GGUF file; join the pieces of a file"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    content, message = NO_MODELS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / name, tmp_path / "out")


def test_a_blob_of_ollama_that_is_a_model_is_converted(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    blob = tiny_gguf().rename(tmp_path / ("sha256-" + "0" * 64))
    assert convert_checkpoint(blob, tmp_path / "out").model_type == "llama"


def test_an_lfs_pointer_is_called_so_in_a_folder_too(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer"):
        load_model(folder)


def split(path: Path, count: int, *, says_so: bool = True) -> list[Path]:
    """Write a GGUF file in parts, as llama.cpp's gguf-split does, and remove it."""
    reader, parts = gguf.GGUFReader(path), []
    tensors = list(reader.tensors)
    for number in range(count):
        parts.append(path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf"))
        writer = gguf.GGUFWriter(parts[-1], "llama")
        for key, field in reader.fields.items() if number == 0 or not says_so else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], kind)
        if says_so:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return parts


@pytest.mark.parametrize("says_so", [True, False], ids=["split.count", "names alone"])
@pytest.mark.parametrize("named", [0, 2])
def test_all_parts_are_read_whichever_is_named(
    tiny_gguf: GGUFFactory, tmp_path: Path, says_so: bool, named: int
) -> None:
    expected = load_model(convert_checkpoint(tiny_gguf(), tmp_path / "whole").path)[0](TOKENS)
    parts = split(tiny_gguf(), 3, says_so=says_so)
    made = convert_checkpoint(parts[named], tmp_path / "out").path
    assert mx.array_equal(load_model(made)[0](TOKENS), expected)


@pytest.mark.parametrize("says_so", [True, False], ids=["split.count", "names alone"])
def test_missing_parts_are_refused_by_name_and_count(
    tiny_gguf: GGUFFactory, tmp_path: Path, says_so: bool
) -> None:
    parts = split(tiny_gguf(), 3, says_so=says_so)
    parts[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"is one of 3 parts; tiny-00002-of-00003\.gguf must lie beside it"
    ):
        convert_checkpoint(parts[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_under_another_name_is_refused(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    first, *_ = split(tiny_gguf(), 3)
    with pytest.raises(CheckpointError, match=r"says that it is part 0 \(from 0\) of 3; put all"):
        convert_checkpoint(first.rename(tmp_path / "renamed.gguf"), tmp_path / "out")


def test_parts_of_several_models_are_refused(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    one, two = split(tiny_gguf(), 2)
    two.write_bytes(one.read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 0"):
        convert_checkpoint(one, tmp_path / "out")


KINDS = {
    "mlp.up_proj": gguf.GGMLQuantizationType.Q4_0,
    "mlp.gate_proj": gguf.GGMLQuantizationType.Q4_1,
    "mlp.down_proj": gguf.GGMLQuantizationType.Q8_0,
    "self_attn.v_proj": gguf.GGMLQuantizationType.Q5_0,
    "self_attn.o_proj": gguf.GGMLQuantizationType.BF16,
}


def test_a_mixture_of_types_keeps_its_values_through_gguf_export(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    source = GGUFFile(tiny_gguf("qwen2", kinds=KINDS, hidden_size=64))
    made = convert_checkpoint(source.path, tmp_path / "out").path
    export_gguf(made, tmp_path / "back.gguf", "f32")
    back = GGUFFile(tmp_path / "back.gguf")
    assert back.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        expected = gguf.quants.dequantize(source.blocks(tensor), tensor.kind)
        values = gguf.quants.dequantize(back.blocks(back.tensors[name]), back.tensors[name].kind)
        np.testing.assert_allclose(
            values.reshape(-1), expected.reshape(-1), rtol=1e-6, atol=1e-7, err_msg=name
        )


def test_a_mixture_of_types_has_the_logits_of_its_dequantized_values(
    tiny_gguf: GGUFFactory, tmp_path: Path
) -> None:
    path = tiny_gguf("qwen2", kinds=KINDS, hidden_size=64)
    model, config = load_model(convert_checkpoint(path, tmp_path / "out").path)
    forms = {v["bits"] for v in config["quantization"].values() if isinstance(v, dict)}
    assert forms | {config["quantization"]["bits"]} == {4, 8}
    from mlx_lm.utils import dequantize_model

    file, plain = GGUFFile(path), dequantize_model(load_model(tmp_path / "out")[0])
    values = {}
    for name, _ in cast(list[tuple[str, mx.array]], tree_flatten(plain.parameters())):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 3)
        tensor = file.tensors[cast(str, names.get_name(name, (".weight", ".bias")))]
        dense = gguf.quants.dequantize(file.blocks(tensor), tensor.kind)
        values[name] = mx.array(dense.reshape(tensor.shape).astype(np.float32))
    plain.load_weights(list(values.items()))
    assert mx.allclose(model(TOKENS), plain(TOKENS), atol=1e-4)


def test_mutated_headers_convert_or_are_one_line(tiny_gguf: GGUFFactory, tmp_path: Path) -> None:
    original = tiny_gguf().read_bytes()
    header_end = original.index(b"blk.2.ffn_up.weight") + 60
    generator = random.Random(int(os.environ.get("IFP_SEED", "9")))
    folder = tmp_path / "mutated"
    folder.mkdir()
    messages = []
    for _ in range(NUM_MUTATIONS):
        damaged = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(8, header_end)
            choice = generator.random()
            if choice < 0.4:
                damaged[at] = generator.randrange(256)
            elif choice < 0.7:
                damaged[at : at + 4] = struct.pack("<I", generator.choice([0, 1, 7, UNSET]))
            else:
                key = generator.choice(_KEYS)
                found = original.index(key) + len(key) + 4  # behind the type
                damaged[found : found + 4] = struct.pack("<I", generator.choice(_NUMBERS))
        (folder / "m.gguf").write_bytes(damaged)
        try:
            convert_checkpoint(folder / "m.gguf", folder / "out", overwrite=True)
        except IFPError as error:
            messages.append(str(error))
        assert {path.name for path in folder.iterdir()} <= {"m.gguf", "out"}
    assert messages
    assert not any("\n" in message for message in messages)


_KEYS = [
    b"llama.block_count", b"llama.context_length", b"llama.embedding_length",
    b"llama.feed_forward_length", b"llama.attention.head_count", b"llama.rope.freq_base",
    b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id",
    b"llama.attention.layer_norm_rms_epsilon",
]  # fmt: skip
_NUMBERS = [0, 1, 2, 3, 7, 264, 2**20, 2**31, UNSET, 0x7F800000, 0x7FC00000, 0xBF800000]
