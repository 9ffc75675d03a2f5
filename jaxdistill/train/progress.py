"""What a run says while it goes: metrics as files, and a line for the person who waits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.formats.paths import is_remote, remove_tree, scratch, state_of, upload, write_text
from jaxdistill.types import Mean

_log = logging.getLogger(__name__)


def host_sum(total: dict[str, Mean], part: Mapping[str, Mean]) -> dict[str, Mean]:
    """Sums of sums, on the host in float64: many steps cannot lose a small one."""
    part = {name: Mean(float(np.asarray(m.total)), float(np.asarray(m.count))) for name, m in part.items()}
    return {name: total[name] + m if name in total else m for name, m in part.items()}


def mean(sums: Mean) -> float:
    """The value of host sums; 0 when nothing was counted."""
    return sums.total / sums.count if sums.count else 0.0


class Interval:
    """Sums over the steps since the last line."""

    def __init__(self):
        self.started = time.perf_counter()
        self.steps = self.tokens = self.skipped = 0
        self.terms: dict[str, Mean] = {}
        self.loss = self.gradient_norm = 0.0

    def add(self, metrics: Mapping[str, Any], tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        if metrics["skipped"]:
            self.skipped += 1
            return
        self.terms = host_sum(self.terms, metrics["terms"])
        self.loss += float(metrics["loss"])
        self.gradient_norm += float(metrics["gradient_norm"])

    def record(self, floor_seconds: float) -> dict[str, Any]:
        """Means over the interval. floor_share: what the products of a step need at the measured rate ÷ its time."""
        seconds = time.perf_counter() - self.started
        kept = self.steps - self.skipped
        record = {
            "loss": self.loss / kept if kept else None,
            "terms": {name: mean(m) for name, m in self.terms.items()},
            "gradient_norm": self.gradient_norm / kept if kept else None,
            "tokens_per_second": self.tokens / seconds,
            "floor_share": floor_seconds * self.steps / seconds,
        }
        return record | ({"skipped": self.skipped} if self.skipped else {})


class Mirror:
    """Where a run's records are written: its directory, or, of one in an object store, where no file can grow, a
    directory on a disk whose files are uploaded anew now and then. Records that cannot be uploaded stop no run."""

    EVERY_SECONDS = 30.0

    def __init__(self, directory: Path):
        self.folder, self._directory = directory, directory
        self._sent: dict[Path, str] = {}
        self._at = time.monotonic()
        if is_remote(directory):
            self.folder = Path(tempfile.mkdtemp(dir=scratch()))

    def file(self, name: str) -> Path:
        """Where to write a file, with what it has so far."""
        file, remote = self.folder / name, self._directory / name
        if file != remote and remote.exists():
            file.write_bytes(remote.read_bytes())
        return file

    def tick(self) -> None:
        """Uploads what is new, when the last time is long ago."""
        if time.monotonic() - self._at > self.EVERY_SECONDS:
            self.upload()

    def upload(self) -> bool:
        """Uploads what is new; whether nothing is left to."""
        if self.folder == self._directory:
            return True
        self._at = time.monotonic()
        for file in (file for file in self.folder.rglob("*") if file.is_file()):
            if (state := state_of(file)) == self._sent.get(file):
                continue
            try:
                upload(file, self._directory / file.relative_to(self.folder).as_posix())
            except Exception as error:  # of every kind of store its own
                _log.warning("%s was not uploaded to %s (%s); tried again later", file, self._directory, error)
                return False
            self._sent[file] = state
        return True

    def close(self) -> None:
        if not self.upload():
            _log.warning("the records of %s stay in %s", self._directory, self.folder)
        elif self.folder != self._directory:
            remove_tree(self.folder)


class MetricsFile:
    """RUN/metrics.jsonl, one object per line; a resumed run continues it and drops lines of steps it will repeat."""

    def __init__(self, path: Path, *, from_step: int):
        kept = path.read_text().splitlines(keepends=True) if path.exists() and from_step > 0 else []
        write_text(path, "".join(line for line in kept if _step_of(line) <= from_step))
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was torn when the run was killed


def finite(value: Any) -> Any:
    """A record as JSON can hold it: None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """The same records as TensorBoard scalars; a resumed run hides the points of steps that it will repeat."""

    def __init__(self, directory: Path, *, from_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), max_queue=100, purge_step=from_step + 1 if from_step else 0)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _flat(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def require_wandb() -> None:
    """Refuses a run that would log to Weights & Biases without its package, before anything is read."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb_project needs wandb; install it with: pip install 'jaxdistill[wandb]'")


class WeightsAndBiases:
    """The same records in a Weights & Biases project."""

    def __init__(self, project: str, directory: Path, config: Any):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(project=project, dir=str(directory), config=config, resume="allow")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(_flat(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass
class Clock:
    """Where the time of a job went: named parts in the order in which they began, in seconds."""

    parts: dict[str, float] = dataclasses.field(default_factory=dict)

    def measure(self, name: str) -> _Measured:
        return _Measured(self, name)

    def __str__(self) -> str:
        total = sum(self.parts.values())
        lines = [f"  {name:<28}{seconds:8.1f} s" for name, seconds in self.parts.items()]
        return "\n".join([*lines, f"  {'total':<28}{total:8.1f} s"])


class _Measured:
    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        parts = self._clock.parts
        parts[self._name] = parts.get(self._name, 0.0) + time.perf_counter() - self._start


class Say:
    """Lines for a person: process 0 speaks; a line may replace the one before it on a terminal."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._silent = jax.process_index() != 0
        self._open = False

    def __call__(self, line: str) -> None:
        if self._silent:
            return
        self._end()
        print(line, file=self._stream, flush=True)

    def progress(self, line: str) -> None:
        if self._silent:
            return
        if not self._stream.isatty():
            print(line, file=self._stream, flush=True)
            return
        print(f"\r\033[K{line}", end="", file=self._stream, flush=True)
        self._open = True

    def _end(self) -> None:
        if self._open:
            print(file=self._stream)
            self._open = False


def progress_line(step: int, steps: int, record: Mapping[str, Any], seconds_left: float) -> str:
    """`step 120/400  loss 1.23  kl 1.10  3,410 tokens/s  61 % of the matmul floor  2:05 left`."""
    parts = [f"step {step}/{steps}"]
    if record["loss"] is None:
        parts.append("every step skipped")
    else:
        parts.append(f"loss {record['loss']:.4g}")
        parts += [f"{name} {value:.4g}" for name, value in record["terms"].items()]
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{record['floor_share']:.0%} of the matmul rate")
    parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """3:05 or 2:03:05."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def matmul_rate(dtype: Any = jnp.float32, *, seconds: float = 0.3) -> float:
    """FLOP/s of large square products on one device, the median over so many seconds: the floor that progress is
    compared with. (The best of a few can be twice what a machine keeps up.)"""
    device = jax.local_devices()[0]
    # Large enough that an accelerator's launch time does not count, small enough for a laptop.
    size = 2048 if device.platform == "cpu" else 8192
    x = jax.device_put(np.ones((size, size), np.float32), device).astype(dtype)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(x, x))
    times = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
