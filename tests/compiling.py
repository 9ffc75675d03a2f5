"""Compiling less than usual, for tests in which compiling is the cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
    """Programs made meanwhile are compiled without most optimisations: for those that run a step or two."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
