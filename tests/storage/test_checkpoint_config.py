"""Folders and configurations that are no checkpoint: one clear error each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifp_mlx.errors import ArchitectureError, CheckpointError, ConfigError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.weights import load_model

CheckpointFactory = Callable[..., Path]
EditConfig = Callable[..., None]


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


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_read_config_refuses_code_of_the_checkpoint(
    tiny_checkpoint: CheckpointFactory, edit_config: EditConfig, key: str
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, **{key: "modeling.py"})
    with pytest.raises(CheckpointError, match=f"wants to run Python code.*{key}"):
        read_config(folder)


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
