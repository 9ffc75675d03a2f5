"""Models written and read part by part: the same as whole, resumed where they were interrupted, one part in memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY_MODELS, family_models, lacking, llama
from tiny import params as tiny_params

from jaxdistill.checkpoint import parts
from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.checkpoint.model import describe, load_model_checkpoint, save_model
from jaxdistill.checkpoint.parts import SavedInParts, save_parts
from jaxdistill.formats.paths import resumable_directory
from jaxdistill.models.export import write_hf_parts
from jaxdistill.models.load import CheckpointInParts, open_checkpoint, read_model
from jaxdistill.models.parts import ParamsInParts, part_names
from jaxdistill.sharding import Layout, MeshConfig, make_mesh


def assert_equal(given, expected) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", sorted(folder.name for folder in TINY_MODELS.iterdir()))
def test_there_and_back_in_parts_is_the_same_as_whole(name, tmp_path):
    """From Hugging Face's files to ours and to theirs again, bit for bit; fused tensors and experts among them."""
    with open_checkpoint(TINY_MODELS / name) as checkpoint:
        save_parts(tmp_path / "ours", CheckpointInParts(checkpoint), dtype="float32", source="it")
    config, expected = read_model(TINY_MODELS / name)
    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    found, given = load_model_checkpoint(tmp_path / "ours", layout=layout)
    assert found == config
    assert_equal(given, expected)
    write_hf_parts(tmp_path / "theirs", SavedInParts.open(tmp_path / "ours"), dtype="float32")
    again, read = read_model(tmp_path / "theirs")
    assert again == config
    assert_equal(read, expected)


