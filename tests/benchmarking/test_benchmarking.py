"""What the benchmarks time is the real thing. Correctness only: no time is ever asserted."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from ifp_mlx.benchmarking import generation, latency, report, runs, shapes, slicing, timing
from ifp_mlx.benchmarking.latency import Workload
from ifp_mlx.benchmarking.timing import Repeats
from ifp_mlx.cli import bench
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import PredictorSelector, select
from ifp_mlx.slicing.compact import slice_model

ONCE = Repeats(1, warmups=0)
TINY = runs.ModelOptions("tiny", predictor="tiny", dtype="float32")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.fixture(scope="module")
def dense() -> Any:
    mx.random.seed(3)
    return shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32)


@pytest.fixture(scope="module")
def predictor() -> SparsityPredictor:
    mx.random.seed(4)
    return shapes.build_predictor(shapes.PREDICTORS["tiny"], 3, 192, mx.float32)


def test_prefill_gives_the_last_logits(dense) -> None:
    logits, _ = generation.prefill(dense, mx.array(PROMPT))
    assert mx.allclose(logits, dense(mx.array([PROMPT]))[0, -1], atol=1e-5).item()


def test_prefill_in_chunks_is_prefill_in_one(dense, monkeypatch) -> None:
    whole, whole_cache = generation.prefill(dense, mx.array(PROMPT))
    monkeypatch.setattr(generation, "PREFILL_STEP_SIZE", 4)
    chunked, chunked_cache = generation.prefill(dense, mx.array(PROMPT))
    assert mx.allclose(whole, chunked, atol=1e-5).item()
    assert whole_cache[0].offset == chunked_cache[0].offset == len(PROMPT)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_repeated_kv_cache_continues_every_sample(dense, num_samples: int) -> None:
    _, kv_cache = generation.prefill(dense, mx.array(PROMPT))
    samples = generation.repeat_kv_cache(kv_cache, num_samples)
    tokens = mx.array([[7 + n] for n in range(num_samples)])
    together = dense(tokens, cache=samples)
    for n in range(num_samples):
        alone = dense(mx.array([[*PROMPT, 7 + n]]))[0, -1]
        assert mx.allclose(together[n, -1], alone, atol=1e-5).item()
    # Sampling has not moved the original: it can be sampled from again.
    assert kv_cache[0].offset == len(PROMPT)
    again = dense(tokens[:1], cache=generation.repeat_kv_cache(kv_cache, 1))
    assert mx.allclose(again[0, -1], together[0, -1], atol=1e-5).item()


def _greedy(model: Any, num_tokens: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num_tokens):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids[len(PROMPT) :]


def test_decode_draws_from_the_model(dense, monkeypatch) -> None:
    monkeypatch.setattr(mx.random, "categorical", lambda logits: mx.argmax(logits, axis=-1))
    logits, kv_cache = generation.prefill(dense, mx.array(PROMPT))
    drawn = generation.decode(dense, generation.repeat_kv_cache(kv_cache, 2), logits, 6, 2)
    assert drawn == [_greedy(dense, 6)] * 2
    samples = generation.repeat_kv_cache(kv_cache, 1)
    assert generation.decode_with_mlx_lm(dense, samples, logits, 6)[0] == drawn[0][0]


def test_first_token_is_that_of_the_checked_path(dense, predictor) -> None:
    token, kv_cache = generation.first_token(dense, predictor, PROMPT, 64)
    compact = slice_model(dense, select(PredictorSelector(predictor), PROMPT, 64))
    assert token.item() == mx.argmax(compact(mx.array([PROMPT]))[0, -1]).item()
    assert kv_cache[0].offset == len(PROMPT)


def test_layers_started_early_compute_the_same(dense, monkeypatch) -> None:
    monkeypatch.setattr(generation, "LAYERS_AT_ONCE", 2)
    started = generation.started_by_layers(dense)
    starts = []
    monkeypatch.setattr(mx, "async_eval", starts.append)
    early, kv_cache = generation.prefill(started, mx.array(PROMPT))
    late, _ = generation.prefill(dense, mx.array(PROMPT))
    assert [hidden.shape for hidden in starts] == [(1, len(PROMPT), 64)]  # after 2 of 3 layers
    assert mx.array_equal(early, late).item()
    assert kv_cache[0].offset == len(PROMPT)


def test_the_host_stays_a_few_layers_ahead_of_the_device(monkeypatch) -> None:
    config = {**shapes.SHAPES["tiny"].config, "num_hidden_layers": 10}
    model = shapes.build_model(config, mx.float32)
    monkeypatch.setattr(generation, "LAYERS_AT_ONCE", 2)
    started = generation.started_by_layers(model)
    ahead, pieces, done = [], [], []

    def start(hidden: mx.array) -> None:
        pieces.append(hidden)
        ahead.append(len(pieces) - len(done))

    monkeypatch.setattr(mx, "async_eval", start)
    monkeypatch.setattr(mx, "eval", done.append)
    generation.prefill(started, mx.array(PROMPT))
    assert ahead == [1, 2, 3, 3]  # the last two layers start with the result
    assert [id(hidden) for hidden in done] == [id(hidden) for hidden in pieces[:2]]
    generation.prefill(started, mx.array(PROMPT))
    assert len(pieces) == 8


def test_first_token_slices_each_layer_as_the_prefill_comes_to_it(
    dense, predictor, monkeypatch
) -> None:
    selection = generation.select_lazily(predictor, PROMPT, 64)
    compact = slice_model(dense, selection)
    expected, expected_cache = generation.prefill(compact, mx.array(PROMPT))
    monkeypatch.setattr(generation, "PREFILL_STEP_SIZE", 4)  # sliced once, not once a chunk
    token, kv_cache = generation.first_token_of(dense, selection, mx.array(PROMPT))
    assert token.item() == mx.argmax(expected).item()
    for layer, other in zip(kv_cache, expected_cache, strict=True):
        keys, expected_keys = layer.keys_and_values()[0], other.keys_and_values()[0]
        assert mx.allclose(keys, expected_keys, atol=1e-5).item()


def test_first_token_lets_go_of_its_compact_model(dense, predictor, monkeypatch) -> None:
    made = []
    make = generation.compact_skeleton

    def remember(*args: Any) -> Any:
        compact = make(*args)
        made.append(weakref.ref(compact))
        return compact

    monkeypatch.setattr(generation, "compact_skeleton", remember)
    gc.disable()
    try:
        token, _ = generation.first_token(dense, predictor, PROMPT, 64)
        mx.eval(token)
        assert made[0]() is None
    finally:
        gc.enable()


def test_predictors_select_by_prompt(predictor) -> None:
    one = generation.select_lazily(predictor, PROMPT, 64)
    other = generation.select_lazily(predictor, PROMPT[::-1], 64)
    assert not mx.array_equal(one.indices, other.indices).item()


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
def test_copies_write_as_much_as_they_read(copy) -> None:
    array = mx.random.randint(0, 2**31, (64,), dtype=mx.uint32)
    (copied,) = copy([array])
    assert copied.nbytes == array.nbytes
    assert copied is not array


def test_every_plain_way_gathers_the_same() -> None:
    indices = top_k_indices(mx.random.normal((3, 24)), 10)
    ways = {
        name: gather() for name, gather in slicing.plain_ways(16, 24, indices, mx.bfloat16).items()
    }
    reference = [np.array(a.astype(mx.float32)) for a in ways["mx.take as it is, down by columns"]]
    rows = [array if n % 3 < 2 else array.T for n, array in enumerate(reference)]  # (K, D) each
    assert [array.shape for array in rows] == [(10, 16)] * 9
    assert not np.array_equal(rows[0], rows[3])
    unsorted = "unit-major, wide rows, units not sorted"
    for name, arrays in ways.items():
        values = [np.array(a.astype(mx.float32)) for a in arrays]
        if "columns" in name:
            values = [array if n % 3 < 2 else array.T for n, array in enumerate(values)]
        joined, expected = np.concatenate(values), np.concatenate(rows)
        if name == unsorted:
            assert not np.array_equal(joined, expected)
            joined, expected = np.sort(joined.ravel()), np.sort(expected.ravel())
        np.testing.assert_array_equal(joined, expected, err_msg=name)


def test_every_packed_way_gathers_the_same() -> None:
    indices = top_k_indices(mx.random.normal((2, 128)), 64)
    ways = {
        name: gather()
        for name, gather in slicing.packed_ways(64, 128, indices, 4, mx.float32).items()
    }
    narrow = ways["unit-major, mx.take as it is"]  # weight, scales, biases of nine layers' parts
    wide = ways["unit-major, wide rows"]
    assert all(mx.array_equal(a, b).item() for a, b in zip(narrow, wide, strict=True))
    for part, joined in enumerate(ways["unit-major, wide rows, one gather for all"]):
        assert mx.array_equal(joined, mx.concatenate(narrow[part::3])).item()
    # gate and up (three arrays each), then down; quantized again it is three arrays.
    down, again = ways["down dequantized"][6], ways["down quantized again at 8 bits"][6:9]
    assert down.shape == (64, 64)
    restored = mx.dequantize(*again, group_size=64, bits=8)
    assert mx.abs(restored - down).max().item() < 0.01


def test_step_bytes_counts_weights_and_kv_cache(dense) -> None:
    per_layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    weights = 4 * (3 * per_layer + 64 + 512 * 64)  # the input embedding is not read
    kv_cache = 4 * 3 * 2 * 32 * (100 + 5) * 2
    assert latency.step_bytes(dense, Workload(100, 10, 2)) == weights + kv_cache


@pytest.mark.parametrize("bits", [16, 4])
def test_parameters_are_counted_unpacked(bits: int) -> None:
    model = shapes.build_model(shapes.SHAPES["tiny"].config, mx.float32, bits)
    per_layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    assert shapes.num_parameters(model) == 3 * per_layer + 64 + 2 * 512 * 64


@pytest.mark.parametrize("bits", [16, 4])
def test_latency_compares_five_rows(bits: int) -> None:
    options = runs.ModelOptions("tiny", predictor="tiny", dtype="float32", bits=bits)
    parts: list[dict[str, Any]] = []
    content = runs.run_latency(
        options,
        [Workload(12, 3, 2), Workload(20, 0)],
        repeats=ONCE,
        decode_repeats=1,
        on_part=parts.append,
    )
    assert [len(part["rows"]) for part in parts] == [5, 10]
    assert json.loads(json.dumps(content)) == json.loads(json.dumps(parts[-1]))
    source, per_input = content["rows"][0], _row(content, latency.PER_INPUT)
    assert source["ttft_to_dense"] == 1.0
    assert source["selection"] is None
    assert per_input["ttft_to_dense"] == pytest.approx(
        per_input["ttft"]["median_s"] / source["ttft"]["median_s"]
    )
    assert per_input["tokens_per_s"] == pytest.approx(6 / per_input["decode"]["median_s"])
    assert per_input["parameters"] == _row(content, latency.SMALL)["parameters"]
    assert content["rows"][5]["decode"] is None


def test_latency_of_one_sample_adds_the_loop_of_mlx_lm() -> None:
    content = runs.run_latency(TINY, [Workload(12, 3, 1)], repeats=ONCE, decode_repeats=1)
    assert _row(content, latency.MLX_LM)["decode"]["repeats"] == 1


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
    assert len(rows) == 8
    assert {row["num_bytes"] for row in rows} == {3 * 3 * 64 * num_kept_units * 2}


def test_switching_counts_the_memory_of_its_tasks() -> None:
    content = runs.run_switching(TINY, task_counts=[3, 1], prompt_tokens=5, repeats=ONCE)
    assert [row["num_tasks"] for row in content["rows"]] == [1, 3]
    assert {row["task_bytes"] for row in content["rows"]} == {3 * 3 * 64 * 64 * 4}
    for row in content["rows"]:
        assert row["added_bytes"] == pytest.approx(row["num_tasks"] * row["task_bytes"], rel=0.1)


def test_shape_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"intermediate_size": 192}))
    shape = shapes.find_shape(str(tmp_path), 64)
    assert (shape.num_units, shape.compact().config["intermediate_size"]) == (192, 64)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: shapes.find_shape("nothing"), "no shape 'nothing'"),
        (lambda: shapes.find_shape("tiny", 193), "has 192 units a layer, not 193"),
        (lambda: shapes.find_shape("qwen1.5-moe-a2.7b").compact(), "pass --keep-units"),
        (lambda: runs.ModelOptions("tiny", bits=7), "--bits must be one of .*, not 7"),
        (lambda: runs.ModelOptions("tiny", dtype="int8"), "--dtype must be one of"),
        (
            lambda: runs.run_slicing(runs.ModelOptions("qwen1.5-moe-a2.7b"), repeats=ONCE),
            "pass --keep-units",
        ),
    ],
)
def test_bad_options_are_refused(act, message: str) -> None:
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


def test_a_checkpoint_is_measured_as_it_is(tiny_checkpoint) -> None:
    path = tiny_checkpoint()
    options = runs.ModelOptions("", [64], "tiny", checkpoint_path=path)
    content = runs.run_latency(options, [Workload(12, 0)], repeats=ONCE, decode_repeats=1)
    assert (content["bits"], content["dtype"]) == (16, "float32")
    assert content["checkpoint_path"] == path.name
    per_task = _row(content, latency.PER_TASK)
    assert per_task["parameters"] == _row(content, latency.SMALL)["parameters"]
