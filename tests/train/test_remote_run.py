"""A run whose teacher, text and directory are in an object store (here fsspec's in memory) is the same run."""

import dataclasses

import fsspec
import pytest
from train_cases import assert_same_end, held_out_of, run, steps_of

from jaxdistill.checkpoint.open import open_config
from jaxdistill.formats.paths import any_path
from jaxdistill.train.config import TeacherConfig

ROOT = "memory://runs"


@pytest.mark.slow
def test_a_stopped_run_in_an_object_store_resumes_bit_for_bit(files, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for name in ("teacher", "text.jsonl", "held_out.jsonl"):
        store.put(str(files.root / name), f"/runs/{name}", recursive=True)
    config = files.config(whole)
    config = dataclasses.replace(
        config,
        out=f"{ROOT}/run",
        teacher=TeacherConfig(path=f"{ROOT}/teacher"),
        data=dataclasses.replace(config.data, path=f"{ROOT}/text.jsonl"),
        held_out=dataclasses.replace(config.held_out, path=f"{ROOT}/held_out.jsonl"),
        export="jaxdistill",
    )
    assert run(config, stop_after=5).step == 5
    finished = run(config)
    out = any_path(config.out)
    assert_same_end(out, whole)
    assert steps_of(out) == steps_of(whole)
    assert held_out_of(out) == held_out_of(whole)
    assert open_config(f"{ROOT}/run/student").layers
    assert str(finished.student) == f"{ROOT}/run/student"
    assert not list(tmp_path.rglob("cache/unfinished/*/*"))
