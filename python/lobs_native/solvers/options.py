"""Options: dataclass fields that carry their own check, help line, and use in reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lobs_native import checks
from lobs_native.checks import check_choice

__all__ = ["Option", "Options", "number", "option", "option_of"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name, its type and its default."""

    help: str = ""  # its line on the command line, which does not offer it without one
    choices: tuple[str, ...] = ()  # the strings that it may be
    optional: bool = False  # whether it may be None
    check: Callable[[Any, str], Any] | None = None  # (value, name) -> the value to keep, or raises
    in_bytes: bool = False  # whether it is a size in bytes
    reported: bool = True  # whether a report repeats it
    compared: bool = True  # whether a resumed run must have the same value

    def checked(self, value: Any, name: str) -> Any:
        """``value`` as it is kept; an error that names the option if it is not acceptable."""
        if value is None and self.optional:
            return None
        if self.choices:
            return check_choice(value, name, self.choices, optional=self.optional)
        return value if self.check is None else self.check(value, name)


def option(
    default: Value,
    *,
    help: str = "",
    choices: tuple[str, ...] = (),
    optional: bool = False,
    check: Callable[[Any, str], Any] | None = None,
    in_bytes: bool = False,
    reported: bool = True,
    compared: bool = True,
) -> Value:
    """A field of a subclass of :class:`Options`, as :class:`Option` describes it.

    A default of None makes it optional.
    """
    optional = optional or default is None
    described = Option(help, choices, optional, check, in_bytes, reported, reported and compared)
    field: Value = dataclasses.field(default=default, metadata={"option": described})
    return field


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The description of a field that :func:`option` made."""
    described: Option = field.metadata["option"]
    return described


@dataclass(frozen=True, kw_only=True)
class Options:
    """A dataclass of options; a new instance checks each of them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = option_of(field).checked(getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)

    def changed(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]


def number(value: Any, name: str) -> float:
    """A number that is not NaN: an int or a float as it is, any other (numpy, torch) as a float."""
    converted = checks.real(value, name)
    kept: float = value if type(value) in (int, float) else converted
    return kept
