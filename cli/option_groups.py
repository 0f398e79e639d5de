"""Options that go together: one dataclass in a command's signature, flags on its command line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_type_hints

_Result = TypeVar("_Result")


def expands_options(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return a command in whose signature each dataclass is replaced by its fields.

    Typer makes flags of what it finds there. Fields are annotated like parameters of a command; a
    field's default is the flag's, so a subclass with another default gives a command another one.
    Groups may hold groups. Values are put together, and ``__post_init__`` checks them, before the
    command is called.

    Raises:
        ValueError: a name comes twice.
    """
    signature = inspect.signature(command, eval_str=True)
    grouped = list(signature.parameters.values())
    flat = [parameter for group in grouped for parameter in _expanded(group)]

    @functools.wraps(command)
    def with_flat_options(**values: Any) -> _Result:
        return command(**{parameter.name: _collected(parameter, values) for parameter in grouped})

    with_flat_options.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    with_flat_options.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return with_flat_options


def _expanded(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """Yield a parameter, or those of its fields if it is a group."""
    if not _is_group(parameter.annotation):
        # By keyword only, so that one that must be given may follow one that need not.
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        return
    for field in _fields(parameter.annotation):
        yield from _expanded(field)


def _collected(parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    """Return the value of a parameter, made of those of its fields if it is a group."""
    if not _is_group(parameter.annotation):
        return values[parameter.name]
    fields = _fields(parameter.annotation)
    return parameter.annotation(**{field.name: _collected(field, values) for field in fields})


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _fields(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters."""
    annotations = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=annotations[field.name],
        )
        for field in dataclasses.fields(group)
    ]
