"""Tables of what measure_mixture.py measured: cross-entropy by criterion and experts kept, drift.

    python summarise_mixture.py OUT.json [--compact SMALL.json]

Means over domains of nats a scored token; differences with 95 % intervals from a paired bootstrap
over the texts of every domain. Prints Markdown. ``--compact`` writes what the tables and the
picture need: sums by text of passes that intervals are made of, sums by domain of the others.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_DRAWS = 2000
GROUPS = ("instructions", "documents")
OWN = ("task64", "sliced", 0)
GENERIC = ("generic", "sliced", 0)
OFF_TASK = ("task64", "sliced", 5)
"""The rotation that is measured first: each domain with the experts of the fifth behind it."""
DIFFERENCES: tuple[tuple[str, tuple[str, str, int], tuple[str, str, int] | None], ...] = (
    ("task64 - whole", OWN, None),
    ("task64 - generic", OWN, GENERIC),
    ("description - generic", ("description", "sliced", 0), GENERIC),
    ("task64:norm - generic", ("task64:norm", "sliced", 0), GENERIC),
    ("task64:frequency - task64", ("task64:frequency", "sliced", 0), OWN),
    ("another task's - task64", OFF_TASK, OWN),
    ("zero slots - next best, task64", ("task64", "zero", 0), OWN),
)
"""Name, one row, and what it is compared with; None for the whole model."""


class Results:
    """The passes of one measurement, of one group of domains: those with examples that select."""

    def __init__(self, content: dict[str, Any], group: str = "all"):
        self._passes: dict[str, dict[str, list[float]]] = content["passes"]
        self._domain_sums: dict[str, dict[str, float]] = content.get("domain_sums", {})
        self._tokens = {d: np.array(v) for d, v in content["scored_tokens"].items()}
        self.num_experts: int = content["model"]["experts"]
        self.domains: list[str] = [
            domain
            for domain in content["selecting_domains"]
            if group == "all" or domain.startswith("lm_") == (group == "documents")
        ]
        generator = np.random.default_rng(0)
        self._draws = {
            domain: generator.integers(0, len(tokens), (_DRAWS, len(tokens)))
            for domain, tokens in self._tokens.items()
            if domain in self.domains
        }

    @property
    def names(self) -> list[str]:
        """Passes that were made."""
        return [*self._passes, *self._domain_sums]

    @property
    def rows(self) -> list[tuple[str, str, int]]:
        """Criterion, variant and rotation of the passes, in the order that they were made in."""
        found: dict[tuple[str, str, int], None] = {}
        for name in self.names:
            if "@" in name and not name.startswith("matrix/"):
                criterion, _, rest = name.partition("@")
                _, variant, rotation = rest.split("/")
                found[criterion, variant, int(rotation)] = None
        return list(found)

    @property
    def amounts(self) -> list[int]:
        """Experts kept, the most first."""
        found = {int(n.split("@")[1].split("/")[0]) for n in self.names if n.endswith("/sliced/0")}
        return sorted(found, reverse=True)

    def mean(self, name: str) -> float | None:
        """Return nats a token, the mean over domains; None if the pass was not made."""
        if name not in self.names or not self.domains:
            return None
        return float(np.mean([self.of_domain(name, domain) for domain in self.domains]))

    def of_domain(self, name: str, domain: str) -> float:
        """Return nats a token of one domain."""
        known = self._domain_sums.get(name)
        total = self._sums(name, domain).sum() if known is None else known[domain]
        return float(total / self._tokens[domain].sum())

    def difference(self, name: str, other: str) -> tuple[float, float, float] | None:
        """Return name minus other and the ends of its 95 % interval; None without both."""
        one, two = self.mean(name), self.mean(other)
        if one is None or two is None:
            return None
        draws = np.zeros(_DRAWS)
        for domain in self.domains:
            picked, tokens = self._draws[domain], self._tokens[domain]
            gap = self._sums(name, domain) - self._sums(other, domain)
            draws += gap[picked].sum(1) / tokens[picked].sum(1) / len(self.domains)
        low, high = np.quantile(draws, [0.025, 0.975])
        return one - two, float(low), float(high)

    def _sums(self, name: str, domain: str) -> npt.NDArray[np.float64]:
        return np.array(self._passes[name][domain])


def pass_name(row: tuple[str, str, int], num_kept: int) -> str:
    """Return the key of a row's pass."""
    criterion, variant, rotation = row
    return f"{criterion}@{num_kept}/{variant}/{rotation}"


