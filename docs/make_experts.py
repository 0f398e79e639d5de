"""Write the tables of docs/experts.md from stored results; ``--check`` only compares."""

import sys

import numpy as np
from page_tables import RESULTS, ROOT, Table, as_table, read, run

sys.path.insert(0, str(ROOT / "benchmarks" / "mixture"))

from summarise_mixture import DIFFERENCES, GROUPS, Results, pass_name

MIXTURE = RESULTS / "mixture" / "mixture.json"
LIMIT = 0.75  # of the share that experts drawn at random would miss: where chat speaks up

ROWS = {
    "64 examples": ("task64", "sliced", 0),
    "8 examples": ("task8", "sliced", 0),
    "64 requests, without answers, and the description": ("requests64", "sliced", 0),
    "the description": ("description", "sliced", 0),
    "generic": ("generic", "sliced", 0),
    "half generic, half description, by ranks": ("blend0.5", "sliced", 0),
    "another task's 64 examples": ("task64", "sliced", 5),
    "random, mean of three": ("random", "sliced", 0),
    "64 examples by frequency": ("task64:frequency", "sliced", 0),
    "64 examples by gate": ("task64:gate", "sliced", 0),
    "64 examples by REAP": ("task64:reap", "sliced", 0),
    "64 examples by norm": ("task64:norm", "sliced", 0),
    "64 examples, zero slots": ("task64", "zero", 0),
    "generic, zero slots": ("generic", "zero", 0),
}
DIFFERENCE_LABELS = (
    "own - whole model",
    "own - generic",
    "description - generic",
    "own by norm - generic",
    "own by frequency - own",
    "another task's - own",
    "zero slots - cut router",
)
GROUP_OF_SEEDS = ("random0", "random1", "random2")


def memory() -> str:
    """Return peak memory and bytes read, from experts.py."""
    labels = {
        "the program with the checkpoint open": "ifp, checkpoint opened",
        "mlx-lm, whole": "mlx-lm, whole",
        "`ifp`, 64 of 128 experts": "ifp, 64 of 128 experts",
        "`ifp`, selecting with eight examples": "ifp, selecting with eight examples",
    }
    rows = read(RESULTS / "experts-memory.json")["rows"]
    cells = [
        (label, *(f"{rows[key][name] / 1e9:.3f}" for name in ("peak", "read")))
        for label, key in labels.items()
    ]
    return as_table(("", "peak", "read"), cells)


def losses() -> str:
    """Return nats a token by what selects and how many experts are kept."""
    groups = [Results(read(MIXTURE), group) for group in GROUPS]
    amounts, count = groups[0].amounts, groups[0].num_experts

    def cell(row: tuple[str, str, int], num_kept: int) -> str:
        criterion, variant, rotation = row
        seeds = GROUP_OF_SEEDS if criterion == "random" else (criterion,)
        names = [pass_name((seed, variant, rotation), num_kept) for seed in seeds]
        means = [np.mean([group.mean(name) for name in names]) for group in groups]
        return " / ".join(f"{mean:.3f}" for mean in means)

    rows = [(label, *(cell(row, kept) for kept in amounts)) for label, row in ROWS.items()]
    head = ("instructions / documents", *(share(kept / count) for kept in amounts))
    return as_table(head, rows)


def differences() -> str:
    """Return paired differences with their intervals."""
    groups = {group: Results(read(MIXTURE), group) for group in GROUPS}
    amounts, count = groups[GROUPS[0]].amounts, groups[GROUPS[0]].num_experts
    rows = []
    for label, (_, one, other) in zip(DIFFERENCE_LABELS, DIFFERENCES, strict=True):
        for group, results in groups.items():
            cells = []
            for kept in amounts:
                base = "whole" if other is None else pass_name(other, kept)
                gap = results.difference(pass_name(one, kept), base)
                assert gap is not None
                cells.append("{:+.2f} ({:+.2f}, {:+.2f})".format(*gap))
            rows.append((label if group == GROUPS[0] else "", group, *cells))
    return as_table(("", "", *(share(kept / count) for kept in amounts)), rows)


def drift() -> str:
    """Return which texts ask for experts that are not there."""
    content = read(MIXTURE)
    count = content["model"]["experts"]
    rows = []
    for kept in Results(content).amounts:
        found = content["drift"][f"task64@{kept}"]
        own = np.concatenate([of[task] for task, of in found.items()])
        others = np.concatenate([of[d] for task, of in found.items() for d in of if d != task])
        limit = LIMIT * (1 - kept / count)
        shares = [f"{100 * value:.1f} %" for value in (own.mean(), others.mean(), limit)]
        above = [f"{100 * (values > limit).mean():.0f} %" for values in (own, others)]
        rows.append((share(kept / count), *shares, *above))
    head = (
        "experts kept", "own texts", "other domains'", "limit", "own above the limit",
        "others above",
    )  # fmt: skip
    return as_table(head, rows)


def share(value: float) -> str:
    """Return a share in percent, with the digits that it has."""
    return f"{100 * value:g} %"


TABLES: dict[str, Table] = {
    "memory": memory,
    "losses": losses,
    "differences": differences,
    "drift": drift,
}

if __name__ == "__main__":
    sys.exit(run({"docs/experts.md": TABLES}))
