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
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.unit_file import write_unit_file
from ifp_mlx.storage import weights
from ifp_mlx.storage.weights import load_model
from ifp_mlx.subnets import dense_model, memory
from ifp_mlx.subnets.dense_model import KeptModel, StreamedModel, open_dense_model
from ifp_mlx.units.modules import stored_bytes

CheckpointFactory = Callable[..., Path]
CONTEXT = 300
RANDOM, PROMPT = SelectorSpec("random"), SelectorSpec("prompt")


def random_units(path: Path, num_kept_units: int) -> Selection:
    return select_random(load_model(path, lazy=True)[0], num_kept_units)


def weight_bytes(model: nn.Module) -> int:
    return stored_bytes(model)


@pytest.mark.parametrize("dtype", [None, mx.bfloat16], ids=["stored", "bfloat16"])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("exact_down", [False, True])
def test_predicted_weights_are_those_of_the_compact_model(
    tiny_checkpoint: CheckpointFactory, dtype: mx.Dtype | None, bits: int | None, exact_down: bool
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    if bits is not None:
        quantize(path, bits)
    selection = random_units(path, 64)
    options = CutOptions(exact_down=exact_down)
    loaded = load_subnetwork(path, selection, dtype=dtype, options=options)
    sizes = memory.checkpoint_sizes(path, dtype, exact_down=exact_down)
    predicted = sizes.predict(64, CONTEXT).weights_bytes
    assert predicted == pytest.approx(weight_bytes(loaded.model), rel=0.01)


def quantize(path: Path, bits: int) -> None:
    import json

    from mlx_lm.utils import quantize_model

    model, config = quantize_model(*load_model(path), 32, bits)
    arrays = dict(tree_flatten(model.parameters()))
    mx.eval(arrays)
    mx.save_safetensors(str(path / "model.safetensors"), arrays, {"format": "mlx"})
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
    write_unit_file(path)
    selection = random_units(path, 1024)
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
    with pytest.raises(ResourceError, match="`keep_units` 128 is the most that fits, or `force`"):
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
        monkeypatch.setattr(memory, "usable_memory_bytes", lambda limit=None: num_bytes)

    return say


def test_models_are_kept_where_a_sub_network_fits_beside_them(
    tiny_checkpoint: CheckpointFactory, tiny_machine: Callable[[int], None]
) -> None:
    path = tiny_checkpoint()
    sizes = memory.checkpoint_sizes(path)
    units_bytes = sizes.amounts.num_units * sizes.dense_unit_bytes
    needed = sizes.predict(sizes.amounts.num_units, CONTEXT).total_bytes + units_bytes
    options = CutOptions(context_tokens=CONTEXT)
    assert sizes.dense_bytes > needed * dense_model.SMALL_SHARE_OF_MEMORY / 1000
    tiny_machine(needed)
    assert isinstance(open_dense_model(path, options), KeptModel)
    tiny_machine(needed - 1)
    assert isinstance(open_dense_model(path, options), StreamedModel)


def test_the_user_s_limit_counts_as_the_machine_s_memory(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    path = tiny_checkpoint()
    assert isinstance(open_dense_model(path), KeptModel)
    limited = open_dense_model(path, CutOptions(memory_bytes=10**6))
    assert isinstance(limited, StreamedModel)
    with pytest.raises(ResourceError, match=r"there are 0\.00 GB"):
        limited.whole()


def test_a_large_kept_model_is_read_in_parts_until_something_needs_the_whole(
    tiny_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint()
    monkeypatch.setattr(dense_model, "SMALL_SHARE_OF_MEMORY", 0)
    kept = open_dense_model(path, lazy=True)
    selection = random_units(path, 64)
    in_parts = kept.cut(selection)
    assert in_parts.unit_bytes_read is not None
    assert kept.reader is kept.skeleton
    from_memory = kept.cut(selection)
    assert from_memory.unit_bytes_read is None
    tokens = mx.array([[3, 14, 15, 9]])
    assert mx.allclose(in_parts.model(tokens), from_memory.model(tokens), atol=1e-5)


@pytest.fixture
def streamed_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return nothing; no model is kept in memory, as where it does not fit."""

    def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(memory.CheckpointSizes, "fits_beside_subnetwork", never)


@pytest.mark.parametrize("selector", [PROMPT, RANDOM], ids=str)
def test_streamed_and_kept_models_answer_alike(
    tiny_checkpoint: CheckpointFactory, request: pytest.FixtureRequest, selector: SelectorSpec
) -> None:
    path = tiny_checkpoint()
    kept = Assistant.load(path, selector=selector)
    request.getfixturevalue("streamed_always")
    streamed = Assistant.load(path, selector=selector)
    assert isinstance(streamed._open_dense(), StreamedModel)
    expected = kept.subnetwork_for_task("help me write Python", 64)
    found = streamed.subnetwork_for_task("help me write Python", 64)
    assert found.selection is not None
    assert expected.selection is not None
    assert mx.array_equal(found.selection.pick.indices, expected.selection.pick.indices)
    tokens = mx.array([[3, 14, 15, 9]])
    # Columns lie otherwise in memory, so sums are added up in another order.
    assert mx.allclose(found.model(tokens), expected.model(tokens), atol=1e-5)
    assert (found.size, found.source) == (expected.size, expected.source)
    assert mx.allclose(streamed.dense().model(tokens), kept.dense().model(tokens), atol=1e-5)


@pytest.mark.usefixtures("streamed_always")
def test_sub_networks_of_a_streamed_model_share_what_they_have_in_common(
    tiny_checkpoint: CheckpointFactory,
) -> None:
    assistant = Assistant.load(tiny_checkpoint(), selector=PROMPT)
    one = assistant.subnetwork_for_task("help me write Python", 64).model
    other = assistant.subnetwork_for_task("tell me a story", 64).model
    assert one.layers[0].self_attn.q_proj.weight is other.layers[0].self_attn.q_proj.weight
    assert one.model.embed_tokens.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "kept"])
def test_requantization_is_told_and_can_be_refused(
    tiny_checkpoint: CheckpointFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    streamed: bool,
) -> None:
    path = tiny_checkpoint(hidden_size=64)
    quantize(path, 4)
    if streamed:
        request.getfixturevalue("streamed_always")
    monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)  # as on a GPU
    default = Assistant.load(path, selector=RANDOM).subnetwork_for_task("write Python", 64)
    assert 0 < default.requantization_error < 0.01
    exact = Assistant.load(path, selector=RANDOM, options=CutOptions(exact_down=True))
    assert exact.subnetwork_for_task("write Python", 64).requantization_error == 0


def test_what_does_not_fit_is_refused_unless_forced(
    tiny_checkpoint: CheckpointFactory, tiny_machine: Callable[[int], None]
) -> None:
    path = tiny_checkpoint()
    tiny_machine(10**6)
    assistant = Assistant.load(path, selector=RANDOM)
    with pytest.raises(ResourceError, match=r"64 of 192 FFN units need .* there are 0\.00 GB"):
        assistant.subnetwork_for_task("help me write Python", 64)
    with pytest.raises(ResourceError, match="192 of 192 FFN units need"):
        assistant.dense()
    forced = Assistant.load(path, selector=RANDOM, options=CutOptions(force=True))
    assert forced.subnetwork_for_task("help me write Python", 64).num_kept_units == 64
