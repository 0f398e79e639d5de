"""Is ``ifp generate`` without a task ever slower than ``--dense``? Prompts of 10 to 2,000 tokens.

    python benchmarks/first_message.py -o benchmarks/results/first-message.json

Each prompt is answered by the whole model and as without a task, where the cost of selecting
decides; one of each length also by the part that it selects for itself, whatever that costs. They
take turns in one process, the model loaded once, short prompts more often; an answer's time runs
from the decision to the last token. Ratios are medians over pairs of neighbours, of wall time and
of the process's CPU time, which other work on the machine touches less. Where nothing is selected
the two do the same work but for deciding, whose CPU time is measured too. The last line is one JSON
object.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before anything imports mlx.core

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.report import markdown_table  # noqa: E402
from ifp_mlx.chat.sampling import SamplingOptions  # noqa: E402
from ifp_mlx.cli.loading import choose_subnetwork  # noqa: E402
from ifp_mlx.cli.options import SubnetOptions  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.subnets.subnetwork import SubNetwork  # noqa: E402

LENGTHS = (10, 40, 150, 600, 2000)
PROMPTS_EACH = 4
TEXT = Path(__file__).parents[1] / "docs" / "latency.md"


def prompts(assistant: Assistant, num_tokens: int) -> list[str]:
    """Return pieces of a text of about so many tokens, no two alike."""
    ids = assistant.tokenizer.encode(TEXT.read_text())
    step = (len(ids) - num_tokens) // PROMPTS_EACH
    return [
        assistant.tokenizer.decode(ids[i * step : i * step + num_tokens])
        for i in range(PROMPTS_EACH)
    ]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    assistant = Assistant.load(resolve_model(args.model))
    kept, sampling = assistant.default_num_kept_units, SamplingOptions(args.max_tokens)
    ways: dict[str, Callable[[str], SubNetwork]] = {
        "dense": lambda text: assistant.dense(),
        "no task": lambda text: choose_subnetwork(
            assistant, SubnetOptions(), text, where_it_pays=True
        ),
        "always selected": lambda text: assistant.subnetwork_for_prompt(text, kept),
    }

    decisions_s: list[float] = []

    def timed(way: str, text: str) -> tuple[float, float, bool]:
        start, cpu = time.perf_counter(), time.process_time()
        subnet = ways[way](text)
        if way == "no task":
            decisions_s.append(time.process_time() - cpu)
        for _ in assistant.converse(subnet).reply([{"role": "user", "content": text}], sampling):
            pass
        passed = time.perf_counter() - start, time.process_time() - cpu
        return *passed, subnet.selection is not None

    for way in ways:
        timed(way, "Hello")
    rows, classes = [], []
    for length in args.lengths:
        pairs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways if way != "dense"}
        num_selected, dense_s = 0, []
        decisions_s.clear()
        for number in range(args.rounds * max(1, min(4, 300 // length))):
            for position, text in enumerate(prompts(assistant, length)):
                for way, ratios in pairs.items():
                    if (position or number) and way == "always selected":
                        continue
                    order = ("dense", way) if (number + position) % 2 else (way, "dense")
                    measured = {name: timed(name, text) for name in order}
                    dense, other = measured["dense"], measured[way]
                    ratios.append((other[0] / dense[0], other[1] / dense[1]))
                    dense_s.append(dense[0])
                    num_selected += way == "no task" and other[2]
        record = {
            "tokens": length,
            "dense_s": statistics.median(dense_s),
            "decision_cpu_s": statistics.median(decisions_s),
        }
        for way, ratios in pairs.items():
            name = way.replace(" ", "_")
            record[f"{name}_ratio"] = statistics.median(wall for wall, _ in ratios)
            record[f"{name}_cpu_ratio"] = statistics.median(cpu for _, cpu in ratios)
        record["num_pairs"] = len(pairs["no task"])
        record["num_selected"] = num_selected
        classes.append(record)
        rows.append([
            str(length),
            str(record["num_pairs"]),
            f"{record['dense_s']:.2f} s",
            f"{record['decision_cpu_s'] * 1000:.1f} ms",
            f"{record['no_task_ratio']:.3f}",
            f"{record['no_task_cpu_ratio']:.3f}",
            f"{record['always_selected_ratio']:.3f}",
            f"{record['always_selected_cpu_ratio']:.3f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    headers = ["tokens", "pairs", "--dense", "deciding", "no task", "CPU", "always selected", "CPU"]
    print(markdown_table(headers, rows))
    document = {
        "model": args.model,
        "selector": str(assistant.files.selector),
        "num_kept_units": kept,
        "num_units": assistant.num_units,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "prompts_each": PROMPTS_EACH,
        "classes": classes,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
