"""What the benchmarks time is the real thing. Correctness only: no time is ever asserted."""

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

from ifp_mlx.benchmarking import latency, report, runs, shapes, slicing, stages, switching, timing
from ifp_mlx.benchmarking.latency import Workload
from ifp_mlx.benchmarking.timing import Repeats
from ifp_mlx.chat.generation import Answer
from ifp_mlx.cli import bench
from ifp_mlx.errors import SelectionError, UsageError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, PredictorSelector, select, select_random
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units.modules import unit_arrays, unit_shape

ONCE = Repeats(1, warmups=0)
TINY = runs.ModelOptions("tiny", predictor="tiny", dtype="float32")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    mx.random.seed(3)
    return shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32)


@pytest.fixture(scope="module")
def selector(dense: nn.Module) -> NamedSelector:
    mx.random.seed(4)
    predictor = shapes.build_predictor(shapes.PREDICTORS["tiny"], unit_shape(dense), mx.float32)
    return NamedSelector.of_model(PredictorSelector(predictor), SelectorSpec("predictor"), dense)


def _greedy(model: nn.Module, num_tokens: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num_tokens):
        ids.append(int(np.array(model(mx.array([ids]))[0, -1]).argmax()))
    return ids[len(PROMPT) :]


def test_first_token_begins_the_answer_of_generate(
    dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Answer] = []

    def remember(*args: Any) -> Answer:
        made.append(Answer(*args))
        return made[-1]

    monkeypatch.setattr(stages, "Answer", remember)
    answer = stages.first_token(dense, PROMPT)
    (begun,) = made
    assert begun.stats is not None
    assert begun.stats.generated_tokens == 1
    assert begun.stats.prompt_tokens == len(PROMPT)
    for _ in zip(range(3), answer, strict=False):
        pass
    assert begun.stats.generated_tokens == 4


def test_a_prompt_is_read_but_for_its_last_token(dense: nn.Module) -> None:
    kv_cache = stages.read_prompt(dense, PROMPT)
    assert kv_cache.token_ids == PROMPT[:-1]
    logits = dense(mx.array([PROMPT[-1:]]), cache=kv_cache.layers)
    whole = dense(mx.array([PROMPT]))
    assert mx.allclose(logits[0, -1], whole[0, -1], atol=1e-5).item()


@pytest.mark.parametrize("num_samples", [1, 3])
def test_every_sample_continues_the_prompt(
    dense: nn.Module, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stages, "make_sampler", lambda temperature: lambda logits: mx.argmax(logits, axis=-1)
    )
    kv_cache = stages.read_prompt(dense, PROMPT)
    drawn = stages.decode(dense, PROMPT, kv_cache, 6, num_samples)
    assert drawn == [_greedy(dense, 6)] * num_samples
    # Decoding has not moved the original: more can be drawn from it.
    assert kv_cache.layers[0].offset == len(PROMPT) - 1
    assert stages.decode(dense, PROMPT, kv_cache, 6, num_samples) == drawn


def test_several_samples_differ(dense: nn.Module) -> None:
    kv_cache = stages.read_prompt(dense, PROMPT)
    samples = stages.decode(dense, PROMPT, kv_cache, 12, 4)
    assert len({tuple(sample) for sample in samples}) == 4


def test_cutting_checks_the_selection(dense: nn.Module) -> None:
    selection = select_random(dense, 64)
    pick = dataclasses.replace(selection.pick, indices=selection.pick.indices + 192)
    with pytest.raises(SelectionError, match="outside"):
        stages.cut(dense, Selection((pick,), selection.selector))


@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_cut_is_the_sliced_model(bits: int) -> None:
    model = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32, bits)
    selection = select_random(model, 64)
    ids = mx.array([PROMPT])
    expected = slice_model(model, selection)(ids)
    assert mx.array_equal(stages.cut(model, selection)(ids), expected).item()


