"""Write the tables of docs/latency.md from stored results; ``--check`` only compares."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from page_tables import RESULTS, Table, as_table, read, run

from ifp_mlx.benchmarking.latency import DENSE, PER_INPUT, PER_TASK, PER_TASK_SLICED, SMALL

Row = dict[str, Any]

SHOWN = (DENSE, SMALL, PER_INPUT, PER_TASK, PER_TASK_SLICED)
SUITES = ("8b-bf16", "8b-4bit", "9b-bf16", "9b-4bit")

# Of the paper's review discussion: prompt, small dense, IFP, selection and loading.
PAPER = (
    ("8B → 3B, A6000", "4k", "0.452", "0.573", "12 %"),
    ("8B → 3B, RTX 3090", "4k", "0.418", "0.526", "11 %"),
    ("8B → 3B, A6000", "2k", "0.461", "0.619", "16 %"),
    ("8B → 3B, RTX 3090", "2k", "0.435", "0.557", "12 %"),
    ("9B → 3B, A6000", "4k", "", "0.557", "13 %"),
)
PAPER_MIXTURE = (
    ("paper, MoE, A6000", "621", "0.734", "28430", "3.97"),
    ("paper, 9B → 3B, A6000", "471", "0.557", "5580", "0.78"),
)


@functools.cache
def document(name: str) -> dict[str, Any]:
    """Return what one job of the suite stored."""
    return read(RESULTS / "latency" / f"{name}.json")


def found(name: str, row: str, prompt: int, **others: int) -> Row:
    """Return one row of a job."""
    wanted = {"name": row, "prompt_tokens": prompt, **others}
    (only,) = (r for r in document(name)["rows"] if all(r[k] == v for k, v in wanted.items()))
    return dict(only)


def ms(timing: dict[str, float] | None, digits: int = 1) -> str:
    """Return a median in milliseconds."""
    return "" if timing is None else f"{timing['median_s'] * 1e3:.{digits}f}"


def bold(text: str) -> str:
    """Return text in bold."""
    return f"**{text}**"


def percent(share: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * share:.0f} %"


def overhead(name: str, prompt: int) -> float:
    """Return selection and loading as a share of the dense source's time to the first token."""
    row, dense = found(name, PER_INPUT, prompt), found(name, DENSE, prompt)
    taken = row["selection"]["median_s"] + row["loading"]["median_s"]
    return float(taken / dense["ttft"]["median_s"])


def suite(name: str, prompt: int) -> str:
    """Return everything that was measured with one model and prompt."""
    head = (
        f"prompt {prompt}", "selection", "loading", "prefill", bold("TTFT"), "decode", "tokens/s",
        "memory, GB", "TTFT / source", "TTFT / compact", "decode / source",
    )  # fmt: skip
    rows = []
    for shown in SHOWN:
        row = found(name, shown, prompt)
        to_source = f"{row['ttft_to_dense']:.3f}"
        rows.append(
            (
                shown,
                *(ms(row[stage]) for stage in ("selection", "loading", "prefill")),
                bold(ms(row["ttft"])),
                ms(row["decode"], 0),
                f"{row['tokens_per_s']:.0f}",
                f"{row['peak_memory_bytes'] / 1e9:.1f}",
                bold(to_source) if shown in (PER_INPUT, PER_TASK) else to_source,
                f"{row['ttft_to_small']:.3f}",
                f"{row['decode_to_dense']:.3f}",
            )
        )
    return as_table(head, rows, 1)


def mixture() -> str:
    """Return the shape of Qwen3-30B-A3B with all experts and with half of them."""
    labels = {
        DENSE: "all 128 experts",
        SMALL: "built with 64 experts",
        PER_TASK: PER_TASK,
        PER_TASK_SLICED: PER_TASK_SLICED,
    }
    head = (
        "", "loading", "prefill", bold("TTFT"), "decode", "tokens/s", "memory, GB",
        "TTFT / compact", "decode / compact",
    )  # fmt: skip
    rows = []
    for name, label in labels.items():
        row = found("30b-a3b-4bit", name, 4096)
        rows.append(
            (
                label,
                *(ms(row[stage], 0) for stage in ("loading", "prefill")),
                bold(ms(row["ttft"], 0)),
                ms(row["decode"], 0),
                f"{row['tokens_per_s']:.0f}",
                f"{row['peak_memory_bytes'] / 1e9:.1f}",
                f"{row['ttft_to_small']:.3f}",
                f"{row['decode_to_small']:.3f}",
            )
        )
    return as_table(head, rows, 1)


