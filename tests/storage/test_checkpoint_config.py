"""Folders and configurations that are no checkpoint: one clear error each."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifp_mlx.convert.conversion import convert_checkpoint
from ifp_mlx.errors import ArchitectureError, CheckpointError, ConfigError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]
TOKENS = mx.array([[3, 60, 5, 41]])


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
def test_read_config_names_the_missing_size(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, key: str
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **{key: ...})
    with pytest.raises(ConfigError, match=f"has no {key}"):
        read_config(folder)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "64", 2**40])
def test_read_config_refuses_a_size_that_is_none(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, size: Any
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, intermediate_size=size)
    with pytest.raises(ConfigError, match=r"intermediate_size is .*, not a positive integer"):
        read_config(folder)


@pytest.mark.parametrize("value", ["1e-5", True, [], {}, float("inf"), float("nan")], ids=str)
def test_read_config_refuses_a_setting_that_is_no_number(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, value: object
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, rms_norm_eps=value)
    with pytest.raises(ConfigError, match=r"rms_norm_eps is .*, not a number"):
        read_config(folder)


def test_read_config_refuses_code_of_the_checkpoint(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, model_file="modeling.py")
    with pytest.raises(CheckpointError, match=r"wants to run Python code.*model_file"):
        read_config(folder)


def test_auto_map_of_a_family_that_is_built_in_is_ignored(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    expected = load_model(folder)[0](TOKENS)
    (folder / "configuration_x.py").write_text("raise SystemExit('code was run')")
    edit_config(folder, auto_map={"AutoConfig": "configuration_x.XConfig"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["configuration_x.XTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert mx.array_equal(load_model(folder)[0](TOKENS), expected)
    assert load_tokenizer(folder).encode("hi")
    made = convert_checkpoint(folder, tmp_path / "out").path
    assert "auto_map" not in json.loads((made / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gemma2", "gpt2", "deepseek_v3"])
def test_whole_numbers_written_as_floats_are_integers(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, family: str
) -> None:
    folder = tiny_checkpoint(family)
    expected = load_model(folder)[0](TOKENS)
    content = json.loads((folder / "config.json").read_text())
    floats = {k: float(v) for k, v in content.items() if type(v) is int}
    edit_config(folder, **{**floats, "eos_token_id": [2.0, 0.0]})
    assert mx.array_equal(load_model(folder)[0](TOKENS), expected)
    assert load_tokenizer(folder).eos_token_ids == {2, 0}
    assert read_config(folder).content.get("num_hidden_layers", 3) == 3
    assert isinstance(read_config(folder).content["vocab_size"], int)


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "longrope", **LONGROPE}},
        {"rope_scaling": {"type": "su", **LONGROPE}},
        {
            "rope_scaling": {
                "rope_type": "longrope", "original_max_position_embeddings": 64.0, **LONGROPE
            },
            "original_max_position_embeddings": ...,
        },
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0,
                "original_max_position_embeddings": 64, **LONGROPE,
            },
            "rope_theta": ..., "original_max_position_embeddings": ...,
        },
    ],
    ids=["rope_type", "su", "length inside", "transformers 5"],
)  # fmt: skip
def test_longrope_of_phi3_is_read_under_all_of_its_names(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, changes: dict[str, Any]
) -> None:
    folder = tiny_checkpoint("phi3", original_max_position_embeddings=64)
    plain = load_model(folder)[0](TOKENS)
    edit_config(folder, rope_scaling={"type": "longrope", **LONGROPE})
    expected = load_model(folder)[0](TOKENS)
    edit_config(folder, rope_scaling=...)
    edit_config(folder, **changes)
    assert mx.array_equal(load_model(folder)[0](TOKENS), expected)
    assert not mx.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma2", "stablelm", "phi3"])
def test_a_rope_scaling_that_mlx_lm_would_pass_over_is_refused(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, family: str
) -> None:
    folder = tiny_checkpoint(family)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(folder, rope_scaling={**scaling, "long_factor": [1.0] * 4})
    with pytest.raises(ConfigError, match=f"rope scaling 'yarn', .* in {family} models"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", "{"),
        ("tokenizer_config.json", "{"),
        ("special_tokens_map.json", "[]"),
        ("tokenizer.json", "\x00"),
    ],
)
def test_the_file_that_is_wrong_is_the_one_to_blame(
    tiny_checkpoint: CheckpointFactory, name: str, content: str
) -> None:
    folder = tiny_checkpoint()
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is not"):
        load_tokenizer(folder)


def test_a_setting_that_the_family_needs_is_named_with_its_file(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig
) -> None:
    folder = tiny_checkpoint("qwen3")
    edit_config(folder, head_dim=...)
    with pytest.raises(ConfigError, match=r"config\.json does not make a model .*head_dim"):
        load_model(folder)


def test_read_config_refuses_an_unknown_family(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, model_type="llama4")
    with pytest.raises(ArchitectureError, match="'llama4' is not supported; these are: afmoe"):
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
