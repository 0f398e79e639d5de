"""Groups of options: dataclasses for a command, flags for Typer."""

import dataclasses
import inspect
from typing import Annotated, Any

import pytest
import typer

from ifp_mlx.cli.app import make_app
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width")] = 3
    height: Annotated[int, typer.Option("--height")] = 4

    def __post_init__(self) -> None:
        if self.width > 9:
            raise UsageError("too wide")


@dataclasses.dataclass(frozen=True)
class TallSize(Size):
    height: Annotated[int, typer.Option("--height")] = 40


@dataclasses.dataclass(frozen=True)
class Picture:
    name: Annotated[str, typer.Argument()]
    size: TallSize = TallSize()
    dark: Annotated[bool, typer.Option("--dark")] = False


@expands_options
def draw(
    context: typer.Context,
    *,
    picture: Picture,
    output: Annotated[str, typer.Option("--output")] = "-",
) -> tuple[str | None, Picture, str]:
    """Draw a picture."""
    return context.info_name, picture, output


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command("draw")(draw)
    return app(list(arguments), prog_name="draw", standalone_mode=False)


def test_fields_stand_where_their_group_stood() -> None:
    names = ["context", "name", "width", "height", "dark", "output"]
    assert list(inspect.signature(draw).parameters) == names
    assert draw.__doc__ == "Draw a picture."


def test_values_are_put_together() -> None:
    assert run("sea", "--width", "5", "--dark", "--output", "x") == (
        "draw",
        Picture("sea", TallSize(5, 40), dark=True),
        "x",
    )


def test_what_is_not_given_has_the_default_of_the_groups_own_class() -> None:
    assert run("sea") == ("draw", Picture("sea", TallSize(3, 40)), "-")


def test_a_group_checks_its_fields() -> None:
    with pytest.raises(UsageError, match="too wide"):
        run("sea", "--width", "10")


def test_a_field_without_a_default_must_be_given() -> None:
    with pytest.raises(typer.BadParameter.__mro__[1], match="name"):
        run("--width", "5")


def test_a_name_that_comes_twice_is_refused() -> None:
    def paint(*, size: Size, width: int = 2) -> None:
        pass

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        expands_options(paint)


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("generate", "max_tokens", 512),
        ("chat", "max_tokens", 1024),
        ("generate", "reuse", 0.0),
        ("serve", "reuse", 0.0),
    ],
)
def test_commands_have_defaults_of_their_own(command: str, flag: str, default: Any) -> None:
    app: Any = typer.main.get_command(make_app(command))
    (parameter,) = [p for p in app.commands[command].params if p.name == flag]
    assert parameter.default == default
