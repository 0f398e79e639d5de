"""Mixtures of experts as GGUF files: read with the same values, written so that they come back."""

import json
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
from typer.testing import CliRunner

from ifp_mlx.cli.app import make_app
from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.convert.gguf_conversion import converted_bytes
from ifp_mlx.convert.gguf_export import export_gguf
from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.errors import ArchitectureError, CheckpointError
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.weights import load_model, stored_tensors

Factory = Callable[..., Path]
ModelFactory = Callable[..., nn.Module]
FAMILIES = ["qwen3_moe", "olmoe", "gpt_oss"]
STACKS = {"qwen3_moe": "mlp.switch_mlp", "olmoe": "mlp.switch_mlp", "gpt_oss": "mlp.experts"}
TOKENS = mx.arange(3, 40)[None]  # longer than the sliding window


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def file_values(path: Path, name: str) -> np.ndarray:
    """Read a tensor with the gguf package alone."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return values.reshape([int(size) for size in tensor.shape][::-1])


# Reading


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_mixture_is_the_model_that_was_written(
    tiny_mixture_gguf: Factory, tiny_mixture: ModelFactory, tmp_path: Path, family: str
) -> None:
    made = convert_checkpoint(tiny_mixture_gguf(family), tmp_path / "out", dtype=mx.float32)
    assert made.model_type == family
    model, original = load_model(made.path)[0], tiny_mixture(family)
    loaded, expected = arrays_of(model), arrays_of(original)
    assert loaded.keys() == expected.keys()
    assert all(mx.array_equal(loaded[name], expected[name]) for name in expected)
    assert mx.allclose(model(TOKENS), original(TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "bits", "mode"),
    [
        (Kind.Q4_0, 4, "affine"),
        (Kind.Q4_1, 4, "affine"),
        (Kind.Q8_0, 8, "affine"),
        (Kind.MXFP4, 4, "mxfp4"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_kinds_that_mlx_has_stay_packed(
    tiny_mixture_gguf: Factory, tmp_path: Path, family: str, kind: Kind, bits: int, mode: str
) -> None:
    kinds = dict.fromkeys(["ffn_gate_exps", "ffn_up_exps"], kind)
    kinds |= {"ffn_down_exps": Kind.Q8_0, "attn_q": Kind.Q4_0}
    path = tiny_mixture_gguf(family, kinds=kinds)
    made = convert_checkpoint(path, tmp_path / "out", dtype=mx.float32)
    model, config = load_model(made.path)
    block = model.layers[2].mlp
    stacks = block.experts if family == "gpt_oss" else block.switch_mlp
    packed = (stacks.up_proj, stacks.down_proj, model.layers[2].self_attn.q_proj)
    assert [(layer.bits, layer.mode) for layer in packed] == [
        (bits, mode), (8, "affine"), (4, "affine"),
    ]  # fmt: skip
    assert isinstance(block.router if family == "gpt_oss" else block.gate, nn.Linear)
    forms = {(bits, mode), (8, "affine"), (4, "affine")}
    described = [s for s in config["quantization"].values() if isinstance(s, dict)]
    described.append(config["quantization"])
    assert {(form["bits"], form["mode"]) for form in described} == forms
    wide, _ = load_model(made.path, mx.float32)
    for name in ("gate", "up", "down"):
        values = arrays_of(wide)[f"model.layers.2.{STACKS[family]}.{name}_proj.weight"]
        assert np.array_equal(np.array(values), file_values(path, f"blk.2.ffn_{name}_exps.weight"))
    assert mx.allclose(model(TOKENS), wide(TOKENS), atol=1e-3)
    stored = sum(tensor.num_bytes for tensor in stored_tensors(made.path).values())
    assert converted_bytes(GGUFFile(path), mx.float32) == stored


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_other_kinds_are_dequantized(
    tiny_mixture_gguf: Factory, tmp_path: Path, family: str
) -> None:
    path = tiny_mixture_gguf(family, kinds={"ffn_up_exps": Kind.Q5_1, "ffn_down_exps": Kind.F16})
    model, config = load_model(convert_checkpoint(path, tmp_path / "out", dtype=mx.float32).path)
    assert "quantization" not in config
    for name in ("up", "down"):
        values = arrays_of(model)[f"model.layers.1.{STACKS[family]}.{name}_proj.weight"]
        assert np.array_equal(np.array(values), file_values(path, f"blk.1.ffn_{name}_exps.weight"))


def test_half_precision_is_rounded_once(tiny_mixture_gguf: Factory, tmp_path: Path) -> None:
    path = tiny_mixture_gguf("gpt_oss", kinds={"ffn_up_exps": Kind.MXFP4})
    exact = arrays_of(
        load_model(convert_checkpoint(path, tmp_path / "a", dtype=mx.float32).path)[0]
    )
    half = arrays_of(
        load_model(convert_checkpoint(path, tmp_path / "b", dtype=mx.bfloat16).path)[0]
    )
    for name, array in exact.items():
        is_floating = mx.issubdtype(array.dtype, mx.floating)
        assert mx.array_equal(half[name], array.astype(mx.bfloat16) if is_floating else array)


def test_yarn_says_what_the_file_says(tiny_mixture_gguf: Factory, tmp_path: Path) -> None:
    metadata = {"gpt-oss.rope.scaling.yarn_beta_fast": 16.0}
    made = convert_checkpoint(tiny_mixture_gguf("gpt_oss", metadata=metadata), tmp_path / "out")
    config = read_config(made.path).content
    assert config["rope_scaling"] == {
        "type": "yarn", "rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


# What cannot be read


@pytest.mark.parametrize(
    ("family", "edits", "message"),
    [
        (
            "qwen3_moe",
            {"blk.1.ffn_up_exps.weight": None},
            r"no tensor blk\.1\.ffn_up_exps\.weight of 8 experts; fetch the file again",
        ),
        (
            "olmoe",
            {"blk.2.ffn_gate_inp.weight": np.ones((7, 32), np.float32)},
            r"no tensor blk\.2\.ffn_gate_inp\.weight of 8 experts",
        ),
        (
            "gpt_oss",
            {"blk.0.ffn_down_exps.weight": np.ones((8, 32), np.float32)},
            r"no tensor blk\.0\.ffn_down_exps\.weight of 8 experts",
        ),
        ("gpt_oss", {"blk.0.ffn_down_exps.bias": None}, r"weights disagree .*down_proj\.bias"),
        ("gpt_oss", {"blk.0.attn_sinks.weight": None}, r"weights disagree .*self_attn\.sinks"),
        (
            "qwen3_moe",
            {"blk.0.ffn_up_exps.weight": np.ones((8, 32, 32), np.float32)},
            r"weights disagree .*up_proj",
        ),
    ],
)
def test_damaged_experts_are_one_clear_error(
    tiny_mixture_gguf: Factory, tmp_path: Path, family: str, edits: dict[str, Any], message: str
) -> None:
    path = tiny_mixture_gguf(family, edits=edits)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"olmoe.expert_used_count": 9}, "a token sees 9 of 8 experts"),
        ({"olmoe.expert_used_count": 0}, "a token sees 0 of 8 experts"),
        ({"olmoe.expert_count": 0}, "a token sees 2 of 0 experts"),
        ({"olmoe.expert_count": 9}, "of 9 experts"),
        ({"olmoe.expert_used_count": "two"}, "expert_used_count is not one number"),
    ],
    ids=str,
)
def test_metadata_of_experts_is_checked(
    tiny_mixture_gguf: Factory, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tiny_mixture_gguf("olmoe", metadata=metadata), tmp_path / "out")


def test_mxfp4_block_that_is_not_a_number_is_refused(
    tiny_mixture_gguf: Factory, tmp_path: Path
) -> None:
    path = tiny_mixture_gguf("gpt_oss", kinds={"ffn_up_exps": Kind.MXFP4})
    content = bytearray(path.read_bytes())
    content[GGUFFile(path).tensors["blk.1.ffn_up_exps.weight"].offset + 17] = 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_up_exps\.weight' holds values that"):
        convert_checkpoint(path, tmp_path / "out")


def test_mixture_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2moe")
    writer.add_expert_count(60)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ArchitectureError, match="architecture 'qwen2moe'; GGUF files of these"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "out")


# Writing


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_mixture_converts_back_to_the_same_model(
    tiny_mixture_gguf: Factory, tmp_path: Path, family: str
) -> None:
    source = convert_checkpoint(tiny_mixture_gguf(family), tmp_path / "source", dtype=mx.float32)
    export_gguf(source.path, tmp_path / "out.gguf", "f32")
    again = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back", dtype=mx.float32)
    expected, actual = load_model(source.path)[0], load_model(again.path)[0]
    wanted, found = arrays_of(expected), arrays_of(actual)
    assert wanted.keys() == found.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    assert mx.array_equal(actual(TOKENS), expected(TOKENS))
    ignored = {"attention_bias", "mlp_bias"}
    before, after = (read_config(made.path).content for made in (source, again))
    assert {k: v for k, v in before.items() if k not in ignored} == {
        k: v for k, v in after.items() if k not in ignored
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_kinds_are_those_that_llama_cpp_reads(
    tiny_mixture_gguf: Factory, tmp_path: Path, family: str
) -> None:
    source = convert_checkpoint(tiny_mixture_gguf(family), tmp_path / "source", dtype=mx.float32)
    export_gguf(source.path, tmp_path / "out.gguf", "q8_0")
    weights = arrays_of(load_model(source.path)[0])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = np.array(weights[f"model.layers.1.{STACKS[family]}.down_proj.weight"])
    written = np.array(tensors["blk.1.ffn_down_exps.weight"].data).reshape(-1)
    assert np.array_equal(written, gguf.quants.quantize(down, Kind.Q8_0).reshape(-1))
    for name, tensor in tensors.items():
        is_float = len(tensor.shape) == 1 or name.endswith(("bias", "ffn_gate_inp.weight"))
        assert tensor.tensor_type == (Kind.F32 if is_float else Kind.Q8_0), name


@pytest.mark.parametrize("kind", [Kind.MXFP4, Kind.Q4_1])
def test_packed_stacks_are_written_dequantized(
    tiny_mixture_gguf: Factory, tmp_path: Path, kind: Kind
) -> None:
    path = tiny_mixture_gguf("gpt_oss", kinds={"ffn_down_exps": kind})
    source = convert_checkpoint(path, tmp_path / "source", dtype=mx.float32)
    export_gguf(source.path, tmp_path / "out.gguf", "f32")
    name = "blk.1.ffn_down_exps.weight"
    assert np.array_equal(file_values(tmp_path / "out.gguf", name), file_values(path, name))


def test_tied_output_is_written_out_where_llama_cpp_needs_it(
    tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    source = tiny_checkpoint("olmoe", num_key_value_heads=4)
    export_gguf(source, tmp_path / "out.gguf", "f32")
    embedding, output = (
        file_values(tmp_path / "out.gguf", f"{name}.weight") for name in ("token_embd", "output")
    )
    assert np.array_equal(embedding, output)


def test_exported_sub_network_has_its_experts_alone(
    tiny_mixture_gguf: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))
    path = tiny_mixture_gguf("qwen3_moe")
    source = convert_checkpoint(path, tmp_path / "source", dtype=mx.float32)
    arguments = [
        "export", "--model", str(source.path), "-o", str(tmp_path / "out"), "--task", "sums",
        "--selector", "random", "--keep-units", "4", "--gguf", str(tmp_path / "out.gguf"),
        "--gguf-type", "f32",
    ]  # fmt: skip
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    file = GGUFFile(tmp_path / "out.gguf")
    assert file.metadata["qwen3moe.expert_count"] == 4
    assert file.tensors["blk.0.ffn_up_exps.weight"].shape == (4, 64, 32)
    back = convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back", dtype=mx.float32)
    expected = load_model(tmp_path / "out")[0](TOKENS)
    assert mx.allclose(load_model(back.path)[0](TOKENS), expected, atol=1e-4)


def test_packed_mixture_can_be_cut(tiny_mixture_gguf: Factory, tmp_path: Path) -> None:
    kinds = dict.fromkeys(["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"], Kind.MXFP4)
    path = tiny_mixture_gguf("gpt_oss", kinds=kinds)
    made = convert_checkpoint(path, tmp_path / "out", dtype=mx.float32)
    packed, wide = load_model(made.path)[0], load_model(made.path, mx.float32)[0]
    selection = select_random(packed, 4, 3)
    compact = slice_model(packed, selection)
    assert compact.layers[0].mlp.experts.up_proj.weight.shape[0] == 4
    assert mx.allclose(compact(TOKENS), slice_model(wide, selection)(TOKENS), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {}, r"qwen3_moe models with mlp_only_layers \[1\] cannot be written as GGUF"),
        ("olmoe", {"norm_topk_prob": True}, "for which it always is False"),
        ("olmoe", {}, "olmoe models with num_key_value_heads 2 cannot be written as GGUF"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            "gpt_oss models with layer_types",
        ),
        ("mixtral", {}, "mixtral models cannot be written as GGUF; these can: "),
    ],
)
def test_mixture_that_gguf_cannot_say_is_refused(
    tiny_checkpoint: Factory, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArchitectureError, match=message):
        export_gguf(tiny_checkpoint(family, **changes), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_exported_yarn_keeps_its_ramp(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint("gpt_oss")
    config = json.loads((source / "config.json").read_text())
    scaling = config["rope_scaling"] | {"beta_fast": 16.0}
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    export_gguf(source, tmp_path / "out.gguf")
    metadata = GGUFFile(tmp_path / "out.gguf").metadata
    assert metadata["gpt-oss.rope.scaling.yarn_beta_fast"] == 16.0
    assert metadata["gpt-oss.rope.scaling.original_context_length"] == 64
