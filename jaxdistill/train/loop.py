"""The loop: batches in, steps on the device, and on the host what a long run needs — lines, checkpoints, a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdistill import partition
from jaxdistill.checkpoint.compatible import check_compatible
from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import Model
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.data.evaluation import eval_batches
from jaxdistill.data.paths import source_at
from jaxdistill.data.pipeline import Loader, make_loader
from jaxdistill.formats.paths import write_text
from jaxdistill.models.export import write_hf
from jaxdistill.models.schema import count_parameters
from jaxdistill.specs import ModelConfig
from jaxdistill.tokenizers import Tokenizer, load_tokenizer
from jaxdistill.train import progress
from jaxdistill.train.config import MAY_CHANGE, TrainConfig, as_document, batch_divisors
from jaxdistill.train.setup import (
    Places,
    Programs,
    Student,
    check_vocabularies,
    enable_compilation_cache,
    make_student,
    open_teacher,
    put_rows,
)
from jaxdistill.types import Mean, Params, TrainState


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended. student: the exported model, None when it was stopped or nothing is exported. kept: the layers
    of the original that the student has, None when it is whole or fresh."""

    directory: Path
    step: int
    student: Path | None
    kept: tuple[int, ...] | None
    held_out: dict[str, float]
    seconds: dict[str, float]


CALIBRATION_BATCHES = 2
"""Training batches that Block Influence is measured on."""


def train(config: TrainConfig) -> Result:
    """Runs a configuration to its last step, or until SIGTERM; resumes what its directory holds.

    Start order: a checkpoint of the run, else the weights of `student.path` or the teacher, else a fresh model.
    Raises ValueError for what cannot run, before any model is read where that can be known, and TrainingStopped
    when too many steps in a row were not finite.
    """
    config.check()
    if config.processes == "automatic":
        jax.distributed.initialize()
    batch_divisors(config, jax.device_count())
    enable_compilation_cache(config.compilation_cache)
    checkpoints = RunCheckpoints(Path(config.out) / "checkpoints", retention=config.checkpoints.retention)
    with contextlib.closing(checkpoints):
        latest = checkpoints.latest()
        saved = {} if latest is None else checkpoints.info(latest)
        if latest is not None:
            check_compatible(saved["config"], as_document(config), may_change=MAY_CHANGE)
        run = _Run(config, checkpoints, saved)
        if latest is not None and run.exported() and latest >= config.steps:
            return run.nothing_left(latest)
        run.prepare(latest)
        return run.loop()


