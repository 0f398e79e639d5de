"""Compact models on disk: the same answers as cutting them, and never somebody else's weights."""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.adapters.adapter import load_adapter, save_adapter
from ifp_mlx.assistant import Assistant
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.errors import AdapterError, ResourceError
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.predictor import PredictorHead
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions
from ifp_mlx.storage import weights
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.files import FilesInUse
from ifp_mlx.storage.weights import load_model
from ifp_mlx.subnets import compact_store, dense_model
from ifp_mlx.subnets.selectors import SELECTORS, SelectorFiles, selector_version
from ifp_mlx.subnets.subnetwork import SubNetwork
from ifp_mlx.subnets.task_cache import TaskCache

CheckpointFactory = Callable[..., Path]
TASK = "help me write Python"
TOKENS = mx.array([[3, 14, 15, 9, 26]])


@pytest.fixture
def cache(tmp_path: Path) -> TaskCache:
    return TaskCache(tmp_path / "subnets")


def ask(folder: Path, cache: TaskCache, task: str = TASK, **options: object) -> SubNetwork:
    """Return a task's sub-network as a new process gets it."""
    assistant = Assistant.load(folder, cache=cache, preload=False, **options)  # type: ignore[arg-type]
    return assistant.subnetwork_for_task(task, 64)


def stored_files(cache: TaskCache) -> list[Path]:
    return sorted(cache.compact_folder.glob("*/*.safetensors"))


def own_files(cache: TaskCache) -> list[Path]:
    return [path for path in stored_files(cache) if path.stem != "shared"]


def write_adapter(model_path: Path, *, num_units: int = 192) -> Path:
    """Write an adapter that changes FFN and attention weights, with a predictor."""
    base, _ = load_model(model_path)
    keys = iter(mx.random.split(mx.random.key(4), 64))
    changed = {
        name: array + 0.02 * mx.random.normal(array.shape, key=next(keys))
        for name, array in dict(tree_flatten(base.parameters())).items()
        if ".layers." in name and array.ndim == 2
    }
    head = PredictorHead(2 * 32, mx.random.normal((3, num_units)), rank=4)
    manifest = {"base_model": "org/tiny", "keep_units": [64]}
    save_adapter(model_path / "ifp" / "adapter", base, changed, head, manifest)
    return model_path / "ifp" / "adapter"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3"])
def test_a_stored_model_equals_the_one_that_was_cut(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache, family: str
) -> None:
    folder = tiny_checkpoint(family)
    first, second = ask(folder, cache), ask(folder, cache)
    assert (first.weights_from_disk, second.weights_from_disk) == (False, True)
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))
    assert second.size == first.size
    assert second.source == first.source


def test_a_family_whose_width_is_not_in_its_config_is_cut_each_time(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    folder = tiny_checkpoint("gpt2")
    first, second = ask(folder, cache), ask(folder, cache)
    assert not second.weights_from_disk
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))
    assert stored_files(cache) == []


def test_the_dense_model_is_left_alone_for_a_stored_task(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    ask(folder, cache)
    real = dense_model.open_dense_model

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the dense model was opened")

    monkeypatch.setattr("ifp_mlx.assistant.open_dense_model", refuse)
    assistant = Assistant.load(folder, cache=cache, preload=False)
    assert assistant.subnetwork_for_task(TASK, 64).weights_from_disk
    monkeypatch.setattr("ifp_mlx.assistant.open_dense_model", real)
    later = Assistant.load(folder, cache=cache, preload=False)
    later.subnetwork_for_task(TASK, 64)
    expected = load_model(folder)[0](TOKENS)
    assert mx.array_equal(later.dense().model(TOKENS), expected)
    assert not later.subnetwork_for_task("another task", 64).weights_from_disk


def test_an_adapter_is_in_the_stored_weights(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    folder = tiny_checkpoint()
    plain = ask(folder, cache)
    write_adapter(folder)
    first, second = ask(folder, cache), ask(folder, cache)
    assert (str(second.selector), second.weights_from_disk) == ("predictor", True)
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))
    assert not mx.allclose(first.model(TOKENS), plain.model(TOKENS), atol=1e-3)
    without = ask(folder, cache, use_adapter=False)
    assert mx.array_equal(without.model(TOKENS), plain.model(TOKENS))