def row_label(row: tuple[str, str, int]) -> str:
    """Return what a row is called in a table."""
    criterion, variant, rotation = row
    zero = ", zero slots" if variant == "zero" else ""
    return criterion + zero + (f", of another task ({rotation} behind)" if rotation else "")


def compact(content: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement without the texts' sums that no interval is made of."""
    compared = {row for _, one, other in DIFFERENCES for row in (one, other) if row is not None}
    amounts = Results(content).amounts
    kept = {"whole", *(pass_name(row, n) for row in compared for n in amounts)}
    passes: dict[str, dict[str, list[float]]] = content["passes"]
    return content | {
        "passes": {
            name: {domain: [float(f"{x:.4g}") for x in sums] for domain, sums in found.items()}
            for name, found in passes.items()
            if name in kept
        },
        "domain_sums": {
            name: {domain: round(sum(sums), 1) for domain, sums in found.items()}
            for name, found in passes.items()
            if name not in kept
        },
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--compact", type=Path, help="write what the tables need")
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.compact:
        content = compact(content)
        text = json.dumps(content, separators=(",", ":"))
        arguments.compact.write_text(text + "\n", encoding="utf-8")
    for group in GROUPS:
        results = Results(content, group)
        if results.domains:
            print(f"## {group} ({len(results.domains)} domains)\n")
            _print_amounts(results)
    print("## by domain: task64, generic\n")
    _print_domains(Results(content))
    print("## gate mass on missing experts\n")
    _print_drift(content)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _print_amounts(results: Results) -> None:
    wholes = [name for name in ("whole", "dense start") if name in results.names]
    print("; ".join(f"{name}: {_nats(results.mean(name))}" for name in wholes) + "\n")
    amounts = results.amounts
    rows = [
        [row_label(row), *(_nats(results.mean(pass_name(row, n))) for n in amounts)]
        for row in results.rows
    ]
    for label, one, other in DIFFERENCES:
        cells = []
        for n in amounts:
            gap = results.difference(
                pass_name(one, n), "whole" if other is None else pass_name(other, n)
            )
            cells.append("" if gap is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap))
        rows.append([f"**{label}**", *cells])
    header = ["experts kept", *(f"{n} ({n / results.num_experts:.1%})" for n in amounts)]
    _print_table(header, rows)


def _print_domains(results: Results) -> None:
    names = [(pass_name(OWN, n), pass_name(GENERIC, n)) for n in results.amounts]
    pairs = [pair for pair in names if all(name in results.names for name in pair)]
    rows = [
        [
            domain,
            _nats(results.of_domain("whole", domain)),
            *(", ".join(_nats(results.of_domain(name, domain)) for name in p) for p in pairs),
        ]
        for domain in results.domains
    ]
    _print_table(["domain", "whole", *(pair[0].partition("/")[0] for pair in pairs)], rows)


def _print_drift(content: dict[str, Any]) -> None:
    rows = []
    for name, found in content["drift"].items():
        own = np.concatenate([of[task] for task, of in found.items()])
        others = np.concatenate([of[d] for task, of in found.items() for d in of if d != task])
        high = float(np.quantile(own, 0.95))
        rows.append(
            [
                name,
                f"{own.mean():.1%}",
                f"{others.mean():.1%}",
                f"{high:.1%}",
                f"{(others > high).mean():.0%}",
            ]
        )
    header = ["kept", "own text", "other domains' text", "95 % of own texts below", "others above"]
    _print_table(header, rows)
    for name, found in content["drift"].items():
        print(f"By task, {name}:\n")
        _print_table(
            ["task", "own text", "other domains', mean", "least"],
            [_drift_row(task, of) for task, of in found.items()],
        )


def _drift_row(task: str, of: dict[str, list[float]]) -> list[str]:
    means = {domain: float(np.mean(shares)) for domain, shares in of.items()}
    own = means.pop(task)
    if not means:
        return [task, f"{own:.1%}", "", ""]
    least = min(means, key=lambda domain: means[domain])
    mean = np.mean(list(means.values()))
    return [task, f"{own:.1%}", f"{mean:.1%}", f"{means[least]:.1%} ({least})"]


if __name__ == "__main__":
    main()