class _Run:
    """One run of the job: the state of the loop, and what it writes."""

    def __init__(self, config: TrainConfig, checkpoints: RunCheckpoints, saved: dict[str, Any]):
        self.config, self.checkpoints = config, checkpoints
        self.directory = Path(config.out)
        self.say, self.clock = progress.Say(), progress.Clock()
        self.kept: tuple[int, ...] | None = tuple(saved["kept"]) if saved.get("kept") else None
        self.held_out: dict[str, float] = saved.get("held_out", {})
        self.seconds_before: float = saved.get("seconds", 0.0)
        self.saved_at: int | None = None

    # Before the first step.

    def prepare(self, resumed: int | None) -> None:
        """Everything up to the first step, from the checkpoint `resumed` if there is one."""
        config, places = self.config, Places.of(self.config)
        with self.clock.measure("open models"):
            self.teacher = open_teacher(config, places)
            tokenizer = data_tokenizer(config, self.teacher)
        if self.kept is not None:
            # The layers were chosen when the run began; another measurement could choose others.
            chosen = dataclasses.replace(config.student, layers=None, keep=self.kept)
            config = dataclasses.replace(config, student=chosen)
        with self.clock.measure("make the student"):
            student = make_student(config, self.teacher, places, self._calibration(places, tokenizer))
        check_vocabularies(student, self.teacher)
        self.student, self.kept = student, student.kept
        self.programs = Programs(config, student, self.teacher, places)
        with self.clock.measure("open data"):
            self.loader = self._loader(tokenizer)
            self.held_out_batches = self._held_out_batches(tokenizer)
        with self.clock.measure("start state"):
            self.state, self.step = self._first_state(resumed), resumed or 0
        self._write_description()
        self._announce(resumed)

    def _loader(self, tokenizer: Tokenizer) -> Loader:
        return make_loader(
            self.config.data, tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
        )

    def _calibration(self, places: Places, tokenizer: Tokenizer) -> Iterator[Any]:
        """The first training batches, from a loader of their own: the run itself still begins at the beginning."""
        with contextlib.closing(self._loader(tokenizer)) as loader:
            for _ in range(CALIBRATION_BATCHES):
                yield put_rows(places, next(loader))

    def _held_out_batches(self, tokenizer: Tokenizer) -> list[dict[str, np.ndarray]]:
        held_out, data = self.config.held_out, self.config.data
        if held_out.path is None:
            return []
        return eval_batches(
            source_at(held_out.path),
            tokenizer,
            length=data.length,
            batch_size=data.batch_size,
            max_windows=held_out.windows,
        )

    def _first_state(self, resumed: int | None) -> TrainState:
        if resumed is None:
            return self.programs.start(self.student.trainable)
        state, data_state, _ = self.checkpoints.restore(resumed, self.programs.expected_state())
        self.loader.restore(data_state)
        return state

    def _write_description(self) -> None:
        if jax.process_index() == 0:
            write_text(self.directory / "config.json", json.dumps(as_document(self.config), indent=1) + "\n")
            write_text(self.directory / "versions.json", json.dumps(versions(), indent=1) + "\n")

    def _announce(self, resumed: int | None) -> None:
        shape = self.student.config
        if self.teacher is not None:
            self.say(f"teacher: {describe(self.teacher.config)}")
        kept = f", layers {_ranges(self.kept)} of the original" if self.kept else ""
        self.say(f"student: {describe(shape)}{kept}")
        self.say(
            f"{self.config.steps} steps of {self.config.data.batch_size} x {self.config.data.length} tokens on "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
            + (f"; resuming after step {resumed}" if resumed is not None else "")
        )

    # Steps.

    def loop(self) -> Result:
        """Trains to the last step or until SIGTERM, saves, and exports a finished student."""
        self._compile()
        sinks = self._sinks()
        skipped_in_a_row = int(self.state.skipped[0])
        rate = progress.matmul_rate(self.config.student.execution.activation_dtype)
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
        floor_seconds = self.programs.flops_per_step / (rate * devices)
        self.began, first, interval = time.perf_counter(), self.step, progress.Interval()
        pending: list[dict[str, Any]] = []
        tokens = self.config.data.batch_size * self.config.data.length
        with _stop_on_sigterm() as stop:
            while self.step < self.config.steps and not self._agreed(stop):
                batch = self.programs.put(next(self.loader))
                self.state, metrics = self.train_step(
                    self.state, self.student.frozen, self.teacher and self.teacher.params, batch
                )
                self.step += 1
                pending.append(metrics)
                logs = self.step % self.config.log.every == 0 or self.step == self.config.steps
                # Read one step behind: the host waits for a step only when the next one is already under way.
                while len(pending) > (0 if logs else 1):
                    done = jax.device_get(pending.pop(0))
                    interval.add(done, tokens)
                    skipped_in_a_row = skipped_in_a_row + 1 if done["skipped"] else 0
                    self._check_finite(skipped_in_a_row)
                if logs:
                    record = self._record(interval, floor_seconds)
                    left = (time.perf_counter() - self.began) / (self.step - first) * (self.config.steps - self.step)
                    self.say.progress(progress.progress_line(self.step, self.config.steps, record, left))
                    _write(sinks, record)
                    interval = progress.Interval()
                self._evaluate_and_save(sinks)
        self.clock.parts["train"] = time.perf_counter() - self.began - self.clock.parts.get("evaluate held-out", 0.0)
        if self.saved_at != self.step:
            self._save()
        for sink in sinks:
            sink.close()
        self.loader.close()
        with self.clock.measure("wait for checkpoints"):
            self.checkpoints.wait()
        return self._finish()

    def _compile(self) -> None:
        with self.clock.measure("compile"), contextlib.closing(self._loader(self.student.tokenizer)) as loader:
            batch = self.programs.put(next(loader))
            arguments = (self.state, self.student.frozen, self.teacher and self.teacher.params, batch)
            self.say("compiling the train step")
            self.train_step = self.programs.train_step.lower(*arguments).compile()

    def _agreed(self, stop: _Stop) -> bool:
        """Whether any process was asked to stop; all must leave the loop at the same step."""
        if jax.process_count() == 1:
            return stop.asked
        return bool(np.any(multihost_utils.process_allgather(np.asarray(stop.asked))))

    def _check_finite(self, skipped_in_a_row: int) -> None:
        if skipped_in_a_row < self.config.stop_after_skipped:
            return
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        good = "no checkpoint was saved" if latest is None else f"the last good one is {self.checkpoints.path(latest)}"
        raise TrainingStopped(
            f"the loss or a gradient was not finite in {skipped_in_a_row} steps in a row, up to step {self.step}; "
            f"{good}. Lower the learning rate, look at the data of these steps, or use float32 activations."
        )

    def _record(self, interval: progress.Interval, floor_seconds: float) -> dict[str, Any]:
        rate = getattr(self.config.optimizer, "rate", None)
        return {
            "step": self.step,
            "tokens": self.step * self.config.data.batch_size * self.config.data.length,
            "seconds": self._seconds(),
            **interval.record(floor_seconds),
            **({"learning_rate": float(rate(self.config.steps)(self.step - 1))} if rate else {}),
        }

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _evaluate_and_save(self, sinks: list[Any]) -> None:
        last = self.step == self.config.steps
        saves = last or self.step % self.config.checkpoints.every == 0
        if self.held_out_batches and (saves or self.step % self.config.held_out.every == 0):
            with self.clock.measure("evaluate held-out"):
                self.held_out = self._evaluate()
            _write(sinks, {"step": self.step, "held_out": self.held_out})
            self.say("held out: " + "  ".join(f"{name} {value:.4f}" for name, value in self.held_out.items()))
        if saves:
            self._save()

    def _evaluate(self) -> dict[str, float]:
        params = _merged(self.state, self.student)
        sums: dict[str, Mean] = {}
        supervised_bytes = 0
        for rows in self.held_out_batches:
            supervised_bytes += int((rows["target_bytes"] * (rows["loss_mask"] > 0)).sum())
            batch = self.programs.put(_own_rows(rows))
            means = self.programs.eval_step(params, self.teacher and self.teacher.params, batch)
            sums = progress.host_sum(sums, jax.device_get(means))
        bits = sums["cross_entropy"].total / math.log(2) / max(1, supervised_bytes)
        found = {"cross_entropy_nats": progress.mean(sums["cross_entropy"]), "bits_per_byte": bits}
        if self.teacher is not None:
            found = {"kl_nats": progress.mean(sums["kl"]), "agreement": progress.mean(sums["agreement"])} | found
        return found

    def _save(self) -> None:
        metric = self.held_out.get("kl_nats", self.held_out.get("bits_per_byte"))
        info = {
            "config": as_document(self.config),
            "versions": versions(),
            "kept": list(self.kept) if self.kept else None,
            "held_out": self.held_out,
            "seconds": self._seconds(),
        }
        self.checkpoints.save(self.step, self.state, self.loader.state(), info, metric=metric)
        self.saved_at = self.step

    # After the last step.

    def _finish(self) -> Result:
        if self.step < self.config.steps:
            self.say(f"stopped at step {self.step}, saved; the same command resumes it")
            return self._result(None)
        student = None
        if self.config.export != "none":
            with self.clock.measure("export"):
                student = self._export()
            self.say(f"student written to {student}")
        if jax.process_index() == 0:
            write_text(self.directory / "times.json", json.dumps(self.clock.parts, indent=1) + "\n")
        return self._result(student)

    def _export(self) -> Path:
        target = self.directory / "student"
        if target.exists():
            return target
        config, params, tokenizer = self.student.config, _merged(self.state, self.student), self.student.tokenizer
        if self.config.export == "jaxdistill" or jax.process_count() > 1 or not config.homogeneous:
            save_model(target, config, params, write_tokenizer=tokenizer.save)
        else:
            write_hf(target, config, params, dtype=self.config.export_dtype, tokenizer=tokenizer)
        return target

    def exported(self) -> bool:
        """Whether a finished run has nothing more to write."""
        return self.config.export == "none" or (self.directory / "student").exists()

    def nothing_left(self, step: int) -> Result:
        """The result of a run that was finished before."""
        self.step = step
        self.say(f"{self.directory} is finished: {step} steps, student in {self.directory / 'student'}; nothing to do")
        return self._result(self.directory / "student" if self.config.export != "none" else None)

    def _result(self, student: Path | None) -> Result:
        return Result(self.directory, self.step, student, self.kept, self.held_out, dict(self.clock.parts))

    def _sinks(self) -> list[Any]:
        if jax.process_index() != 0:
            return []
        sinks: list[Any] = [progress.MetricsFile(self.directory / "metrics.jsonl", from_step=self.step)]
        if self.config.log.tensorboard:
            sinks.append(progress.TensorBoard(self.directory / "tensorboard"))
        if self.config.log.wandb_project is not None:
            project = self.config.log.wandb_project
            sinks.append(progress.WeightsAndBiases(project, self.directory, as_document(self.config)))
        return sinks


def data_tokenizer(config: TrainConfig, teacher: Model | None) -> Tokenizer:
    """The tokenizer that the training text goes through."""
    if teacher is not None:
        return teacher.tokenizer
    return load_tokenizer(config.student.tokenizer or config.student.path)


def describe(config: ModelConfig) -> str:
    """A model in one line."""
    return f"{count_parameters(config):,} parameters, {len(config.layers)} layers, vocabulary {config.vocab:,}"


def versions() -> dict[str, Any]:
    """What a run was made with: packages, git revision of the working directory, devices."""
    packages = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "git_revision": git.stdout.strip() or None,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _merged(state: TrainState, student: Student) -> Params:
    return partition.merge(state.params["student"], student.frozen)


def _own_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's part of a global batch."""
    size = len(rows["tokens"]) // jax.process_count()
    start = jax.process_index() * size
    return {name: values[start : start + size] for name, values in rows.items()}


def _write(sinks: list[Any], record: dict[str, Any]) -> None:
    for sink in sinks:
        sink.write(record)


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-9, 12, 20-29."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


@dataclasses.dataclass
class _Stop:
    asked: bool = False


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[_Stop]:
    """Turns SIGTERM into a wish that the loop reads between steps."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return

    def ask(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
