"""Write docs/cli.md from the commands' own help; with --check only compare."""

import sys
from pathlib import Path
from typing import Any, cast

import typer

from ifp_mlx.cli.app import make_app
from ifp_mlx.cli.chat_commands import ChatCommands
from ifp_mlx.cli.chat_state import Chat
from ifp_mlx.cli.help_sections import split_examples

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# Command reference

Made from the help of the commands by `python docs/make_cli.py`; a test keeps the two the same.

Only answers go to standard output; status lines, progress and errors go to standard error. `--json`
prints one JSON document on standard output.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed, with one line that says what to do; also when the reader of a pipe went away |
| 2 | wrong usage |
| 130 | interrupted with Ctrl-C; what was answered so far is printed and kept |

| variable | meaning |
|---|---|
| `IFP_HOME` | one folder for models, sub-networks, chats and history, instead of the platform's |
| `IFP_MODEL` | the default of `--model` |
| `IFP_NO_OPENBLAS` | Linux: leave mlx's own BLAS in place |
| `HF_HUB_OFFLINE` | never reach for the Hugging Face hub |
| `NO_COLOR` | no colours |
| `VISUAL`, `EDITOR` | what Ctrl-G opens in a chat |

`ifp --install-completion` installs completion for your shell.
"""


def page() -> str:
    """Return the whole page."""
    root: Any = typer.main.get_command(make_app())
    sections = [INTRODUCTION, *_sections("ifp", root)]
    return "\n".join(sections)


def _sections(path: str, command: Any) -> list[str]:
    children = getattr(command, "commands", None)
    if children:
        introduction = [] if path == "ifp" else [f"## {path}\n\n{_text(command.help)}\n"]
        shown = {name: child for name, child in children.items() if not child.hidden}
        nested = [_sections(f"{path} {name}", child) for name, child in shown.items()]
        return [*introduction, *(section for sections in nested for section in sections)]
    level = "##" if path.count(" ") == 1 else "###"
    text, examples = split_examples(command.help or "")
    parts = [f"{level} {path}\n", f"{_text(text)}\n", f"`{_usage(path, command)}`\n"]
    if examples:
        parts.append("\n".join(["```sh", *examples, "```\n"]))
    rows = [_row(parameter) for parameter in command.params]
    if rows:
        parts.append("| argument or option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n")
    if path == "ifp chat":
        parts.append(_slash_commands())
    return ["\n".join(parts)]


def _usage(path: str, command: Any) -> str:
    arguments = [
        _name(p) if p.required else f"[{_name(p)}]"
        for p in command.params
        if p.param_type_name == "argument"
    ]
    return " ".join([path, *arguments, "[OPTIONS]"])


def _name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        flags = _name(parameter)
    else:
        flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.metavar:
            flags = f"{flags} {parameter.metavar}"
    shown = parameter.default
    has_default = isinstance(shown, (int, float, str)) and not isinstance(shown, bool)
    default = f" Default: `{shown}`." if has_default else ""
    needed = " Required." if parameter.required and parameter.param_type_name == "option" else ""
    meaning = f"{_text(parameter.help)}{needed}{default}"
    return f"| `{flags}` | {meaning} |".replace("TASK|KEY", "TASK\\|KEY")


def _slash_commands() -> str:
    # The table needs no chat, only running a command does.
    table = ChatCommands(cast(Chat, None), Path(), list).table
    rows = [
        f"| `{f'{name} {command.arguments}'.strip()}` | {command.help} |".replace(
            "|off", "\\|off"
        ).replace("RATIO|UNITS", "RATIO\\|UNITS")
        for name, command in table.items()
    ]
    return "\n".join(["In the chat:\n", "| command | meaning |", "|---|---|", *rows, ""])


def _text(help_text: str | None) -> str:
    paragraphs = (help_text or "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).replace("|", "\\|")


def main() -> None:
    """Write or check the page."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != text:
            sys.exit(f"{PAGE} is not what the help says; run: python docs/make_cli.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
