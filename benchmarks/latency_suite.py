"""Every measurement of docs/latency.md in one process: JSON files into benchmarks/results/latency/.

    python benchmarks/latency_suite.py                 # all jobs, about ten minutes on an H100
    python benchmarks/latency_suite.py --only 8b-bf16  # one of them
    python benchmarks/latency_suite.py --layers 2 --repeats 1 --results /tmp/smoke

One process, because a device builds its kernels once a process. Each job is also one command of
``ifp bench``; its options are in the JSON. A job that fails is reported and the next one runs.
"""

import argparse
import dataclasses
import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifp_mlx.benchmarking import report, shapes
from ifp_mlx.benchmarking.latency import Workload
from ifp_mlx.benchmarking.runs import ModelOptions, run_latency, run_slicing, run_switching
from ifp_mlx.benchmarking.timing import Repeats

Job = Callable[[Repeats, Path], dict[str, Any]]

DECODE_REPEATS = 5  # decoding takes seconds
BIG_PREDICTOR = "qwen2.5-0.5b"
SAMPLES = 4  # of one prompt, where decoding is measured with several
PAPER = (Workload(4096, num_samples=SAMPLES), Workload(2048, num_samples=SAMPLES))
GROWTH = tuple(Workload(tokens, new_tokens=0) for tokens in (512, 1024, 8192))


def latency(options: ModelOptions, workloads: tuple[Workload, ...]) -> Job:
    """Return a job that measures latency and saves after each workload."""

    def job(repeats: Repeats, path: Path) -> dict[str, Any]:
        content = run_latency(
            options,
            workloads,
            repeats=repeats,
            decode_repeats=min(DECODE_REPEATS, repeats.counted),
            on_part=lambda part: report.write_document(path, part),
        )
        print(report.latency_table(content["rows"]))
        return content

    return job


def slicing(options: ModelOptions) -> Job:
    """Return a job that measures gathers."""

    def job(repeats: Repeats, path: Path) -> dict[str, Any]:
        content = run_slicing(options, repeats=_odd(repeats))
        print(report.slicing_table(content["rows"]))
        return content

    return job


def switching(options: ModelOptions, task_counts: tuple[int, ...]) -> Job:
    """Return a job that measures switching between tasks."""

    def job(repeats: Repeats, path: Path) -> dict[str, Any]:
        content = run_switching(
            options, task_counts=task_counts, prompt_tokens=64, repeats=_odd(repeats)
        )
        print(report.switch_table(content["rows"]))
        return content

    return job


def _odd(repeats: Repeats) -> Repeats:
    """Return about twice as many repeats, for what takes milliseconds; a median is one of them."""
    return dataclasses.replace(repeats, counted=2 * repeats.counted - 1)


def options(shape: str, bits: int = 16, **changes: Any) -> ModelOptions:
    """Return the options of a job."""
    return ModelOptions(shape, **{"predictor": BIG_PREDICTOR, "bits": bits, **changes})


READING = tuple(Workload(tokens, new_tokens=0) for tokens in (1024, 4096, 16384, 32768))
"""Prompts that a part reads and the whole model answers (docs/reading.md)."""

K_SWEEP = (1792, 3584, 7168, 10752, 14336)

# The most important first: a run that is cut off keeps what it has.
JOBS: dict[str, Job] = {
    "8b-bf16": latency(options("llama-3.1-8b"), PAPER + GROWTH),
    "slicing-8b-bf16": slicing(options("llama-3.1-8b")),
    "8b-4bit": latency(options("llama-3.1-8b", 4), PAPER),
    "9b-bf16": latency(options("paper-9b"), PAPER),
    "9b-4bit": latency(options("paper-9b", 4), PAPER),
    "slicing-8b-4bit": slicing(options("llama-3.1-8b", 4)),
    "switch-8b-bf16": switching(options("llama-3.1-8b"), (1, 2, 5, 10, 20)),
    "wide-bf16": latency(
        options("wide-8-layers"), (Workload(2048, 50, num_samples=SAMPLES), Workload(2048, 50))
    ),
    "8b-bf16-units": latency(
        options("llama-3.1-8b", num_kept_units=K_SWEEP), (Workload(4096, 16, num_samples=SAMPLES),)
    ),
    "moe-bf16": latency(options("qwen1.5-moe-a2.7b"), PAPER),
    "30b-a3b-4bit": latency(
        options("qwen3-30b-a3b", 4, predictor="smollm2-135m"), (Workload(4096, new_tokens=50),)
    ),
    "slicing-30b-a3b-4bit": slicing(options("qwen3-30b-a3b", 4)),
    "8b-bf16-reading": latency(
        options("llama-3.1-8b", num_kept_units=(7168,), predictor="smollm2-135m"), READING
    ),
    "8b-4bit-reading": latency(
        options("llama-3.1-8b", 4, num_kept_units=(7168,), predictor="smollm2-135m"), READING
    ),
    "8b-bf16-one-sample": latency(options("llama-3.1-8b"), (Workload(2048),)),
    "slicing-9b-bf16": slicing(options("paper-9b")),
    "8b-bf16-small-predictor": latency(
        options("llama-3.1-8b", predictor="smollm2-135m"), (Workload(4096, 0),)
    ),
}


def main() -> None:
    """Run the jobs that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--skip", nargs="*", default=[], choices=list(JOBS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--layers", type=int, help="cut every model to so many layers")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; then no more")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results" / "latency",
        help="folder",
    )
    arguments = parser.parse_args()
    if arguments.layers:
        _cut_layers(arguments.layers)
    repeats = Repeats(arguments.repeats, arguments.warmups)
    start = time.perf_counter()
    for name in arguments.only:
        if name in arguments.skip:
            continue
        if time.perf_counter() - start > arguments.budget:
            print(f"{name}: no time left", flush=True)
            continue
        job_start = time.perf_counter()
        path = arguments.results / f"{name}.json"
        try:
            report.write_document(path, JOBS[name](repeats, path))
        except Exception:  # the next job may well run
            traceback.print_exc(file=sys.stdout)
        print(f"{name}: {time.perf_counter() - job_start:.1f} s", flush=True)
        gc.collect()
        mx.clear_cache()


def _cut_layers(num_layers: int) -> None:
    for name, shape in shapes.SHAPES.items():
        config = {**shape.config, "num_hidden_layers": num_layers}
        shapes.SHAPES[name] = dataclasses.replace(shape, config=config)


if __name__ == "__main__":
    main()