def test_an_answer_lets_go_of_its_compact_model(dense: nn.Module, selector: NamedSelector) -> None:
    compact = stages.cut(dense, select(selector, PROMPT, 64))
    made = weakref.ref(compact)
    answer = stages.first_token(compact, PROMPT)
    gc.disable()
    try:
        del compact
        assert made() is not None
        del answer
        assert made() is None
    finally:
        gc.enable()


def test_predictors_select_by_prompt(selector: NamedSelector) -> None:
    one = select(selector, PROMPT, 64)
    other = select(selector, PROMPT[::-1], 64)
    assert not mx.array_equal(one.pick.indices, other.pick.indices).item()


def test_works_take_turns_and_warmups_do_not_count() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = timing.measure_in_turns(works, Repeats(3, warmups=1))
    assert calls == ["a", "b"] * 4
    assert timings["a"].repeats == 3
    assert timings["a"].min_s <= timings["a"].median_s <= timings["a"].max_s


def test_timing_is_the_median() -> None:
    assert timing.Timing.of([3.0, 1.0, 9.0]) == timing.Timing(3.0, 1.0, 9.0, 3)


@pytest.mark.parametrize("copy", timing.COPIES.values(), ids=timing.COPIES.keys())
def test_copies_write_as_much_as_they_read(copy: timing.Copy) -> None:
    array = mx.random.randint(0, 2**31, (64,), dtype=mx.uint32)
    (copied,) = copy([array])
    assert copied.nbytes == array.nbytes
    assert copied is not array


def test_every_way_gathers_the_same(dense: nn.Module) -> None:
    ways = slicing.gathers(dense, select_random(dense, 64))
    sliced, taken = ways[slicing.SLICED](), ways[slicing.TAKEN]()
    assert len(ways) == 2
    assert [array.shape for array in sliced] == [(64, 64)] * 9
    assert all(mx.array_equal(a, b).item() for a, b in zip(sliced, taken, strict=True))


def test_every_exact_way_gathers_the_same() -> None:
    model = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32, 4)
    # So few that plain columns are smaller than the packed whole.
    ways = slicing.gathers(model, select_random(model, 24))
    exact, taken = ways[slicing.SLICED_EXACTLY](), ways[slicing.TAKEN]()
    # Gate and up are weight, scales and biases each; down is plain columns.
    assert len(exact) == 3 * 7
    assert all(mx.array_equal(a, b).item() for a, b in zip(exact, taken, strict=True))


def test_columns_quantized_again_are_nearly_the_same() -> None:
    model = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32, 4)
    ways = slicing.gathers(model, select_random(model, 64))
    down, (weight, scales, biases) = ways[slicing.TAKEN]()[6], ways[slicing.SLICED]()[6:9]
    assert down.shape == (64, 64)
    restored = mx.dequantize(weight, scales, biases, group_size=64, bits=8)
    np.testing.assert_allclose(np.array(restored), np.array(down), atol=0.01)


def test_a_down_that_stays_whole_is_not_counted_as_written() -> None:
    model = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32, 4)
    exact = slicing.gathers(model, select_random(model, 128))[slicing.SLICED_EXACTLY]()
    shared = {id(array) for array in unit_arrays(model).values()}
    assert len(exact) == 3 * 6
    assert not shared & {id(array) for array in exact}


def test_step_bytes_counts_weights_and_kv_cache(dense: nn.Module) -> None:
    per_layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    weights = 4 * (3 * per_layer + 64 + 512 * 64)  # the input embedding is not read
    kv_cache = 4 * 3 * 2 * 32 * (100 + 5) * 2
    assert latency.step_bytes(dense, Workload(100, 10, 2)) == weights + kv_cache


def test_a_tied_embedding_is_read_in_every_step() -> None:
    config = {**shapes.SHAPES["tiny"].config, "tie_word_embeddings": True}
    tied = shapes.build_model(config, mx.float32)
    untied = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32)
    workload = Workload(100, 10, 2)
    assert latency.step_bytes(tied, workload) == latency.step_bytes(untied, workload)


