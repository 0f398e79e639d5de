import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.checkpoint import (
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    stored_tensors,
)
from ifp_mlx.errors import ArchitectureError, CheckpointError, ConfigError, IFPError
from ifp_mlx.tensor_files import read_header

CheckpointFactory = Callable[..., Path]
TOKENS = mx.array([[3, 60, 5, 41]])


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of ``...`` removes the key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with any header, also one that is wrong."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def entry(
    start: int = 0, end: int = 8, shape: list[Any] | None = None, dtype: str = "F32"
) -> dict[str, Any]:
    shape = [2] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


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
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


# What is no checkpoint


def test_read_config_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint directory; ifp pull"):
        read_config(tmp_path / "nowhere")


def test_read_config_refuses_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "[" * 100_000], ids=range(4))
def test_read_config_refuses_what_is_no_json_object(
    tiny_checkpoint: CheckpointFactory, content: str
) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        read_config(folder)


@pytest.mark.parametrize("key", ["intermediate_size", "hidden_size", "vocab_size"])
def test_read_config_names_the_missing_size(tiny_checkpoint: CheckpointFactory, key: str) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **{key: ...})
    with pytest.raises(ConfigError, match=f"has no {key}"):
        read_config(folder)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "64", 2**40])
def test_read_config_refuses_a_size_that_is_none(
    tiny_checkpoint: CheckpointFactory, size: Any
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, intermediate_size=size)
    with pytest.raises(ConfigError, match=r"intermediate_size is .*, not a positive integer"):
        read_config(folder)


@pytest.mark.parametrize("value", ["1e-5", True, [], {}, float("inf"), float("nan")], ids=str)
def test_read_config_refuses_a_setting_that_is_no_number(
    tiny_checkpoint: CheckpointFactory, value: object
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, rms_norm_eps=value)
    with pytest.raises(ConfigError, match=r"rms_norm_eps is .*, not a number"):
        read_config(folder)


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_read_config_refuses_code_of_the_checkpoint(
    tiny_checkpoint: CheckpointFactory, key: str
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **{key: "modeling.py"})
    with pytest.raises(CheckpointError, match=f"wants to run Python code.*{key}"):
        read_config(folder)


def test_read_config_refuses_an_unknown_family(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, model_type="mixtral")
    with pytest.raises(ArchitectureError, match="'mixtral' is not supported; these are: cohere"):
        read_config(folder)
    edit_config(folder, model_type=...)
    with pytest.raises(ConfigError, match="has no model_type"):
        read_config(folder)


