"""Timing lazy arrays: warm up, repeat in turns, evaluate before the clock stops."""

import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

Work = Callable[[], Any]
"""Does the work and returns its arrays, evaluated or not: the timer evaluates them."""

OnTurn = Callable[[str, int, int], None]
"""Takes what was measured, how many measurements are taken, and how many there will be."""

Copy = Callable[[list[mx.array]], list[mx.array]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one piece of work took.

    Attributes:
        median_s: the middle one of the repeats, in seconds.
        min_s: the fastest.
        max_s: the slowest.
        repeats: how many were counted, warm-ups not among them.
    """

    median_s: float
    min_s: float
    max_s: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarise the times of repeated runs."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclasses.dataclass(frozen=True)
class Repeats:
    """How often work is done: ``warmups`` times unwatched, then ``counted`` times."""

    counted: int = 5
    warmups: int = 2


def settle() -> None:
    """Wait for what earlier work left the device to do, such as a step that nobody asked for."""
    mx.synchronize()
    mx.synchronize(generation_stream)  # mlx-lm's own, where answers come from


def measure(work: Work) -> tuple[float, Any]:
    """Return the seconds that work took, its arrays evaluated, and what it returned."""
    settle()
    start = time.perf_counter()
    result = work()
    mx.eval(result)
    return time.perf_counter() - start, result


def measure_in_turns(
    works: Mapping[str, Work],
    repeats: Repeats,
    on_turn: OnTurn = lambda name, done, total: None,
) -> dict[str, Timing]:
    """Return the timing of each piece of work.

    They take turns within each repeat, so that a machine that slows down slows all of them.

    Args:
        works: what is timed, by name.
        repeats: how often.
        on_turn: called after each measurement.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    num_turns = repeats.warmups + repeats.counted
    for turn in range(num_turns):
        for position, (name, work) in enumerate(works.items(), start=1):
            took = measure(work)[0]  # keeping the result would keep its memory
            if turn >= repeats.warmups:
                seconds[name].append(took)
            on_turn(name, turn * len(works) + position, num_turns * len(works))
    return {name: Timing.of(values) for name, values in seconds.items()}


def computes_on_cpu() -> bool:
    """Return whether this machine has no GPU that mlx uses."""
    return _backend() == "cpu"


def machine() -> dict[str, str]:
    """Return what the figures depend on: device, versions, day."""
    device: dict[str, Any] = mx.device_info()
    name = device.get("device_name") or device.get("architecture") or platform.processor()
    return {
        "device": str(name),
        "backend": _backend(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "mlx_lm": metadata.version("mlx-lm"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _backend() -> str:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "cpu"


def copy_bandwidth(num_bytes: int, repeats: Repeats) -> float:
    """Return bytes read and written a second by a plain device copy, the faster of two kinds.

    Args:
        num_bytes: size of the array that is copied; more than the caches hold.
        repeats: how often.
    """
    words = mx.random.randint(0, 2**31, (num_bytes // 4,), dtype=mx.uint32)
    mx.eval(words)
    timings = measure_in_turns(copy_works([words]), repeats)
    fastest = min(timing.median_s for timing in timings.values())
    return 2 * words.nbytes / fastest


def copy_works(arrays: list[mx.array]) -> dict[str, Work]:
    """Return each of ``COPIES`` as work on the given arrays."""

    def work(copy: Copy) -> Work:
        return lambda: copy(arrays)

    return {name: work(copy) for name, copy in COPIES.items()}


def _join_halves(arrays: list[mx.array]) -> list[mx.array]:
    halves = [cast(list[mx.array], mx.split(array, 2)) for array in arrays]
    return [mx.concatenate(pair) for pair in halves]


def _invert(arrays: list[mx.array]) -> list[mx.array]:
    return [mx.bitwise_invert(array) for array in arrays]


COPIES: dict[str, Copy] = {
    "concatenate": _join_halves,
    "invert": _invert,
}
"""Ways to read every (even-sized, integer) array once and write as much: mlx has no bare copy."""
