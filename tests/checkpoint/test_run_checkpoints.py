"""Run checkpoints: exact restore on any mesh, donation, retention, damage, disagreement."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import abstract, all_bits, layout, shardings, train_state

from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.checkpoint.run import Retention, RunCheckpoints

DATA = {"0": {"position": 17, "source": ["a", 3, None]}, "1": {"position": 0, "buffer": [1, 2, 3]}}
INFO = {"config": {"train": {"steps": 100, "learning_rate": 3e-4}}, "versions": {"jax": "0"}}


def small_state(value=0.0):
    return {"weights": jnp.arange(4.0) + value}


def expected_small(**change):
    leaf = {"shape": (4,), "dtype": jnp.float32} | change
    return {"weights": jax.ShapeDtypeStruct(**leaf, sharding=layout().replicated())}


@pytest.fixture
def checkpoints(tmp_path):
    made = RunCheckpoints(tmp_path / "checkpoints", retention=Retention(last=20))
    yield made
    made.close()


def saved(checkpoints, *steps, metric=None):
    for step in steps:
        checkpoints.save(step, small_state(step), DATA, INFO, metric=metric)
        checkpoints.wait()


def test_restore_gives_back_every_bit_on_every_mesh(checkpoints):
    """fsdp 8 -> fsdp 4 x tensor 2 -> one device -> fsdp 2, saved anew on each; the types of the tree come back too."""
    state = train_state(layout(fsdp=8))
    original = all_bits(state)
    for step, where in enumerate([layout(fsdp=4, tensor=2), layout(), layout(fsdp=2)]):
        checkpoints.save(step, state, DATA, INFO)
        state, data, info = checkpoints.restore(step, abstract(where, state))
        assert all_bits(state) == original
        assert (data, info) == (DATA, INFO)
        assert jax.tree.map(lambda x: x.sharding, state) == shardings(where, state)
    assert jax.random.key_impl(state.rng) == jax.random.key_impl(jax.random.key(0))
    assert type(state.opt_state) is type(train_state(layout()).opt_state)
    shards = state.params["student"]["embedding"].addressable_shards
    assert [s.data.shape for s in shards] == [(32, 8), (32, 8)]


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}])
def test_checkpoint_taken_while_donated_steps_follow_equals_the_state_at_its_step(checkpoints, sizes):
    where = layout(**sizes)
    state = train_state(where, rows=200_000)
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x * 2 + 1, s),
        donate_argnums=0,
        out_shardings=shardings(where, state),
    )
    state = step(state)
    at_save, target = all_bits(state), abstract(where, state)
    checkpoints.save(1, state, DATA, INFO)
    for _ in range(10):
        previous, state = state, step(state)
    assert previous.params["student"]["embedding"].is_deleted()
    after = all_bits(state)
    restored, _, _ = checkpoints.restore(1, target)
    assert all_bits(restored) == at_save
    assert after[".params['student']['embedding']"] != at_save[".params['student']['embedding']"]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=1, best=0), [9]),
        (Retention(last=2, best=0), [8, 9]),
        (Retention(last=1, best=1), [4, 9]),
        (Retention(last=1, best=2), [4, 5, 9]),
        (Retention(last=1, every=3, best=0), [3, 6, 9]),
        (Retention(last=2, every=4, best=1), [4, 8, 9]),
        (Retention(last=100, best=0), list(range(1, 10))),
    ],
)
def test_retention_keeps_the_last_every_mth_and_the_best(tmp_path, retention, kept):
    metrics = {1: 9.0, 2: 5.0, 3: float("nan"), 4: 1.0, 5: 2.0, 6: None, 7: 3.0, 8: float("inf"), 9: 4.0}
    checkpoints = RunCheckpoints(tmp_path, retention=retention)
    for step, metric in metrics.items():
        checkpoints.save(step, small_state(step), DATA, INFO, metric=metric)
    checkpoints.close()
    assert checkpoints.steps() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:08d}" for s in kept]
    assert checkpoints.latest() == 9
    assert checkpoints.best() == min((s for s in kept if s not in (3, 6, 8)), key=lambda s: metrics[s])


def test_nothing_that_the_run_did_not_save_is_deleted(tmp_path):
    foreign = {"notes.txt": "n", "step_00000001/mine": "m", "step_2/mine": "m", "export/model": "e"}
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    checkpoints = RunCheckpoints(tmp_path, retention=Retention(last=1, best=0))
    saved(checkpoints, 1, 2)
    (checkpoints.path(2) / "sample.txt").write_text("kept by hand")
    saved(checkpoints, 3, 4)
    checkpoints.close()
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign
    assert checkpoints.steps() == [2, 4]
    assert (checkpoints.path(2) / "sample.txt").read_text() == "kept by hand"


def test_saving_a_step_again_replaces_it_only_when_the_new_one_is_whole(checkpoints):
    saved(checkpoints, 5)
    first = checkpoints.path(5)
    checkpoints.save(5, small_state(100.0), DATA, INFO)
    checkpoints.wait()
    assert checkpoints.steps() == [5]
    assert checkpoints.path(5) != first
    assert not first.exists()
    state, _, _ = checkpoints.restore(5, expected_small())
    np.testing.assert_array_equal(state["weights"], [100, 101, 102, 103])


def test_unfinished_directories_are_ignored_and_reported(tmp_path, caplog):
    checkpoints = RunCheckpoints(tmp_path)
    saved(checkpoints, 1)
    torn = tmp_path / "step_00000002.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "half").write_text("x")
    again = RunCheckpoints(tmp_path)
    assert torn.name in caplog.text
    assert [p.name for p in again.torn()] == [torn.name]
    assert again.latest() == 1
    saved(again, 2)
    assert again.steps() == [1, 2]
    assert again.torn() == []
    checkpoints.close()
    again.close()


def test_a_full_disk_is_told_and_leaves_the_previous_checkpoint(checkpoints):
    saved(checkpoints, 1)
    big = {"weights": jnp.ones((1 << 20,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        with pytest.raises(CheckpointError, match=r"step 2 .*could not be written.*Free space.*steps \[1\]"):  # noqa: PT012
            checkpoints.save(2, big, DATA, INFO)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [1]
    state, data, _ = checkpoints.restore(1, expected_small())
    np.testing.assert_array_equal(state["weights"], [1, 2, 3, 4])
    assert data == DATA
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


def test_a_writer_that_fails_at_once_is_told_too(checkpoints, monkeypatch):
    saved(checkpoints, 1)

    def fail(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxdistill.checkpoint.records.write_text", fail)
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device.*steps \[1\]"):
            saved(checkpoints, 2)
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


def test_mismatched_leaves_are_all_named(checkpoints):
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16), "c": jnp.zeros(1), "key": jax.random.key(0)}
    checkpoints.save(1, state, DATA, INFO)
    where = layout().replicated()
    wanted = {
        "a": jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=where),
        "b": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=where),
        "d": {"e": jax.ShapeDtypeStruct((5,), jnp.int32, sharding=where)},
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=where),
    }
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, wanted)
    lines = str(error.value).splitlines()
    assert "5 leaves differ (saved / expected)" in lines[0]
    assert lines[1:-1] == [
        "  a: float32[2,3] / float32[3,2]",
        "  b: bfloat16[2] / float32[2]",
        "  c: float32[1] / absent",
        "  d/e: absent / int32[5]",
        "  key: key<fry>[] / uint32[2]",
    ]


def test_a_step_that_does_not_exist_is_told_with_those_that_do(checkpoints):
    saved(checkpoints, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; it has \[3\]"):
        checkpoints.restore(4, expected_small())


def truncate(path):
    path.write_text(path.read_text()[:-20])


def change_a_position(path):
    path.write_text(path.read_text().replace("17", "18"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "cannot be read"),
        (truncate, "cannot be read"),
        (lambda p: p.write_text("[]"), "cannot be read"),
        (change_a_position, "does not match its checksum"),
    ],
)
def test_a_damaged_data_state_refuses_instead_of_replaying_data(checkpoints, damage, message):
    saved(checkpoints, 1)
    damage(checkpoints.path(1) / "records" / "data-00000-of-00001.json")
    with pytest.raises(CheckpointError, match=rf"(?s){message}.*repeat or skip data"):
        checkpoints.restore(1, expected_small())


def test_a_data_state_with_fewer_processes_than_saved_refuses(checkpoints):
    saved(checkpoints, 1)
    records = checkpoints.path(1) / "records"
    info = json.loads((records / "info.json").read_text())
    (records / "info.json").write_text(json.dumps(info | {"processes": 2}))
    with pytest.raises(CheckpointError, match=r"data-00000-of-00002\.json cannot be read"):
        checkpoints.restore(1, expected_small())


def test_damaged_arrays_refuse(checkpoints):
    saved(checkpoints, 1, 2)
    for file in (checkpoints.path(2) / "arrays").rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read .*another checkpoint of the run: \[1\]"):
        checkpoints.restore(2, expected_small())


@pytest.mark.parametrize("value", [{"0": (1, 2)}, {0: 1}, {"0": float("nan")}, {"0": b"bytes"}, {"0": np.ones(1)}])
def test_a_data_state_that_json_would_change_is_refused_before_anything_is_written(checkpoints, value):
    with pytest.raises(TypeError, match="the data state cannot be saved exactly"):
        checkpoints.save(1, small_state(), value, INFO)
    checkpoints.wait()
    assert checkpoints.steps() == []


def test_leaves_that_are_not_jax_arrays_are_refused(checkpoints):
    with pytest.raises(TypeError, match=r"'n': 'ndarray'"):
        checkpoints.save(1, {"n": np.zeros(2)}, DATA, INFO)


def test_a_newer_format_is_refused(checkpoints):
    saved(checkpoints, 1)
    path = checkpoints.path(1) / "records" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, this jaxdistill reads up to 1"):
        checkpoints.latest()


def test_info_is_readable_without_arrays(checkpoints):
    saved(checkpoints, 1, metric=0.5)
    shutil.rmtree(checkpoints.path(1) / "arrays")
    assert checkpoints.info(1) == INFO


@pytest.mark.parametrize("wrong", [{"last": 0}, {"best": -1}, {"every": 0}])
def test_a_retention_that_keeps_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        Retention(**wrong)