def test_links_out_of_the_checkpoint_are_refused(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    elsewhere = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint directory"):
        load_model(folder)


def test_links_of_the_hub_cache_are_followed(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load_model(snapshot)[1]["hidden_size"] == 32


# Weights that do not fit


def test_pickled_weights_are_refused_with_advice(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*get"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\*\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 100, -1])
def test_truncated_weights_are_one_line(
    tiny_checkpoint: CheckpointFactory, kept_bytes: int
) -> None:
    folder = tiny_checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"is damaged: .*; download or convert it again"):
        load_model(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(
    tiny_checkpoint: CheckpointFactory, bad: float
) -> None:
    folder = tiny_checkpoint()
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = bad
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=f"{name} holds values that are not numbers"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"vocab_size": 99}, {"tie_word_embeddings": False}], ids=str
)
def test_config_that_disagrees_with_the_weights_is_one_line(
    tiny_checkpoint: CheckpointFactory, changes: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_layers", [2, 4, 2**30])
def test_layer_count_that_disagrees_is_refused_at_once(
    tiny_checkpoint: CheckpointFactory, num_layers: int
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, num_hidden_layers=num_layers)
    with pytest.raises(CheckpointError, match=f"says {num_layers} layers, the weights have 3"):
        load_model(folder)


def packed_checkpoint(folder: Path) -> dict[str, mx.array]:
    """Quantize a checkpoint in place and return its arrays."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = quantize_model(*load_model(folder), group_size=32, bits=4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


PACKED_DAMAGE: dict[str, tuple[str, tuple[int, ...], str]] = {
    "more scales": ("scales", (192, 2), "has 4 bits in groups of 16, no format of mlx"),
    "scales do not divide": ("scales", (192, 3), "has 32 columns, which its packed weight"),
    "no scales": ("scales", (192, 0), "has 32 columns, which its packed weight"),
    "fewer rows": ("scales", (96, 1), "has 192 rows, its packed weight"),
    "flat scales": ("scales", (192,), "has 192 rows, its packed weight"),
    "wide codes": ("weight", (192, 64), "has 64 bits in groups of 32, no format of mlx"),
    "no codes": ("weight", (192, 0), "has 0 bits in groups of 32, no format of mlx"),
    "other rows": ("weight", (191, 4), "has 192 rows, its packed weight"),
    "flat codes": ("weight", (768,), "has scales but no packed weight"),
    "biases": ("biases", (192, 2), "shape"),
}


@pytest.mark.parametrize(("part", "shape", "message"), PACKED_DAMAGE.values(), ids=PACKED_DAMAGE)
def test_packed_weights_of_the_wrong_shape_are_one_line(
    tiny_checkpoint: CheckpointFactory, part: str, shape: tuple[int, ...], message: str
) -> None:
    folder = tiny_checkpoint()
    weights = packed_checkpoint(folder)
    name = f"model.layers.1.mlp.up_proj.{part}"
    damaged = weights | {name: mx.zeros(shape, weights[name].dtype)}
    mx.save_safetensors(str(folder / "model.safetensors"), damaged, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "config.json and the weights disagree" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"intermediate_size": 96}], ids=str)
def test_config_that_disagrees_with_packed_weights_is_one_line(
    tiny_checkpoint: CheckpointFactory, changes: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    packed_checkpoint(folder)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"group_size": 32, "bits": 7, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "none"},
        {"group_size": 0, "bits": 4},
        {"group_size": 16, "bits": 4, "mode": "affine"},
        {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 0}},
        {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32}},
        [],
        "4",
    ],
    ids=str,
)
def test_quantization_settings_that_disagree_are_one_line(
    tiny_checkpoint: CheckpointFactory, settings: object
) -> None:
    folder = tiny_checkpoint()
    packed_checkpoint(folder)
    edit_config(folder, quantization=settings, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"config\.json and the weights disagree") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", 3])
def test_index_must_not_name_files_outside(
    tiny_checkpoint: CheckpointFactory, file: object
) -> None:
    folder = tiny_checkpoint()
    write_index(folder, {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        stored_tensors(folder)


def test_index_must_agree_with_the_files(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    write_index(folder, {"model.norm.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        stored_tensors(folder)
    write_index(folder, {"nothing": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'nothing' is not in model\.safetensors"):
        stored_tensors(folder)
    write_index(folder, [])
    with pytest.raises(CheckpointError, match="has no weight_map"):
        stored_tensors(folder)


def test_a_tensor_in_two_files_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in model-2\.safetensors and in model\.safe"):
        stored_tensors(folder)


# Headers


def test_read_header_gives_the_ranges_of_the_data(tmp_path: Path) -> None:
    arrays = {"b": mx.arange(6, dtype=mx.int32).reshape(2, 3), "a": mx.array([1.5, 2.5])}
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    tensors = read_header(path)
    content = path.read_bytes()
    for name, dtype in (("a", np.float32), ("b", np.int32)):
        stored = tensors[name]
        raw = content[stored.offset : stored.offset + stored.num_bytes]
        assert np.array_equal(
            np.frombuffer(raw, dtype).reshape(stored.shape), np.array(arrays[name])
        )


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{x", b"", "not valid JSON"),
    "not utf-8": (b"\xff\xfe", b"", "not valid JSON"),
    "deep json": (b"[" * 50_000, b"", "not valid JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "same key twice": (b'{"a":{}, "a":{}}', b"", "not valid JSON"),
    "a list": ([], b"", "not a table"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "metadata are not strings"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12), "'b' overlaps"),
    "hole": ({"a": entry(), "b": entry(12, 20)}, bytes(20), "'b' leaves a hole"),
    "beyond the file": ({"a": entry(0, 80, [20])}, bytes(8), "take 80 bytes"),
    "data left over": ({"a": entry()}, bytes(9), "it has 9 for them"),
    "unknown dtype": ({"a": entry(dtype="F4")}, bytes(8), "dtype 'F4'; these can be read"),
    "dtype no text": ({"a": entry() | {"dtype": []}}, bytes(8), "has the dtype"),
    "shape and bytes": ({"a": entry(0, 8, [3])}, bytes(8), "does not take 8 bytes"),
    "huge shape": ({"a": entry(0, 8, [2**62, 4])}, bytes(8), "does not take"),
    "negative shape": ({"a": entry(0, 8, [-2])}, bytes(8), r"has the shape \[-2\]"),
    "bool shape": ({"a": entry(0, 4, [True])}, bytes(4), "has the shape"),
    "rank": ({"a": entry(0, 4, [1] * 9)}, bytes(4), "has the shape"),
    "negative offset": ({"a": entry(-8, 0)}, bytes(8), "has the offsets"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8), "has the offsets"),
    "reversed": ({"a": entry(8, 0)}, bytes(8), "does not take"),
    "entry": ({"a": [1]}, b"", "entry of tensor 'a' is not valid"),
    "missing key": ({"a": {"dtype": "F32"}}, b"", "entry of tensor 'a' is not valid"),
    "path": ({"../a": entry()}, bytes(8), "is no tensor name"),
    "absolute path": ({"/etc/a": entry()}, bytes(8), "is no tensor name"),
    "windows path": ({"a\\b": entry()}, bytes(8), "is no tensor name"),
    "control": ({"a\n": entry()}, bytes(8), "is no tensor name"),
    "empty name": ({"": entry()}, bytes(8), "is no tensor name"),
    "long name": ({"a" * 600: entry()}, bytes(8), "is no tensor name"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_read_header_refuses(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [3, 2**20, 2**40, 2**64 - 1])
def test_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry()}, bytes(8), length)
    message = "not valid JSON" if length == 3 else f"header length {length} does not fit"
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_mutated_headers_are_read_or_refused_with_one_line(tmp_path: Path) -> None:
    """3,000 damaged headers: never another exception, never memory by an unchecked length."""
    path = tmp_path / "model.safetensors"
    arrays = {f"model.layers.{n}.weight": mx.ones((n, 3), dtype=mx.bfloat16) for n in range(1, 7)}
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    original = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    rng = random.Random(5)
    pieces = [
        b"9999999999999999999",
        b"-1",
        b"null",
        b"1e309",
        b'"F16"',
        b"[",
        b"}",
        b"\x00",
        b"../",
    ]
    refused = multi_line = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    mutated = path.with_name("mutated.safetensors")
    for _ in range(3000):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(header_end)
            match rng.randrange(5):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged[at : at + rng.randint(1, 40)] = b""
                case 2:
                    damaged[at:at] = rng.choice(pieces)
                case 3:
                    damaged[: rng.randint(1, 8)] = rng.randbytes(8)
                case 4:
                    digits = [i for i in range(8, header_end) if 48 <= damaged[i] <= 57]
                    damaged[rng.choice(digits)] = 48 + rng.randrange(10)
        mutated.write_bytes(damaged)
        try:
            tensors = read_header(mutated)
        except CheckpointError as error:
            refused += 1
            multi_line += "\n" in str(error)
        else:  # a change that left a valid file, such as a letter in a name
            assert all(t.offset + t.num_bytes <= len(damaged) for t in tensors.values())
    assert refused > 2000
    assert not multi_line
    grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kilobytes < 200_000
    assert time.perf_counter() - started < 60


# Identity


def test_fingerprint_follows_values_not_files(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
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
    assert read_config(new)["rope_theta"] == 300.0
