"""Which checkpoints of a run are kept."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept: the `last` ones, those whose step is a multiple of `every`, and the `best`.

    Best is lowest metric; checkpoints without one (or with a metric that is not finite) are never best. Everything
    else that the run saved is deleted once a newer checkpoint is whole; nothing that it did not save ever is.
    """

    last: int = 3
    every: int | None = None
    best: int = 1

    def __post_init__(self):
        if self.last < 1 or self.best < 0 or (self.every is not None and self.every < 1):
            raise ValueError(f"{self}: `last` must be at least 1, `best` at least 0, `every` at least 1 or None.")

    def keeps(self, metrics: dict[int, float | None]) -> set[int]:
        """Of these steps, with their metrics, the ones to keep."""
        steps = sorted(metrics)
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        return kept | set(ranked(metrics)[: self.best])


def ranked(metrics: dict[int, float | None]) -> list[int]:
    """Steps with a metric, best first; of equals the later one."""
    return sorted((s for s, m in metrics.items() if m is not None), key=lambda s: (metrics[s], -s))
