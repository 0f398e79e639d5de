"""What it costs to change the task in the middle of a session, and to keep several at hand."""

import dataclasses
import gc
import itertools
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.generation import (
    first_token,
    first_token_of,
    prefill,
    select_lazily,
    started_by_layers,
)
from ifp_mlx.benchmarking.timing import Repeats, Timing, Work, measure_in_turns
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import Selection
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.units import ffn


@dataclasses.dataclass(frozen=True)
class SwitchRow:
    """Time to the first token of a short prompt, with a number of tasks at hand.

    Attributes:
        num_tasks: resident compact models.
        stay: the same task as before.
        resident: another task whose compact model is in memory.
        indices: another task of which only the indices are on disk: read, check, slice.
        anew: another task that was never seen: select, slice.
        added_bytes: memory that all tasks together take beyond the dense model.
        task_bytes: FFN arrays of one compact model.
    """

    num_tasks: int
    stay: Timing
    resident: Timing
    indices: Timing
    anew: Timing
    added_bytes: int
    task_bytes: int


def measure_switching(
    source: nn.Module,
    predictor: SparsityPredictor,
    num_kept_units: int,
    *,
    task_counts: list[int],
    prompt_tokens: int,
    repeats: Repeats,
) -> list[SwitchRow]:
    """Return a row for each number of tasks. Evaluates.

    Args:
        source: the dense model.
        predictor: selects for a new task.
        num_kept_units: K.
        task_counts: ascending numbers of tasks at hand.
        prompt_tokens: of the prompt that follows each switch.
        repeats: how often.
    """
    vocab_size = min(source.args.vocab_size, predictor.reader.args.vocab_size)
    prompt = mx.random.randint(0, vocab_size, (prompt_tokens,))
    before = _settled_memory()
    compacts: list[nn.Module] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for count in task_counts:
            while len(compacts) < count:
                task_ids: list[int] = mx.random.randint(0, vocab_size, (48,)).tolist()  # type: ignore[assignment]
                selection = select_lazily(predictor, task_ids, num_kept_units)
                paths.append(Path(folder) / f"{len(paths)}.safetensors")
                selection.save(paths[-1])
                compacts.append(started_by_layers(slice_model(source, selection)))
                mx.eval(compacts[-1].parameters())
            added_bytes = _settled_memory() - before
            works = _works(source, predictor, num_kept_units, compacts, paths, prompt)
            timings = measure_in_turns(works, repeats)
            rows.append(
                SwitchRow(
                    num_tasks=count,
                    **timings,
                    added_bytes=added_bytes,
                    task_bytes=sum(array.nbytes for array in ffn.ffn_arrays(compacts[0])),
                )
            )
    return rows


def _settled_memory() -> int:
    """Return the active memory when what earlier measurements left behind is gone."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


def _works(
    source: nn.Module,
    predictor: SparsityPredictor,
    num_kept_units: int,
    compacts: list[nn.Module],
    paths: list[Path],
    prompt: mx.array,
) -> dict[str, Work]:
    tasks = itertools.cycle(range(len(compacts)))
    task_ids: list[int] = prompt.tolist()  # type: ignore[assignment]

    def token(model: nn.Module) -> mx.array:
        return mx.argmax(prefill(model, prompt)[0])

    return {
        "stay": lambda: token(compacts[0]),
        "resident": lambda: token(compacts[next(tasks)]),
        "indices": lambda: first_token_of(source, Selection.load(paths[next(tasks)])[0], prompt)[0],
        "anew": lambda: first_token(source, predictor, task_ids, num_kept_units)[0],
    }
