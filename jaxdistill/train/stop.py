"""A way out of a run: a signal becomes a wish, which the loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Callable[[int], bool]]:
    """Yields a test, called with the number of steps done: whether the run should save and leave now.

    SIGTERM (a scheduler's notice) and Ctrl-C ask for it; a second Ctrl-C raises KeyboardInterrupt. With several
    processes JAX's preemption service listens to SIGTERM and lets all of them leave after the same step, without a
    collective in every step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        again = "; Ctrl-C again leaves without saving" if number == signal.SIGINT else ""
        say(f"{signal.Signals(number).name}: saving after this step{again}")

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