def test_layers_without_parameters(tmp_path):
    """What `save_model` has written is read layer by layer."""
    config = dataclasses.replace(lacking(), layers=(*lacking().layers, *llama(layers=2).layers))
    params = tiny_params(config)
    save_model(tmp_path / "whole", config, params)
    save_parts(tmp_path / "parts", SavedInParts.open(tmp_path / "whole"), dtype="bfloat16", source="it")
    found, given = load_model_checkpoint(tmp_path / "parts", layout=Layout(), dtype="bfloat16")
    assert found == config
    assert_equal(given, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert describe(tmp_path / "parts").bytes == 2 * describe(tmp_path / "parts").parameters


def test_compressed_arrays_are_read_alike(tmp_path):
    config = llama(embed=64, mlp=256)
    params = jax.tree.map(jnp.zeros_like, tiny_params(config))
    for compress in (False, True):
        target = tmp_path / str(compress)
        save_parts(target, ParamsInParts(config, params), dtype="float32", source="it", compress=compress)
        assert_equal(load_model_checkpoint(target, layout=Layout())[1], params)
    sizes = [sum(f.stat().st_size for f in (tmp_path / each).rglob("*") if f.is_file()) for each in ("False", "True")]
    assert sizes[1] < sizes[0] / 5


class Interrupted(Exception):
    pass


class Counting:
    """Parts that remember what was read, and fail at the n-th."""

    def __init__(self, config, params, fail_at=None):
        self.parts, self.config, self.fail_at, self.read_names = ParamsInParts(config, params), config, fail_at, []

    def read(self, name, expert=None):
        self.read_names.append((name, expert))
        if len(self.read_names) == self.fail_at:
            raise Interrupted
        return self.parts.read(name, expert)


def test_what_was_interrupted_goes_on_where_it_was(tmp_path):
    config = family_models()["mixture"]
    params, target = tiny_params(config), tmp_path / "model"
    for fail_at in (9, 7):
        with pytest.raises(Interrupted):
            save_parts(target, Counting(config, params, fail_at), dtype="float32", source="it")
        assert not target.exists()
    rest = Counting(config, params)
    save_parts(target, rest, dtype="float32", source="it")
    # Of each interrupted writing the part in flight may not have been noted.
    assert len([*part_names(config)]) - 14 <= len(rest.read_names) <= len([*part_names(config)]) - 12
    assert_equal(load_model_checkpoint(target, layout=Layout())[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shards_that_were_finished_are_not_read_again(tmp_path):
    config = family_models()["phi3_long"]
    params, options = tiny_params(config), {"dtype": "float32", "source": "it", "max_shard_bytes": 8000}
    with pytest.raises(Interrupted):
        write_hf_parts(tmp_path / "hf", Counting(config, params, 15), **options)
    assert not (tmp_path / "hf").exists()
    rest = Counting(config, params)
    write_hf_parts(tmp_path / "hf", rest, **options)
    assert 0 < len(rest.read_names) < len([*part_names(config)]) - 3
    assert_equal(read_model(tmp_path / "hf")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("change", [{"source": "another"}, {"dtype": "bfloat16"}])
def test_parts_of_another_state_are_not_kept(change, tmp_path):
    config = llama()
    old, new = tiny_params(config, 0), tiny_params(config, 1)
    with pytest.raises(Interrupted):
        save_parts(tmp_path / "model", Counting(config, old, 9), dtype="float32", source="it")
    save_parts(tmp_path / "model", ParamsInParts(config, new), **{"dtype": "float32", "source": "it"} | change)
    dtype = change.get("dtype", "float32")
    expected = jax.tree.map(lambda x: x.astype(dtype), new)
    assert_equal(load_model_checkpoint(tmp_path / "model", layout=Layout(), dtype=dtype)[1], expected)


def test_parts_from_before_the_machine_started_anew_are_not_kept(tmp_path, monkeypatch):
    """They may not all have reached the disk, and an array reads as zeros where they are missing."""
    config = llama()
    params, options = tiny_params(config), {"dtype": "float32", "source": "it"}
    with pytest.raises(Interrupted):
        save_parts(tmp_path / "model", Counting(config, params, 9), **options)
    monkeypatch.setattr(parts, "_boot", lambda: "another")
    again = Counting(config, params)
    save_parts(tmp_path / "model", again, **options)
    assert len(again.read_names) == len([*part_names(config)])


def test_what_a_killed_process_was_writing_is_not_kept(tmp_path):
    def work() -> None:
        with resumable_directory(tmp_path / "x", "it") as (folder, done):
            if "first" in done:
                return
            (folder / "first").write_text("x")
            done.add("first")
            (folder / ".second.tmp-0123abcd").write_text("half")
            raise Interrupted

    with pytest.raises(Interrupted):
        work()
    work()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["first"]


def test_one_process_writes_a_directory(tmp_path):
    with resumable_directory(tmp_path / "x", "it") as (folder, done):
        (folder / "file").write_text("a")
        done.add("a")
        with pytest.raises(FileExistsError, match="another process is writing"):
            resumable_directory(tmp_path / "x", "it").__enter__()
        assert (folder / "file").read_text() == "a"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["file"]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        resumable_directory(tmp_path / "x", "it").__enter__()


def test_a_name_that_was_cut_off_is_not_done(tmp_path):
    def interrupted(name: str, known: dict[str, bool]) -> None:
        with resumable_directory(tmp_path / "x", "it") as (_, done):
            assert {each: each in done for each in known} == known
            done.add(name)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted("first", {})
    with (tmp_path / ".x.partial" / ".finished").open("a") as file:
        file.write("seco")
    with pytest.raises(Interrupted):
        interrupted("third", {"first": True, "seco": False, "second": False})
    with pytest.raises(Interrupted):
        interrupted("fourth", {"first": True, "third": True})


def test_a_damaged_model_is_named(tmp_path):
    save_model(tmp_path / "model", llama(), tiny_params(llama()))
    (tmp_path / "model" / "arrays" / "manifest.ocdbt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model cannot be read .*; convert the model again"):
        SavedInParts.open(tmp_path / "model").read("embedding.kernel")


MEASURED = """
import json, resource, sys
import numpy as np
from jaxdistill.checkpoint.parts import save_parts
from jaxdistill.models.schema import schema
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig

class Made:
    def __init__(self, config):
        self.config = config
    def read(self, name, expert=None):
        return np.full(schema(self.config)[name].shape, 1.5, np.float32)

layer = LayerSpec(mixer=Attention(heads=8, kv_heads=8, head_dim=64), ffn=GatedMLP(mlp=4096))
depth = int(sys.argv[2])
config = ModelConfig(family="llama", vocab=8, embed=512, layers=(layer,) * depth, tied=True)
save_parts(sys.argv[1], Made(config), dtype="float32", source="it")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    """29 MB a layer: 30 more of them would be 880 MB."""

    def peak(depth: int) -> int:
        command = [sys.executable, "-c", MEASURED, str(tmp_path / str(depth)), str(depth)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(32) < peak(2) + 200_000_000
