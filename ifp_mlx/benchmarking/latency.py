"""Time to the first token and decoding speed: a dense model, a small one, and sub-networks of ours.

All rows are measured in one process, in turns. *Dense source* is the model that is sliced; *dense
of the compact shape* is what a sub-network should cost, a model with K units built directly.
"""

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.generation import (
    decode,
    decode_with_mlx_lm,
    first_token,
    first_token_of,
    prefill,
    repeat_kv_cache,
    select_lazily,
    started_by_layers,
)
from ifp_mlx.benchmarking.shapes import is_mixture, num_bytes, num_parameters
from ifp_mlx.benchmarking.timing import Repeats, Timing, Work, measure, measure_in_turns
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units import ffn

DENSE = "dense source"
SMALL = "dense of the compact shape"
PER_INPUT = "ours, per input"
PER_TASK = "ours, per task, resident"
PER_TASK_SLICED = "ours, per task, cached indices"
MLX_LM = "dense source, decoded by mlx-lm"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of every row: a prompt, and several samples of its continuation.

    Attributes:
        prompt_tokens: T.
        new_tokens: tokens a sample; 0 measures no decoding.
        num_samples: samples of the one prompt, which share its prefill.
    """

    prompt_tokens: int
    new_tokens: int = 100
    num_samples: int = 4


@dataclasses.dataclass(frozen=True)
class Subjects:
    """The models of one run.

    Attributes:
        dense: the source as it is loaded.
        source: the source as sub-networks are cut from it; shares all it can with ``dense``.
        small: a dense model of the compact shape; None for a model that is not sliced.
        predictor: selects; None with ``small``.
        num_kept_units: K.
    """

    dense: nn.Module
    source: nn.Module
    small: nn.Module | None = None
    predictor: SparsityPredictor | None = None
    num_kept_units: int = 0


@dataclasses.dataclass
class Row:
    """One line of the table. Times in seconds, sizes in bytes; None: not part of this row.

    Attributes:
        name: what answered.
        prompt_tokens: T.
        new_tokens: tokens a sample.
        num_samples: B.
        num_kept_units: K of the run.
        parameters: of the model that answers.
        selection: predictor and top-k, evaluated on their own.
        loading: slicing all layers, evaluated on its own.
        prefill: the prompt through the model that answers, up to its first token.
        ttft: from the prompt's ids to the first token, all stages one evaluation.
        decode: all new tokens of all samples, after the prefill.
        tokens_per_s: new tokens of all samples a second.
        peak_memory_bytes: what the row needs resident, and the most it adds until the first token.
        step_bytes: bytes that one decoding step must read: weights and mean KV cache. Not known
            of a mixture of experts.
        bandwidth_share: of the device's copy bandwidth that decoding reaches with them.
        ttft_to_dense: ratio to the dense source in this run; ``ttft_to_small`` and
            ``decode_to_small`` are to the dense model of the compact shape.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    num_samples: int
    num_kept_units: int
    parameters: int
    selection: Timing | None = None
    loading: Timing | None = None
    prefill: Timing | None = None
    ttft: Timing | None = None
    decode: Timing | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    step_bytes: int | None = None
    bandwidth_share: float | None = None
    ttft_to_dense: float | None = None
    ttft_to_small: float | None = None
    decode_to_dense: float | None = None
    decode_to_small: float | None = None


def measure_latency(
    subjects: Subjects,
    workload: Workload,
    *,
    repeats: Repeats,
    decode_repeats: int,
    bandwidth: float,
) -> list[Row]:
    """Return the rows of one prompt length. Evaluates.

    Args:
        subjects: what is compared.
        workload: what each is asked to do.
        repeats: of everything up to the first token.
        decode_repeats: of decoding, which takes longer.
        bandwidth: of a device copy, bytes a second, for the share that decoding reaches.
    """
    prompt_ids = _random_ids(subjects, workload.prompt_tokens)
    ids = mx.array(prompt_ids)
    models = {DENSE: subjects.dense}
    works: dict[str, Work] = {DENSE: _first_token(subjects.dense, ids)}
    resident = {DENSE: num_bytes(subjects.dense)}
    stages: dict[str, Work] = {}
    small, predictor = subjects.small, subjects.predictor
    if small is not None and predictor is not None:
        selection = select_lazily(predictor, prompt_ids, subjects.num_kept_units)
        mx.eval(selection.indices)
        compact = slice_model(subjects.source, selection)
        mx.eval(compact.parameters())
        models |= dict.fromkeys((PER_INPUT, PER_TASK, PER_TASK_SLICED), compact) | {SMALL: small}
        works |= {
            SMALL: _first_token(small, ids),
            PER_INPUT: lambda: first_token(
                subjects.source, predictor, prompt_ids, subjects.num_kept_units
            )[0],
            PER_TASK: _first_token(compact, ids),
            PER_TASK_SLICED: lambda: first_token_of(subjects.source, selection, ids)[0],
        }
        stages = {
            "selection": lambda: (
                select_lazily(predictor, prompt_ids, subjects.num_kept_units).indices
            ),
            "loading": lambda: ffn.ffn_modules(slice_model(subjects.source, selection)),
        }
        predictor_bytes = num_bytes(predictor.reader) + num_bytes(predictor.head)
        resident |= {
            SMALL: num_bytes(small),
            PER_INPUT: num_bytes(subjects.source) + predictor_bytes,
            PER_TASK: num_bytes(compact),
            PER_TASK_SLICED: num_bytes(subjects.source),
        }
    timings = measure_in_turns(works | stages, repeats)
    rows = {
        name: Row(
            name=name,
            **dataclasses.asdict(workload),
            num_kept_units=subjects.num_kept_units,
            parameters=num_parameters(models[name]),
            ttft=timings[name],
            prefill=timings[PER_TASK if models[name] is models.get(PER_TASK) else name],
            peak_memory_bytes=resident[name] + _added_memory(work),
        )
        for name, work in works.items()
    }
    for name in (PER_INPUT, PER_TASK_SLICED):
        if name in rows:
            rows[name].loading = timings["loading"]
    if PER_INPUT in rows:
        rows[PER_INPUT].selection = timings["selection"]
    if workload.new_tokens:
        _add_decoding(rows, models, ids, workload, decode_repeats, bandwidth)
    _add_ratios(rows)
    return list(rows.values())


