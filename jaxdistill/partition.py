"""Splitting a nested dict of arrays in two by name, and putting it together again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from jaxdistill.types import Params


def names(tree: Params, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by dotted name: {"ffn": {"up": x}} → {"ffn.up": x}."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        flat.update(names(node, name) if isinstance(node, dict) else {name: node})
    return flat


def nest(flat: dict[str, Any]) -> Params:
    """The inverse of `names`."""
    tree: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_names(function: Callable[[str, Any], Any], tree: Params, prefix: str = "") -> Params:
    """The same tree with `function(dotted name, leaf)` in place of each leaf."""
    mapped: Params = {}
    for key, node in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        mapped[key] = map_names(function, node, name) if isinstance(node, dict) else function(name, node)
    return mapped


def matches(patterns: Sequence[str]) -> Callable[[str], bool]:
    """A test of dotted names: whether any of the shell patterns (`*.norm.scale`) matches."""
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def split(tree: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """(the leaves whose dotted names are chosen, the rest), each as a nested dict without empty branches."""
    flat = names(tree)
    return (
        nest({name: leaf for name, leaf in flat.items() if chosen(name)}),
        nest({name: leaf for name, leaf in flat.items() if not chosen(name)}),
    )


def merge(one: Params, other: Params) -> Params:
    """Both trees in one. Raises ValueError when a leaf stands in both."""
    merged = dict(one)
    for key, node in other.items():
        if key not in merged:
            merged[key] = node
        elif isinstance(merged[key], dict) and isinstance(node, dict):
            merged[key] = merge(merged[key], node)
        else:
            raise ValueError(f"both trees hold {key!r}; a parameter is trained or frozen, not both.")
    return merged
