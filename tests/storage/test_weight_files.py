"""Which files count: the index decides, then model.safetensors; links as hub caches have them."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.weights import load_model, stored_tensors

CheckpointFactory = Callable[..., Path]
TOKENS = mx.array([[3, 60, 5, 41]])


def split(folder: Path, *, index: bool = True, count: int = 2) -> list[Path]:
    """Write a checkpoint's weights as shards instead, with an index or without."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    names, files, weight_map = sorted(weights), [], {}
    for number in range(count):
        part = {name: weights[name] for name in names[number::count]}
        files.append(folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors")
        mx.save_safetensors(str(files[-1]), part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, files[-1].name))
    (folder / "model.safetensors").unlink()
    if index:
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return files


def logits(folder: Path) -> mx.array:
    result: mx.array = load_model(folder)[0](TOKENS)
    return result


def test_the_index_decides_against_stray_files(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    expected = logits(folder)
    other = tiny_checkpoint(name="other", num_hidden_layers=2)
    split(folder)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    (folder / "model.fp16.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert mx.array_equal(logits(folder), expected)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", None], ids=str)
def test_model_safetensors_decides_without_an_index(
    tiny_checkpoint: CheckpointFactory, content: bytes | None
) -> None:
    folder = tiny_checkpoint()
    expected = logits(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.fp16.safetensors").write_bytes(whole if content is None else content)
    (folder / "model-00001-of-00003.safetensors").write_bytes(whole)
    assert mx.array_equal(logits(folder), expected)


def test_a_whole_set_of_shards_needs_no_index(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    expected = logits(folder)
    split(folder, index=False, count=3)
    assert mx.array_equal(logits(folder), expected)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_missing_shards_are_named(tiny_checkpoint: CheckpointFactory, index: bool) -> None:
    folder = tiny_checkpoint()
    for file in split(folder, index=index, count=3)[1:]:
        file.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"lacks model-00002-of-00003\.safetensors, model-00003-of.*; download the model",
    ):
        load_model(folder)


def test_shards_of_two_models_are_named(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (file, _) = split(folder, index=False)
    (folder / "model-00001-of-00003.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"shards of several models .*; move away those"):
        load_model(folder)


def test_a_stale_index_is_named_with_what_to_do(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    whole = (folder / "model.safetensors").read_bytes()
    for file in split(folder):
        file.unlink()
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"or remove model\.safetensors\.index\.json if"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.Q4_0.gguf", r"give the file itself to ifp convert: model\.Q4_0\.gguf"),
        ("adapter_model.safetensors", "holds an adapter, not a model; merge it"),
        ("pytorch_model.bin", "only pickled weights"),
        ("weights.safetensors", r"but weights\.safetensors; rename it to model\.safetensors if"),
    ],
)
def test_what_is_there_instead_of_weights_is_called_by_its_name(
    tiny_checkpoint: CheckpointFactory, name: str, message: str
) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_several_files_under_other_names_need_an_index(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / "part-a.safetensors")
    (folder / "part-b.safetensors").write_bytes((folder / "part-a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"part-a\S+, part-b\S+; get \S+index\.json, which"):
        load_model(folder)


def test_missing_tensors_are_named_and_converting_again_is_not_advised(
    tiny_checkpoint: CheckpointFactory, edit_config: Callable[..., None]
) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, mlp_bias=True)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.\w+_proj\.bias") as caught:
        load_model(folder)
    assert "convert" not in str(caught.value)
    assert "\n" not in str(caught.value)


def hub_cache(folder: Path, root: Path) -> tuple[Path, Path]:
    """Return a hub cache's snapshot of a checkpoint, and its folder of blobs."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / "0123", root / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot, blobs


@pytest.mark.parametrize("what", ["folder", "each blob"])
def test_blobs_of_a_hub_cache_may_lie_on_another_disk(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, what: str
) -> None:
    folder = tiny_checkpoint()
    expected = logits(folder)
    snapshot, blobs = hub_cache(folder, tmp_path / "hub")
    disk = tmp_path / "disk"
    blobs.rename(disk)
    if what == "folder":
        blobs.symlink_to(disk)
    else:
        blobs.mkdir()
        for file in disk.iterdir():
            (blobs / file.name).symlink_to(file)
    assert mx.array_equal(logits(snapshot), expected)


def test_a_link_beside_the_needed_files_stops_nothing(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    (folder / "old").symlink_to("/nowhere")
    (folder / "notes.md").symlink_to(tmp_path)
    assert load_model(folder)[1]["hidden_size"] == 32


def test_a_needed_link_to_nothing_is_named(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that is g"):
        stored_tensors(folder)
