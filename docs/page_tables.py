"""Tables of pages that stored results make: written between two comments, or compared with them.

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``. The scripts ``make_*.py``
say which tables a page has; each writes its pages, or with ``--check`` only compares.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRAINING = ROOT / "docs" / "training"

Table = Callable[[], str]


def read(path: Path) -> dict[str, Any]:
    """Return a JSON document."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 0) -> str:
    """Return a Markdown table; columns from ``numbers_from`` on, if it is given, to the right."""
    rule = ["---:" if numbers_from and i >= numbers_from else "---" for i in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def with_tables(text: str, tables: Mapping[str, Table], page: str) -> str:
    """Return a page's text with its tables made anew.

    Raises:
        SystemExit: the page does not have each table once, or has others.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} does not have one table {name!r}")
        before, _, rest = text.partition(begin)
        text = before + begin + table() + end + rest.partition(end)[2]
    if text.count("<!-- end of ") != len(tables):
        raise SystemExit(f"{page} has tables that nothing makes")
    return text


def run(pages: Mapping[str, Mapping[str, Table]]) -> int:
    """Write pages by their paths in the repository; with ``--check`` return 1 if one is old."""
    status = 0
    for page, tables in pages.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = with_tables(text, tables, page)
        if wanted == text:
            continue
        if "--check" in sys.argv[1:]:
            sys.stderr.write(f"{page}: a table is old; run docs/{Path(sys.argv[0]).name}\n")
            status = 1
        else:
            path.write_text(wanted, encoding="utf-8")
    return status
