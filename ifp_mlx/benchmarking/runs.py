"""Whole benchmark runs: from names of shapes to one document of results."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.latency import Row, Subjects, Workload, measure_latency
from ifp_mlx.benchmarking.report import document
from ifp_mlx.benchmarking.shapes import (
    Shape,
    build_model,
    build_predictor,
    find_predictor_config,
    find_shape,
)
from ifp_mlx.benchmarking.slicing import measure_slicing
from ifp_mlx.benchmarking.switching import measure_switching
from ifp_mlx.benchmarking.timing import OnTurn, Repeats, copy_bandwidth, machine
from ifp_mlx.errors import UsageError
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.storage.weights import load_model
from ifp_mlx.units.modules import compute_dtype, packed_leaves, unit_shape

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

_BITS = (2, 3, 4, 5, 6, 8, 16)

SEED = 7

# Far more than any cache holds, little beside the models; a CPU needs less to settle.
_COPY_BYTES = {"cuda": 2 * 10**9, "metal": 10**9, "cpu": 10**8}

CACHE_BYTES = 8 * 10**9
"""Most that freed arrays may hold on to: the rows of a run free arrays of many sizes, few of which
another row has a use for."""

Document = dict[str, Any]
OnPart = Callable[[Document], Any]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What every run needs to know of the models.

    Attributes:
        shape: name of a built-in shape, or a path to a config.
        num_kept_units: amounts of units to keep; empty for the shape's own.
        predictor: name of a built-in predictor, or a path to a config.
        bits: 16 for plain weights, else the bits of quantized ones.
        dtype: name of the floating type.
        checkpoint_path: a real checkpoint in place of random weights.
    """

    shape: str
    num_kept_units: Sequence[int] = ()
    predictor: str = "smollm2-135m"
    bits: int = 16
    dtype: str = "bfloat16"
    checkpoint_path: Path | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            known = ", ".join(map(str, _BITS))
            raise UsageError(f"`bits` must be one of {known}, not {self.bits}")
        if self.dtype not in DTYPES:
            raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}, not {self.dtype}")


@contextlib.contextmanager
def _bounded_cache() -> Iterator[None]:
    previous = mx.set_cache_limit(CACHE_BYTES)
    mx.set_cache_limit(min(CACHE_BYTES, previous))
    try:
        yield
    finally:
        mx.set_cache_limit(previous)


@_bounded_cache()
def run_latency(
    options: ModelOptions,
    workloads: Sequence[Workload],
    *,
    repeats: Repeats,
    decode_repeats: int,
    on_part: OnPart = lambda content: None,
    on_turn: OnTurn = lambda name, done, total: None,
) -> Document:
    """Return the latency of every amount of units at every workload. Evaluates.

    Args:
        options: the models.
        workloads: prompts and what follows them.
        repeats: of everything up to the first token.
        decode_repeats: of decoding.
        on_part: called with the document so far, after each workload.
        on_turn: called after each measurement.

    Raises:
        UsageError: an option does not fit.
    """
    mx.random.seed(SEED)
    shapes = _shapes(options)
    dense, options = _load_or_build(options, shapes[0])
    facts = _facts(options, repeats)
    bandwidth = copy_bandwidth(_COPY_BYTES[facts["machine"]["backend"]], Repeats(9, 3))
    facts |= {"decode_repeats": decode_repeats, "copy_bytes_per_s": bandwidth}
    rows: list[Row] = []
    content = document("latency", facts, rows)
    predictor = None
    for shape in shapes:
        subjects = Subjects(dense)
        if shape.num_kept_units is not None:
            predictor = predictor or _predictor(options, dense)
            subjects = Subjects(
                dense,
                build_model(shape.compact_config(), DTYPES[options.dtype], options.bits),
                predictor,
                shape.num_kept_units,
            )
        for workload in workloads:
            rows += measure_latency(
                subjects,
                workload,
                repeats=repeats,
                decode_repeats=decode_repeats,
                bandwidth=bandwidth,
                on_turn=on_turn,
            )
            content = document("latency", facts, rows)
            on_part(content)
            mx.clear_cache()
        del subjects  # before the next small model is built
    return content


@_bounded_cache()
def run_slicing(options: ModelOptions, *, repeats: Repeats) -> Document:
    """Return the time of every way to gather units. Evaluates.

    Raises:
        UsageError: an option does not fit.
    """
    mx.random.seed(SEED)
    shape = _shapes(options)[0]
    num_kept_units = shape.kept_units()
    model, options = _load_or_build(options, shape)
    rows = measure_slicing(model, select_random(model, num_kept_units), repeats=repeats)
    facts = _facts(options, repeats) | {"num_kept_units": num_kept_units}
    return document("slicing", facts, rows)


@_bounded_cache()
def run_switching(
    options: ModelOptions, *, task_counts: Sequence[int], prompt_tokens: int, repeats: Repeats
) -> Document:
    """Return what switching between tasks costs. Evaluates.

    Raises:
        UsageError: an option does not fit.
    """
    mx.random.seed(SEED)
    shape = _shapes(options)[0]
    num_kept_units = shape.kept_units()
    model, options = _load_or_build(options, shape)
    rows = measure_switching(
        model,
        _predictor(options, model),
        num_kept_units,
        task_counts=sorted(task_counts),
        prompt_tokens=prompt_tokens,
        repeats=repeats,
    )
    facts = _facts(options, repeats) | {
        "num_kept_units": num_kept_units,
        "prompt_tokens": prompt_tokens,
    }
    return document("switch", facts, rows)


def _facts(options: ModelOptions, repeats: Repeats) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    values["checkpoint_path"] = options.checkpoint_path and options.checkpoint_path.name
    return {"machine": machine(), **values, "repeats": repeats.counted, "warmups": repeats.warmups}


def _shapes(options: ModelOptions) -> list[Shape]:
    name = str(options.checkpoint_path or options.shape)
    return [find_shape(name, kept) for kept in options.num_kept_units or (None,)]


def _load_or_build(options: ModelOptions, shape: Shape) -> tuple[nn.Module, ModelOptions]:
    """Return the dense model, and the options with the bits and the type that it really has."""
    if options.checkpoint_path is None:
        return build_model(shape.config, DTYPES[options.dtype], options.bits), options
    model, _ = load_model(options.checkpoint_path, "auto")
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names[compute_dtype(model)]
    return model, dataclasses.replace(options, bits=_bits_of(model), dtype=dtype)


def _bits_of(model: nn.Module) -> int:
    packings = packed_leaves(model).values()
    return int(next(iter(packings))["bits"]) if packings else 16


def _predictor(options: ModelOptions, model: nn.Module) -> SparsityPredictor:
    config = find_predictor_config(options.predictor)
    return build_predictor(config, unit_shape(model), DTYPES[options.dtype])
