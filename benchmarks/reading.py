r"""Time to the first token when a part of a model reads the prompt and the whole model answers.

    python benchmarks/reading.py --model qwen-coder --prompt 2048 --keep 0.5 0.33 \
        --output benchmarks/results/reading-cpu.json

What ``ifp generate`` does with ``--read-with part`` and ``--read-with whole``, in turns in one
process, the units chosen for a task beforehand. The prompt is code of Python's standard library.
Two clocks: the wall's, and the seconds of this process's own threads, which say more on a machine
that does other work as well (then with OPENBLAS_NUM_THREADS=1, because waiting threads count).
"""

from ifp_mlx.blas import prefer_openblas

BLAS = prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ifp_mlx.assistant import Assistant  # noqa: E402
from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.chat.chat_template import chat_ids  # noqa: E402
from ifp_mlx.chat.sampling import SamplingOptions  # noqa: E402
from ifp_mlx.convert.registry import resolve_model  # noqa: E402
from ifp_mlx.subnets.subnetwork import SubNetwork  # noqa: E402

TASK = "help me write Python"
QUESTION = "Complete this module:\n\n"


@dataclasses.dataclass
class Row:
    """One way to read.

    Attributes:
        name: of it.
        subnet: what answers.
        wall_s: to the first token, each repeat.
        cpu_s: the same on the process's clock.
    """

    name: str
    subnet: SubNetwork
    wall_s: list[float] = dataclasses.field(default_factory=list)
    cpu_s: list[float] = dataclasses.field(default_factory=list)

    def document(self, whole: "Row") -> dict[str, Any]:
        """Return figures and their ratios to those of the whole model, repeat by repeat."""
        return {
            "name": self.name,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "wall_ratio": _ratio(self.wall_s, whole.wall_s),
            "cpu_ratio": _ratio(self.cpu_s, whole.cpu_s),
        }


def prompt_of(assistant: Assistant, num_tokens: int) -> list[dict[str, str]]:
    """Return a message of nearly so many tokens."""
    code = inspect.getsource(argparse)
    ids = assistant.tokenizer.encode(code, add_special_tokens=False)
    empty = len(chat_ids(assistant.tokenizer, [{"role": "user", "content": QUESTION}]))
    text = QUESTION + assistant.tokenizer.decode(ids[: num_tokens - empty])
    return [{"role": "user", "content": text}]


def first_token(assistant: Assistant, row: Row, messages: list[dict[str, str]]) -> None:
    """Answer with one token, and note what it took. Evaluates."""
    conversation = assistant.converse(row.subnet)
    start = time.process_time()
    for _ in conversation.reply(messages, SamplingOptions(max_new_tokens=1)):
        pass
    row.cpu_s.append(time.process_time() - start)
    assert conversation.stats is not None
    row.wall_s.append(conversation.stats.time_to_first_token_s)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen-coder")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.33])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", "-o", type=Path)
    arguments = parser.parse_args()
    assistant = Assistant.load(resolve_model(arguments.model), reads_with_part=True)
    messages = prompt_of(assistant, arguments.prompt)
    whole = Row("whole", assistant.dense())
    rows, selection_s = [whole], []
    for share in arguments.keep:
        start = time.process_time()
        subnet = assistant.subnetwork_for_task(TASK, assistant.amounts.nearest(share))
        selection_s.append(time.process_time() - start)
        assert subnet.reader is not None
        rows.append(Row(f"part, {subnet.reader.num_kept_units} units", subnet))
    result = {
        "benchmark": "reading",
        "machine": machine(),
        "blas": BLAS,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "model": arguments.model,
        "prompt_tokens": len(chat_ids(assistant.tokenizer, messages)),
        "num_units": assistant.num_units,
        "select_and_cut_cpu_s": selection_s,
    }
    for repeat in range(arguments.repeats):
        for row in rows[repeat % len(rows) :] + rows[: repeat % len(rows)]:
            first_token(assistant, row, messages)
            print(f"{row.name}: {row.wall_s[-1]:.1f} s, CPU {row.cpu_s[-1]:.1f} s", flush=True)
        result["rows"] = [row.document(whole) for row in rows]
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n| prompt read by | first token, s | CPU s | ratio | CPU ratio |\n{'|---' * 5}|")
    for row in rows:
        found = row.document(whole)
        wall, cpu = statistics.median(row.wall_s), statistics.median(row.cpu_s)
        ratios = f"{found['wall_ratio']:.3f} | {found['cpu_ratio']:.3f}"
        print(f"| {row.name} | {wall:.1f} | {cpu:.1f} | {ratios} |")


def _ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


if __name__ == "__main__":
    main()
