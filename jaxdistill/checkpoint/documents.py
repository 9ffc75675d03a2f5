"""Frozen dataclasses as JSON documents and back, driven by their type annotations.

Every nested dataclass is tagged with its class name under "type", so that a field may hold one of several classes, and
may come to hold more of them without making older files unreadable.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
_TAG = "type"


def to_dict(value: Any) -> Any:
    """A dataclass (or a tuple, dict or scalar inside one) as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_TAG: type(value).__name__} | fields
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a {type(value).__name__} cannot be written as JSON; allowed are dataclasses, tuples, dicts, "
        "numbers, strings, booleans and None."
    )


def from_dict(expected: type[T], document: Any) -> T:
    """The dataclass `expected` from its document. Absent fields take their defaults.

    Raises ValueError, with the dotted name of the place, for unknown fields, missing ones and values of a wrong type.
    """
    return _read(expected, document, expected.__name__)


def _read(expected: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; allowed are {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is dict:
        _require(isinstance(value, dict), value, "an object", where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(expected):
        return _read_dataclass(expected, value, where)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = value is None if expected is type(None) else type(value) is expected
    _require(right, value, f"a value of type {expected.__name__}", where)
    return value


def _read_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    classes: dict[str, Any] = {m.__name__: m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)}
    if isinstance(value, dict) and classes:
        tag = value.get(_TAG)
        if tag not in classes:
            raise ValueError(f"{where}.{_TAG} is {tag!r}; allowed are {', '.join(classes)}.")
        return _read(classes[tag], value, where)
    plain = [m for m in members if m is not type(None) and not dataclasses.is_dataclass(m)]
    for member in plain:
        try:
            return _read(member, value, where)
        except ValueError:
            if len(plain) == 1 and not classes:
                raise
    raise ValueError(f"{where} is {value!r}; allowed is {' | '.join(getattr(m, '__name__', str(m)) for m in members)}.")


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _require(isinstance(value, list), value, "a list", where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    _require(len(value) == len(arguments), value, f"a list of {len(arguments)}", where)
    return tuple(_read(a, item, f"{where}.{i}") for i, (a, item) in enumerate(zip(arguments, value, strict=True)))


def _read_dataclass(expected: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), value, f"an object with the fields of {expected.__name__}", where)
    given = {name: item for name, item in value.items() if name != _TAG}
    _require(
        value.get(_TAG, expected.__name__) == expected.__name__, value.get(_TAG), expected.__name__, f"{where}.type"
    )
    fields = {field.name: field for field in dataclasses.fields(expected) if field.init}
    if unknown := sorted(given.keys() - fields.keys()):
        raise ValueError(f"{where} has the unknown fields {unknown}; allowed are {sorted(fields)}.")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{where} lacks the fields {missing}.")
    annotations = typing.get_type_hints(expected)
    return expected(**{name: _read(annotations[name], item, f"{where}.{name}") for name, item in given.items()})


def _require(right: bool, value: Any, allowed: str, where: str) -> None:
    if not right:
        raise ValueError(f"{where} is {value!r}; allowed is {allowed}.")
