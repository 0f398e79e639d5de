"""Write architecture.md's list of files from modules' first lines; ``--check`` only compares."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->"
ROOMS = (
    "units", "storage", "selection", "adapters", "slicing", "subnets", "pictures", "chat", "text",
    "training", "fitting", "evaluation", "benchmarking", "server",
)  # fmt: skip
BENCHMARKS = ("benchmarks", "benchmarks/function", "benchmarks/mixture", "benchmarks/variants")
FOLDERS = ("ifp_mlx", *(f"ifp_mlx/{room}" for room in ROOMS), "convert", "cli", *BENCHMARKS)


def first_line(path: Path) -> str:
    """Return the first sentence of a module's docstring, for one line of a list."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".:")


def list_files() -> str:
    """Return the list as a block of text: a folder, then a line a module."""
    lines = ["```"]
    for folder in FOLDERS:
        package = ROOT / folder / "__init__.py"
        lines.append(
            f"{folder}/".ljust(23) + " " + (first_line(package) if package.exists() else "")
        )
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"  {path.name}".ljust(23) + " " + first_line(path))
    lines.append("```\n")
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Rewrite the list, or with ``--check`` return 1 if it is out of date."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    wanted = pattern.sub(lambda _: BEGIN + list_files() + END, text)
    if "--check" in sys.argv[1:]:
        if wanted != text:
            sys.stderr.write(f"{PAGE.name}: the list of files is old; run docs/make_files.py\n")
        return int(wanted != text)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
