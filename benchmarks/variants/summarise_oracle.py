"""Tables of what train_oracle.py measured: nats a scored token, and differences from dense.

    PYTHONPATH=benchmarks/mixture python summarise_oracle.py OUT.json

Means over domains; 95 % intervals from a paired bootstrap over each domain's examples. Markdown.
"""

import argparse
import json
from pathlib import Path

from summarise_mixture import GROUPS, Results


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    content = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    content |= {"model": {"experts": 1}, "selecting_domains": list(content["scored_tokens"])}
    for group in GROUPS:
        results = Results(content, group)
        if not results.domains:
            continue
        count = len(results.domains)
        print(f"## {group} ({count} domains)\n")
        print(
            "| row | nats | minus dense (95 %) | better in | " + " | ".join(results.domains) + " |"
        )
        print("|---" * (4 + count) + "|")
        for name in results.names:
            own = [results.of_domain(name, domain) for domain in results.domains]
            cells = [name, f"{results.mean(name):.3f}", "", ""]
            gap = results.difference(name, "dense")
            if gap is not None and name != "dense":
                cells[2] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap)
                dense = [results.of_domain("dense", domain) for domain in results.domains]
                cells[3] = f"{sum(a < b for a, b in zip(own, dense, strict=True))} of {count}"
            print("| " + " | ".join([*cells, *(f"{nats:.3f}" for nats in own)]) + " |")
        print()
    for label, groups in content["groups"].items():
        members: dict[int, list[str]] = {}
        for domain, index in groups.items():
            members.setdefault(index, []).append(domain)
        words = "; ".join(", ".join(names) for _, names in sorted(members.items()))
        speed = content["training"][label]["tokens_a_second"]
        print(f"- {label} ({speed:,.0f} tokens/s): {words}")


if __name__ == "__main__":
    main()
