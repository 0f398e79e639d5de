"""Write the tables of docs/reading.md and docs/fidelity.md from stored results, or compare."""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from page_tables import RESULTS, ROOT, Table, as_table, read, run

sys.path.insert(0, str(ROOT / "benchmarks" / "function"))
from analyse import (
    HIGHER_IS_BETTER,
    Line,
    changed_lines,
    load,
    paired_difference,
    pooled_correlation,
    spearman,
)

QWEN, SMOLLM2, GEMMA = "qwen2.5-coder-0.5b", "smollm2-135m", "gemma3-270m"

SETS = {
    "mbpp": "MBPP functions",
    "math": "math",
    "tools": "tool calls",
    "sql": "SQL",
    "needle-2k": "fact in 2k",
    "needle-4k": "in 4k",
    "needle-8k": "in 8k",
    "needle-16k": "in 16k",
    "document-qa": "questions on 3k",
    "math-8shot": "math, 8 examples",
    "code-file": "code file",
    "summary": "summary",
    "math-chat": "math, 4 turns",
    "recall-chat": "fact and math, 4 turns",
}
SHORT = ("mbpp", "math", "tools", "sql")
FACTS = ("needle-2k", "needle-4k", "needle-8k", "needle-16k")
LONG = ("document-qa", "math-8shot", "code-file", "summary")
CHATS = ("math-chat", "recall-chat")

AMOUNTS = {
    "whole": "whole model",
    "whole/split": "whole, in two passes",
    **{f"part-whole/task/{kept}": f"{kept} % of the units" for kept in (67, 50, 33, 25)},
    "part-part/task/67": "67 %, which also answers",
}


def parts(amounts: Sequence[int], kinds: Mapping[str, str]) -> dict[str, str]:
    """Return the whole model's row and those of parts, with what tables call them.

    Args:
        amounts: percent of the units, largest first.
        kinds: names of rows, ``{}`` standing for the amount, and what they are called.
    """
    shown = {"whole": "whole model"}
    for kept in amounts:
        shown |= {row.format(kept): f"{kept} %, {text}" for row, text in kinds.items()}
    return shown


CHOICES = parts(
    (67, 50),
    {
        "part-whole/task/{}": "for the task",
        "part-whole/static/{}": "for all tasks",
        "part-whole/block/{}": "by the first 256 tokens",
        "part-whole/random/{}": "at random",
    },
)
TAILS = parts(
    (50, 33),
    {
        "part-whole/task/{}": "1 token",
        "part-whole/task/{}/tail-16": "16",
        "part-whole/task/{}/tail-64": "64",
        "part-whole/task/{}/tail-256": "256",
        "part-whole/task/{}/tail-message": "last message",
    },
)

BITS = (16, 8, 6, 5, 4, 3)
KEPT = (100, 95, 90, 80, 67, 50)
FIGURES = {
    ("own", "acceptance"): "**total variation: of 100 tokens sampled, how many would be others**",
    ("own", "kl"): "KL",
    ("own", "sure_flips_per_100_sure"): "flips where the whole model was sure, per 100 such tokens",
    ("own", "cross_entropy_added"): "cross-entropy added",
    ("own", "agreement"): "agreement of first choices",
    ("own", "tokens_to_flip_mean"): "tokens until the first flip, mean",
    ("free_running", "same_tokens_mean"): "own greedy answers: tokens that stay the same, mean",
    ("free_running", "same_16"): "own greedy answers: first 16 tokens the same",
    ("own", "tokens_to_sure_flip_mean"): "tokens until the first flip where it was sure, mean",
    ("own", "answers_without_flip"): "answers without a flip",
    ("reference", "cross_entropy_added"): "*on reference answers:* cross-entropy added",
    ("reference", "acceptance"): "*on reference answers:* total variation",
}
KEEPS_UP, GIVEN_UP = 1.2, 10.0


@functools.cache
def rows(model: str) -> Mapping[tuple[str, str], Line]:
    """Return the stored rows of a model by row and set."""
    lines = load([RESULTS / "function" / f"{model}.jsonl.xz"])
    return {(line["row"]["name"], line["set"]): line for line in lines}


def cell(model: str, row: str, set_name: str, *, is_short: bool = False) -> str:
    """Return score and difference from the whole model, with its interval or a star."""
    line, whole = rows(model).get((row, set_name)), rows(model)[("whole", set_name)]
    if line is None:
        return ""
    if row == "whole":
        return f"{100 * line['score']:.1f}"
    mean, low, high, *_ = paired_difference(line["outcomes"], whole["outcomes"])
    if is_short:
        return f"{100 * line['score']:.1f} ({100 * mean:+.1f}{'*' if high < 0 else ''})"
    return f"{100 * line['score']:.1f} ({100 * mean:+.1f}, {100 * low:+.1f} to {100 * high:+.1f})"


