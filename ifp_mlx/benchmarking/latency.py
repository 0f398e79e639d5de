"""Time to the first token and decoding speed: a dense model, a small one, and sub-networks of ours.

All rows are measured in one process, in turns. *Dense source* is the model that is sliced; *dense
of the compact shape* is what a sub-network should cost, a model with K units built directly.
"""

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import get_total_parameters

from ifp_mlx.benchmarking.shapes import is_mixture, random_ids
from ifp_mlx.benchmarking.stages import cut, decode, first_token, read_prompt
from ifp_mlx.benchmarking.timing import (
    OnTurn,
    Repeats,
    Timing,
    Work,
    measure,
    measure_in_turns,
    settle,
)
from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selectors import NamedSelector, PredictorSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.units.modules import leaf_modules, stored_bytes, unit_arrays

DENSE = "dense source"
SMALL = "dense of the compact shape"
PER_INPUT = "ours, per input"
PER_TASK = "ours, per task, resident"
PER_TASK_SLICED = "ours, per task, cached indices"
READ = "dense source, prompt read by ours"

_DECODED_AS = {PER_INPUT: PER_TASK, PER_TASK_SLICED: PER_TASK, READ: DENSE}
"""Rows that decode with the model of another."""

_SELECTION, _LOADING = "selection", "loading"
_WARMUP_TOKENS = 4


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
    num_samples: int = 1


@dataclasses.dataclass(frozen=True)
class Subjects:
    """The models of one run.

    Attributes:
        dense: the source.
        small: a dense model of the compact shape; None for a model that is not sliced.
        predictor: selects; None with ``small``.
        num_kept_units: K.
    """

    dense: nn.Module
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
        selection: predictor and top-k.
        loading: checking the selection and slicing all layers.
        prefill: the prompt through the model that answers, up to its first token.
        ttft: from the prompt's ids to the first token, through all stages of this row.
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


@dataclasses.dataclass(frozen=True)
class _Contender:
    """What a row is made from: a model that answers, and what comes before it does.

    Attributes:
        model: answers.
        ttft: from the prompt's ids to the first token.
        resident_bytes: what must be in memory before.
        stages: names of what comes before the prefill.
    """

    model: nn.Module
    ttft: Work
    resident_bytes: int
    stages: tuple[str, ...] = ()


def measure_latency(
    subjects: Subjects,
    workload: Workload,
    *,
    repeats: Repeats,
    decode_repeats: int,
    bandwidth: float,
    on_turn: OnTurn = lambda name, done, total: None,
) -> list[Row]:
    """Return the rows of one prompt length. Evaluates.

    Args:
        subjects: what is compared.
        workload: what each is asked to do.
        repeats: of everything up to the first token.
        decode_repeats: of decoding, which takes longer.
        bandwidth: of a device copy, bytes a second, for the share that decoding reaches.
        on_turn: called after each measurement.
    """
    readers = [] if subjects.predictor is None else [subjects.predictor.reader]
    prompt_ids = random_ids(workload.prompt_tokens, subjects.dense, *readers)
    contenders, stages = _contenders(subjects, prompt_ids)
    works = {name: contender.ttft for name, contender in contenders.items()}
    timings = measure_in_turns(works | stages, repeats, on_turn)
    rows = {}
    for name, contender in contenders.items():
        before = {stage: timings[stage] for stage in contender.stages}
        parts = [*(stages[stage] for stage in contender.stages), contender.ttft]
        rows[name] = Row(
            name=name,
            **dataclasses.asdict(workload),
            num_kept_units=subjects.num_kept_units,
            parameters=int(get_total_parameters(contender.model)),
            selection=before.get(_SELECTION),
            loading=before.get(_LOADING),
            prefill=timings[PER_TASK if before else name],
            ttft=timings[name],
            peak_memory_bytes=contender.resident_bytes + max(map(_added_memory, parts)),
        )
    if workload.new_tokens:
        _add_decoding(rows, contenders, prompt_ids, workload, decode_repeats, bandwidth, on_turn)
    _add_ratios(rows)
    return list(rows.values())


