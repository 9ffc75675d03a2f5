"""Tiny runs for the tests of the training job: a byte-level teacher, text, configurations, and what a run left."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import llama

from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL, Term
from jaxdistill.models.schema import init_params
from jaxdistill.optimizer import AdamW, Optax, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.search import Budget, Grid, SearchConfig
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.train import progress
from jaxdistill.train.config import (
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from jaxdistill.train.loop import train

TEACHER = llama(vocab=264, layers=3)
LENGTH, ROWS, STEPS = 32, 8, 8


@dataclasses.dataclass(frozen=True)
class Files:
    """What the runs read, and where their compiled programs are kept."""

    root: Path

    teacher = property(lambda self: self.root / "teacher")
    text = property(lambda self: self.root / "text.jsonl")
    held_out = property(lambda self: self.root / "held_out.jsonl")

    def write(self) -> Files:
        params = init_params(TEACHER, jax.random.key(1))
        # Larger scores than fresh ones: there is something to learn.
        params["embedding"] = jax.tree.map(lambda x: 8 * x, params["embedding"])
        save_model(self.teacher, TEACHER, params, write_tokenizer=load_tokenizer("bytes").save)
        write_documents(self.text, seed=0, count=120, words=(5, 25))
        write_documents(self.held_out, seed=1, count=9, words=(2, 4))
        return self

    def config(self, out: Path, **changes) -> TrainConfig:
        """A run of 8 steps that is logged, saved and evaluated at different intervals."""
        given = {
            "out": str(out),
            "teacher": TeacherConfig(path=str(self.teacher)),
            "student": StudentConfig(prune=Target(layers=(0, 2))),
            "data": DataConfig(path=str(self.text), length=LENGTH, batch_size=ROWS),
            "optimizer": AdamW(learning_rate=WarmupCosine(peak=1e-2)),
            "steps": STEPS,
            "held_out": HeldOutConfig(path=str(self.held_out), every=4),
            "checkpoints": CheckpointConfig(every=3),
            "log": LogConfig(every=1, tensorboard=False),
            "export": "none",
            "compilation_cache": str(self.root / "xla"),
        }
        return TrainConfig(**{**given, **changes})

    def pruning(self, out: Path, **changes) -> TrainConfig:
        """A run of 3 steps whose student is cut by importance in every axis; after SGD parameters can be compared."""
        target = Target(layers=2, embed=12, mlp=16, heads=2, kv_heads=1)
        student = StudentConfig(prune=target, calibration_batches=2)
        return self.config(out, student=student, optimizer=Optax(optax.sgd(0.5)), steps=3, **changes)

    def searching(self, out: Path, **changes) -> SearchConfig:
        """A search among small shapes, each trained for 3 steps."""
        run = self.config(out / "unused", student=StudentConfig(calibration_batches=2), steps=3)
        given = {"budget": Budget(parameters=0.9), "grid": Grid(layers=(2, 3), mlp=(8, 16)), "candidates": 3}
        return SearchConfig(out=str(out), train=run, **{**given, **changes})


def write_documents(path: Path, *, seed: int, count: int, words: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    with path.open("w") as lines:
        for _ in range(count):
            text = " ".join(f"w{n}" for n in random.integers(0, 99, random.integers(*words)))
            lines.write(json.dumps({"text": text}) + "\n")


def run(config: Any, *, job=train, devices: int = 1, stop_after: int | None = None, number=signal.SIGTERM) -> Any:
    """A job on the 8 simulated devices, or as on a machine with one; a signal may arrive at a step's line."""
    said = progress.Say.progress

    def hear(self, line):
        said(self, line)
        if re.match(rf"step {stop_after}/", line):
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        if devices == 1:
            patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(progress.Say, "progress", hear)
        return job(config)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict]:
    """The training lines, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second", "floor_share"}
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics(out) if "held_out" not in line]


def held_out_of(out: Path) -> dict[int, dict]:
    return {line["step"]: line["held_out"] for line in metrics(out) if "held_out" in line}


def checkpoints(out: Path) -> RunCheckpoints:
    return RunCheckpoints(out / "checkpoints")


def saved(out: Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """(every array of the train state by name, the data state) of a checkpoint."""
    opened = checkpoints(out)
    leaves = json.loads((opened.path(step) / "records" / "info.json").read_text())["leaves"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = {
        name: jax.ShapeDtypeStruct(
            leaf["shape"], jax.random.key(0).dtype if "key_impl" in leaf else jnp.dtype(leaf["dtype"]), sharding=place
        )
        for name, leaf in leaves.items()
    }
    state, data, _ = opened.restore(step, expected)
    opened.close()
    keys = {n for n, leaf in leaves.items() if "key_impl" in leaf}
    return {n: np.asarray(jax.random.key_data(x) if n in keys else x) for n, x in state.items()}, data


def assert_same_end(one: Path, other: Path, step: int = STEPS) -> None:
    """Parameters, optimizer state, random key, counters and place in the data are the same bits."""
    (state, data), (expected, expected_data) = saved(one, step), saved(other, step)
    assert state.keys() == expected.keys()
    differing = [name for name in expected if state[name].tobytes() != expected[name].tobytes()]
    assert not differing
    assert data == expected_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poison(Term):
    """Not a number in some steps, 0 in the others."""

    steps: tuple[int, ...]

    def __call__(self, student, teacher, at, parameters):
        bad = jnp.isin(at.step, jnp.asarray(self.steps))
        return jnp.where(bad, jnp.nan, 0.0) * student.log_normalizer()


def poisoned(*steps: int) -> dict[str, Term]:
    return {"kl": ForwardKL(), "poison": Poison(steps=steps)}
