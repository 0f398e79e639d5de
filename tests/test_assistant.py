"""The assistant: selects once a task, serves from the cache, shares what it can."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.assistant import Assistant
from ifp_mlx.chat.conversation import SamplingOptions
from ifp_mlx.errors import CheckpointError, ResourceError, SelectionError, UsageError
from ifp_mlx.selection.calibration import CalibrationExample, calibrate
from ifp_mlx.storage import checkpoint
from ifp_mlx.subnets.task_cache import SubNetCache

CheckpointFactory = Callable[..., Path]
TASK = "help me write Python"


@pytest.fixture
def calibrated(tiny_checkpoint: CheckpointFactory) -> Path:
    """A tiny checkpoint with a calibration in its ifp/ folder."""
    folder = tiny_checkpoint()
    (folder / "ifp").mkdir()
    model, _ = checkpoint.load_model(folder)
    examples = [CalibrationExample(range(9, 60), "code"), CalibrationExample(range(60, 99), "talk")]
    calibrate(model, examples).save(folder / "ifp" / "calibration.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> SubNetCache:
    return SubNetCache(tmp_path / "subnets")


def test_second_request_is_a_cache_hit_without_selection(
    calibrated: Path, cache: SubNetCache
) -> None:
    first = Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    second = Assistant.load(calibrated, cache=cache).subnetwork_for_task(f" {TASK}\n", 64)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.selection_s > 0
    assert second.selection_s == 0
    assert first.selection is not None
    assert second.selection is not None
    assert mx.array_equal(first.selection.indices, second.selection.indices)


def test_a_resident_sub_network_is_not_sliced_again(calibrated: Path, cache: SubNetCache) -> None:
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


def test_keeping_every_unit_is_the_dense_model(calibrated: Path, cache: SubNetCache) -> None:
    assistant = Assistant.load(calibrated, cache=cache)
    subnet = assistant.subnetwork_for_task(TASK, 192)
    assert subnet.model is assistant.dense().model
    assert subnet.active_parameters == subnet.total_parameters
    assert cache.entries() == []


def test_near_duplicates_share_a_sub_network_when_asked(
    calibrated: Path, cache: SubNetCache
) -> None:
    Assistant.load(calibrated, cache=cache).subnetwork_for_task(TASK, 64)
    choosy = Assistant.load(calibrated, cache=cache, reuse_threshold=1.01)
    assert choosy.subnetwork_for_task("write some Python", 64).reused_task is None
    lenient = Assistant.load(calibrated, cache=cache, reuse_threshold=0.05)
    reused = lenient.subnetwork_for_task("Python, please", 64)
    assert reused.reused_task in (TASK, "write some Python")
    assert reused.reuse_overlap is not None
    assert 0.05 <= reused.reuse_overlap <= 1
    assert len(cache.entries()) == 2


def test_a_full_disk_costs_the_cache_entry_not_the_answer(
    calibrated: Path, cache: SubNetCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ResourceError("cannot write: No space left on device")

    monkeypatch.setattr(cache, "put", full)
    warnings: list[str] = []
    assistant = Assistant.load(calibrated, cache=cache, on_warning=warnings.append)
    subnet = assistant.subnetwork_for_task(TASK, 64)
    assert subnet.num_kept_units == 64
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


def test_best_selector_that_the_files_allow_is_taken(
    calibrated: Path, tiny_checkpoint: CheckpointFactory
) -> None:
    assert Assistant.load(calibrated).selector_name == "blend"
    assert Assistant.load(tiny_checkpoint(name="bare")).selector_name == "prompt"


def test_static_task_prior_is_selectable(calibrated: Path) -> None:
    code = Assistant.load(calibrated, selector="static:code").select_for("x", 64)
    talk = Assistant.load(calibrated, selector="static:talk").select_for("x", 64)
    assert not mx.array_equal(code.indices, talk.indices)
    with pytest.raises(SelectionError, match="no calibrated task 'law'; there are: code, talk"):
        Assistant.load(calibrated, selector="static:law")


def test_selector_without_its_files_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(UsageError, match="needs a calibration"):
        Assistant.load(folder, selector="static")
    with pytest.raises(UsageError, match="needs an IFP adapter"):
        Assistant.load(folder, selector="predictor")
    with pytest.raises(UsageError, match="no selector 'best'; there are: predictor"):
        Assistant.load(folder, selector="best")


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
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(32) == 3, float("nan"), weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match="values that are not numbers"):
        Assistant.load(folder)


def test_compensation_changes_the_compact_model(calibrated: Path) -> None:
    plain = Assistant.load(calibrated).subnetwork_for_task(TASK, 64)
    compensated = Assistant.load(calibrated, compensate=True).subnetwork_for_task(TASK, 64)
    assert "bias" not in plain.model.layers[0].mlp.down_proj
    assert "bias" in compensated.model.layers[0].mlp.down_proj


def test_conversation_answers_with_the_sub_network(calibrated: Path) -> None:
    assistant = Assistant.load(calibrated)
    conversation = assistant.converse(assistant.subnetwork_for_task(TASK, 64))
    assert "".join(conversation.reply("hello", SamplingOptions(max_new_tokens=5)))
    assert conversation.stats is not None
    assert conversation.stats.generated_tokens == 5