def by_set(
    model: str,
    shown: Mapping[str, str],
    sets: Sequence[str],
    head: str,
    *,
    is_short: bool = False,
) -> str:
    """Return a table of rows by sets, with intervals if it is not a short one."""
    counts = [len(rows(model)[("whole", name)]["outcomes"]) for name in sets]
    table = []
    for row, text in shown.items():
        cells = [cell(model, row, name, is_short=is_short) for name in sets]
        if any(cells):
            table.append((text, *cells))
    names = [f"{SETS[name]}, n = {count}" for name, count in zip(sets, counts, strict=True)]
    return as_table((head, *names), table)


def latency() -> str:
    """Return times to the first token of the 8B shape."""
    head = ("prompt", "bits", "whole model", "a model of half the units", "sub-network answers",
            "**read by the part**", "ratio", "memory, GB")  # fmt: skip
    table = []
    for name in ("8b-bf16-reading", "8b-4bit-reading"):
        document = read(RESULTS / "latency" / f"{name}.json")
        prompts = dict.fromkeys(row["prompt_tokens"] for row in document["rows"])
        for prompt in prompts:
            found = {r["name"]: r for r in document["rows"] if r["prompt_tokens"] == prompt}
            dense, part = found["dense source"], found["dense source, prompt read by ours"]
            times = [
                f"{1e3 * found[row]['ttft']['median_s']:.0f}"
                for row in (
                    "dense source",
                    "dense of the compact shape",
                    "ours, per task, resident",
                    "dense source, prompt read by ours",
                )
            ]
            memory = [f"{row['peak_memory_bytes'] / 1e9:.1f}" for row in (dense, part)]
            table.append((str(prompt), str(document["bits"]), *times[:3], f"**{times[3]}**",
                          f"{part['ttft_to_dense']:.2f}", " → ".join(memory)))  # fmt: skip
    return as_table(head, table, numbers_from=1)


