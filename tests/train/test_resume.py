"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from train_cases import (
    STEPS,
    assert_same_end,
    checkpoints,
    held_out_of,
    metrics,
    poisoned,
    run,
    saved,
    steps_of,
)

from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.checkpoint.open import open_model
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.prune.choose import Target
from jaxdistill.prune.measure import Activations
from jaxdistill.prune.plan import PrunePlan, depth_plan
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import loop, setup
from jaxdistill.train.config import CheckpointConfig, Correction, LogConfig, StudentConfig, TeacherConfig


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_bit_for_bit(files, whole, tmp_path, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = run(files.config(tmp_path), stop_after=5, number=number)
    assert (stopped.step, stopped.student) == (5, None)
    assert checkpoints(tmp_path).latest() == 5
    # Evaluated at 3 and 4: the checkpoint of the stop has no value of its own, and so is not the best.
    assert checkpoints(tmp_path).best() == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    finished = run(files.config(tmp_path))
    assert finished.step == STEPS
    assert_same_end(tmp_path, whole)
    assert steps_of(tmp_path) == steps_of(whole)
    assert [line["step"] for line in steps_of(whole)] == list(range(1, STEPS + 1))
    assert held_out_of(tmp_path) == held_out_of(whole)


def test_a_second_interrupt_leaves_at_once(files, tmp_path):
    def twice(line):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), loop.stop_requests(twice):
        signal.raise_signal(signal.SIGINT)


def test_lines_over_several_steps_lose_and_repeat_none(files, whole, tmp_path):
    """Logged every 4 and saved every 3 steps: killed after step 5's data was seen, the line of step 4 stays whole."""
    config = files.config(tmp_path, log=LogConfig(every=4, tensorboard=False))
    run(config)
    single = {line["step"]: line["loss"] for line in steps_of(whole)}
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    first = 1
    for line in lines:
        steps = range(first, line["step"] + 1)
        np.testing.assert_allclose(line["loss"], np.mean([single[s] for s in steps]), rtol=1e-12)
        first = line["step"] + 1


def test_another_mesh_and_accumulation_go_on_within_rounding(files, whole, tmp_path):
    run(files.config(tmp_path), stop_after=3)
    config = files.config(tmp_path, mesh=MeshConfig(fsdp=2, tensor=4), accumulate=2)
    run(config, devices=8)
    losses, expected = ([line["loss"] for line in steps_of(out)] for out in (tmp_path, whole))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[:3] == expected[:3]
    assert saved(tmp_path, STEPS)[1] == saved(whole, STEPS)[1]


def test_parts_are_chosen_once_and_then_come_from_the_runs_plan(files, tmp_path, monkeypatch):
    config = files.config(
        tmp_path, student=StudentConfig(prune=Target(layers=2, mlp=8), calibration_batches=2), steps=4
    )
    plan = run(config, stop_after=2).plan
    assert len(plan.layers) == 2
    assert [len(kept) for kept in plan.widths["mlp"]] == [8, 8]
    assert PrunePlan.load(tmp_path / "plan.json") == plan

    def measured_again(*_):
        raise AssertionError("importance was measured again")

    monkeypatch.setattr(Activations, "__call__", measured_again)
    assert run(config).plan == plan
    # A run that finished before still knows it.
    assert run(config).plan == plan
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"plan\.json is missing"):
        run(config)


def test_frozen_parts_are_made_again_and_do_not_move(files, tmp_path):
    chosen = StudentConfig(prune=Target(layers=(0, 2)), trainable=("*norm.scale",))
    config = files.config(tmp_path, student=chosen, export="jaxdistill")
    run(config, stop_after=4)
    names = [name for name in saved(tmp_path, 4)[0] if name.startswith("params/student/")]
    assert names
    assert all(name.endswith("norm/scale") for name in names)
    student = open_model(run(config).student).params
    teacher = open_model(files.teacher)
    _, initial = prune_model(teacher.config, teacher.params, depth_plan(teacher.config, (0, 2)))
    assert np.array_equal(student["embedding"]["kernel"], initial["embedding"]["kernel"])
    assert not np.array_equal(student["final_norm"]["scale"], initial["final_norm"]["scale"])


