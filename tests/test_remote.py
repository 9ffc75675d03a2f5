"""Everything that takes a path takes one of an object store: here fsspec's in memory."""

import functools
import http.server
import importlib.util
import json
import threading
import tracemalloc

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import TINY_MODELS, llama
from tiny import params as tiny_params
from tiny_tokenizers import byte_level_json
from upath import UPath

from jaxdistill.checkpoint.model import CheckpointError, save_model
from jaxdistill.checkpoint.open import open_config, open_model
from jaxdistill.checkpoint.retention import Retention
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.data.paths import open_path
from jaxdistill.formats import paths
from jaxdistill.formats.paths import any_path, atomic_directory, atomic_file, fetched, resumable_directory, write_text
from jaxdistill.formats.safetensors import open_safetensors
from jaxdistill.formats.source import FormatError
from jaxdistill.jobs.convert import convert_model
from jaxdistill.jobs.inspect import describe_path
from jaxdistill.models.export import write_hf
from jaxdistill.models.load import model_config, open_checkpoint, read_model, read_params
from jaxdistill.models.schema import init_params
from jaxdistill.prune.plan import PrunePlan, whole_plan
from jaxdistill.sharding import DEFAULT_RULES, Layout, MeshConfig, make_mesh
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.train import progress
from jaxdistill.train.progress import MetricsFile, Mirror

ROOT = "memory://bucket"


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return store


def put(source, destination: str) -> str:
    fsspec.filesystem("memory").put(str(source), destination.removeprefix("memory:/"), recursive=True)
    return destination


def names(directory: str) -> list[str]:
    place = any_path(directory)
    return sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())


def test_files_appear_whole_or_not_at_all():
    write_text(f"{ROOT}/a/b.txt", "old")

    def interrupted():
        with atomic_file(f"{ROOT}/a/b.txt") as file:
            file.write(b"new, and")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert any_path(f"{ROOT}/a/b.txt").read_text() == "old"
    assert names(ROOT) == ["a/b.txt"]
    write_text(f"{ROOT}/a/b.txt", "new")
    assert any_path(f"{ROOT}/a/b.txt").read_text() == "new"


def test_directories_appear_whole_or_not_at_all(monkeypatch):
    def interrupted():
        with atomic_directory(f"{ROOT}/model") as folder:
            (folder / "x").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert names(ROOT) == []
    uploaded = []
    upload = paths.upload
    monkeypatch.setattr(paths, "upload", lambda file, to: (uploaded.append(file.name), upload(file, to)))
    with atomic_directory(f"{ROOT}/model") as folder:
        (folder / "arrays").mkdir()
        (folder / "arrays" / "weights").write_bytes(bytes(1000))
        (folder / "config.json").write_text("{ }")
        (folder / "tokenizer_config.json").write_text("{}")
    assert names(f"{ROOT}/model") == ["arrays/weights", "config.json", "tokenizer_config.json"]
    # What says that it is a model comes last.
    assert uploaded == ["weights", "tokenizer_config.json", "config.json"]
    with pytest.raises(FileExistsError, match="not empty"), atomic_directory(f"{ROOT}/model"):
        pass
    with atomic_directory(f"{ROOT}/model", replace=True) as folder:
        (folder / "other").write_text("other")
    assert names(ROOT) == ["model/other"]


def test_an_upload_that_fails_leaves_nothing(monkeypatch):
    upload = paths.upload

    def fails(file, to):
        if file.name == "second":
            raise OSError("the connection was lost")
        upload(file, to)

    def write(name: str, *, replace: bool):
        with atomic_directory(f"{ROOT}/{name}", replace=replace) as folder:
            (folder / "first").write_bytes(bytes(9))
            (folder / "second").write_bytes(bytes(1))

    write_text(f"{ROOT}/kept/file", "kept")
    monkeypatch.setattr(paths, "upload", fails)
    for name, replace in (("new", False), ("kept", True)):
        with pytest.raises(OSError, match="connection") as raised:
            write(name, replace=replace)
        assert "no part of it is left" in raised.value.__notes__[0]
        assert names(ROOT) == ["kept/file"]


