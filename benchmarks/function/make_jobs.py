"""Write the job files of two questions: what may a part read, and what do fewer bits or units cost?

python make_jobs.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
Steps = list[dict[str, Any]]

BLOCK = 256
SHORT = ["mbpp", "math", "tools", "sql"]
LONG = ["document-qa", "needle-4k", "math-8shot", "needle-2k", "needle-8k", "code-file", "summary"]
CHATS = ["math-chat", "recall-chat"]


def main() -> None:
    """Write all files."""
    _write("qwen-fidelity", *_fidelity("qwen-coder"))
    _write("smollm2-fidelity", *_fidelity("smollm2-135m", few=True))
    _write("qwen-reading-short", *_reading_short("qwen-coder"))
    _write("qwen-reading-long", *_reading_long("qwen-coder", [*LONG, "needle-16k"], CHATS))
    _write("smollm2-reading", *_reading_long("smollm2-135m", ["tools", "sql", *LONG], CHATS))
    sets = ["sql", "tools", "mbpp", *LONG, "needle-16k"]
    _write("gemma3-reading", *_reading_long("gemma3-270m", sets, []))


def _fidelity(model: str, *, few: bool = False) -> tuple[str, Rows, Steps]:
    """Bits by kept units, the units chosen for the task; those that say most come first."""
    shares = (1, 0.95, 0.9, 0.8, 0.67, 0.5)
    first = [(16, kept) for kept in shares] + [(bits, 1) for bits in (4, 3, 8, 6, 5)]
    second = [(4, kept) for kept in (0.9, 0.8, 0.67, 0.95, 0.5)]
    third = [(8, 0.9), (8, 0.8), (3, 0.9), (6, 0.9), (5, 0.8), (8, 0.67), (3, 0.8), (6, 0.8)]
    listed = [*first, *second, *third]
    rest = [(bits, kept) for kept in shares for bits in (8, 6, 5, 3) if (bits, kept) not in listed]
    rows = _whole()
    for bits, kept in [*listed, *rest]:
        if (bits, kept) != (16, 1):
            rows[_fidelity_name(bits, kept)] = {
                "read": "part",
                "write": "part",
                "part": {"units": "task", "kept": kept, "bits": bits},
            }
    groups = [first[1:], second, third, rest]
    names = [[_fidelity_name(*pair) for pair in group] for group in groups]
    if few:
        names = names[:2]
    figures = {"own": 128, "reference": 128}
    main_sets = ["summary", "needle-2k"] if few else ["mbpp", "math"]
    other_sets = ["code-file", "document-qa"] if few else ["tools", "sql"]
    steps = [
        {"rows": ["whole", "whole/split", *names[0]], "sets": main_sets, **figures},
        {"rows": names[1], "sets": main_sets, **figures},
        {"rows": ["whole", "whole/split", *names[0], *names[1]], "sets": other_sets, **figures},
    ]
    steps[2:2] = [{"rows": group, "sets": main_sets, **figures} for group in names[2:]]
    return model, rows, steps


def _reading_short(model: str) -> tuple[str, Rows, Steps]:
    """Short prompts: what a part may read before the whole model answers."""
    rows = _whole() | _by_amount("task") | _by_amount("static")
    rows["part-part/task/67"] = _row("part", "part", "task", 0.67)
    rows["part-part/task/50"] = _row("part", "part", "task", 0.5)
    rows["whole-part/task/67"] = _row("whole", "part", "task", 0.67)
    rows["whole-part/task/50"] = _row("whole", "part", "task", 0.5)
    rows["part-whole/random/50"] = _row("part", "whole", "random", 0.5)
    rows |= _tails("task", 0.5) | _tails("task", 0.33)
    figures = {"own": 64, "reference": 64}
    first = ["whole", "whole/split", *_by_amount("task")]
    tails = [*_tails("task", 0.5), *_tails("task", 0.33)]
    rest = [name for name in rows if name not in first and name not in tails]
    steps = [
        {"rows": first, "sets": SHORT, **figures},
        {"rows": [t for t in tails if not t.endswith("message")], "sets": SHORT, **figures},
        {"rows": rest, "sets": SHORT, **figures},
    ]
    return model, rows, steps


def _reading_long(model: str, sets: list[str], chats: list[str]) -> tuple[str, Rows, Steps]:
    """Long prompts and conversations."""
    rows = _whole() | _by_amount("task") | _by_amount("static") | _by_amount("block")
    rows["part-part/task/67"] = _row("part", "part", "task", 0.67)
    rows["part-part/task/50"] = _row("part", "part", "task", 0.5)
    rows["whole-part/task/50"] = _row("whole", "part", "task", 0.5)
    rows["part-whole/random/50"] = _row("part", "whole", "random", 0.5)
    rows |= _tails("task", 0.5) | _tails("task", 0.33)
    figures = {"own": 32, "reference": 64}
    first = ["whole", "part-whole/task/67", "part-whole/task/50"]
    second = ["whole/split", "part-whole/task/33", "part-whole/task/25"]
    third = ["part-whole/task/50/tail-64", "part-whole/block/50", "part-whole/static/50",
             "part-whole/task/33/tail-64", "part-part/task/67"]  # fmt: skip
    steps: Steps = [
        {"rows": first, "sets": sets, **figures},
        {"rows": first, "sets": chats},
        {"rows": second, "sets": sets, **figures},
        {"rows": third, "sets": sets, **figures},
        {"rows": [*second, *third[::4]], "sets": chats},
    ]
    with_history = ["math-8shot", *(s for s in ("sql", "tools") if s in sets)]
    steps.append({"rows": ["part-whole/task/50/tail-message", "part-whole/task/33/tail-message"],
                  "sets": with_history, **figures})  # fmt: skip
    done = {*first, *second, *third}
    rest = [name for name in rows if name not in done and not name.endswith("message")]
    steps.append({"rows": rest, "sets": sets, **figures})
    return model, rows, [step for step in steps if step["sets"]]


def _whole() -> Rows:
    # The same model, the prompt read in two pieces: what a change of rounding alone does.
    return {"whole": {}, "whole/split": {"reading": {"tail": 64}}}


def _row(read: str, write: str, units: str, kept: float) -> dict[str, Any]:
    return {"read": read, "write": write, "part": {"units": units, "kept": kept}}


def _by_amount(units: str) -> Rows:
    rows = {}
    for kept in (0.67, 0.5, 0.33, 0.25):
        row = _row("part", "whole", units, kept)
        if units == "block":
            row["reading"] = {"block": BLOCK}
        rows[f"part-whole/{units}/{round(100 * kept)}"] = row
    return rows


def _tails(units: str, kept: float) -> Rows:
    return {
        f"part-whole/{units}/{round(100 * kept)}/tail-{tail}": {
            **_row("part", "whole", units, kept),
            "reading": {"tail": tail},
        }
        for tail in (16, 64, 256, "message")
    }


def _fidelity_name(bits: int, kept: float) -> str:
    return f"fidelity/bits-{bits}/kept-{round(100 * kept)}"


def _write(name: str, model: str, rows: Rows, steps: Steps) -> None:
    job = {"model": model, "rows": rows, "steps": steps}
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
