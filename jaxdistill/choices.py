"""Fields that hold one of a few values: their types say which, and one function refuses others."""

from __future__ import annotations

import functools
import typing
from typing import Any, Literal


def check_choices(given: Any) -> None:
    """For `__post_init__` of a dataclass. Raises ValueError where a field with a type `Literal[…]` (or that or None)
    holds anything else."""
    kind = type(given)
    for name, allowed in _choices(kind).items():
        if (value := getattr(given, name)) not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(f"{kind.__name__}.{name} is {value!r}; allowed are {names}.")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        members = (hint,) if typing.get_origin(hint) is Literal else typing.get_args(hint)
        literals = [member for member in members if typing.get_origin(member) is Literal]
        if literals and all(member in literals or member is type(None) for member in members):
            values = [value for literal in literals for value in typing.get_args(literal)]
            found[name] = (*values, *(None for member in members if member is type(None)))
    return found
