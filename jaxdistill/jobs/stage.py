"""What a person sees while they wait: one line for each stage of a job, with the time it takes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxdistill.sharding import Layout, MeshConfig, make_mesh


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Says what is being done, how long it has been going on (on a terminal), and how long it took."""
    with _ticking(what, lambda: ""):
        yield


@contextlib.contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """Like `stage`, for work that reports (done, total)."""
    state = ""

    def report(done: int, total: int) -> None:
        nonlocal state
        state = f" {done}/{total}"

    with _ticking(what, lambda: state):
        yield report


@contextlib.contextmanager
def counted_bytes(what: str) -> Iterator[Callable[[int, int], None]]:
    """Like `counted` for bytes, with their rate and the time that is left."""
    state, began, first = "", time.perf_counter(), None

    def report(done: int, total: int) -> None:
        nonlocal state, first
        # What an interrupted job had finished says nothing about the rate.
        first = done if first is None else first
        rate = (done - first) / max(time.perf_counter() - began, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        state = f" {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s{left}"

    with _ticking(what, lambda: state):
        yield report


@contextlib.contextmanager
def _ticking(what: str, state: Callable[[], str]) -> Iterator[None]:
    began, finished = time.perf_counter(), threading.Event()
    live = sys.stderr.isatty()

    def line() -> str:
        return f"{what}{state()}: {time.perf_counter() - began:.1f} s"

    def tick() -> None:
        while not finished.wait(0.5):
            print(f"\r{line()}\033[K", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if live:
        ticker.start()
    try:
        yield
    finally:
        finished.set()
        if live:
            ticker.join()
        print(f"\r{line()}\033[K" if live else line(), file=sys.stderr, flush=True)


def whole_machine(mesh: MeshConfig | None = None) -> Layout:
    """Parameters and rows spread over every device that there is; None splits them over all."""
    import jax

    return Layout() if jax.device_count() == 1 else Layout(make_mesh(mesh or MeshConfig()))