def beside_the_paper() -> str:
    """Return ratios of times to the first token: the paper's, and ours."""
    head = ("", "prompt", "small dense", "IFP, per input", "IFP, per task", "selection + loading")

    def ours(label: str, name: str, prompt: int) -> tuple[str, ...]:
        ratios = [found(name, row, prompt)["ttft_to_dense"] for row in (SMALL, PER_INPUT, PER_TASK)]
        small, per_input, per_task = (f"{ratio:.3f}" for ratio in ratios)
        shown = (small, bold(per_input), bold(per_task), percent(overhead(name, prompt)))
        return (bold(label), f"{prompt // 1024}k", *shown)

    def paper(label: str, prompt: str, small: str, per_input: str, share: str) -> tuple[str, ...]:
        return (f"paper, {label}", prompt, small, per_input, "", share)

    rows = []
    for start, prompt in ((0, 4096), (2, 2048)):
        rows += [paper(*line) for line in PAPER[start : start + 2]]
        rows.append(ours("ours, 8B → 3B, H100", "8b-bf16", prompt))
        rows.append(ours("ours, the same at 4 bits", "8b-4bit", prompt))
    rows.append(paper(*PAPER[4]))
    rows.append(ours("ours, 9B → 3B, H100", "9b-bf16", 4096))
    rows.append(ours("ours, the same at 4 bits", "9b-4bit", 4096))
    rows.append(ours("ours, the same at 4 bits", "9b-4bit", 2048))
    return as_table(head, rows, 1)


def other_mixture() -> str:
    """Return the shape of Qwen1.5-MoE-A2.7B beside 9B cut to 3B, the paper's and ours."""
    dense = found("9b-bf16", DENSE, 4096)
    rows = list(PAPER_MIXTURE)
    for label, row in (
        ("ours, MoE-shaped, H100", found("moe-bf16", DENSE, 4096)),
        ("ours, 9B → 3B, per input, H100", found("9b-bf16", PER_INPUT, 4096)),
        ("ours, 9B → 3B, per task, H100", found("9b-bf16", PER_TASK, 4096)),
    ):
        ratios = (row[key]["median_s"] / dense[key]["median_s"] for key in ("ttft", "decode"))
        first, decode = (f"{ratio:.3f}" for ratio in ratios)
        rows.append((label, ms(row["ttft"]), first, ms(row["decode"], 0), decode))
    return as_table(("", "TTFT", "TTFT / 9B", "decode", "decode / 9B"), rows, 1)


def aims() -> str:
    """Return what was aimed at before measuring, and what came out, with 4096 tokens."""

    def each(row: str, ratio: str) -> list[str]:
        return [f"{found(name, row, 4096)[ratio]:.3f}" for name in SUITES]

    slices = [document(f"slicing-{name}")["rows"][0]["ratio"] for name in SUITES[:3]]
    rows = (
        ("per task ≤ 0.51 of the source's TTFT", *each(PER_TASK, "ttft_to_dense"), "met at 4 bits"),
        ("per input ≤ 0.57", *each(PER_INPUT, "ttft_to_dense"), "met at 4 bits"),
        (
            "slicing ≤ 2.5 × a device copy of the same bytes",
            *(f"{ratio:.1f}" for ratio in slices),
            "",
            "missed",
        ),
        (
            "loading + selection ≤ 8 % of the source's TTFT",
            *(percent(overhead(name, 4096)) for name in SUITES),
            "met once",
        ),
        (
            "decode within 2 % of the dense model of the same shape",
            *each(PER_TASK, "decode_to_small"),
            "not slower but for 9B in bfloat16, whose five repeats spread from "
            + spread(found("9b-bf16", PER_TASK, 4096)["decode"], "s"),
        ),
    )
    head = ("aim", "8B, bfloat16", "8B, 4 bits", "9B, bfloat16", "9B, 4 bits", "")
    return as_table(head, rows)


def spread(timing: dict[str, float], unit: str) -> str:
    """Return the ends of what was measured."""
    scale = {"s": 1.0, "ms": 1e3}[unit]
    return f"{timing['min_s'] * scale:.1f} to {timing['max_s'] * scale:.1f} {unit}"


def kernels() -> str:
    """Return how much each stage launches, and what it took."""
    labels = {
        "selection": "selection: 24 layers of the predictor, its head, top-k",
        "slicing": "slicing: gate, up and down of each layer; time with the checks around it",
        "prefill": "one pass of the sub-network",
    }
    rows = []
    for stage, label in labels.items():
        key = {"slicing": "loading"}.get(stage, stage)
        own = [row for row in document("8b-bf16")["rows"] if row["name"] == PER_INPUT]
        times = sorted(row[key]["median_s"] * 1e3 for row in own)
        counted = read(RESULTS / "kernel-counts.json")["rows"][stage]["launches"]
        rows.append((label, str(counted), f"{times[0]:.0f} to {times[-1]:.0f} ms"))
    return as_table(("", "launches", "measured"), rows, 1)


def wide() -> str:
    """Return decoding where weights take longer to read than kernels to launch."""
    rows = []
    for name, label in ((DENSE, "dense source"), (SMALL, SMALL), (PER_TASK, "ours")):
        cells = []
        for samples in (1, 4):
            row = found("wide-bf16", name, 2048, num_samples=samples)
            cells += [ms(row["decode"], 0), f"{row['bandwidth_share']:.2f}"]
        size = "" if name == PER_TASK else f", {row['parameters'] / 1e9:.2f}B"
        rows.append((label + size, *cells))
    head = ("", "1 sample", "of copy bandwidth", "4 samples", "of copy bandwidth")
    return as_table(head, rows, 1)


