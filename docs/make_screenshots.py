"""Draw docs/chat-100.svg and docs/chat-40.svg: real chats with the default model on a terminal.

ifp pull smollm2-135m && python docs/make_screenshots.py
"""

import importlib.util
import io
import re
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from ifp_mlx.convert.registry import resolve_model

FOLDER = Path(__file__).parent
TERMINAL = FOLDER.parent / "tests" / "cli" / "terminal.py"
COLOURS = {"default": None, "brown": "yellow", "brightbrown": "bright_yellow"}


def picture(screen: Any, title: str) -> str:
    """Return what is on a pyte screen as SVG, without the empty lines below."""
    console = Console(record=True, width=screen.columns, file=io.StringIO())
    last = max(row for row in range(screen.lines) if screen.display[row].strip())
    for row in range(last + 1):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            line.append(cell.data, Style(color=colour(cell.fg), bold=cell.bold))
        console.print(line, soft_wrap=True)
    drawing = console.export_svg(title=title)
    # No font is fetched from elsewhere: the reader's own monospaced one will do.
    return re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL)


def colour(name: str) -> str | None:
    """Return Rich's name of a colour that pyte names."""
    known = COLOURS.get(name, name)
    if known is None or known.startswith("bright_") or not known.startswith("bright"):
        is_hex = known is not None and len(known) == 6 and not known.isalpha()
        return f"#{known}" if is_hex else known
    return f"bright_{known.removeprefix('bright')}"


def main() -> None:
    """Run one chat for each width and draw its screen."""
    spec = importlib.util.spec_from_file_location("terminal", TERMINAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TIMEOUT_S = 600.0
    model = resolve_model("smollm2-135m").absolute()
    for columns, rows in ((100, 34), (40, 40)):
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "models").mkdir()
            (Path(home) / "models" / model.name).symlink_to(model)
            arguments = ("chat", "--task", "help me write Python", "-m", "160")
            options = {"columns": columns, "rows": rows, "IFP_HOME": home}
            with module.terminal(*arguments, **options) as chat:
                chat.wait_for_prompt()
                chat.press("Write a Python function that adds two numbers.", "Enter")
                chat.wait_for("tok/s")
                chat.wait_for_prompt()
                chat.press("/task explain things simply", "Enter")
                chat.wait_for("conversation")
                chat.wait_for_prompt()
                chat.press("/")
                chat.wait_for("/retask")
                drawing = picture(chat.screen, f"ifp chat, {columns} columns")
                (FOLDER / f"chat-{columns}.svg").write_text(drawing)


if __name__ == "__main__":
    main()
