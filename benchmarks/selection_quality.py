"""Quality of training-free sub-networks: the table of the README.

Cross-entropy on held-out text, by domain, with all FFN units and with two thirds and half of
them, picked at random, by the calibrated prior over all text, by that of the text's own domain,
and by the rank blend:

    python benchmarks/selection_quality.py MODEL_FOLDER EVAL_FOLDER --calibration FILE

Prints Markdown; ``--out FILE`` also writes the figures as JSON, after every row, so that a run
that is stopped keeps what it has measured.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ifp_mlx.blas import prefer_openblas

BLAS = prefer_openblas()  # before mlx is imported

import mlx.core as mx  # noqa: E402

from ifp_mlx.adapters.shipped import find_companion  # noqa: E402
from ifp_mlx.evaluation.quality import load_held_out  # noqa: E402
from ifp_mlx.evaluation.rows import parse_row  # noqa: E402
from ifp_mlx.evaluation.subject import Subject  # noqa: E402
from ifp_mlx.evaluation.table import (  # noqa: E402
    RowResult,
    markdown_table,
    measure_rows,
    shortened,
)
from ifp_mlx.selection.calibration import Calibration  # noqa: E402
from ifp_mlx.storage.config_file import read_config  # noqa: E402
from ifp_mlx.storage.files import write_bytes_atomically  # noqa: E402
from ifp_mlx.storage.tokenizer import load_tokenizer  # noqa: E402
from ifp_mlx.storage.weights import load_model  # noqa: E402
from ifp_mlx.subnets.selectors import SelectorFiles  # noqa: E402
from ifp_mlx.units.amounts import Amounts  # noqa: E402

SELECTORS = "static,domain,blend,random"


def main() -> None:
    """Measure what the command line says and print the table."""
    arguments = _parse_arguments()
    model, _ = load_model(arguments.model, "auto")
    tokenizer = load_tokenizer(arguments.model)
    calibration = Calibration.load(arguments.calibration or _own_calibration(arguments.model))
    subject = Subject(model, tokenizer, SelectorFiles(calibration=calibration))
    domains = arguments.domains.split(",") if arguments.domains else None
    examples = load_held_out(arguments.data, tokenizer, arguments.limit, domains)
    examples = shortened(examples, arguments.max_scored)
    amounts = Amounts.of(read_config(arguments.model), subject.num_units)
    kept = [amounts.nearest(float(keep)) for keep in arguments.keep.split(",")]
    names = ["dense"] if arguments.dense else []
    names += [f"{name}@{k}" for k in kept for name in arguments.selectors.split(",")]
    rows = [parse_row(name, amounts, amounts.num_units) for name in names]
    facts = _facts(arguments, sum(map(len, examples.values())))
    results: list[RowResult] = []
    start = time.perf_counter()

    def keep_row(result: RowResult) -> None:
        results.append(result)
        seconds = time.perf_counter() - start
        print(
            f"{result.row.label}: {result.mean_cross_entropy(documents=False):.3f} "
            f"{result.mean_cross_entropy(documents=True):.3f} ({seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        if arguments.out:
            content = {**facts, "rows": [result.to_dict() for result in results]}
            write_bytes_atomically(arguments.out, json.dumps(content, indent=1).encode())

    measure_rows(subject, rows, examples, with_reference=arguments.kl, on_row=keep_row)
    print(f"`{facts['command']}`\n")
    print(f"{facts['machine']}; {facts['texts']}.\n")
    print(markdown_table(results))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("data", type=Path, help="folder of held-out .jsonl files")
    parser.add_argument(
        "--calibration", type=Path, help="of ifp calibrate; by default the model's own"
    )
    parser.add_argument("--keep", default="0.67,0.5", help="shares of the units: %(default)s")
    parser.add_argument("--selectors", default=SELECTORS, help="rows for each share: %(default)s")
    parser.add_argument("--limit", type=int, default=20, help="texts a domain: %(default)s")
    parser.add_argument(
        "--max-scored", type=int, default=256, help="scored tokens a text: %(default)s"
    )
    parser.add_argument("--domains", help="only these, separated by commas")
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="leave out dense")
    parser.add_argument("--kl", action="store_true", help="also KL to dense and top-1 agreement")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def _own_calibration(model: Path) -> Path:
    found = find_companion(model, read_config(model), "calibration.safetensors")
    if found is None:
        raise SystemExit(
            f"{model} has no calibration; make one with ifp calibrate, or --calibration"
        )
    return found


def _facts(arguments: argparse.Namespace, num_texts: int) -> dict[str, Any]:
    words = [
        Path(word).name if word.startswith("/") else word for word in sys.argv[1:]
    ]  # the machine's folders say nothing to others
    return {
        "command": shlex.join(["python", "benchmarks/selection_quality.py", *words]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"mlx {importlib.metadata.version('mlx')} on {mx.default_device().type.name}, "
        f"{'with ' + BLAS if BLAS else 'without OpenBLAS'}, float32",
        "texts": f"{num_texts} texts, {arguments.limit} a domain at most, "
        f"up to {arguments.max_scored} scored tokens each",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