def test_interrupted_work_goes_on():
    def work(file: str, *, fails: bool) -> bool:
        with resumable_directory(f"{ROOT}/long", "state 1") as (folder, done):
            resumed = "first" in done
            (folder / file).write_text("x")
            done.add("first")
            if fails:
                raise RuntimeError
        return resumed

    with pytest.raises(RuntimeError):
        work("one", fails=True)
    assert names(ROOT) == []
    assert work("two", fails=False)
    assert names(ROOT) == ["long/one", "long/two"]


def test_a_copy_is_made_once_for_each_state(empty_store):
    write_text(f"{ROOT}/data/a.txt", "one")
    first = fetched(f"{ROOT}/data")
    assert (first / "a.txt").read_text() == "one"
    assert fetched(f"{ROOT}/data") == first
    write_text(f"{ROOT}/data/a.txt", "two")
    assert (fetched(f"{ROOT}/data") / "a.txt").read_text() == "two"
    assert fetched(f"{ROOT}/data/a.txt").read_text() == "two"
    with pytest.raises(FileNotFoundError, match="no such file"):
        fetched(f"{ROOT}/nothing")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_models_are_read_and_converted_both_ways(name):
    source = put(TINY_MODELS / name, f"{ROOT}/hf")
    write_text(f"{source}/tokenizer.json", byte_level_json())
    assert model_config(source) == model_config(TINY_MODELS / name)
    expected, given = read_model(TINY_MODELS / name)[1], read_model(source)[1]
    np.testing.assert_array_equal(given["embedding"]["kernel"], expected["embedding"]["kernel"])
    ours, again = f"{ROOT}/ours", f"{ROOT}/again"
    convert_model(source, ours, to="jaxdistill", dtype="float32")
    assert open_config(ours) == open_config(source)
    convert_model(ours, again, to="hf", dtype="float32")
    local, remote = open_safetensors(TINY_MODELS / name), open_safetensors(again)
    assert sorted(local.names()) == sorted(remote.names())
    for tensor in local.names():
        np.testing.assert_array_equal(local.read(tensor), remote.read(tensor))
    model = open_model(ours)
    np.testing.assert_array_equal(model.params["embedding"]["kernel"], expected["embedding"]["kernel"])
    assert "parameters" in describe_path(ours)
    with pytest.raises(FileExistsError, match="not empty"):
        convert_model(source, ours, to="jaxdistill", dtype="float32")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """First and last byte of every request for part of a file."""
    requests = []
    store = type(fsspec.filesystem("memory"))
    fetch = store.cat_file

    def counted(self, path, start=None, end=None, **options):
        if start is not None:
            requests.append((start, end))
        return fetch(self, path, start=start, end=end, **options)

    monkeypatch.setattr(store, "cat_file", counted)
    return requests


def test_only_the_rows_that_are_asked_for_are_fetched(asked):
    source = open_safetensors(put(TINY_MODELS / "qwen3" / "model.safetensors", f"{ROOT}/model.safetensors"))
    name = max(source.names(), key=lambda name: source.info(name).nbytes)
    whole = source.read(name)
    asked.clear()
    found = source.read_slice(name, (slice(3, 9, 2), slice(1, 4)))
    np.testing.assert_array_equal(found, whole[3:9:2, 1:4])
    assert [stop - start for start, stop in asked] == [6 * whole[0].nbytes]


MESHES = {"one device": None, "fsdp": MeshConfig(fsdp=8), "three axes": MeshConfig(fsdp=2, tensor=2, expert=2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["qwen3_moe", "phi3_short", "biases_linear"])
def test_every_tensor_is_fetched_once_for_all_devices(name, mesh, asked):
    """Fused tensors, numbered experts and shards of a file among them."""
    sizes = MESHES[mesh]
    layout = Layout() if sizes is None else Layout(make_mesh(sizes))
    with open_checkpoint(put(TINY_MODELS / name, f"{ROOT}/hf")) as checkpoint:
        asked.clear()
        given = read_params(checkpoint, layout=layout)
        tensors = sum(checkpoint.source.info(tensor).nbytes for tensor in checkpoint.source.names())
    assert sum(stop - start for start, stop in asked) == tensors
    expected = read_model(TINY_MODELS / name, layout=layout)[1]
    for ours, theirs in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(ours, theirs)


def test_layers_that_are_split_over_devices_are_read_alike():
    rules = DEFAULT_RULES.replace(layers="tensor", heads=None, kv_heads=None, mlp=None, vocab=None)
    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)), rules)
    given = read_model(put(TINY_MODELS / "qwen3", f"{ROOT}/hf"), layout=layout)[1]
    expected = read_model(TINY_MODELS / "qwen3", layout=layout)[1]
    for ours, theirs in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)


