"""Write the tables of docs/training-log.md from stored results; ``--check`` only compares."""

import functools
import sys

from page_tables import RESULTS, ROOT, TRAINING, Table, as_table, read, read_lines, run

sys.path.insert(0, str(ROOT / "benchmarks" / "mixture"))

from summarise_mixture import GROUPS, Results

AMOUNTS = (512, 768)
DOMAINS = (
    "classification", "coding", "general", "math", "qa", "reasoning", "sql", "summarisation",
    "tool_use", "writing",
)  # fmt: skip

TRAINED = {
    "dense, trained": "dense",
    "static, trained": "static@K",
    "**IFP, joint**": "ifp-joint@K",
    "IFP joint, per task": "ifp-joint+task@K",
    "IFP joint, fixed-mask control": "ifp-joint+fixed@K",
    "IFP joint, shuffled control": "ifp-joint+shuffled@K",
    "static, 2-bit changes": "static-2-bit@K",
    "**shipped adapter**: IFP joint, 2-bit changes": "ifp-joint-2-bit@K",
    "shipped adapter, per task": "ifp-joint-2-bit+task@K",
}
DESCRIPTIONS = {
    "IFP joint, descriptions 20 %": "ifp-joint-descriptions-20@K",
    "the same, per task": "ifp-joint-descriptions-20+task@K",
    "IFP joint, descriptions 20 %, half the rate": "ifp-joint-descriptions-20-half-rate@K",
    "the same at half the rate, per task": "ifp-joint-descriptions-20-half-rate+task@K",
}
FIRST_100 = {
    "dense, before training": "dense-untrained",
    "dense, teacher": "teacher",
    "dense, trained": "dense",
    "static prior, untrained": "static-untrained@K",
    "predictor after warm start, model untrained": "ifp-untrained@K",
    "static, trained": "static@K",
    "IFP, predictor fixed (second run)": "ifp-fixed@K",
    "IFP fixed, per task (second run)": "ifp-fixed+task@K",
    "IFP, joint, gradient centred (second run)": "run-2-ifp-joint@K",
    **{label: row for label, row in TRAINED.items() if row not in ("dense", "static@K")},
}
ABLATIONS = {
    "static": "static",
    "predictor fixed, both stages": "both-stages",
    "predictor fixed, instructions only": "sft-only",
    "predictor fixed, no distillation": "no-distillation",
    "joint, SoftTopK": "soft-top-k",
    "joint, HardConcrete": "hard-concrete",
    "joint, no warm start": "no-warm-start",
}
SPEEDS = {
    "dense fine-tuning": "dense",
    "static mask": "static",
    "IFP, joint": "ifp-joint",
    "IFP, predictor fixed (second run)": "ifp-fixed",
}
ORACLE = {
    "before training": "before",
    "dense, trained": "dense",
    "oracle, R = 2": "oracle 2",
    "oracle, R = 4": "oracle 4",
    "oracle, R = 16, one a domain": "oracle 16",
    "shuffled, R = 16: another domain's variant": "shuffled 16",
}


def quality(rows: dict[str, str], limit: int | None, num_kept: int) -> str:
    """Return held-out cross-entropy with one number of units."""
    found = {
        record["row"]: record
        for record in read_lines(TRAINING / "held-out.jsonl")
        if record["limit"] == limit
    }
    cells = []
    for label, row in rows.items():
        record = found[row.replace("@K", f"@{num_kept}")]
        means = [f"{record[group]:.3f}" for group in GROUPS]
        cells.append((label, *means, *(f"{record['cross_entropy'][d]:.2f}" for d in DOMAINS)))
    return as_table((f"K = {num_kept}", *GROUPS, *DOMAINS), cells)


def ablations() -> str:
    """Return the short runs of the second configuration."""
    found = {record["row"]: record for record in read_lines(TRAINING / "held-out.jsonl")}
    rows = []
    for label, name in ABLATIONS.items():
        records = [found[f"ablation-{name}@{kept}"] for kept in AMOUNTS]
        means = [" / ".join(f"{record[group]:.3f}" for group in GROUPS) for record in records]
        rows.append((label, *(f"**{mean}**" if name == "soft-top-k" else mean for mean in means)))
    return as_table(("row", *(f"K = {kept}" for kept in AMOUNTS)), rows)


def speeds() -> str:
    """Return tokens a second of whole runs, from their logs."""
    logs = {name: read_lines(TRAINING / f"{name}.jsonl") for name in SPEEDS.values()}
    reached = {name: log[-1]["tokens_per_s"] for name, log in logs.items()}
    rows = [
        (
            label,
            f"{reached[name]:,.0f}",
            "" if name == "ifp-fixed" else f"{100 * reached[name] / reached['dense']:.0f} %",
        )
        for label, name in SPEEDS.items()
    ]
    return as_table(("step, with distillation", "tokens/s", "share of dense"), rows, 1)


def oracle() -> str:
    """Return what variants of every layer gain if the domain's label chooses."""
    content = read(RESULTS / "variants" / "oracle.json")
    content |= {"model": {"experts": 1}, "selecting_domains": list(content["scored_tokens"])}
    groups = [Results(content, group) for group in GROUPS]
    rows = []
    for label, name in ORACLE.items():
        cells = [label]
        for results in groups:
            gap = results.difference(name, "dense")
            assert gap is not None
            shown = "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap)
            cells += [f"{results.mean(name):.3f}", "" if name == "dense" else shown]
        rows.append(cells)
    heads = [f"{group} ({len(r.domains)})" for group, r in zip(GROUPS, groups, strict=True)]
    return as_table(("row", heads[0], "minus dense", heads[1], "minus dense"), rows)


TABLES: dict[str, Table] = {
    **{
        f"all examples, {kept}": functools.partial(quality, TRAINED | DESCRIPTIONS, None, kept)
        for kept in AMOUNTS
    },
    **{
        f"first 100 examples, {kept}": functools.partial(quality, FIRST_100, 100, kept)
        for kept in AMOUNTS
    },
    "ablations": ablations,
    "speeds": speeds,
    "oracle": oracle,
}

if __name__ == "__main__":
    sys.exit(run({"docs/training-log.md": TABLES}))
