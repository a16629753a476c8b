"""Options in groups: a command takes a dataclass where Typer wants one parameter per option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from persona_nnsight.experiments.arguments import Option
from persona_nnsight.experiments.experiment import Experiment


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it, each dataclass parameter spread out into its fields.

    >>> @dataclass
    ... class Size:
    ...     width: int = 1
    ...     height: int = 1
    >>> def draw(size: Size, colour: str = "red") -> None: ...
    >>> list(inspect.signature(expand_groups(draw)).parameters)
    ['width', 'height', 'colour']
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if not is_dataclass(hint):
            parameters.append(parameter.replace(annotation=hint))
            continue
        groups[name] = hint
        parameters += [
            inspect.Parameter(
                field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=option
            )
            for field, option in _options(hint)
        ]

    @wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            own = [field.name for field, _ in _options(group)]
            values[name] = group(**{field: values.pop(field) for field in own})
        command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


def _options(group: Any) -> list[tuple[Field[Any], Any]]:
    """The fields of a dataclass that are options, each with the type that Typer reads.

    Those of an experiment are its arguments, which say themselves how they are typed.
    """
    if not issubclass(group, Experiment):
        types = get_type_hints(group, include_extras=True)
        return [(field, types[field.name]) for field in fields(group)]
    found: list[tuple[Field[Any], Any]] = []
    for field in fields(group):
        option: Option | None = field.metadata.get("option")
        if option is not None:
            value = option.type | None if field.default is None else option.type
            shown = typer.Option(
                *option.names,
                help=option.help,
                metavar=option.metavar,
                show_default=option.default,
                rich_help_panel=option.group,
            )
            found.append((field, Annotated[value, shown]))
    return found