def test_one_layer_at_a_time_is_on_the_host(tmp_path):
    config = llama(embed=256, mlp=1024, layers=8)
    write_hf(tmp_path / "model", config, tiny_params(config), dtype="float32")
    layer, layout = 256 * 1024 * 4, Layout(make_mesh(MeshConfig(fsdp=8)))
    with open_checkpoint(put(tmp_path / "model", f"{ROOT}/hf")) as checkpoint:
        tracemalloc.start()
        read_params(checkpoint, layout=layout)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert layer < peak < 3 * layer


@pytest.mark.parametrize(("answer", "came"), [(lambda whole: whole, "96"), (lambda whole: b"", "0")])
def test_an_answer_of_other_bytes_than_were_asked_for_is_refused(answer, came, tmp_path, monkeypatch):
    """A server that does not know ranges sends the whole file."""
    save_file({"a": np.zeros(8, np.float32)}, tmp_path / "a.safetensors")
    file = put(tmp_path / "a.safetensors", f"{ROOT}/a.safetensors")
    source, store = open_safetensors(file), type(fsspec.filesystem("memory"))
    fetch = store.cat_file
    monkeypatch.setattr(store, "cat_file", lambda self, path, start=None, end=None: answer(fetch(self, path)))
    with pytest.raises(FormatError, match=f"bytes 0 to 8 were asked for, and {came} bytes came instead of 8"):
        open_safetensors(file)
    with pytest.raises(FormatError, match=rf"a\.safetensors: bytes .* {came} bytes came instead of 32.*copy the file"):
        source.read("a")


def test_a_file_of_unknown_size_is_refused(tmp_path, monkeypatch):
    save_file({"a": np.zeros(8, np.float32)}, tmp_path / "a.safetensors")
    file = put(tmp_path / "a.safetensors", f"{ROOT}/a.safetensors")
    store = type(fsspec.filesystem("memory"))
    told = store.info
    monkeypatch.setattr(store, "info", lambda *given, **options: {**told(*given, **options), "size": None})
    with pytest.raises(FormatError, match=r"does not say how large the file is.*copy the file"):
        open_safetensors(file)


def test_data_and_plans():
    write_text(f"{ROOT}/text/a.jsonl", "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)))
    write_text(f"{ROOT}/text/b.jsonl", json.dumps({"text": "last"}) + "\n")
    for path in (f"{ROOT}/text", f"{ROOT}/text/a.jsonl"):
        assert open_path(path)[2]["text"] == "text 2"
    config = model_config(TINY_MODELS / "qwen3")
    plan = whole_plan(config)
    plan.save(f"{ROOT}/plan.json")
    assert PrunePlan.load(f"{ROOT}/plan.json") == plan


def test_what_cannot_be_reached_is_told():
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ValueError, match="gcsfs"):
            any_path("gs://bucket/x")
    with pytest.raises(ValueError, match="nonsense://bucket cannot be reached"):
        any_path("nonsense://bucket")
    assert any_path("file:///tmp/x") == any_path("/tmp/x")


def test_a_tokenizer_is_read(tmp_path):
    for place in (tmp_path, f"{ROOT}/tokenizer"):
        write_text(f"{place}/tokenizer.json", byte_level_json())
    assert load_tokenizer(f"{ROOT}/tokenizer").vocab_size == load_tokenizer(tmp_path / "tokenizer.json").vocab_size


def weights(value: float = 0.0):
    return {"weights": jnp.arange(4.0) + value}


