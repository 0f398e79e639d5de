"""Selectors score, selections are exact, checked and comparable."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.errors import DataError, SelectionError
from ifp_mlx.selection.calibration import Calibration, CalibrationExample, calibrate
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.selectors import (
    BlendSelector,
    NamedSelector,
    PromptSelector,
    RandomSelector,
    Selector,
    StaticSelector,
    select,
)
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.statistics import ranks
from ifp_mlx.selection.top_k import mask_from_indices, top_k_indices
from ifp_mlx.units.kinds import UnitShape

ModelFactory = Callable[..., nn.Module]
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


TINY = UnitShape((0, 1, 2), 192)


def selection_of(rows: list[list[int]] | mx.array, num_units: int = 24) -> Selection:
    indices = rows if isinstance(rows, mx.array) else mx.array(rows, dtype=mx.int32)
    pick = Pick("ffn", tuple(range(indices.shape[0])), indices, num_units)
    return Selection((pick,), SelectorSpec("test"))


def named(selector: Selector, shape: UnitShape = TINY, name: str = "test") -> NamedSelector:
    return NamedSelector(selector, SelectorSpec(name), "ffn", shape)


def unit_activations(model: nn.Module, ids: list[int]) -> list[np.ndarray]:
    """An independent reading: the llama forward pass, one layer at a time."""
    hidden = model.model.embed_tokens(mx.array([ids]))
    found = []
    for layer in model.layers:
        attended = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal", None)
        mlp, normed = layer.mlp, layer.post_attention_layernorm(attended)
        units = nn.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        found.append(np.array(units[0]))
        hidden = attended + mlp.down_proj(units)
    return found


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.sampled_from([1, 3, 1000]))
def test_top_k_keeps_exactly_k_sorted_unique_and_best(seed: int, k: int, levels: int) -> None:
    scores = np.random.default_rng(seed).integers(0, levels, (3, 24)).astype(np.float32)
    kept = np.array(top_k_indices(mx.array(scores), k))
    assert kept.shape == (3, k)
    assert (np.diff(kept, axis=-1) > 0).all()
    stable = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(kept, np.sort(stable, axis=-1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 24))
def test_top_k_of_distinct_scores_follows_a_permutation(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores, order = rng.permutation(24).astype(np.float32)[None], rng.permutation(24)
    kept = np.array(top_k_indices(mx.array(scores), k))[0]
    permuted = np.array(top_k_indices(mx.array(scores[:, order]), k))[0]
    assert set(order[permuted]) == set(kept)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_top_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(SelectionError, match=f"cannot keep {k} of 24 units"):
        top_k_indices(mx.zeros((2, 24)), k)


def test_mask_is_one_at_the_kept_units() -> None:
    mask = np.array(mask_from_indices(mx.array([[0, 2], [1, 3]]), 4))
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 24]], "outside 0..23"),
        ([[-1, 3]], "outside 0..23"),
        ([[3, 3]], "ascending and unique"),
        ([[5, 3]], "ascending and unique"),
    ],
)
def test_indices_that_take_would_accept_are_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        selection_of(rows).validate()


def test_wrong_dtype_and_rank_are_refused() -> None:
    with pytest.raises(SelectionError, match="int32"):
        selection_of(mx.array([[0.0, 1.0]])).validate()
    with pytest.raises(SelectionError, match="int32"):
        selection_of(mx.array([0, 1], dtype=mx.int32)).validate()


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2), (1, 0), (1, 1)])
def test_layers_that_do_not_fit_the_indices_are_refused(layers: tuple[int, ...]) -> None:
    pick = Pick("ffn", layers, mx.array([[0, 1], [2, 3]], dtype=mx.int32), 24)
    with pytest.raises(SelectionError, match="2 layers names layers"):
        Selection((pick,), SelectorSpec("test")).validate()


def test_overlap_is_the_shared_share_by_layer() -> None:
    overlap = selection_of([[0, 1, 2], [3, 4, 5]]).overlap(selection_of([[0, 1, 9], [6, 7, 8]]))
    np.testing.assert_allclose(np.array(overlap), [2 / 3, 0])
    with pytest.raises(SelectionError, match="one shape"):
        selection_of([[0]]).overlap(selection_of([[0]], num_units=25))


def test_selection_survives_the_disk(tmp_path: Path) -> None:
    pick = Pick("ffn", (2, 5), mx.array([[1, 4], [0, 3]], dtype=mx.int32), 24)
    saved = Selection((pick,), SelectorSpec("static", "math"))
    saved.save(tmp_path / "s.safetensors", {"a": "b"})
    selection, metadata = Selection.load(tmp_path / "s.safetensors")
    assert mx.array_equal(selection.pick.indices, pick.indices)
    assert (selection.pick.layers, selection.num_units) == ((2, 5), 24)
    assert selection.selector == SelectorSpec("static", "math")
    assert selection.digest == saved.digest
    assert metadata["a"] == "b"


def test_what_scores_were_is_kept_as_ranks(tmp_path: Path) -> None:
    prior = Calibration(mx.array([[0.1, 9.0, -3.0, 2.0]]), {}, 1)
    spec, shape = SelectorSpec("static"), UnitShape((0,), 4)
    named = NamedSelector(StaticSelector(prior), spec, "ffn", shape)
    select(named, (), 2).save(tmp_path / "s.safetensors")
    pick = Selection.load(tmp_path / "s.safetensors")[0].pick
    assert pick.indices.tolist() == [[1, 3]]
    assert pick.ranks is not None
    assert pick.ranks.tolist() == [[64, 192, 0, 128]]


def test_ranks_that_do_not_fit_are_refused() -> None:
    for wrong in (mx.zeros((1, 5), dtype=mx.uint8), mx.zeros((1, 4))):
        pick = Pick("ffn", (0,), mx.array([[1]], dtype=mx.int32), 4, wrong)
        with pytest.raises(SelectionError, match="ranks of units"):
            pick.validate()


def test_selection_files_of_version_1_are_read(tmp_path: Path) -> None:
    indices = mx.array([[1, 4], [0, 3]], dtype=mx.int32)
    header = {"num_units": "24", "selector": "static:math"}
    mx.save_safetensors(str(tmp_path / "s.safetensors"), {"indices": indices}, header)
    selection, _ = Selection.load(tmp_path / "s.safetensors")
    assert mx.array_equal(selection.pick.indices, indices)
    assert (selection.pick.kind, selection.pick.shape) == ("ffn", UnitShape((0, 1), 24))
    assert str(selection.selector) == "static:math"


def test_digest_tells_selections_apart() -> None:
    one = selection_of([[0, 1], [2, 3]])
    assert one.digest == selection_of([[0, 1], [2, 3]]).digest
    others = [
        selection_of([[0, 1], [2, 4]]),
        selection_of([[0, 1], [2, 3]], num_units=25),
        Selection((Pick("ffn", (0, 2), one.pick.indices, 24),), one.selector),
        Selection((Pick("expert", (0, 1), one.pick.indices, 24),), one.selector),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_calibration_is_the_norm_product_of_an_independent_reading(
    tiny_model: ModelFactory,
) -> None:
    model = tiny_model("llama")
    examples = [CalibrationExample(PROMPT, "a"), CalibrationExample(PROMPT[:5], "b")]
    calibration = calibrate(model, examples)
    assert calibration.num_tokens == len(PROMPT) + 5
    for layer in range(3):
        down = np.linalg.norm(np.array(model.layers[layer].mlp.down_proj.weight), axis=0)
        tasks = []
        for name, ids in (("a", PROMPT), ("b", PROMPT[:5])):
            units = unit_activations(model, ids)[layer]
            tasks.append(np.sqrt((units**2).mean(axis=0)) * down)
            np.testing.assert_allclose(calibration.tasks[name][layer], tasks[-1], rtol=1e-4)
        np.testing.assert_allclose(calibration.importance[layer], np.mean(tasks, 0), rtol=1e-4)


def test_calibration_survives_the_disk(tiny_model: ModelFactory, tmp_path: Path) -> None:
    calibration = calibrate(tiny_model("llama"), [CalibrationExample(PROMPT, "a")])
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    np.testing.assert_allclose(again.importance, calibration.importance, rtol=1e-3)
    assert (set(again.tasks), again.num_tokens) == ({"a"}, len(PROMPT))
    (tmp_path / "c.safetensors").write_bytes(b"junk")
    with pytest.raises(SelectionError, match="is not a calibration file"):
        Calibration.load(tmp_path / "c.safetensors")


def test_calibration_without_text_is_refused(tiny_model: ModelFactory) -> None:
    with pytest.raises(DataError, match="no text to calibrate on"):
        calibrate(tiny_model("llama"), [CalibrationExample([])])


def test_prompt_scores_are_griffins_statistic(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    texts = [PROMPT, PROMPT[:3], PROMPT[::-1]]  # read together, the second is padded
    scores = np.array(PromptSelector(model).scores(texts))
    for text, of_text in zip(texts, scores, strict=True):
        for layer, units in enumerate(unit_activations(model, text)):
            relative = units / np.linalg.norm(units, axis=-1, keepdims=True)
            expected = np.linalg.norm(relative, axis=0)
            np.testing.assert_allclose(of_text[layer], expected, rtol=1e-4)


def test_blend_is_the_weighted_mean_of_ranks(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")
    calibration = calibrate(model, [CalibrationExample(PROMPT[::-1])])
    blend = BlendSelector(model, calibration, prior_weight=0.25).scores([PROMPT])[0]
    expected = 0.25 * ranks(calibration.importance)
    expected += 0.75 * ranks(PromptSelector(model).scores([PROMPT])[0])
    np.testing.assert_allclose(blend, expected, atol=1e-6)


def test_ranks_count_the_smaller_scores() -> None:
    np.testing.assert_allclose(ranks(mx.array([[3.0, 1.0, 2.0, 9.0]])), [[0.5, 0, 0.25, 0.75]])


def test_static_selects_the_same_whatever_the_instruction(tiny_model: ModelFactory) -> None:
    calibration = calibrate(tiny_model("llama"), [CalibrationExample(PROMPT, "a")])
    selector = StaticSelector(calibration)
    first, second = select(named(selector), PROMPT, 9), select(named(selector), [1], 9)
    assert mx.array_equal(first.pick.indices, second.pick.indices)
    assert mx.array_equal(first.pick.indices, top_k_indices(calibration.importance, 9))


def test_unknown_task_is_refused_with_the_list(tiny_model: ModelFactory) -> None:
    calibration = calibrate(tiny_model("llama"), [CalibrationExample(PROMPT, "math")])
    with pytest.raises(SelectionError, match="no calibrated task 'code'; there are: math"):
        StaticSelector(calibration, "code").scores([()])


def test_random_selects_by_seed() -> None:
    shape = UnitShape((0, 1, 2), 24)
    one = select(named(RandomSelector(shape, seed=1), shape), [1], 9)
    same = select(named(RandomSelector(shape, seed=1), shape), [2], 9)
    other = select(named(RandomSelector(shape, seed=2), shape), [1], 9)
    assert mx.array_equal(one.pick.indices, same.pick.indices)
    assert not mx.array_equal(one.pick.indices, other.pick.indices)


def test_scores_that_are_not_finite_are_refused() -> None:
    class Broken:
        def scores(self, texts: object) -> mx.array:
            return mx.array([[[1.0, float("nan"), 2.0]]])

    with pytest.raises(SelectionError, match="'broken' gave scores that are not finite"):
        select(named(Broken(), UnitShape((0,), 3), "broken"), [1], 2)


def test_examples_of_a_task_count_as_much_as_its_description() -> None:
    class Known:
        def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
            rows = [mx.zeros((1, 4)).at[0, unit].add(float(score)) for unit, score in texts]
            return mx.stack(rows)

    description, examples = [0, 4], [[1, 9], [2, 5], [3, 1]]
    known = named(Known(), UnitShape((0,), 4))
    # Units score 4, 9 / 3, 5 / 3 and 1 / 3 before both halves are halved.
    assert select(known, description, 2, examples).pick.indices.tolist() == [[0, 1]]
    assert select(known, [0, 2], 2, examples).pick.indices.tolist() == [[0, 1]]
    assert select(known, [0, 1], 2, examples).pick.indices.tolist() == [[1, 2]]