def roofline() -> str:
    """Return what a decoding step must read, and its share of a copy's bandwidth."""
    jobs = (
        ("8B, bfloat16, 4k", "8b-bf16", 4096, 4),
        ("8B, bfloat16, 2k", "8b-bf16-one-sample", 2048, 1),
        ("8B, 4 bits, 4k", "8b-4bit", 4096, 4),
        ("9B, bfloat16, 4k", "9b-bf16", 4096, 4),
        ("9B, 4 bits, 4k", "9b-4bit", 4096, 4),
        ("wide, bfloat16, 2k", "wide-bf16", 2048, 1),
    )
    rows = []
    for label, name, prompt, samples in jobs:
        cells = [label, str(samples)]
        for shown in (DENSE, PER_TASK):
            row = found(name, shown, prompt, num_samples=samples)
            cells += [f"{row['step_bytes'] / 1e9:.1f} GB", percent(row["bandwidth_share"])]
        rows.append(cells)
    return as_table(("", "samples", "dense source", "share", "ours", "share"), rows, 1)


def slicing() -> str:
    """Return gathers of all layers beside a device copy of the same bytes."""
    labels = {"mx.take for each array": "taken"}
    rows = []
    for shape, name in (
        ("8B, bfloat16", "8b-bf16"),
        ("9B, bfloat16", "9b-bf16"),
        ("8B, 4 bits", "8b-4bit"),
    ):
        for row in document(f"slicing-{name}")["rows"]:
            label = labels.get(row["name"], row["name"])
            if row["name"] == "as ifp slices" and name == "8b-4bit":
                label += ", down at 8 bits"
            rows.append(
                (
                    f"{shape}: {label}",
                    f"{row['num_bytes'] / 1e9:.2f}",
                    ms(row["timing"]),
                    f"{row['copy_s'] * 1e3:.2f}",
                    f"{row['ratio']:.2f}",
                )
            )
    return as_table(("gather", "GB", "time", "device copy", "time / copy"), rows, 1)


def switching() -> str:
    """Return what a switch of task costs, by tasks at hand."""
    head = (
        "tasks", "same task", "other task, resident", "other task, indices on disk", "new task",
        "memory of all tasks, GB",
    )  # fmt: skip
    rows = [
        (
            str(row["num_tasks"]),
            *(ms(row[key]) for key in ("stay", "resident", "indices", "anew")),
            f"{row['num_tasks'] * row['task_bytes'] / 1e9:.2f}",
        )
        for row in document("switch-8b-bf16")["rows"]
    ]
    return as_table(head, rows, 1)


def growth(name: str, points: Sequence[tuple[str, dict[str, int]]], head: str) -> str:
    """Return times to the first token along one axis."""
    rows = []
    for label, at in points:
        dense, small, per_input, per_task = (
            found(name, row, **at) for row in (DENSE, SMALL, PER_INPUT, PER_TASK)
        )
        times = [ms(row["ttft"]) for row in (dense, small, per_input, per_task)]
        ratios = [f"{row['ttft_to_dense']:.3f}" for row in (per_input, per_task)]
        rows.append((label, *times, *ratios))
    columns = (DENSE, "compact shape", "per input", "per task")
    return as_table((head, *columns, "per input / source", "per task / source"), rows, 1)


def prompts() -> str:
    """Return growth with the prompt."""
    lengths = (512, 1024, 2048, 4096, 8192)
    points = [(str(length), {"prompt": length}) for length in lengths]
    return growth("8b-bf16", points, "prompt (K = 1536)")


def units() -> str:
    """Return growth with the units that are kept."""
    shares = {1792: "F/8", 3584: "F/4", 7168: "F/2", 10752: "3F/4", 14336: "F"}
    points = [
        (f"{kept}, {share}", {"prompt": 4096, "num_kept_units": kept})
        for kept, share in shares.items()
    ]
    return growth("8b-bf16-units", points, "K of 14336 (4096 tokens)")


TABLES: dict[str, Table] = {
    **{
        f"{name} {prompt}": functools.partial(suite, name, prompt)
        for name in SUITES
        for prompt in (4096, 2048)
    },
    "30b-a3b-4bit": mixture,
    "beside the paper": beside_the_paper,
    "moe-bf16": other_mixture,
    "aims": aims,
    "kernel counts": kernels,
    "wide-bf16": wide,
    "roofline": roofline,
    "slicing": slicing,
    "switch-8b-bf16": switching,
    "growth with the prompt": prompts,
    "growth with the units": units,
}

if __name__ == "__main__":
    sys.exit(run({"docs/latency.md": TABLES}))
