"""The loop: batches in, steps on the device, and on the host what a long run needs — lines, checkpoints, a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdistill import __version__, partition
from jaxdistill.checkpoint.compatible import check_compatible
from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.data.evaluation import eval_batches
from jaxdistill.data.paths import source_at
from jaxdistill.data.pipeline import Loader, make_loader
from jaxdistill.formats.paths import any_path, write_text
from jaxdistill.losses.alm import ALM
from jaxdistill.models.export import check_exportable, write_hf
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.lora import adapter_schema, merge_adapters
from jaxdistill.models.schema import count_parameters
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.specs import ModelConfig
from jaxdistill.train import progress
from jaxdistill.train.config import ADDED, MAY_CHANGE, TrainConfig, as_document, batch_divisors
from jaxdistill.train.setup import (
    Places,
    Programs,
    Tokenizers,
    check_shapes,
    enable_compilation_cache,
    join_processes,
    make_student,
    open_teacher,
    tokenizers_of,
)
from jaxdistill.train.stop import stop_requests
from jaxdistill.types import Mean, Params, TrainState

PLAN_NAME = "plan.json"
_matmul_rate = functools.cache(progress.matmul_rate)


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended. student: the exported model, None when it was stopped or nothing is exported. plan: what the
    student has of the original, None when it is whole or fresh."""

    directory: Path
    step: int
    student: Path | None
    plan: PrunePlan | None
    held_out: dict[str, float]
    seconds: dict[str, float]


def train(config: TrainConfig) -> Result:
    """Runs a configuration to its last step, or until SIGTERM or Ctrl-C; resumes what its directory holds.

    Start order: a checkpoint of the run, else the weights of `student.path` or the teacher, else a fresh model.
    Raises ValueError for what cannot run, before any model is read where that can be known, and TrainingStopped
    when too many steps in a row were not finite.
    """
    config.check()
    directory = any_path(config.out)
    if config.log.wandb_project is not None:
        progress.require_wandb()
    join_processes(config)
    batch_divisors(config, jax.device_count(), processes=jax.process_count())
    enable_compilation_cache(config.compilation_cache)
    checkpoints = RunCheckpoints(directory / "checkpoints", retention=config.checkpoints.retention)
    with contextlib.closing(checkpoints):
        latest = checkpoints.latest()
        saved = {} if latest is None else checkpoints.info(latest)
        if latest is not None:
            check_compatible(saved["config"], as_document(config), may_change=MAY_CHANGE, added=ADDED)
        run = _Run(config, directory, checkpoints, saved)
        run.refuse_foreign_student(latest)
        if latest is not None and run.exported() and latest >= config.steps:
            return run.nothing_left(latest)
        run.prepare(latest)
        return run.loop()


