"""Measure what a model can still do when a part of it reads or writes.

    python run.py JOB.json [JOB.json ...] --models FOLDER --data FOLDER --out FOLDER [--seconds S]

Rows are appended to OUT/rows.jsonl as soon as they are done; a row that is there already is
skipped, so a run that was stopped goes on where it was. OUT/answers and OUT/tokens hold the token
ids of the answers and the figures of every token. Nothing is downloaded. **Programs that the model
wrote are run**, each in a process of its own.
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import dataclasses  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
from measure import Bench  # noqa: E402
from results import Results  # noqa: E402
from rows import WHOLE, Row, Unit, load_job  # noqa: E402

_MARGIN = 1.3
"""A unit is started only if this many times the last one of its set still fits the time."""


def main() -> None:
    """Do the units of a job."""
    arguments = _parse_arguments()
    jobs = [load_job(path) for path in arguments.jobs]
    results = Results(arguments.out)
    clock = Clock(arguments.seconds)
    for units in jobs:
        print(f"{mx.default_device()}: {len(units)} units of {units[0].model}, ", end="")
        print(f"{results.count(units)} done", flush=True)
        if results.count(units) < len(units):
            run_job(units, arguments, results, clock)


def run_job(
    units: Sequence[Unit], arguments: argparse.Namespace, results: Results, clock: "Clock"
) -> None:
    """Measure the units of a job that are not done, as far as time allows."""
    bench = Bench(arguments, units[0].model, results)
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        for unit in units:
            results.write_finished()
            if unit.key in results.keys:
                continue
            if not clock.allows(unit.set_name):
                print(f"{clock.now():7.1f} s  no time for {unit.key}", flush=True)
                continue
            if unit.row.name != WHOLE and dataclasses.replace(unit, row=Row(WHOLE)).key not in (
                results.keys
            ):
                continue  # the whole model's row did not fit the time
            start = time.perf_counter()
            try:
                pending = bench.measure(unit, pool)
            except Exception:  # the next unit may well run
                traceback.print_exc()
                continue
            seconds = time.perf_counter() - start
            clock.took(unit.set_name, seconds)
            results.add(pending)
            mx.clear_cache()
            peak = mx.get_peak_memory() / 1e9
            print(
                f"{clock.now():7.1f} s  {unit.key}: {seconds:.1f} s {pending.line['seconds']}, "
                f"peak {peak:.1f} GB",
                flush=True,
            )
        results.write_finished(wait=True)


class Clock:
    """Time since the start, and what units of a set take.

    Args:
        limit: seconds after which nothing is started any more.
    """

    def __init__(self, limit: float):
        self._start = time.perf_counter()
        self._limit = limit
        self._seconds: dict[str, float] = {}

    def now(self) -> float:
        """Return seconds since the start."""
        return time.perf_counter() - self._start

    def took(self, set_name: str, seconds: float) -> None:
        """Note what the last unit of a set took."""
        self._seconds[set_name] = seconds

    def allows(self, set_name: str) -> bool:
        """Return whether there is time for one more unit of a set."""
        return self.now() + _MARGIN * self._seconds.get(set_name, 0) < self._limit


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("jobs", type=Path, nargs="+")
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoint folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of the text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after this time")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, help="items a set")
    parser.add_argument("--calibrate", type=int, default=128, help="calibration examples a task")
    parser.add_argument("--batch", type=int, default=256, help="answers written at once")
    parser.add_argument("--cache-gb", type=float, default=12.0, help="KV caches of one batch")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="judging threads")
    return parser.parse_args()


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    main()
