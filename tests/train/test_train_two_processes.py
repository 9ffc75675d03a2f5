"""Two processes train, prune and search as one does, leave together when one gets SIGTERM, and take over from each
other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from compiling import flags_for_one_device
from train_cases import STEPS, checkpoints, held_out_of, run, saved, steps_of

from jaxdistill.checkpoint.open import open_model
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.search import search

JOB = Path(__file__).with_name("job.py")


@contextlib.contextmanager
def two_processes(files, out, *, job="train", lines=0, devices=1):
    """Both processes of a job with some devices each, once it has written some lines of metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{flags_for_one_device()} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    children = []
    for rank in range(2):
        with (out.parent / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(JOB), job, str(files.root), str(out), str(rank), str(port)]
            children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        path, end = out / "metrics.jsonl", time.monotonic() + 200
        while (
            all(c.poll() is None for c in children)
            and (len(path.read_text().splitlines()) if path.exists() else 0) < lines
        ):
            assert time.monotonic() < end, logs(out)
            time.sleep(0.01)
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def logs(out):
    return "\n".join((out.parent / f"{rank}.log").read_text()[-2500:] for rank in range(2))


def assert_same_run(out, whole):
    """As the run of one process: losses and held-out values within rounding, and the same place in the data."""
    ours, theirs = steps_of(out), steps_of(whole)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=1e-4)
    found, expected = held_out_of(out)[STEPS], held_out_of(whole)[STEPS]
    np.testing.assert_allclose(found["kl_nats"], expected["kl_nats"], rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte"], expected["bits_per_byte"], rtol=1e-5)
    (_, data), (_, expected_data) = saved(out, STEPS), saved(whole, STEPS)
    assert data == expected_data


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(files, whole, tmp_path):
    out = tmp_path / "run"
    with two_processes(files, out, lines=2) as children:
        children[1].send_signal(signal.SIGTERM)
        assert [child.wait(60) for child in children] == [0, 0], logs(out)
    reached = checkpoints(out).latest()
    assert reached == steps_of(out)[-1]["step"] < STEPS
    records = sorted(p.name for p in (checkpoints(out).path(reached) / "records").glob("data-*"))
    assert records == ["data-00000-of-00002.json", "data-00001-of-00002.json"]
    run(files.config(out))
    assert_same_run(out, whole)


@pytest.mark.slow
def test_two_processes_go_on_from_one_and_export(files, whole, tmp_path):
    out = tmp_path / "run"
    run(files.config(out), stop_after=4)
    with two_processes(files, out) as children:
        assert [child.wait(200) for child in children] == [0, 0], logs(out)
    assert_same_run(out, whole)
    state, _ = saved(out, STEPS)
    student = open_model(out / "student")
    np.testing.assert_array_equal(student.params["final_norm"]["scale"], state["params/student/final_norm/scale"])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_cut_the_same_student_as_one(devices, files, tmp_path):
    """By importance that each measured on its own rows: one plan, one student before and after it learned. With two
    devices each, they split the parts of layers as well, and so what is measured of them."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    with two_processes(files, out, job="prune", devices=devices) as children:
        assert [child.wait(200) for child in children] == [0, 0], logs(out)
    plan = run(files.pruning(alone)).plan
    assert [
        PrunePlan.load(path) for path in (out / "plan.json", *(tmp_path / f"{rank}.json" for rank in range(2)))
    ] == [plan] * 3
    assert len(plan.layers) == 2
    np.testing.assert_allclose([x["loss"] for x in steps_of(out)], [x["loss"] for x in steps_of(alone)], rtol=1e-5)
    for step, expected in held_out_of(alone).items():
        assert held_out_of(out)[step] == pytest.approx(expected, rel=1e-5)
    (state, data), (expected, expected_data) = saved(out, 3), saved(alone, 3)
    assert data == expected_data
    assert state.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(state[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_search_as_one(files, tmp_path):
    out, alone = tmp_path / "run", tmp_path / "alone"
    with two_processes(files, out, job="search") as children:
        assert [child.wait(200) for child in children] == [0, 0], logs(out)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1] == json.loads((out / "search.json").read_text())
    ranked = run(files.searching(alone, candidates=2), job=search)
    assert [row["name"] for row in both[0]] == [row.name for row in ranked]
    for found, row in zip(both[0], ranked, strict=True):
        assert PrunePlan.load(found["plan"]) == PrunePlan.load(row.plan)
        assert found["before"] == pytest.approx(row.before, rel=1e-5)
        assert found["after"] == pytest.approx(row.after, rel=1e-4)
        assert found["costs"] == row.costs
    assert not list(out.glob("candidates/*/checkpoints"))