class _Run:
    """One run of the job: the state of the loop, and what it writes."""

    def __init__(self, config: TrainConfig, directory: Path, checkpoints: RunCheckpoints, saved: dict[str, Any]):
        self.config, self.checkpoints = config, checkpoints
        self.directory = directory
        self.say, self.clock = progress.Say(), progress.Clock()
        self.records: progress.Mirror | None = None
        self.sinks: list[Any] = []
        self.plan = self._saved_plan() if saved.get("pruned") else None
        self.held_out: dict[str, float] = saved.get("held_out", {})
        self.evaluated_at: int | None = None
        self.seconds_before: float = saved.get("seconds", 0.0)
        self.began = time.perf_counter()

    # Before the first step.

    def refuse_foreign_student(self, latest: int | None) -> None:
        """A new run would end with a student that it did not make: an existing one is never overwritten."""
        if latest is None and self.config.export != "none" and (self.directory / "student").exists():
            raise ValueError(
                f"{self.directory / 'student'} exists, and {self.directory} has no checkpoint of the run that made it. "
                "Choose another output directory, or move the student."
            )

    def prepare(self, resumed: int | None) -> None:
        """Everything up to the first step, from the checkpoint `resumed` if there is one."""
        config, places = self.config, Places.of(self.config)
        with self.clock.measure("open data"):
            texts = tokenizers_of(config)
            check_shapes(config, self.plan, layout=places.student)
            self.loader = self._loader(texts)
            self.held_out_batches = held_out_batches(config, texts)
        with self.clock.measure("open models"):
            teacher = open_teacher(config, places)
        with self.clock.measure("make the student"):
            # A resumed run keeps the plan that it began with: another measurement could choose other parts.
            student = make_student(config, teacher, places, plan=self.plan, progress=self._calibrated)
        self.plan = student.plan
        if config.export == "huggingface" and student.config.homogeneous:
            check_exportable(student.config)
        with self.clock.measure("prepare the steps"):
            self.programs = Programs(config, student, teacher, places, progress=self._mapped)
        with self.clock.measure("start state"):
            # A teacher that learns is part of the state, and no longer kept beside it.
            learns = teacher is not None and config.teacher.correction is not None
            learner = teacher.params if teacher is not None and learns else None
            self.state, self.step = self._first_state(student.trainable, learner, resumed), resumed or 0
            self.fixed_teacher = None if teacher is None else {} if learns else teacher.params
        self.saved_at = resumed
        # The state holds the trainable leaves from here on.
        self.student = dataclasses.replace(student, trainable={})
        self._write_description()
        self._announce(resumed, None if teacher is None else teacher.config)

    def _loader(self, texts: Tokenizers) -> Loader:
        return make_loader(
            self.config.data,
            texts.rows,
            teacher_tokenizer=texts.teachers_rows,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _calibrated(self, done: int, total: int) -> None:
        if done == total or done % max(1, total // 4) == 0:
            self.say.progress(f"measuring importance: batch {done}/{total}")

    def _mapped(self, done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            self.say.progress(f"the nearest of the teacher's tokens: {done:,}/{total:,}")

    def _saved_plan(self) -> PrunePlan:
        if not (self.directory / PLAN_NAME).exists():
            raise ValueError(
                f"{self.directory / PLAN_NAME} is missing, which says what of the original this run's student has; "
                "put it back, or start a new run."
            )
        return PrunePlan.load(self.directory / PLAN_NAME)

    def _first_state(self, trainable: Params, teacher: Params | None, resumed: int | None) -> TrainState:
        if resumed is None:
            return self.programs.start(trainable, teacher)
        state, shards, info = self.checkpoints.restore(resumed, self.programs.expected_state())
        self.loader.restore({**info["data"], "shards": shards})
        return state

    def _write_description(self) -> None:
        if jax.process_index() == 0:
            write_text(self.directory / "config.json", json.dumps(as_document(self.config), indent=1) + "\n")
            write_text(self.directory / "versions.json", json.dumps(versions(), indent=1) + "\n")
            if self.plan is not None:
                self.plan.save(self.directory / PLAN_NAME)

    def _announce(self, resumed: int | None, teacher: ModelConfig | None) -> None:
        if teacher is not None:
            self.say(f"teacher: {describe(teacher)}")
        kept = "" if self.plan is None else f"; of the original, {self.plan.summary()}"
        self.say(f"student: {describe(self.student.config)}{kept}")
        student, lora = self.config.student, self.student.lora
        if self.student.moved:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.student.moved.items())
            self.say(f"moved to another tokenizer; rows of its embedding: {kinds}")
        if lora is not None:
            numbers = sum(math.prod(leaf.shape) for leaf in adapter_schema(self.student.config, lora).values())
            self.say(f"adapters: {numbers:,} parameters of rank {lora.rank}")
        elif teacher is not None and self.plan is None and not (student.path or student.model or student.tokenizer):
            self.say("the student is the whole teacher; student.prune, path, model and tokenizer make another one")
        self.say(
            f"{self.config.steps} steps of {self.config.data.batch_size} x {self.config.data.length} tokens on "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
            + (f"; resuming after step {resumed}" if resumed is not None else "")
        )

    # Steps.

    def loop(self) -> Result:
        """Trains to the last step or until asked to stop, saves, and exports a finished student."""
        with contextlib.closing(self.loader):
            if self.step < self.config.steps:
                self._compile()
                with self._logging(), stop_requests(self.say) as stop:
                    self._steps(stop)
                    with self.clock.measure("wait for checkpoints"):
                        self.checkpoints.wait()
        return self._finish()

    def _compile(self) -> None:
        with self.clock.measure("compile"):
            batch = self.programs.put(self.loader.empty)
            self.say("compiling the train step")
            arguments = (self.state, self.student.frozen, self.fixed_teacher, batch)
            self.train_step = self.programs.train_step.lower(*arguments).compile()

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Opens what records are written to; process 0 writes."""
        log = self.config.log
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                self.records = progress.Mirror(self.directory)
                stack.callback(self.records.close)
                self.sinks = [progress.MetricsFile(self.records.file("metrics.jsonl"), from_step=self.step)]
                if log.tensorboard:
                    self.sinks.append(progress.TensorBoard(self.records.folder / "tensorboard", from_step=self.step))
                if log.wandb_project is not None:
                    document = as_document(self.config)
                    self.sinks.append(progress.WeightsAndBiases(log.wandb_project, self.records.folder, document))
            for sink in self.sinks:
                stack.callback(sink.close)
            yield

    def _steps(self, stop: Callable[[int], bool]) -> None:
        """Trains, and saves where it ends."""
        config, first = self.config, self.step
        skipped_in_a_row = int(self.state.skipped[0])
        floor_seconds = self._floor_seconds()
        if first == 0 and self.held_out_batches:
            self._evaluate_held_out()  # what the student is before it learns
        evaluating = self.clock.parts.get("evaluate held-out", 0.0)
        self.began, interval = time.perf_counter(), progress.Interval()
        under_way: list[dict[str, Any]] = []

        def read(keep: int) -> None:
            nonlocal skipped_in_a_row
            while len(under_way) > keep:
                done = jax.device_get(under_way.pop(0))
                interval.add(done, config.data.batch_size * config.data.length)
                skipped_in_a_row = skipped_in_a_row + 1 if done["skipped"] else 0
                self._check_finite(skipped_in_a_row, self.step - len(under_way))

        def line() -> None:
            read(keep=0)
            left = (time.perf_counter() - self.began) / (self.step - first) * (config.steps - self.step)
            record = interval.record(floor_seconds)
            self.say.progress(progress.progress_line(self.step, config.steps, record, left))
            self._write({**self._place(), **record})

        while self.step < config.steps and not stop(self.step):
            batch = self.programs.put(next(self.loader))
            self.state, metrics = self.train_step(self.state, self.student.frozen, self.fixed_teacher, batch)
            self.step += 1
            under_way.append(metrics)
            saves = self._due(config.checkpoints.every)
            evaluates = bool(self.held_out_batches) and (saves or self._due(config.held_out.every))
            # Read one step behind: the host waits for a step only when the next one is already under way.
            read(keep=1)
            # A line before each checkpoint, so that a resume neither loses nor repeats steps; and one before each
            # evaluation, so that its time does not count as training.
            if self._due(config.log.every) or saves or evaluates:
                line()
                if evaluates:
                    self._evaluate_held_out()
                if saves:
                    self._save()
                interval = progress.Interval()
        if under_way or interval.steps:
            line()
        evaluating = self.clock.parts.get("evaluate held-out", 0.0) - evaluating
        self.clock.parts["train"] = time.perf_counter() - self.began - evaluating
        if self.saved_at != self.step:
            self._save()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _floor_seconds(self) -> float:
        """What the products of a step take at the rate that was measured on this machine."""
        rate = _matmul_rate(self.config.student.execution.activation_dtype)
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
        return self.programs.flops_per_step / (rate * devices)

    def _check_finite(self, skipped_in_a_row: int, step: int) -> None:
        if skipped_in_a_row < self.config.stop_after_skipped:
            return
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        good = "no checkpoint was saved" if latest is None else f"the last good one is {self.checkpoints.path(latest)}"
        raise TrainingStopped(
            f"the loss or a gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step}; {good}. "
            "Look at the data of these steps, or start a run with a lower learning rate or float32 activations."
        )

    def _place(self) -> dict[str, Any]:
        """Where the run is: the beginning of every line of metrics."""
        rate = self.config.optimizer.rate(self.config.steps)
        return {
            "step": self.step,
            "tokens": self.step * self.config.data.batch_size * self.config.data.length,
            "seconds": self._seconds(),
            **({} if rate is None else {"learning_rate": float(rate(self.step - 1))}),
        }

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)
        if self.records is not None:
            self.records.tick()

    def _evaluate_held_out(self) -> None:
        with self.clock.measure("evaluate held-out"):
            self.held_out, self.evaluated_at = self._evaluate(), self.step
        self._write({"step": self.step, "held_out": self.held_out})
        self.say("held out: " + "  ".join(f"{name} {value:.4f}" for name, value in self.held_out.items()))

    def _evaluate(self) -> dict[str, float]:
        params, teacher = self._student_params(), self.state.params.get("teacher", self.fixed_teacher)
        sums: dict[str, Mean] = {}
        supervised_bytes = 0
        for rows in self.held_out_batches:
            supervised_bytes += int((rows["target_bytes"] * (rows["loss_mask"] > 0)).sum())
            batch = self.programs.put_global(rows)
            means = self.programs.eval_step(params, teacher, batch)
            sums = progress.host_sum(sums, jax.device_get(means))
        bits = sums["cross_entropy"].total / math.log(2) / max(1, supervised_bytes)
        found = {"cross_entropy_nats": progress.mean(sums["cross_entropy"]), "bits_per_byte": bits}
        compared = {"kl": "kl_nats"}  # with their units; other terms have none
        return {compared.get(n, n): progress.mean(mean) for n, mean in sums.items() if n != "cross_entropy"} | found

    def _student_params(self) -> Params:
        return partition.merge(self.state.params["student"], self.student.frozen)

    def _save(self) -> None:
        """Starts saving. A checkpoint that was not evaluated (a stop between evaluations) is never the best."""
        closeness = ["kl_nats", *(name for name, term in self.config.losses.items() if isinstance(term, ALM))]
        metric = next((self.held_out[name] for name in (*closeness, "bits_per_byte") if name in self.held_out), None)
        data = self.loader.state()
        info = {
            "config": as_document(self.config),
            "versions": versions(),
            "pruned": self.plan is not None,
            "held_out": progress.finite(self.held_out),
            "seconds": self._seconds(),
            # What all processes have in common; each saves its own shards.
            "data": {name: value for name, value in data.items() if name != "shards"},
        }
        metric = metric if self.evaluated_at == self.step else None
        if self.records is not None:
            self.records.upload()  # a resume begins behind these lines
        self.checkpoints.save(self.step, self.state, data["shards"], info, metric=metric)
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
        self.say(f"read {self.loader.statistics}")
        if jax.process_index() == 0:
            write_text(self.directory / "times.json", json.dumps(self.clock.parts, indent=1) + "\n")
        return self._result(student)

    def _export(self) -> Path:
        target = self.directory / "student"
        if target.exists():
            return target
        config, params, tokenizer = self.student.config, self._student_params(), self.student.tokenizer
        if self.student.lora is not None:
            params = merge_adapters(params, self.student.lora)
        if self.config.export == "jaxdistill" or self._must_be_ours(config):
            save_model(target, config, params, write_tokenizer=tokenizer.save)
        else:
            write_hf(target, config, params, dtype=self.config.export_dtype, tokenizer=tokenizer)
        return target

    def _must_be_ours(self, config: ModelConfig) -> bool:
        """Whether Hugging Face's format cannot be written, which is said."""
        try:
            check_exportable(config)
        except ConfigError as error:
            self.say(f"writing jaxdistill's format: {error}")
            return True
        if jax.process_count() > 1:
            self.say("several processes write jaxdistill's format; `jaxdistill convert` makes Hugging Face's of it")
            return True
        return False

    def exported(self) -> bool:
        """Whether a finished run has nothing more to write."""
        return self.config.export == "none" or (self.directory / "student").exists()

    def nothing_left(self, step: int) -> Result:
        """The result of a run that was finished before."""
        self.step = step
        student = self.directory / "student" if self.config.export != "none" else None
        self.say(
            f"{self.directory} is finished: {step} steps, student in {student or 'its checkpoints'}; nothing to do"
        )
        return self._result(student)

    def _result(self, student: Path | None) -> Result:
        return Result(self.directory, self.step, student, self.plan, self.held_out, dict(self.clock.parts))


def held_out_batches(config: TrainConfig, texts: Tokenizers) -> list[dict[str, Any]]:
    """The batches of held-out text, the same on all processes; none without a path."""
    held_out, data = config.held_out, config.data
    if held_out.path is None:
        return []
    return eval_batches(
        source_at(held_out.path, field=data.field, split=held_out.split),
        texts.rows,
        teacher_tokenizer=texts.teachers_rows,
        length=data.length,
        teacher_length=data.teacher_length,
        chunks=data.chunks,
        batch_size=data.batch_size,
        max_windows=held_out.windows,
        # As the models see text in training: some read badly without the token that begins it.
        prepend_bos=data.prepend_bos,
        date=datetime.date.fromisoformat(data.template_date),
    )


def describe(config: ModelConfig) -> str:
    """A model in one line."""
    return f"{count_parameters(config):,} parameters, {len(config.layers)} layers, vocabulary {config.vocab:,}"


@functools.cache
def versions() -> dict[str, Any]:
    """What a run was made with: packages, git revision of the working directory, devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "jaxdistill": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "git_revision": _git_revision(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _git_revision() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None  # no git here
    return git.stdout.strip() or None
