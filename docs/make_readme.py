"""Write the tables of README.md from stored results; ``--check`` only compares."""

import sys

import make_fits
from make_function import QWEN
from make_function import rows as rows_of
from page_tables import TRAINING, Table, as_table, read_lines, run

HELD_OUT = TRAINING / "held-out.jsonl"

TRAINED = {
    "one static mask, trained alike": "static-2-bit",
    "**shipped adapter, per task description**": "ifp-joint-2-bit+task",
    "**shipped adapter, per input**": "ifp-joint-2-bit",
    "control: one mask for all": "ifp-joint-2-bit+fixed",
    "control: another domain's mask": "ifp-joint-2-bit+shuffled",
}


def equal_bytes() -> str:
    """Return function against bytes: the whole model in fewer bits, and fewer FFN units."""
    found = rows_of(QWEN)

    def row(label: str, key: str) -> list[str]:
        code, maths = found[key, "mbpp"], found[key, "math"]
        scores = [f"{100 * record['score']:.1f} %" for record in (code, maths)]
        return [label, f"{code['part_bytes'] / 1e6:.0f} MB", *scores]

    rows = [row("whole, 16 bits", "whole")]
    rows += [row(f"whole, {bits} bits", f"fidelity/bits-{bits}/kept-100") for bits in (8, 4)]
    rows += [
        row(f"{kept} % of the units, 16 bits", f"fidelity/bits-16/kept-{kept}")
        for kept in (90, 67, 50)
    ]
    return as_table(("", "weights", "functions right", "word problems right"), rows)


def trained() -> str:
    """Return what the shipped adapter reaches on held-out text, with its controls."""
    found = {record["row"]: record for record in read_lines(HELD_OUT) if record["limit"] is None}

    def cell(name: str) -> str:
        return f"{found[name]['instructions']:.3f} / {found[name]['documents']:.3f}"

    rows = [
        [label, *(cell(f"{name}@{kept}") for kept in (512, 768))] for label, name in TRAINED.items()
    ]
    rows.append(["all 1536 units, trained", cell("dense"), ""])
    return as_table(("", "512 of 1536 units", "768 of 1536 units"), rows)


TABLES: dict[str, Table] = {
    "what fits": make_fits.table,
    "equal bytes": equal_bytes,
    "trained": trained,
}

if __name__ == "__main__":
    sys.exit(run({"README.md": TABLES}))