def cpu() -> str:
    """Return times to the first token on a CPU."""
    document = read(RESULTS / "reading-cpu.json")
    median = lambda values: sorted(values)[len(values) // 2]  # noqa: E731 - of an odd number
    table = []
    for row in document["rows"]:
        units = row["name"].removeprefix("part, ").removesuffix(" units")
        share = "whole model"
        if units.isdigit():
            share = f"{100 * int(units) / document['num_units']:.0f} % of the units"
        ratio = "" if row["name"] == "whole" else f"**{row['cpu_ratio']:.2f}**"
        table.append((share, f"{median(row['cpu_s']):.1f}", ratio, f"{median(row['wall_s']):.1f}"))
    return as_table(("prompt read by", "first token, CPU s", "ratio", "wall s"), table, 1)


def fidelity_row(bits: int, kept: int) -> str:
    """Return the name of a row."""
    is_whole = (bits, kept) == (16, 100)
    return "whole" if is_whole else f"fidelity/bits-{bits}/kept-{kept}"


def grid(set_name: str) -> str:
    """Return scores of Qwen by bits and kept units."""
    table = []
    for bits in BITS:
        cells = [f"{bits} bits"]
        for kept in KEPT:
            line = rows(QWEN)[(fidelity_row(bits, kept), set_name)]
            cells.append(f"{100 * line['score']:.1f}")
        table.append(cells)
    return as_table((SETS[set_name], *(f"{kept} % of the units" for kept in KEPT)), table, 1)


def sizes() -> str:
    """Return the weights of the same rows."""
    table = [
        (f"{bits} bits",
         *(f"{rows(QWEN)[(fidelity_row(bits, kept), 'math')]['part_bytes'] / 1e6:.0f}"
           for kept in KEPT))
        for bits in BITS
    ]  # fmt: skip
    return as_table(("weights, MB", *(f"{kept} % of the units" for kept in KEPT)), table, 1)


def whole_by_bits() -> str:
    """Return the whole model at fewer bits, and parts at 16, with intervals."""
    head = ("", "weights, MB", *(f"{SETS[name]}, n = {len(rows(QWEN)[('whole', name)]['outcomes'])}"
                                 for name in ("mbpp", "math")))  # fmt: skip
    pairs = [(bits, 100) for bits in BITS] + [(16, kept) for kept in KEPT[1:]]
    table = []
    for bits, kept in pairs:
        row = fidelity_row(bits, kept)
        text = f"whole model, {bits} bits" if kept == 100 else f"{kept} % of the units, 16 bits"
        size = rows(QWEN)[(row, "math")]["part_bytes"] / 1e6
        cells = [cell(QWEN, row, name) for name in ("mbpp", "math")]
        table.append((text, f"{size:.0f}", *cells))
    return as_table(head, table)


def smollm2_by_bits() -> str:
    """Return the same of SmolLM2, on what it can do at all."""
    sets = ("needle-2k", "document-qa", "code-file", "summary")
    shown = {fidelity_row(bits, 100): f"whole model, {bits} bits" for bits in BITS}
    shown |= {fidelity_row(16, kept): f"{kept} % of the units, 16 bits" for kept in KEPT[1:]}
    shown |= {fidelity_row(4, kept): f"{kept} % of the units, 4 bits" for kept in (95, 90, 80)}
    return by_set(SMOLLM2, shown, sets, "")


def correlations() -> str:
    """Return Spearman's correlation of cheap figures with function."""
    columns = [(QWEN, "mbpp"), (QWEN, "math"), (SMOLLM2, "summary"), (SMOLLM2, "document-qa")]
    table = []
    for (kind, name), text in FIGURES.items():
        sign = 1 if name in HIGHER_IS_BETTER else -1
        cells = []
        for model, set_name in columns:
            chosen = [
                line
                for (row, of), line in rows(model).items()
                if of == set_name and row.startswith("fidelity/") and name in line.get(kind, {})
            ]
            figures = [sign * line[kind][name] for line in chosen]
            cells.append(f"{spearman(figures, [line['score'] for line in chosen]):.3f}")
        table.append((text, *cells))
    head = ("figure", "Qwen: MBPP", "math", "SmolLM2: summaries", "questions on 3k")
    return as_table(head, table, 1)


def thresholds() -> str:
    """Return what rows of Qwen on short prompts lost, by what changed in them."""
    found = changed_lines(list(rows(QWEN).values()), "whole")
    bands = ((0.0, KEEPS_UP), (KEEPS_UP, 2.5), (2.5, 5.0), (5.0, GIVEN_UP), (GIVEN_UP, 100.0))
    table = []
    for low, high in bands:
        band = [x for x in found if low <= x.changed < high and x.line["set"] in SHORT]
        points = [100 * x.difference for x in band]
        worse = sum(x.high < 0 for x in band)
        table.append(
            (f"{low:g} to {high:g}", str(len(band)), f"{max(points):+.1f} to {min(points):+.1f}",
             f"{sorted(points)[len(points) // 2]:+.1f}", f"{worse} of {len(band)}")
        )  # fmt: skip
    head = ("changed of 100", "rows", "points, best to worst", "median", "surely worse")
    return as_table(head, table, 1)


def pooled() -> str:
    """Return correlations over rows of all kinds of damage."""
    found = changed_lines(list(rows(QWEN).values()), "whole")
    groups: dict[str, list[Any]] = {
        "short prompts": [x for x in found if x.line["set"] in SHORT],
        "all prompts": found,
    }
    table = []
    for kind, name in (
        ("own", "acceptance"),
        ("own", "kl"),
        ("own", "sure_flips_per_100_sure"),
        ("own", "answers_without_sure_flip"),
        ("own", "agreement"),
    ):
        values = [pooled_correlation(group, kind, name) for group in groups.values()]
        text = FIGURES.get((kind, name), "answers without a flip where it was sure")
        table.append((text, *(f"{value:.3f}" for value in values)))
    head = ("figure", *(f"{name}, {len(group)} rows" for name, group in groups.items()))
    return as_table(head, table, 1)


READING: dict[str, Table] = {
    "short prompts": lambda: by_set(QWEN, AMOUNTS, SHORT, "prompt read by"),
    "facts": lambda: by_set(QWEN, AMOUNTS, FACTS, "prompt read by"),
    "long prompts": lambda: by_set(QWEN, AMOUNTS, LONG, "prompt read by"),
    "conversations": lambda: by_set(
        QWEN,
        {**AMOUNTS, "part-whole/task/50/tail-64": "50 %, tail of 64"},
        CHATS,
        "messages read by",
    ),
    "choices": lambda: by_set(
        QWEN,
        CHOICES,
        ("mbpp", "math", "needle-2k", "needle-16k", "document-qa"),
        "units",
        is_short=True,
    ),
    "tails": lambda: by_set(
        QWEN,
        TAILS,
        (*SHORT[:3], "math-8shot", "document-qa", "needle-2k", "needle-4k", "needle-16k"),
        "left to the whole model",
        is_short=True,
    ),
    "smollm2": lambda: by_set(
        SMOLLM2,
        AMOUNTS,
        (*FACTS[:2], "document-qa", "code-file", "summary", "recall-chat"),
        "prompt read by",
        is_short=True,
    ),
    "gemma": lambda: by_set(
        GEMMA,
        AMOUNTS,
        (*FACTS[:3], "document-qa", "code-file", "summary"),
        "prompt read by",
        is_short=True,
    ),
    "8b": latency,
    "cpu": cpu,
}
FIDELITY: dict[str, Table] = {
    "whole by bits": whole_by_bits,
    "mbpp grid": lambda: grid("mbpp"),
    "math grid": lambda: grid("math"),
    "sizes": sizes,
    "smollm2": smollm2_by_bits,
    "correlations": correlations,
    "pooled": pooled,
    "thresholds": thresholds,
}


if __name__ == "__main__":
    sys.exit(run({"docs/reading.md": READING, "docs/fidelity.md": FIDELITY}))