def step_bytes(model: nn.Module, workload: Workload) -> int:
    """Return the bytes that one decoding step of all samples reads at least.

    Every weight once (of an untied input embedding only a row a sample, not counted), and each
    sample's keys and values at half of the new tokens.
    """
    weights = num_bytes(model)
    if "lm_head" in model:
        weights -= num_bytes(model.model.embed_tokens)
    _, kv_cache = prefill(model, mx.zeros((1,), dtype=mx.int32))
    keys, values = kv_cache[0].keys_and_values()
    position_bytes = len(kv_cache) * int(keys.nbytes + values.nbytes)
    positions = workload.prompt_tokens + workload.new_tokens // 2
    return weights + workload.num_samples * positions * position_bytes


def _first_token(model: nn.Module, ids: mx.array) -> Work:
    started = started_by_layers(model)
    return lambda: mx.argmax(prefill(started, ids)[0])


def _random_ids(subjects: Subjects, num_tokens: int) -> list[int]:
    # Below the vocabulary of every model in the run.
    readers = [subjects.predictor.reader] if subjects.predictor is not None else []
    vocab_size = min(model.args.vocab_size for model in (subjects.dense, *readers))
    ids: list[int] = mx.random.randint(0, vocab_size, (num_tokens,)).tolist()  # type: ignore[assignment]
    return ids


def _added_memory(work: Work) -> int:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(work)
    return max(0, mx.get_peak_memory() - before)


def _add_decoding(
    rows: dict[str, Row],
    models: dict[str, nn.Module],
    ids: mx.array,
    workload: Workload,
    repeats: int,
    bandwidth: float,
) -> None:
    """Time decoding once a model: rows that share a model share the figure."""
    works: dict[str, Work] = {}
    for name in (DENSE, SMALL, PER_TASK):
        if name in rows:
            works[name] = _decoding(models[name], ids, workload)
            _decoding(models[name], ids, dataclasses.replace(workload, new_tokens=4))()
    if workload.num_samples == 1:  # mlx-lm's own loop has one sample
        works[MLX_LM] = _decoding(models[DENSE], ids, workload, by_mlx_lm=True)
        rows[MLX_LM] = dataclasses.replace(rows[DENSE], name=MLX_LM)
        models = {**models, MLX_LM: models[DENSE]}
    timings = measure_in_turns(works, Repeats(repeats, warmups=0))
    for name, row in rows.items():
        timed = name if name in timings else PER_TASK
        row.decode = timings[timed]
        row.tokens_per_s = workload.num_samples * workload.new_tokens / timings[timed].median_s
        if is_mixture(models[name]):
            continue
        row.step_bytes = step_bytes(models[name], workload)
        bytes_per_s = row.step_bytes * workload.new_tokens / timings[timed].median_s
        row.bandwidth_share = bytes_per_s / bandwidth


def _decoding(
    model: nn.Module, ids: mx.array, workload: Workload, *, by_mlx_lm: bool = False
) -> Work:
    logits, kv_cache = prefill(model, ids)
    mx.eval(logits, [layer.state for layer in kv_cache])

    def work() -> list[list[int]]:
        samples = repeat_kv_cache(kv_cache, workload.num_samples)
        if by_mlx_lm:
            return [decode_with_mlx_lm(model, samples, logits, workload.new_tokens)]
        return decode(model, samples, logits, workload.new_tokens, workload.num_samples)

    return work


def _add_ratios(rows: dict[str, Row]) -> None:
    for row in rows.values():
        row.ttft_to_dense = _ratio(row.ttft, rows[DENSE].ttft)
        row.decode_to_dense = _ratio(row.decode, rows[DENSE].decode)
        if SMALL in rows:
            row.ttft_to_small = _ratio(row.ttft, rows[SMALL].ttft)
            row.decode_to_small = _ratio(row.decode, rows[SMALL].decode)


def _ratio(timing: Timing | None, reference: Timing | None) -> float | None:
    if timing is None or reference is None:
        return None
    return timing.median_s / reference.median_s