@pytest.mark.slow
def test_a_corrected_teacher_a_projection_and_a_plan_resume_to_the_same_bits(files, tmp_path):
    """Everything that learns besides the student's weights, and what is cut and frozen beside them."""

    def config(out):
        return files.config(
            out,
            teacher=TeacherConfig(path=str(files.teacher), correction=Correction()),
            student=StudentConfig(
                prune=Target(layers=2, embed=12, mlp=8), calibration_batches=2, trainable=("segments.*",)
            ),
            losses={"kl": ForwardKL(), "states": HiddenMatch(balance="kl")},
            steps=4,
        )

    run(config(tmp_path / "whole"))
    run(config(tmp_path / "parts"), stop_after=2)
    result = run(config(tmp_path / "parts"))
    assert_same_end(tmp_path / "parts", tmp_path / "whole", step=4)
    assert result.held_out == held_out_of(tmp_path / "whole")[4]
    state, _ = saved(tmp_path / "whole", 4)
    assert "params/objective/states/projection" in state
    moved = state["params/teacher/final_norm/scale"] - np.asarray(
        open_model(files.teacher).params["final_norm"]["scale"]
    )
    assert np.abs(moved).max() > 0


def test_a_contradicting_configuration_is_refused_with_its_fields(files, whole):
    config = files.config(whole)
    changed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seed=5),
        optimizer=dataclasses.replace(config.optimizer, weight_decay=0.3),
        log=LogConfig(every=7),
    )
    with pytest.raises(ValueError, match="2 fields differ") as refusal:
        run(changed)
    assert "data.seed: 0 / 5" in str(refusal.value)
    assert "optimizer.weight_decay: 0.1 / 0.3" in str(refusal.value)


def test_a_finished_run_does_nothing(files, whole, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr(loop, "open_teacher", None)  # calling it would raise
    result = run(files.config(whole))
    assert (result.step, result.held_out) == (STEPS, held_out_of(whole)[STEPS])
    assert "finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_killed_before_its_export_only_exports(files, whole, tmp_path, monkeypatch):
    config = files.config(tmp_path, export="jaxdistill", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", None)
        with pytest.raises(TypeError):
            run(config)
    monkeypatch.setattr(setup.Programs, "train_step", None, raising=False)
    assert run(config).student == tmp_path / "student"
    assert checkpoints(tmp_path).path(2).name == "step_00000002", "the checkpoint was not written again"


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_its_reason(files, tmp_path, monkeypatch):
    from jaxdistill.checkpoint import records

    def full(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_text", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run(files.config(tmp_path))
    # Nothing that is whole was written: the run begins again.
    assert run(files.config(tmp_path, checkpoints=CheckpointConfig(every=100)), stop_after=1).step == 1


def test_a_checkpoint_between_evaluations_is_never_the_best(files, tmp_path):
    run(files.config(tmp_path), stop_after=5)
    info = json.loads((checkpoints(tmp_path).path(5) / "records" / "info.json").read_text())
    assert info["metric"] is None
    assert checkpoints(tmp_path).best() == 3


JOB = Path(__file__).with_name("job.py")


@contextlib.contextmanager
def job(files, out, *arguments, lines=0):
    """A run in a process of its own, once it has written some lines of metrics."""
    with (out.parent / "log").open("w") as log:
        command = [sys.executable, "-W", "error", str(JOB), "train", str(files.root), str(out), *arguments]
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        path, end = out / "metrics.jsonl", time.monotonic() + 120
        while child.poll() is None and (path.read_text().count("\n") if path.exists() else 0) < lines:
            assert time.monotonic() < end, (out.parent / "log").read_text()[-3000:]
            time.sleep(0.005)
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(files, whole, tmp_path):
    out = tmp_path / "run"
    with job(files, out, lines=2) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0, (tmp_path / "log").read_text()[-3000:]
    reached = checkpoints(out).latest()
    assert reached == steps_of(out)[-1]["step"] < STEPS, "it ended before the signal arrived"
    with job(files, out) as child:
        assert child.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_same_end(out, whole)
    assert steps_of(out) == steps_of(whole)


def test_sigkill_resumes_from_the_last_whole_checkpoint(files, whole, tmp_path):
    out = tmp_path / "run"
    with job(files, out, lines=5) as child:
        child.kill()
        assert child.wait(60) == -signal.SIGKILL
    # As if it had been killed while it wrote a line.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    with job(files, out) as child:
        assert child.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_same_end(out, whole)
    assert steps_of(out) == steps_of(whole)
    assert held_out_of(out) == held_out_of(whole)
    assert len(metrics(out)) == len(metrics(whole))


def test_skipped_steps_in_a_row_count_across_a_resume(files, tmp_path):
    config = files.config(tmp_path, losses=poisoned(*range(2, 8)), stop_after_skipped=4)
    run(config, stop_after=4)
    with pytest.raises(loop.TrainingStopped, match="4 steps in a row, up to step 6"):
        run(config)
