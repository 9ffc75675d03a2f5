"""Whether a saved configuration allows a resume under the current one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

_ABSENT = "absent"
_NOTHING = (None, [])
"""What a field that is not there may be now: fields that are added later leave things as they were at these values."""


def check_compatible(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    may_change: Collection[str] = frozenset(),
    added: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse a resume that contradicts the saved configuration, listing every differing field.

    saved, current: nested configurations of JSON values (tuples count as lists). may_change: dotted names that may
    differ without changing what was computed so far ("train.steps", "log"); a name covers everything below it. added:
    dotted names of fields that older configurations lack, and the value that leaves things as they were; for others it
    is None or nothing. Raises ValueError.
    """
    before, now = dict(_dotted(_plain(saved), "")), dict(_dotted(_plain(current), ""))
    differing = [
        name
        for name in {**before, **now}
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
        and not (name not in before and now[name] in (*_NOTHING, added.get(name)))
        and not any(name == allowed or name.startswith(f"{allowed}.") for allowed in may_change)
    ]
    if differing:
        lines = [f"  {name}: {_show(before, name)} / {_show(now, name)}" for name in differing]
        raise ValueError(
            f"the run was started with another configuration; {len(differing)} fields differ (saved / given):\n"
            + "\n".join(lines)
            + "\nGive the saved values to resume it, or another output directory to start a new run."
            + (f" Only these may change: {', '.join(sorted(may_change))}." if may_change else "")
        )


def _show(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else _ABSENT


def _plain(document: Mapping[str, Any]) -> Any:
    """As JSON would give it back, so that a saved configuration equals the one that it was saved from."""
    return json.loads(json.dumps(document))


def _dotted(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists by their dotted names; an empty dict or list is a leaf."""
    branches = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    empty = True
    for key, child in branches:
        empty = False
        yield from _dotted(child, f"{name}.{key}" if name else str(key))
    if empty:
        yield name, node
