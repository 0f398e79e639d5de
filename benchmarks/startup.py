"""Measure the first token of a known task: ``ifp`` beside ``mlx_lm.generate`` on its export.

    python benchmarks/startup.py [--model smollm2-135m] [--repeats 9]

Every figure is a whole process, from its start to the first byte of the answer, the prompt the
same and one token generated. The sub-network is cached and exported first, in a temporary folder,
which serves as IFP_HOME. Runs are interleaved. mlx_lm.generate runs on the terms that ifp gives
itself: PyTorch, which neither needs, is hidden where it is installed, because transformers would
import it, and OpenBLAS is loaded where mlx has no fast BLAS. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ifp_mlx.benchmarking.report import markdown_table
from ifp_mlx.convert.registry import resolve_model

TASK = "help me write Python"
PROMPT = "Write a function that reverses a string."

_EQUAL_TERMS = """
import sys
sys.modules["torch"] = None
from ifp_mlx.blas import prefer_openblas
prefer_openblas()
from mlx_lm.generate import main
main()
"""
_HEADER = b"==========\n"  # what mlx_lm.generate prints before the answer


def first_answer(
    command: list[str], environment: dict[str, str], stdin: bytes, header: bytes
) -> tuple[float, float, bytes]:
    """Run a command; return seconds to the answer's first byte, CPU seconds in all, its output."""
    cpu_before_s = children_cpu_s()
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(stdin)
        process.stdin.close()
        output = b""
        first_s = 0.0
        while piece := process.stdout.read(4096):
            output += piece
            if not first_s and len(output) > len(header):
                first_s = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed with {process.returncode}")
    return first_s, children_cpu_s() - cpu_before_s, output.removeprefix(header)


def children_cpu_s() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Export, warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    model = str(resolve_model(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "IFP_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }
        exported = str(Path(folder, "exported"))
        ifp = [sys.executable, "-c", "from ifp_mlx.cli.app import main; main()"]
        ours = ["--model", model, "--task", TASK]
        subprocess.run(
            [*ifp, "export", *ours, "-o", exported],
            env=environment,
            check=True,
            stderr=subprocess.DEVNULL,
        )
        message = f"{PROMPT}\n".encode()
        limit = ["--max-tokens", "1"]
        reference = [sys.executable, "-c", _EQUAL_TERMS, "--model", exported, *limit]
        runs: dict[str, tuple[list[str], bytes, bytes]] = {
            "mlx_lm.generate": ([*reference, "--prompt", PROMPT], b"", _HEADER),
            "ifp generate": ([*ifp, "generate", *ours, *limit, PROMPT], b"", b""),
            "ifp chat": ([*ifp, "chat", *ours, *limit, "--no-save"], message, b""),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        answers = {}
        for repeat in range(arguments.repeats + 1):  # the first warms the disk's cache
            for name, (command, stdin, header) in runs.items():
                first_s, cpu_s, output = first_answer(command, environment, stdin, header)
                answers[name] = output.split(b"\n")[0].decode()
                if repeat:
                    times[name].append((first_s, cpu_s))
    if len(set(answers.values())) > 1:
        raise SystemExit(f"the answers differ: {answers}")
    report(times, arguments.repeats)


def report(times: dict[str, list[tuple[float, float]]], repeats: int) -> None:
    """Print the table, and everything as JSON."""
    reference = times["mlx_lm.generate"]
    rows: list[list[str]] = []
    record: dict[str, Any] = {}
    for name, measured in times.items():
        first = [first_s for first_s, _ in measured]
        # Neighbours in time, so that what else the machine does cancels out.
        ratio = statistics.median(
            ours[0] / theirs[0] for ours, theirs in zip(measured, reference, strict=True)
        )
        cpu_s = statistics.median(cpu_s for _, cpu_s in measured)
        median = statistics.median(first)
        spread = f"{min(first):.2f}-{max(first):.2f}"
        rows.append([name, f"{median:.2f} s", spread, f"{ratio:.2f}", f"{cpu_s:.2f} s"])
        record[name] = {"first_token_s": first, "ratio": ratio, "cpu_s": cpu_s}
    headers = ["process", "first token", "spread", "ratio", "CPU time"]
    print(markdown_table(headers, rows))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")}
    print(json.dumps({"machine": machine, **versions, "repeats": repeats, "rows": record}))


if __name__ == "__main__":
    main()
