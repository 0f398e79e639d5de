"""Predicted memory is what loading takes, and too much is refused with advice that works."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ifp_mlx.assistant import Assistant
from ifp_mlx.errors import ResourceError
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_side_file
from ifp_mlx.storage import checkpoint
from ifp_mlx.storage.checkpoint import load_model
from ifp_mlx.subnets import base_model, memory
from ifp_mlx.subnets.base_model import KeptModel, StreamedModel, open_base_model

CheckpointFactory = Callable[..., Path]
CONTEXT = 300


def select_random(num_kept_units: int) -> Selection:
    scores = mx.random.uniform(shape=(3, 192), key=mx.random.key(5))
    return Selection(top_k_indices(scores, num_kept_units), 192, "random")


def weight_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("dtype", [None, mx.bfloat16], ids=["stored", "bfloat16"])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("exact_down", [False, True])
def test_predicted_weights_are_those_of_the_compact_model(
    tiny_checkpoint: CheckpointFactory, dtype: mx.Dtype | None, bits: int | None, exact_down: bool
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    if bits is not None:
        quantize(path, bits)
    loaded = load_subnetwork(path, select_random(64), dtype=dtype, exact_down=exact_down)
    sizes = memory.checkpoint_sizes(path, dtype, exact_down=exact_down)
    predicted = sizes.predict(64, CONTEXT).weights_bytes
    assert predicted == pytest.approx(weight_bytes(loaded.model), rel=0.01)


def quantize(path: Path, bits: int) -> None:
    import json

    from mlx_lm.utils import quantize_model

    model, config = quantize_model(*load_model(path), 32, bits)
    weights = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi3"])
def test_predicted_kv_cache_is_the_one_that_mlx_lm_makes(
    tiny_checkpoint: CheckpointFactory, family: str
) -> None:
    path = tiny_checkpoint(family)
    model = load_model(path)[0]
    kv_cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, CONTEXT), dtype=mx.int32), cache=kv_cache))
    actual = sum(layer.keys.nbytes + layer.values.nbytes for layer in kv_cache)
    assert memory.predict_peak_bytes(path, 64, CONTEXT).kv_cache_bytes == actual


def test_peak_of_loading_stays_below_the_prediction(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(hidden_size=128, intermediate_size=4096, num_hidden_layers=4)
    write_side_file(path)
    scores = mx.random.uniform(shape=(4, 4096), key=mx.random.key(5))
    selection = Selection(top_k_indices(scores, 1024), 4096, "random")
    predicted = memory.predict_peak_bytes(path, 1024, 1)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loaded = load_subnetwork(path, selection)
    peak = mx.get_peak_memory() - before
    assert weight_bytes(loaded.model) <= peak
    assert peak <= predicted.weights_bytes + predicted.working_set_bytes


def test_largest_k_that_fits_is_the_last_one_that_is_not_refused(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    sizes = memory.checkpoint_sizes(tiny_checkpoint())
    available = sizes.predict(128, CONTEXT).total_bytes
    assert sizes.largest_k_that_fits(CONTEXT, available) == 128
    assert memory.require_memory(sizes, 128, CONTEXT, available).total_bytes == available
    with pytest.raises(ResourceError, match="--keep-units 128 is the most that fits, or --force"):
        memory.require_memory(sizes, 192, CONTEXT, available)


def test_nothing_fits_where_even_the_shared_weights_do_not(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    sizes = memory.checkpoint_sizes(tiny_checkpoint())
    assert sizes.largest_k_that_fits(CONTEXT, 10**6) is None
    with pytest.raises(ResourceError, match="no amount of units fits; use a quantized checkpoint"):
        memory.require_memory(sizes, 64, CONTEXT, 10**6)


def test_usable_memory_is_within_the_machine() -> None:
    assert 2**28 < memory.usable_memory_bytes() < 2**50


@pytest.fixture
def tiny_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how much memory this machine is said to have."""

    def say(num_bytes: int) -> None:
        monkeypatch.setattr(memory, "usable_memory_bytes", lambda: num_bytes)

    return say


def test_small_models_are_kept_and_large_ones_streamed(
    tiny_checkpoint: CheckpointFactory, tiny_machine: Callable[[int], None]
) -> None:
    path = tiny_checkpoint()
    assert isinstance(open_base_model(path), KeptModel)
    tiny_machine(10**6)
    assert isinstance(open_base_model(path), StreamedModel)


@pytest.mark.parametrize("selector", ["prompt", "random"])
def test_streamed_and_kept_models_answer_alike(
    tiny_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    path = tiny_checkpoint()
    kept = Assistant.load(path, selector=selector)
    monkeypatch.setattr(base_model, "KEPT_SHARE_OF_MEMORY", 0)
    streamed = Assistant.load(path, selector=selector)
    assert isinstance(streamed._open_base(), StreamedModel)
    expected = kept.subnetwork_for_task("help me write Python", 64)
    found = streamed.subnetwork_for_task("help me write Python", 64)
    assert found.selection is not None
    assert expected.selection is not None
    assert mx.array_equal(found.selection.indices, expected.selection.indices)
    tokens = mx.array([[3, 14, 15, 9]])
    # Columns lie otherwise in memory, so sums are added up in another order.
    assert mx.allclose(found.model(tokens), expected.model(tokens), atol=1e-5)
    assert (found.active_parameters, found.total_parameters) == (
        expected.active_parameters,
        expected.total_parameters,
    )
    assert mx.allclose(streamed.dense().model(tokens), kept.dense().model(tokens), atol=1e-5)


def test_sub_networks_of_a_streamed_model_share_what_they_have_in_common(
    tiny_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "KEPT_SHARE_OF_MEMORY", 0)
    assistant = Assistant.load(tiny_checkpoint(), selector="prompt")
    one = assistant.subnetwork_for_task("help me write Python", 64).model
    other = assistant.subnetwork_for_task("tell me a story", 64).model
    assert one.layers[0].self_attn.q_proj.weight is other.layers[0].self_attn.q_proj.weight
    assert one.model.embed_tokens.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize("share", [0, 1], ids=["streamed", "kept"])
def test_requantization_is_told_and_can_be_refused(
    tiny_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    quantize(path, 4)
    monkeypatch.setattr(base_model, "KEPT_SHARE_OF_MEMORY", share)
    monkeypatch.setattr(checkpoint, "automatic_dtype", lambda model: None)  # as on a GPU
    default = Assistant.load(path, selector="random").subnetwork_for_task("write Python", 64)
    assert 0 < default.requantization_error < 0.01
    exact = Assistant.load(path, selector="random", exact_down=True)
    assert exact.subnetwork_for_task("write Python", 64).requantization_error == 0


def test_what_does_not_fit_is_refused_unless_forced(
    tiny_checkpoint: CheckpointFactory, tiny_machine: Callable[[int], None]
) -> None:
    path = tiny_checkpoint()
    tiny_machine(10**6)
    assistant = Assistant.load(path, selector="random")
    with pytest.raises(ResourceError, match=r"64 of 192 units need .* this machine has 0\.00 GB"):
        assistant.subnetwork_for_task("help me write Python", 64)
    with pytest.raises(ResourceError, match="192 of 192 units need"):
        assistant.dense()
    forced = Assistant.load(path, selector="random", force=True)
    assert forced.subnetwork_for_task("help me write Python", 64).num_kept_units == 64