def test_a_damaged_adapter_is_refused_when_its_weights_are_needed(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    folder = tiny_checkpoint()
    adapter = write_adapter(folder)
    ask(folder, cache)
    shard = next(adapter.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert ask(folder, cache).weights_from_disk
    with pytest.raises(AdapterError, match="checksum is wrong"):
        ask(folder, cache, "another task")


@pytest.fixture
def packed(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A quantized checkpoint that is computed as it is stored, as on a GPU."""
    quantization = make_quantization(bits=4, group_size=32)
    quantize_checkpoint(tiny_checkpoint(hidden_size=64), tmp_path / "packed", quantization)
    monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)
    return tmp_path / "packed"


def test_packed_layers_stay_packed(packed: Path, cache: TaskCache) -> None:
    first, second = ask(packed, cache), ask(packed, cache)
    assert second.weights_from_disk
    assert isinstance(second.model.layers[0].mlp.gate_proj, nn.QuantizedLinear)
    assert second.requantization_error == first.requantization_error > 0
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))


def test_modules_that_mlx_lm_does_not_have_are_cut_each_time(
    packed: Path, cache: TaskCache
) -> None:
    exact = CutOptions(exact_down=True)
    first, second = ask(packed, cache, options=exact), ask(packed, cache, options=exact)
    assert not second.weights_from_disk
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))


def test_weights_written_again_are_not_taken_for_the_old_ones(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    folder = tiny_checkpoint()
    before = ask(folder, cache)
    file = folder / "model.safetensors"
    weights = load_arrays(file)[0]
    # One value in the middle of a tensor, which the fingerprint's samples do not see.
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = mx.where(mx.arange(32 * 32).reshape(32, 32) == 300, 9.0, weights[name])
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    after = ask(folder, cache)
    assert not after.weights_from_disk
    assert not mx.array_equal(after.model(TOKENS), before.model(TOKENS))


@pytest.mark.parametrize("which", ["own", "shared"])
@pytest.mark.parametrize("damage", ["truncated", "not safetensors", "empty"])
def test_damaged_files_are_removed_and_made_again(
    tiny_checkpoint: CheckpointFactory,
    cache: TaskCache,
    caplog: pytest.LogCaptureFixture,
    which: str,
    damage: str,
) -> None:
    folder = tiny_checkpoint()
    expected = ask(folder, cache).model(TOKENS)
    damaged = next(p for p in stored_files(cache) if (p.stem == "shared") == (which == "shared"))
    content = damaged.read_bytes()
    damaged.write_bytes(
        {"truncated": content[: len(content) // 2], "not safetensors": b"\x07" * 99, "empty": b""}[
            damage
        ]
    )
    again = ask(folder, cache)
    assert not again.weights_from_disk
    assert mx.array_equal(again.model(TOKENS), expected)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("removed damaged weights from the cache")
    assert ask(folder, cache).weights_from_disk


def test_arrays_of_another_shape_are_not_used(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint()
    expected = ask(folder, cache).model(TOKENS)
    [own] = own_files(cache)
    arrays, header = load_arrays(own)
    name = "model.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(str(own), {**arrays, name: arrays[name][:32]}, header)
    assert mx.array_equal(ask(folder, cache).model(TOKENS), expected)
    assert len(caplog.messages) == 1


def test_tasks_share_what_is_outside_the_units(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    folder = tiny_checkpoint()
    ask(folder, cache)
    ask(folder, cache, "tell me a story")
    assert len(own_files(cache)) == 2
    assert len(stored_files(cache)) == 3
    assistant = Assistant.load(folder, cache=cache, preload=False)
    one = assistant.subnetwork_for_task(TASK, 64).model
    other = assistant.subnetwork_for_task("tell me a story", 64).model
    assert one.layers[0].self_attn.q_proj.weight is other.layers[0].self_attn.q_proj.weight


def test_the_least_recently_used_leave_when_the_budget_is_full(tmp_path: Path) -> None:
    for age, name in enumerate(["a/old", "a/new", "a/shared", "b/only", "b/shared"]):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + age, 1000 + age))
    compact_store.prune(tmp_path, 400)
    assert not (tmp_path / "a" / "old.safetensors").exists()
    assert compact_store.stored_bytes(tmp_path) == 400
    in_use = FilesInUse()
    in_use.hold(tmp_path / "a" / "new.safetensors")
    compact_store.prune(tmp_path, 50, spare_used=True)
    assert [p.parent.name for p in tmp_path.glob("*/*")] == ["a", "a"]  # the lone shared file, too
    del in_use
    compact_store.prune(tmp_path, 50, spare_used=True)
    assert not list(tmp_path.glob("*/*"))


def test_removing_a_task_removes_its_weights(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache
) -> None:
    ask(tiny_checkpoint(), cache)
    assert stored_files(cache)
    cache.remove(cache.find(TASK))
    assert stored_files(cache) == []


def test_a_full_disk_costs_the_stored_weights_not_the_answer(
    tiny_checkpoint: CheckpointFactory,
    cache: TaskCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("cannot write: No space left on device")

    monkeypatch.setattr(compact_store, "save_arrays", full)
    subnet = ask(tiny_checkpoint(), cache)
    assert subnet.num_kept_units == 64
    assert caplog.messages == [
        "the sub-network's weights are not kept: cannot write: No space left on device"
    ]


def test_prompts_and_large_models_are_not_stored(
    tiny_checkpoint: CheckpointFactory, cache: TaskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    Assistant.load(folder, cache=cache).subnetwork_for_prompt("hello", 64)
    monkeypatch.setattr(dense_model, "SMALL_SHARE_OF_MEMORY", 0)
    ask(folder, cache)
    assert stored_files(cache) == []


@pytest.mark.parametrize("name", SELECTORS)
def test_versions_are_known_without_making_the_selector(
    tiny_checkpoint: CheckpointFactory, name: str
) -> None:
    folder = tiny_checkpoint()
    write_adapter(folder)
    model, _ = load_model(folder)
    calibration = calibrate(model, [CalibrationExample(range(9, 60))])
    files = SelectorFiles(load_adapter(folder / "ifp" / "adapter"), calibration)
    assert files.adapter is not None
    expected = files.adapter.fingerprint if name == "predictor" else SELECTORS[name].version
    assert selector_version(SelectorSpec(name), files) == expected
