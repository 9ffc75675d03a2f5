"""Two processes train as one does, leave together when one gets SIGTERM, and take over from each other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from train_cases import STEPS, checkpoints, held_out_of, run, saved, steps_of

from jaxdistill.checkpoint.open import open_model

JOB = Path(__file__).with_name("job.py")


@contextlib.contextmanager
def two_processes(files, out, lines=0):
    """Both processes of a run, once it has written some lines of metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    children = []
    for rank in range(2):
        with (out.parent / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(JOB), str(files.root), str(out), str(rank), str(port)]
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
