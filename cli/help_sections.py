"""Help in sections: the options and commands that a newcomer needs first, the others below."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

# Of options. Those without a section stand first, under "Options".
MANY = "Many prompts"
UNITS = "Which part of the model"
SAMPLING = "How answers are drawn"
ADVANCED = "Advanced"

# Of commands.
TALK = "First steps"
TASKS = "Tasks"
MODELS = "Models"
DEVELOPERS = "For developers"


class SectionedCommand(TyperCommand):
    """A command whose help shows its options in sections, by their ``rich_help_panel``."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does, and each example on a line of its own."""
        text, examples = split_examples(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
        if examples:
            with formatter.section("Examples"):
                for example in examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options without a section, and the sections."""
        records = [(p, p.get_help_record(ctx)) for p in self.get_params(ctx)]
        shown = [(p, record) for p, record in records if record is not None]
        arguments = [
            (name.partition(" <")[0], text)  # without the Python type that Typer adds
            for p, (name, text) in shown
            if p.param_type_name == "argument"
        ]
        _write(formatter, "Arguments", arguments)
        options = [(p, record) for p, record in shown if p.param_type_name == "option"]
        _write_sections(formatter, "Options", ((_section(p), record) for p, record in options))


class SectionedGroup(TyperGroup):
    """A group of commands whose help shows them in sections, also if no command is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Print the help instead of complaining that a command is missing."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each command: the first sentence of its help, whole."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = (
            (_section(command), (name, _first_sentence(command)))
            for name, command in found
            if command is not None and not command.hidden
        )
        _write_sections(formatter, "Commands", rows)


class CommandGroup(typer.Typer):
    """Commands under one name, with help in sections.

    Args:
        help_text: what they are for.
        settings: more of Typer's.
    """

    def __init__(self, help_text: str | None = None, **settings: Any):
        # Plain help: Rich's tables leave too little room for the text.
        if help_text is not None:
            settings["help"] = help_text
        super().__init__(cls=SectionedGroup, rich_markup_mode=None, **settings)

    def command(
        self, name: str | None = None, **settings: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """Return a decorator that adds a command."""
        return super().command(name, cls=SectionedCommand, **settings)


def split_examples(help_text: str) -> tuple[str, list[str]]:
    """Return a command's help without its last paragraph, if that is ``Examples: A;`` and so on.

    Returns:
        The text, and the command lines.
    """
    text, _, last = inspect.cleandoc(help_text).rpartition("\n\n")
    if not last.startswith("Example"):
        return inspect.cleandoc(help_text), []
    lines = last.partition(":")[2].split(";\n")
    return text, [" ".join(line.split()) for line in lines]


def _section(item: Any) -> str | None:
    section = getattr(item, "rich_help_panel", None)
    return section if isinstance(section, str) else None


def _first_sentence(command: Any) -> str:
    paragraph = (command.short_help or command.help or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".")


def _write_sections(
    formatter: Any, first: str, rows: Iterable[tuple[str | None, tuple[str, str]]]
) -> None:
    """Write rows by section, in the order in which sections appear; advanced options come last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for section, row in rows:
        sections.setdefault(section or first, []).append(row)
    for heading in sorted(sections, key=lambda name: (name != first, name == ADVANCED)):
        _write(formatter, heading, sections[heading])


def _write(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(heading):
            formatter.write_dl(rows)
