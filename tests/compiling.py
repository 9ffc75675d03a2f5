"""How programs of tests are compiled, and reading what was compiled."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest


def flags_for_one_device() -> str:
    """XLA_FLAGS for a process of a test that shall have one device."""
    return re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])


@contextlib.contextmanager
def compiled_times(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], int]]:
    """Inside, how often a function of some name has been compiled so far."""
    with caplog.at_level("WARNING"), jax.log_compiles():
        yield lambda name: sum(record.getMessage().startswith(f"Compiling jit({name})") for record in caplog.records)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives_in_loops(program: str) -> list[tuple[str, int]]:
    """(kind, largest result in elements) of every collective that runs inside a while loop of a compiled program."""
    computations: dict[str, list[str]] = {}
    name = None
    for line in program.splitlines():
        if (header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)) is not None:
            name = header.group(1)
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    inside: set[str] = set()
    todo = [
        m.group(1) for lines in computations.values() for line in lines for m in re.finditer(r"body=%?([\w.\-]+)", line)
    ]
    while todo:
        if (current := todo.pop()) in inside:
            continue
        inside.add(current)
        for line in computations.get(current, []):
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
    found = []
    for computation in inside:
        for line in computations.get(computation, []):
            if (match := COLLECTIVE.search(line)) is not None:
                sizes = [
                    int(np.prod([int(n) for n in dims.split(",") if n]))
                    for dims in re.findall(r"\[([\d,]*)\]", match.group(1))
                ]
                found.append((match.group(2), max(sizes, default=1)))
    return found