def _contenders(
    subjects: Subjects, prompt_ids: Sequence[int]
) -> tuple[dict[str, _Contender], dict[str, Work]]:
    """Return what is compared by name, and the stages that some of them have. Evaluates."""

    def answered_by(model: nn.Module) -> _Contender:
        return _Contender(model, lambda: first_token(model, prompt_ids), stored_bytes(model))

    dense, small, predictor = subjects.dense, subjects.small, subjects.predictor
    contenders = {DENSE: answered_by(dense)}
    if small is None or predictor is None:
        return contenders, {}
    selector = NamedSelector.of_model(
        PredictorSelector(predictor), SelectorSpec("predictor"), dense
    )
    num_kept_units = subjects.num_kept_units
    selection = select(selector, prompt_ids, num_kept_units)
    compact = cut(dense, selection)
    predictor_bytes = stored_bytes(predictor.reader) + stored_bytes(predictor.head)
    contenders |= {
        SMALL: answered_by(small),
        PER_INPUT: _Contender(
            compact,
            lambda: first_token(
                cut(dense, select(selector, prompt_ids, num_kept_units)), prompt_ids
            ),
            stored_bytes(dense) + predictor_bytes,
            (_SELECTION, _LOADING),
        ),
        PER_TASK: answered_by(compact),
        PER_TASK_SLICED: _Contender(
            compact,
            lambda: first_token(cut(dense, selection), prompt_ids),
            stored_bytes(dense),
            (_LOADING,),
        ),
        READ: _Contender(
            dense,
            lambda: first_token(ReadsWithPart(dense, compact), prompt_ids),
            stored_bytes(dense) + sum(array.nbytes for array in unit_arrays(compact).values()),
        ),
    }
    stages: dict[str, Work] = {
        _SELECTION: lambda: select(selector, prompt_ids, num_kept_units).pick.indices,
        _LOADING: lambda: cut(dense, selection),
    }
    return contenders, stages


def step_bytes(model: nn.Module, workload: Workload) -> int:
    """Return the bytes that one decoding step of all samples reads at least.

    Every weight once (of an untied input embedding only a row a sample, not counted), and each
    sample's keys and values at half of the new tokens.
    """
    one_position = read_prompt(model, (0, 0))
    position_bytes: int = sum(
        array.nbytes // array.shape[2]  # (B, G, positions, D / H)
        for layer in one_position.layers
        for array in (layer.keys, layer.values)
    )
    positions = workload.prompt_tokens + workload.new_tokens // 2
    weights_bytes = stored_bytes(model) - _looked_up_bytes(model)
    return weights_bytes + workload.num_samples * positions * position_bytes


def _looked_up_bytes(model: nn.Module) -> int:
    """Return the size of embeddings that serve the input alone: a head makes the logits."""
    leaves = [module for _, module in leaf_modules(model)]
    embeddings = [m for m in leaves if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
    vocab_size = model.args.vocab_size
    vocabularies = [m for m in leaves if "weight" in m and m.weight.shape[0] == vocab_size]
    has_head = len(vocabularies) > len(embeddings)
    return sum(map(stored_bytes, embeddings)) if has_head else 0


def _added_memory(work: Work) -> int:
    settle()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(work)
    return max(0, mx.get_peak_memory() - before)


def _add_decoding(
    rows: dict[str, Row],
    contenders: dict[str, _Contender],
    prompt_ids: Sequence[int],
    workload: Workload,
    repeats: int,
    bandwidth: float,
    on_turn: OnTurn,
) -> None:
    """Time decoding once a model: rows that share a model share the figure."""
    works: dict[str, Work] = {}
    for name in (DENSE, SMALL, PER_TASK):
        if name in rows:
            works[name] = _decoding(contenders[name].model, prompt_ids, workload)
            warmup = dataclasses.replace(workload, new_tokens=_WARMUP_TOKENS)
            _decoding(contenders[name].model, prompt_ids, warmup)()
    timings = measure_in_turns(
        works,
        Repeats(repeats, warmups=0),
        lambda name, done, total: on_turn(f"{name}, writing", done, total),
    )
    for name, row in rows.items():
        decode_s = timings[_DECODED_AS.get(name, name)]
        row.decode = decode_s
        row.tokens_per_s = workload.num_samples * workload.new_tokens / decode_s.median_s
        model = contenders[name].model
        if not is_mixture(model):
            row.step_bytes = step_bytes(model, workload)
            bytes_per_s = row.step_bytes * workload.new_tokens / decode_s.median_s
            row.bandwidth_share = bytes_per_s / bandwidth


def _decoding(model: nn.Module, prompt_ids: Sequence[int], workload: Workload) -> Work:
    kv_cache = read_prompt(model, prompt_ids)
    return lambda: decode(model, prompt_ids, kv_cache, workload.new_tokens, workload.num_samples)


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