def test_checkpoints_of_a_run_are_uploaded_whole_or_not_at_all(tmp_path, monkeypatch):
    upload, uploaded, broken = paths.upload, [], []

    def recorded(file, to):
        if file.name in broken:
            raise OSError("the connection was lost")
        uploaded.append(f"{to.parent.name}/{to.name}")
        upload(file, to)

    monkeypatch.setattr(paths, "upload", recorded)
    checkpoints = RunCheckpoints(f"{ROOT}/run", retention=Retention(last=2, best=0))
    for step in (1, 2, 3):
        checkpoints.save(step, weights(step), {"0": step}, {})
    checkpoints.wait()
    # What says that a checkpoint is whole is written once, behind all else.
    assert (uploaded[-1], uploaded.count(uploaded[-1])) == ("step_00000003/commit_success.txt", 1)
    broken.append("info.json")
    checkpoints.save(4, weights(4), {"0": 4}, {})
    with pytest.raises(CheckpointError, match=r"step 4 .*connection was lost.* steps \[2, 3\]"):
        checkpoints.wait()
    broken.clear()
    assert {file.split("/")[0] for file in names(f"{ROOT}/run")} == {"step_00000002", "step_00000003"}
    checkpoints.save(4, weights(4), {"0": 4}, {"is": "info"})
    checkpoints.close()
    again = RunCheckpoints(f"{ROOT}/run")
    assert (again.steps(), again.torn()) == ([3, 4], [])
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights())
    state, data, info = again.restore(4, expected)
    np.testing.assert_array_equal(state["weights"], weights(4)["weights"])
    assert (data, info) == ({"0": 4}, {"is": "info"})
    again.close()
    # Neither what was uploaded nor what was read stays on the disk.
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_several_processes_write_where_all_can(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="Allowed are disks that all of them share, and gs://"):
        RunCheckpoints(f"{ROOT}/run")
    with pytest.raises(CheckpointError, match="Allowed are disks that all of them share, and gs://"):
        save_model(f"{ROOT}/model", llama(), init_params(llama(), jax.random.key(0)))
    assert names(ROOT) == []


def write_records(*records: dict, from_step: int, mirror: Mirror) -> MetricsFile:
    metrics = MetricsFile(mirror.file("metrics.jsonl"), from_step=from_step)
    for record in records:
        metrics.write(record)
    return metrics


def test_records_of_a_run_are_uploaded_before_a_checkpoint_and_now_and_then(tmp_path, monkeypatch):
    run = any_path(f"{ROOT}/run")
    mirror = Mirror(run)
    metrics = write_records({"step": 1}, {"step": 2}, from_step=0, mirror=mirror)
    mirror.tick()
    assert not run.exists()
    mirror.upload()
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    metrics.close()
    # Killed here, and resumed behind step 1.
    mirror = Mirror(run)
    metrics = write_records({"step": 2, "again": True}, from_step=1, mirror=mirror)
    monkeypatch.setattr(Mirror, "EVERY_SECONDS", -1)
    mirror.tick()
    expected = '{"step": 1}\n{"step": 2, "again": true}\n'
    assert (run / "metrics.jsonl").read_text() == expected
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events").write_text("events")
    metrics.close()
    mirror.close()
    assert names(str(run)) == ["metrics.jsonl", "tensorboard/events"]
    assert not mirror.folder.exists()


def test_records_that_cannot_be_uploaded_stop_no_run(monkeypatch, caplog):
    mirror = Mirror(any_path(f"{ROOT}/run"))
    write_records({"step": 1}, from_step=0, mirror=mirror).close()

    def fails(file, to):
        raise RuntimeError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "upload", fails)
        assert not mirror.upload()
        mirror.close()
    assert "the connection was lost" in caplog.text
    assert f"stay in {mirror.folder}" in caplog.text
    assert (mirror.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_upload_that_fails_is_tried_again_with_what_was_made(monkeypatch):
    def work() -> bool:
        with resumable_directory(f"{ROOT}/long", "state 1") as (folder, done):
            resumed = "first" in done
            (folder / "one").write_text("x")
            done.add("first")
        return resumed

    def fails(file, to):
        raise OSError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(paths, "upload", fails)
        with pytest.raises(OSError, match="connection"):
            work()
    assert work()
    assert names(ROOT) == ["long/one"]


@pytest.fixture
def server(tmp_path):
    """(address, folder) of a web server that answers with the dates of its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", folder
        serving.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_what_a_web_server_changed_is_fetched_again(server):
    pytest.importorskip("aiohttp")
    address, folder = server
    (folder / "a.txt").write_text("one")
    first = fetched(f"{address}/a.txt")
    assert first.read_text() == "one"
    assert fetched(f"{address}/a.txt") == first
    (folder / "a.txt").write_text("three")
    assert fetched(f"{address}/a.txt").read_text() == "three"


def test_options_of_a_path_are_kept():
    given = UPath(f"{ROOT}/x", endpoint="somewhere")
    assert any_path(given).storage_options == {"endpoint": "somewhere"}
