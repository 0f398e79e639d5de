"""What it costs to change the task in the middle of a session, and to keep several at hand."""

import dataclasses
import gc
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.shapes import random_ids
from ifp_mlx.benchmarking.stages import cut, first_token
from ifp_mlx.benchmarking.timing import Repeats, Timing, Work, measure_in_turns, settle
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, PredictorSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.units.modules import unit_arrays

_TASK_TOKENS = 48  # of a task's description


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
        task_bytes: units of one compact model.
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
    prompt_ids = random_ids(prompt_tokens, source, predictor.reader)
    selector = NamedSelector.of_model(
        PredictorSelector(predictor), SelectorSpec("predictor"), source
    )
    before = _settled_memory()
    compacts: list[nn.Module] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for count in task_counts:
            while len(compacts) < count:
                task_ids = random_ids(_TASK_TOKENS, source, predictor.reader)
                selection = select(selector, task_ids, num_kept_units)
                paths.append(Path(folder) / f"{len(paths)}.safetensors")
                selection.save(paths[-1])
                compacts.append(cut(source, selection))
            added_bytes = _settled_memory() - before
            works = _works(source, selector, num_kept_units, compacts, paths, prompt_ids)
            timings = measure_in_turns(works, repeats)
            rows.append(
                SwitchRow(
                    num_tasks=count,
                    **timings,
                    added_bytes=added_bytes,
                    task_bytes=sum(array.nbytes for array in unit_arrays(compacts[0]).values()),
                )
            )
    return rows


def _settled_memory() -> int:
    """Return the active memory when what earlier measurements left behind is gone."""
    gc.collect()
    settle()
    mx.clear_cache()
    return int(mx.get_active_memory())


def _works(
    source: nn.Module,
    selector: NamedSelector,
    num_kept_units: int,
    compacts: list[nn.Module],
    paths: list[Path],
    prompt_ids: list[int],
) -> dict[str, Work]:
    # Other tasks than the first, which ``stay`` stays with; of one task, that one.
    others = itertools.cycle(compacts[1:] or compacts)
    other_paths = itertools.cycle(paths[1:] or paths)

    def token_of(selection: Selection) -> Iterator[str]:
        return first_token(cut(source, selection), prompt_ids)

    return {
        "stay": lambda: first_token(compacts[0], prompt_ids),
        "resident": lambda: first_token(next(others), prompt_ids),
        "indices": lambda: token_of(Selection.load(next(other_paths))[0]),
        "anew": lambda: token_of(select(selector, prompt_ids, num_kept_units)),
    }
