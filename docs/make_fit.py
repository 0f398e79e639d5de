"""Write the tables of docs/fit.md from stored results; ``--check`` only compares."""

import functools
import sys

from page_tables import RESULTS, Table, as_table, read, run


def measured(name: str) -> str:
    """Return the candidates of a run, in the order of their memory."""
    document = read(RESULTS / "fit" / f"{name}.json")
    has_check = document["check"] is not None
    head = ("keeps", "bits", "memory, GB", "on disk, MB", "changed", "same")
    table = []
    for row in sorted(document["rows"], key=lambda row: -row["memory_bytes"]):
        candidate, fidelity = row["candidate"], row["fidelity"]
        share = f"{100 * candidate['num_kept_units'] / document['num_units']:.0f} %"
        lost = "+" if row["is_lost"] else ""
        cells = [
            f"{share} reads" if candidate["only_reads"] else share,
            str(candidate["bits"] or "own"),
            f"{row['memory_bytes'] / 1e9:.2f}",
            f"{row['disk_bytes'] / 1e6:.0f}",
            f"{fidelity['changed']:.1f}{lost}",
            f"{fidelity['same_tokens']:.0f}",
        ]
        if has_check:
            right = "" if row["num_right"] is None else f"{row['num_right']}/{row['num_checked']}"
            cells.append(right)
        table.append(cells)
    return as_table((*head, "right") if has_check else head, table, 2)


TABLES: dict[str, Table] = {
    name: functools.partial(measured, name) for name in ("qwen2.5-coder-0.5b", "smollm2-135m")
}


if __name__ == "__main__":
    sys.exit(run({"docs/fit.md": TABLES}))