@pytest.mark.parametrize("bits", [16, 4])
def test_latency_compares_six_rows(bits: int) -> None:
    options = runs.ModelOptions("tiny", predictor="tiny", dtype="float32", bits=bits)
    parts: list[dict[str, Any]] = []
    content = runs.run_latency(
        options,
        [Workload(12, 3, 2), Workload(20, 0)],
        repeats=ONCE,
        decode_repeats=1,
        on_part=parts.append,
    )
    assert [len(part["rows"]) for part in parts] == [6, 12]
    assert json.loads(json.dumps(content)) == json.loads(json.dumps(parts[-1]))
    source, per_input = content["rows"][0], _row(content, latency.PER_INPUT)
    assert source["ttft_to_dense"] == 1.0
    assert source["selection"] is None
    assert per_input["ttft_to_dense"] == pytest.approx(
        per_input["ttft"]["median_s"] / source["ttft"]["median_s"]
    )
    assert per_input["tokens_per_s"] == pytest.approx(6 / per_input["decode"]["median_s"])
    assert per_input["parameters"] == _row(content, latency.SMALL)["parameters"]
    per_layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    assert source["parameters"] == 3 * per_layer + 64 + 2 * 512 * 64  # of packed ones, unpacked
    assert content["rows"][6]["decode"] is None
    assert _row(content, latency.READ)["decode"] == source["decode"]


