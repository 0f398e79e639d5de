"""The assistant: selects once a task, serves from the cache, shares what it can."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.errors import CheckpointError, ResourceError, SelectionError, UsageError
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.storage.arrays import load_arrays
from ifp_mlx.storage.weights import load_model
from ifp_mlx.subnets.task_cache import TaskCache

CheckpointFactory = Callable[..., Path]
TASK = "help me write Python"


@pytest.fixture
def calibrated(tiny_checkpoint: CheckpointFactory) -> Path:
    """A tiny checkpoint with a calibration in its ifp/ folder."""
    folder = tiny_checkpoint()
    (folder / "ifp").mkdir()
    model, _ = load_model(folder)
    examples = [CalibrationExample(range(9, 60), "code"), CalibrationExample(range(60, 99), "talk")]
    calibrate(model, examples).save(folder / "ifp" / "calibration.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> TaskCache:
    return TaskCache(tmp_path / "subnets")


def test_second_request_is_a_cache_hit_without_selection(
    calibrated: Path, cache: TaskCache
) -> None:
    first = Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    second = Assistant.load(calibrated, cache=cache).subnetwork_for_task(f" {TASK}\n", 64)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.selection_s > 0
    assert second.selection_s == 0
    assert first.selection is not None
    assert second.selection is not None
    assert mx.array_equal(first.selection.pick.indices, second.selection.pick.indices)


def test_a_resident_sub_network_is_not_sliced_again(calibrated: Path, cache: TaskCache) -> None:
    assistant = Assistant.load(calibrated, cache=cache)
    first = assistant.subnetwork_for_task(TASK, 64)
    assistant.subnetwork_for_task("something else", 64)
    again = assistant.subnetwork_for_task(TASK, 64)
    assert again.model is first.model
    assert again.slicing_s == 0


def test_resident_sub_networks_leave_when_the_budget_is_full(calibrated: Path) -> None:
    assistant = Assistant.load(calibrated)
    assistant._compact_models._max_resident_bytes = 1
    first = assistant.subnetwork_for_task(TASK, 64)
    assistant.subnetwork_for_task("something else", 64)
    assert assistant.subnetwork_for_task(TASK, 64).model is not first.model


def test_keeping_every_unit_is_the_dense_model(calibrated: Path, cache: TaskCache) -> None:
    assistant = Assistant.load(calibrated, cache=cache)
    subnet = assistant.subnetwork_for_task(TASK, 192)
    assert subnet.model is assistant.dense().model
    assert subnet.size == subnet.source
    assert cache.entries() == []


def test_near_duplicates_share_a_sub_network_when_asked(calibrated: Path, cache: TaskCache) -> None:
    Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    choosy = Assistant.load(calibrated, cache=cache, reuse_threshold=1.01)
    assert choosy.subnetwork_for_task("write some Python", 64).reused_task is None
    lenient = Assistant.load(calibrated, cache=cache, reuse_threshold=0.05)
    reused = lenient.subnetwork_for_task("Python, please", 64)
    assert reused.reused_task in (TASK, "write some Python")
    assert reused.reuse_overlap is not None
    assert 0.05 <= reused.reuse_overlap <= 1


def test_a_reuse_is_remembered_and_selects_no_more(
    calibrated: Path, cache: TaskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = Assistant.load(calibrated, cache=cache, reuse_threshold=0.05)
    assistant.subnetwork_for_task(TASK, 64)
    first = assistant.subnetwork_for_task("Python, please", 64)
    assert (first.reused_task, first.from_cache) == (TASK, False)

    def refuse(*_: object) -> None:
        raise AssertionError("selected again")

    monkeypatch.setattr(Assistant, "_select", refuse)
    monkeypatch.setattr("ifp_mlx.assistant.open_dense_model", refuse)
    later = Assistant.load(calibrated, cache=cache, reuse_threshold=0.05, preload=False)
    again = later.subnetwork_for_task("Python, please", 64)
    assert (again.reused_task, again.from_cache) == (TASK, True)
    assert again.reuse_overlap == first.reuse_overlap
    assert again.selection is not None
    assert first.selection is not None
    assert again.selection.digest == first.selection.digest


def test_a_damaged_entry_does_not_break_another_task(calibrated: Path, cache: TaskCache) -> None:
    Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    (entry,) = cache.entries()
    content = entry.path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    entry.path.write_bytes(content[:size] + b"\x7f" * (len(content) - size))
    lenient = Assistant.load(calibrated, cache=cache, reuse_threshold=0.05)
    assert lenient.subnetwork_for_task("tell me a story", 64).reused_task is None


def test_a_full_disk_costs_the_cache_entry_not_the_answer(
    calibrated: Path,
    cache: TaskCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ResourceError("cannot write: No space left on device")

    monkeypatch.setattr(cache, "put", full)
    subnet = Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    assert subnet.num_kept_units == 64
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.messages[0]


def test_best_selector_that_the_files_allow_is_taken(
    calibrated: Path, tiny_checkpoint: CheckpointFactory
) -> None:
    assert Assistant.load(calibrated).files.selector == SelectorSpec("blend")
    assert Assistant.load(tiny_checkpoint(name="bare")).files.selector == SelectorSpec("prompt")


def test_static_task_prior_is_selectable(calibrated: Path) -> None:
    specs = [SelectorSpec.parse(f"static:{task}") for task in ("code", "talk")]
    code, talk = (Assistant.load(calibrated, selector=s).select_for("x", 64) for s in specs)
    assert not mx.array_equal(code.pick.indices, talk.pick.indices)
    with pytest.raises(SelectionError, match="no calibrated task 'law'; there are: code, talk"):
        Assistant.load(calibrated, selector=SelectorSpec.parse("static:law"))


def test_selector_without_its_files_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(UsageError, match="needs a calibration"):
        Assistant.load(folder, selector=SelectorSpec.parse("static"))
    with pytest.raises(UsageError, match="needs an IFP adapter"):
        Assistant.load(folder, selector=SelectorSpec.parse("predictor"))
    with pytest.raises(UsageError, match="no selector 'best'; there are: predictor"):
        Assistant.load(folder, selector=SelectorSpec.parse("best"))


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_descriptions_are_refused(calibrated: Path, text: str) -> None:
    assistant = Assistant.load(calibrated)
    with pytest.raises(UsageError, match="the task description is empty"):
        assistant.subnetwork_for_task(text, 64)
    with pytest.raises(UsageError, match="the prompt is empty"):
        assistant.subnetwork_for_prompt(text, 64)


def test_instruction_beyond_the_context_is_refused(calibrated: Path) -> None:
    with pytest.raises(UsageError, match=r"instruction has \d+ tokens, the model's context 512"):
        Assistant.load(calibrated).subnetwork_for_prompt("x" * 600, 64)


def test_weights_that_are_not_finite_are_refused(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    weights = load_arrays(folder / "model.safetensors")[0]
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(32) == 3, float("nan"), weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match="values that are not numbers"):
        Assistant.load(folder)


def test_conversation_answers_with_the_sub_network(calibrated: Path) -> None:
    assistant = Assistant.load(calibrated)
    conversation = assistant.converse(assistant.subnetwork_for_task(TASK, 64))
    messages = [{"role": "user", "content": "hello"}]
    assert "".join(conversation.reply(messages, SamplingOptions(max_new_tokens=5)))
    assert conversation.stats is not None
    assert conversation.stats.generated_tokens == 5


def test_a_part_reads_and_the_whole_writes(tiny_checkpoint: CheckpointFactory) -> None:
    assistant = Assistant.load(tiny_checkpoint(), reads_with_part=True)
    subnet = assistant.subnetwork_for_task(TASK, 64)
    assert subnet.selection is None
    assert subnet.reader is not None
    assert subnet.reader.num_kept_units == 64
    whole = assistant.dense()
    assert assistant.kv_identity(subnet) != assistant.kv_identity(whole)
    other = assistant.subnetwork_for_task(TASK, 128)
    assert assistant.kv_identity(subnet) != assistant.kv_identity(other)
    messages = [{"role": "user", "content": "hello there, how are you today?" * 4}]
    answer = "".join(assistant.converse(subnet).reply(messages))
    assert answer
    full = assistant.subnetwork_for_task(TASK, assistant.num_units)
    assert full.reader is None
    expected = "".join(assistant.converse(whole).reply(messages))
    assert "".join(assistant.converse(full).reply(messages)) == expected


def test_a_part_that_only_reads_takes_no_adapter(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="leave out `adapter`"):
        Assistant.load(tiny_checkpoint(), adapter=tmp_path, reads_with_part=True)
