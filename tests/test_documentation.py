"""README and docs: links lead somewhere, and every ``ifp`` command in them is one that exists."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer

from ifp_mlx.cli.app import make_app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES += sorted((ROOT / "benchmarks").glob("**/*.md"))

_LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_RESULT = re.compile(r"results/[\w./-]+|training/[\w.-]+\.jsonl?")
_FIGURE = re.compile(r"(?<![\w.-])\d+\.\d+(?![\w.])")  # no version, no name
WHOLE_FOLDERS = ("results/latency", "results/fit", "results/function", "docs/training")
FIGURES_OF_OTHERS = {"What others published about real mixtures"}
_COMMAND_ENDS = {"|", "||", "&&", ";", "&", ">", ">>", "<", "2>"}


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get where it is rendered."""
    names = set()
    for heading in _HEADING.findall(without_code(page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        text = re.sub(r"[^\w\- ]", "", text.lower())
        names.add(text.strip().replace(" ", "-"))
    return names


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for first, second in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            target = first or second
            if not re.match(r"[a-z]+:", target):
                yield page, target


def test_links_lead_to_files_and_headings() -> None:
    dead = []
    found = list(links())
    for page, target in found:
        name, _, anchor = target.partition("#")
        path = (page.parent / unquote(name)).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert len(found) > 40  # there is something to see
    assert dead == []


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Yield a page's headings and what stands below each."""
    parts = _HEADING.split(page.read_text(encoding="utf-8"))
    yield from zip(["", *parts[1::2]], parts[::2], strict=True)


def tables(text: str) -> list[str]:
    """Return the tables of a text, with the line before each."""
    return re.findall(r"(?:^.*\n)?(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("cli.md", "log.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_tables_of_figures_come_from_stored_results(page: Path) -> None:
    """A table is written by docs/make_*.py, or the stored result is named in its section.

    Or below "Repeat it", which says how all of a page's figures are made.
    """
    found = dict(sections(page))
    without_source = [
        f"{heading}: {table.splitlines()[1]}"
        for heading, text in found.items()
        for table in tables(text)
        if len(_FIGURE.findall(table)) >= 4 and not table.startswith("<!-- ")
        if not _RESULT.search(text + found.get("Repeat it", ""))
        if heading not in FIGURES_OF_OTHERS
    ]
    assert without_source == []


def test_every_result_and_picture_is_shown_or_linked() -> None:
    sources = [page.read_text(encoding="utf-8") for page in PAGES]
    sources += [script.read_text(encoding="utf-8") for script in (ROOT / "docs").glob("*.py")]
    known = "".join(sources)
    stored = [*(ROOT / "benchmarks" / "results").rglob("*.json*")]
    stored += [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.svg")]
    stored += (ROOT / "docs" / "training").iterdir()
    assert len(stored) > 30
    unused = [
        str(path.relative_to(ROOT))
        for path in stored
        if path.name not in known and not path.parent.as_posix().endswith(WHOLE_FOLDERS)
    ]
    assert unused == []


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of a page's code blocks, continued ones joined."""
    inside = False
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            yield line


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every ``ifp`` command line of a code block: where it stands, and its words."""
    for page in PAGES:
        for line in code_lines(page):
            if not re.match(r"(\$ )?ifp [a-z-]", line):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            end = next((i for i, word in enumerate(words) if word in _COMMAND_ENDS), len(words))
            yield f"{page.relative_to(ROOT)}: {line.strip()}", words[1:end]


def parse(words: list[str]) -> None:
    """Have the command line's own parser read words; nothing runs."""
    command: Any = typer.main.get_command(make_app(words[0]))
    context = command.make_context("ifp", [], resilient_parsing=True)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
        context = type(context)(command, parent=context, info_name=name)
    command.make_parser(context).parse_args(words)


@pytest.mark.parametrize(("place", "words"), [pytest.param(*c, id=c[0]) for c in commands()])
def test_commands_in_the_documentation_exist(place: str, words: list[str]) -> None:
    parse(words)


def test_python_example_of_the_readme_runs(
    tmp_path: Path,
    write_tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a tiny model under the name of the default one."""
    monkeypatch.setenv("IFP_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    write_tiny_checkpoint(tmp_path / "models" / "smollm2-135m", intermediate_size=1536)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out