def test_latency_of_a_mixture_of_experts_has_one_row(tmp_path: Path) -> None:
    config = {
        **shapes.SHAPES["qwen1.5-moe-a2.7b"].config,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "vocab_size": 67,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = runs.ModelOptions(str(path), dtype="float32")
    content = runs.run_latency(options, [Workload(12, 3, 2)], repeats=ONCE, decode_repeats=1)
    (row,) = content["rows"]
    assert row["name"] == latency.DENSE
    # A step reads the experts of its tokens, not all of them: no share of bandwidth is claimed.
    assert row["decode"] is not None
    assert row["bandwidth_share"] is None


def test_latency_of_a_part_of_the_experts(tmp_path: Path) -> None:
    config = {
        **shapes.SHAPES["qwen3-30b-a3b"].config,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "vocab_size": 67,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = runs.ModelOptions(str(path), (4,), predictor="tiny", dtype="float32")
    content = runs.run_latency(options, [Workload(12, 3)], repeats=ONCE, decode_repeats=1)
    per_task, small = _row(content, latency.PER_TASK), _row(content, latency.SMALL)
    assert per_task["parameters"] == small["parameters"] < content["rows"][0]["parameters"]
    assert per_task["step_bytes"] is None
    rows = runs.run_slicing(options, repeats=ONCE)["rows"]
    assert {row["num_bytes"] for row in rows} == {2 * 4 * (3 * 32 * 24 + 32) * 4}


def test_a_run_bounds_what_freed_arrays_hold_and_then_lifts_the_bound() -> None:
    limits = []

    def look(_: dict[str, Any]) -> None:
        limits.append(mx.set_cache_limit(0))
        mx.set_cache_limit(limits[-1])

    before = mx.set_cache_limit(10**15)
    try:
        runs.run_latency(TINY, [Workload(4, 0)], repeats=ONCE, decode_repeats=1, on_part=look)
        look({})
    finally:
        mx.set_cache_limit(before)
    assert limits == [runs.CACHE_BYTES, 10**15]


@pytest.mark.parametrize("num_kept_units", [64, 63])
def test_slicing_reports_every_way(num_kept_units: int) -> None:
    options = dataclasses.replace(TINY, num_kept_units=(num_kept_units,), dtype="float16")
    content = runs.run_slicing(options, repeats=ONCE)
    rows = content["rows"]
    assert [row["name"] for row in rows] == [slicing.SLICED, slicing.TAKEN]
    assert {row["num_bytes"] for row in rows} == {3 * 3 * 64 * num_kept_units * 2}


def test_switching_counts_the_memory_of_its_tasks() -> None:
    content = runs.run_switching(TINY, task_counts=[3, 1], prompt_tokens=5, repeats=ONCE)
    assert [row["num_tasks"] for row in content["rows"]] == [1, 3]
    assert {row["task_bytes"] for row in content["rows"]} == {3 * 3 * 64 * 64 * 4}
    for row in content["rows"]:
        assert row["added_bytes"] == pytest.approx(row["num_tasks"] * row["task_bytes"], rel=0.1)


def test_switching_goes_to_other_tasks(
    dense: nn.Module, selector: NamedSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[object] = []
    monkeypatch.setattr(switching, "first_token", lambda model, ids: answered.append(model))
    compacts = [nn.Module(), nn.Module()]
    works = switching._works(dense, selector, 64, compacts, [Path("a"), Path("b")], PROMPT)
    for _ in range(2):
        works["stay"]()
        works["resident"]()
    assert answered == [compacts[0], compacts[1]] * 2


def test_shape_is_read_from_a_folder(tmp_path: Path) -> None:
    config = {"model_type": "llama", "intermediate_size": 192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shapes.find_shape(str(tmp_path), 64)
    assert (shape.num_units, shape.compact_config()["intermediate_size"]) == (192, 64)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: shapes.find_shape("nothing"), "no shape 'nothing'"),
        (lambda: shapes.find_shape("tiny", 193), "has 192 units a layer, not 193"),
        (lambda: shapes.find_shape("qwen1.5-moe-a2.7b").compact_config(), "pass `keep_units`"),
        (lambda: runs.ModelOptions("tiny", bits=7), "`bits` must be one of .*, not 7"),
        (lambda: runs.ModelOptions("tiny", dtype="int8"), "`dtype` must be one of"),
        (
            lambda: runs.run_slicing(runs.ModelOptions("qwen1.5-moe-a2.7b"), repeats=ONCE),
            "pass `keep_units`",
        ),
    ],
)
def test_bad_options_are_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        act()


def test_markdown_table_lines_up() -> None:
    table = report.markdown_table(("name", "ms"), [("a", "1.0"), ("longer", "10.0")])
    assert table.splitlines() == [
        "| name   |   ms |",
        "| ------ | ---: |",
        "| a      |  1.0 |",
        "| longer | 10.0 |",
    ]


@pytest.mark.parametrize("command", ["latency", "slicing", "switch"])
def test_command_prints_a_table_and_writes_json(command: str, tmp_path: Path) -> None:
    arguments = [command, "--shape", "tiny", "--dtype", "float32", "--repeats", "1"]
    arguments += {
        "latency": ["--predictor-config", "tiny", "--prompt", "9", "--new-tokens", "2"],
        "slicing": [],
        "switch": ["--predictor-config", "tiny", "--prompt", "9", "--tasks", "2"],
    }[command]
    path = tmp_path / "out.json"
    result = CliRunner().invoke(bench.app, [*arguments, "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert "| " in result.stdout
    content = json.loads(path.read_text())
    assert content["benchmark"] == command
    assert content["machine"]["mlx"]


def _row(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in content["rows"] if row["name"] == name)


def test_a_checkpoint_is_measured_as_it_is(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint()
    options = runs.ModelOptions("", [64], "tiny", checkpoint_path=path)
    content = runs.run_latency(options, [Workload(12, 0)], repeats=ONCE, decode_repeats=1)
    assert (content["bits"], content["dtype"]) == (16, "float32")
    assert content["checkpoint_path"] == path.name
    per_task = _row(content, latency.PER_TASK)
    assert per_task["parameters"] == _row(content, latency.SMALL)["parameters"]
