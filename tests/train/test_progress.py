"""What a run says: sums over lines, files of metrics, TensorBoard, times, and lines for a person."""

from __future__ import annotations

import io
import json
import math
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxdistill.train.progress import (
    Clock,
    Interval,
    MetricsFile,
    Say,
    TensorBoard,
    duration,
    finite,
    host_sum,
    matmul_rate,
    mean,
    progress_line,
)
from jaxdistill.types import Mean


def step_metrics(loss, total, count, *, skipped=0):
    terms = {"kl": Mean(np.float32(total), np.float32(count))}
    return {"loss": np.float32(loss), "terms": terms, "gradient_norm": np.float32(2 * loss), "skipped": skipped}


def test_a_line_is_the_mean_of_its_steps_without_the_skipped():
    interval = Interval()
    for metrics in (step_metrics(1.0, 8, 2), step_metrics(math.nan, math.nan, 5, skipped=1), step_metrics(4.0, 1, 4)):
        interval.add(metrics, tokens=100)
    interval.started = time.perf_counter() - 2.0
    record = interval.record(floor_seconds=0.1)
    assert (record["loss"], record["gradient_norm"], record["skipped"]) == (2.5, 5.0, 1)
    # Σ total / Σ count: a mean over positions, not of the steps' means.
    assert record["terms"] == {"kl": 1.5}
    assert record["tokens_per_second"] == pytest.approx(150, rel=0.02)
    assert record["floor_share"] == pytest.approx(0.15, rel=0.02)


def test_a_line_of_skipped_steps_has_no_values():
    interval = Interval()
    interval.add(step_metrics(math.inf, 1, 1, skipped=1), tokens=10)
    record = interval.record(floor_seconds=0.0)
    assert (record["loss"], record["gradient_norm"], record["terms"], record["skipped"]) == (None, None, {}, 1)
    assert "every step skipped" in progress_line(1, 2, record, 0)


def test_sums_are_kept_in_float64():
    sums = {}
    for _ in range(1000):
        sums = host_sum(sums, {"kl": Mean(np.float32(1e-4), np.float32(1e4))})
    sums = host_sum(sums, {"kl": Mean(np.float32(1e8), np.float32(1))})
    sums = host_sum(sums, {"kl": Mean(np.float32(1e-4), np.float32(0))})
    # In float32 all that is small would be lost beside 1e8.
    assert sums["kl"].total == pytest.approx(1e8 + 1001 * float(np.float32(1e-4)), rel=1e-15)
    assert sums["kl"].count == 1e7 + 1
    assert mean(Mean(0.0, 0.0)) == 0.0


def test_a_resumed_file_of_metrics_drops_what_will_be_repeated_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, from_step=0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": math.nan if step == 2 else float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    again = MetricsFile(path, from_step=2)
    again.write({"step": 3, "terms": {"kl": math.inf}})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "terms": {"kl": None}},
    ]


def test_numbers_that_json_lacks_become_null():
    assert finite({"a": math.nan, "b": {"c": -math.inf, "d": 1.5}, "e": 3, "f": "text"}) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
        "e": 3,
        "f": "text",
    }


def events(directory) -> list[Event]:
    """All events of a directory, by the format of TensorFlow's record files: length, checksum, bytes, checksum."""
    found = []
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_tensorboard_holds_the_scalars_of_the_records(tmp_path):
    board = TensorBoard(tmp_path, from_step=0)
    board.write({"step": 3, "loss": 1.5, "terms": {"kl": 0.25}, "gradient_norm": None})
    board.write({"step": 4, "held_out": {"kl_nats": 0.5}})
    board.close()
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(3, "loss", 1.5), (3, "terms/kl", 0.25), (4, "held_out/kl_nats", 0.5)]


def test_a_resumed_tensorboard_hides_the_steps_that_are_repeated(tmp_path):
    TensorBoard(tmp_path, from_step=7).close()
    starts = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(8, 1)]


def test_the_line_for_a_person():
    record = {"loss": 1.23456, "terms": {"kl": 1.1}, "tokens_per_second": 3410.4, "floor_share": 0.612}
    assert progress_line(120, 400, record, 125.2) == (
        "step 120/400  loss 1.235  kl 1.1  3,410 tokens/s  61% of the matmul rate  2:05 left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_replace_each_other_on_a_terminal_only():
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        say = Say(stream)
        say("begin")
        say.progress("one")
        say.progress("two")
        say("end")
    assert file.getvalue() == "begin\none\ntwo\nend\n"
    assert terminal.getvalue() == "begin\n\r\033[Kone\r\033[Ktwo\nend\n"


def test_the_clock_adds_up_parts_in_their_order():
    clock = Clock({"read": 1.0})
    with clock.measure("train"):
        time.sleep(0.02)
    with clock.measure("read"):
        pass
    assert list(clock.parts) == ["read", "train"]
    assert 1.0 <= clock.parts["read"] < 1.5
    assert 0.02 <= clock.parts["train"] < 1.0
    lines = str(Clock({"read": 1.0, "train": 2.5})).splitlines()
    assert [line.split() for line in lines] == [["read", "1.0", "s"], ["train", "2.5", "s"], ["total", "3.5", "s"]]


def test_time_is_counted_when_a_part_fails():
    clock = Clock()
    with pytest.raises(KeyError), clock.measure("open"):
        raise KeyError
    assert "open" in clock.parts


def test_the_measured_rate_is_plausible():
    assert 1e8 < matmul_rate() < 1e14
