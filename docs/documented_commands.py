"""The command blocks of README and docs: what is in them, and what of it cannot be run here."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

NOT_RUN = {
    "is what CI runs": [
        "make test",
    ],
    "needs an accelerator, and up to 80 GB of its memory": [
        "python benchmarks/latency_suite.py",
        "ifp bench latency --shape llama-3.1-8b --predictor-config qwen2.5-0.5b",
        "ifp bench slicing --shape llama-3.1-8b --bits 4",
        "ifp bench switch --shape llama-3.1-8b --predictor-config qwen2.5-0.5b",
        "ifp bench latency --shape llama-3.1-8b --bits 4 --predictor-config qwen2.5-0.5b "
        "--output my-mac.json",
    ],
    "needs an accelerator, PyTorch, and a folder of training text": [
        "python text_rows.py DATA SMOLLM2/tokenizer.json rows.npz",
        "python train_mixture.py SMOLLM2 rows.npz OUT --minutes 11",
        "python measure_mixture.py OUT/model DATA mixture.json --dense OUT/start --minutes 5",
        "python oracle_rows.py DATA SMOLLM2/tokenizer.json rows.npz held_out.npz",
        "python train_oracle.py SMOLLM2 rows.npz held_out.npz oracle.json --compile --seconds 240",
    ],
    "needs an accelerator, hours, and the text that it trains or measures on": [
        "python run.py JOBS/smollm2-reading.json --models MODELS --data DATA --out OUT",
        "python analyse.py OUT",
        "python show.py OUT 'smollm2-135m|whole|mbpp' --models MODELS --data DATA",
        "ifp train --config benchmarks/training/teacher.toml --bits 4 -o runs/teacher",
        "ifp train --config benchmarks/training/ifp_joint.toml -o runs/ifp-joint",
    ],
    "needs the Hugging Face hub": [
        "ifp pull ORG/NAME",
        "ifp pull mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit",
    ],
    "fetches more than 400 MB": [
        "ifp pull qwen2.5-coder-0.5b",
        'python -m venv elsewhere && elsewhere/bin/pip install "mlx[cpu]" mlx-lm torch '
        "transformers gguf",
        "elsewhere/bin/python benchmarks/export_parity.py check parity",
    ],
    "needs two Macs": [
        "mlx.distributed_config --hosts mac1.local,mac2.local --over thunderbolt --backend ring "
        "--auto-setup --output-hostfile macs.json",
        "mlx.launch --hostfile macs.json --backend ring -- ifp generate "
        '"Write a date picker." --task "write Swift" --keep 0.75 '
        "--model qwen3-30b-a3b-instruct-2507-4bit",
        "mlx.launch --hostfile macs.json --backend ring -- mlx_lm.server --model ~/qwen3-30b-swift",
    ],
}
"""Why not, and the commands, as they stand in the pages with one space between words."""

SMALLER = {
    "python benchmarks/server_load.py --model smollm2-135m --clients 32 --seconds 60 "
    "--max-tokens 12": "python benchmarks/server_load.py --model smollm2-135m --clients 3 "
    "--seconds 5 --max-tokens 12",
    "python benchmarks/server_load.py --random --clients 32 --seconds 60 --strict": "python "
    "benchmarks/server_load.py --random --clients 3 --seconds 5 --strict",
    "python benchmarks/schema_speed.py --rounds 6 --tokens 40": "python "
    "benchmarks/schema_speed.py --rounds 1 --tokens 40",
    "ifp bench latency --model path/to/checkpoint --keep-units 1024 --prompt 1024 "
    "--output my-model.json": "ifp bench latency --model path/to/checkpoint --keep-units 1024 "
    "--prompt 32 --new-tokens 2 --repeats 1 --output my-model.json",
}
"""Commands that take minutes, and the same with smaller numbers, which are run instead."""

_ANSWERS = re.compile(r"\bifp (chat|generate|serve|fit)\b")
_SHORT = "--max-tokens 24"
"""How long answers are for commands that do not say it: what is said is not what is looked at."""

_BLOCK = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LANGUAGES = {"sh", "console", "python"}
_COMMENT = re.compile(r"\s+# .*$", re.MULTILINE)
_LOOKS_LIKE_A_COMMAND = re.compile(
    r"^(\$ )?([A-Z_]+=\S+ )*(ifp|python3?|pip|make|curl|cd|export|git|mlx[._][\w.]+|\S*bin/\w+) \S",
    re.MULTILINE,
)
_SHELL = re.compile(r"[|<>&;~`]|\$\(")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        page: from the repository's root, with forward slashes.
        line: of the block, counted from 1.
        text: as a shell reads it, on one line if it is no Python.
        before: the ``cd`` and ``export`` lines of the block above it.
        output: what the page says that it prints; None if the page says nothing.
    """

    page: str
    line: int
    text: str
    before: tuple[str, ...] = ()
    output: str | None = None

    @property
    def words(self) -> list[str] | None:
        """The words of a command that needs no shell, else None."""
        return None if self.before or _SHELL.search(self.text) else shlex.split(self.to_run)

    @property
    def reason_not_to_run(self) -> str | None:
        """Why it is not run, or None."""
        return next((why for why, texts in NOT_RUN.items() if self.text in texts), None)

    @property
    def to_run(self) -> str:
        """The text as it is run: with smaller numbers where it would take minutes."""
        return _ANSWERS.sub(rf"\g<0> {_SHORT}", SMALLER.get(self.text, self.text))


def pages() -> list[Path]:
    """Return the pages in which a command is one to run."""
    found = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
    return [*found, *sorted((ROOT / "benchmarks").glob("**/*.md"))]


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page in order; a Python block is one command."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    for block in _BLOCK.finditer(text):
        language, content = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        if language == "python":
            yield Command(name, line, f"python -c {shlex.quote(content)}")
        elif language == "console":
            yield from _transcript(name, line, content)
        elif language == "sh":
            before: list[str] = []
            for part in _lines(content):
                if part.startswith(("cd ", "export ")):
                    before.append(part)
                else:
                    yield Command(name, line, part, tuple(before))


def unmarked(page: Path) -> list[str]:
    """Return what looks like a command in blocks that do not say that they hold commands."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    found = [
        _LOOKS_LIKE_A_COMMAND.search(content)
        for language, content in blocks
        if language not in _LANGUAGES
    ]
    return [match[0] for match in found if match]


def _lines(content: str) -> list[str]:
    """Return a block's commands: continued lines joined, comments gone, one space between words."""
    joined = _COMMENT.sub("", content.replace("\\\n", " "))
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def _transcript(page: str, line: int, content: str) -> Iterator[Command]:
    """Yield the commands behind ``$``; what stands below the last is what it prints."""
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        text, _, output = part.partition("\n")
        yield Command(page, line, " ".join(text.split()), output=output.strip() or None)
