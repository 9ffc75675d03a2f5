"""The tools that convert, compare and look at checkpoints, as they are run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY_MODELS

from jaxdistill.models.load import read_model
from jaxdistill.models.schema import leaf_at, stacked_schema
from jaxdistill.sharding import Layout, MeshConfig, make_mesh
from jaxdistill.tokenizers import ByteTokenizer

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def copy(name: str, to: Path) -> Path:
    folder = Path(shutil.copytree(TINY_MODELS / name, to))
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def compare():
    return tool("compare_checkpoints")


def test_a_model_is_equal_to_itself_in_another_format(compare, tmp_path, capsys):
    from jaxdistill.jobs.convert import convert_model

    source = copy("mixture", tmp_path / "hf")
    convert_model(str(source), str(tmp_path / "ours"), to="jaxdistill", dtype="float32")
    options = compare.Options(one=str(source), other=str(tmp_path / "ours"))
    assert compare.main(options) == 0
    assert "47 of 47 tensors are equal" in capsys.readouterr().out


def test_differences_are_listed_with_the_largest_first(compare, tmp_path, capsys):
    one, other = copy("tied_wide_heads", tmp_path / "one"), copy("tied_wide_heads", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(0.5)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(1.01)
    save_file(tensors, other / "model.safetensors")
    options = compare.Options(one=str(one), other=str(other), text="! #%&!", rows=1)
    assert compare.main(options) == 1
    printed = capsys.readouterr().out
    assert "18 of 20 tensors are equal" in printed
    assert "final_norm.scale" in printed
    assert "… and 1 more" in printed
    found = compare.compare_scores(*(compare.open_model(str(path)) for path in (one, one)), "! #%&!")
    assert found == {"tokens": 6, "largest difference of scores": 0, "mean KL in nats": 0, "same best token": 1}
    found = compare.compare_scores(*(compare.open_model(str(path)) for path in (one, other)), "! #%&!")
    assert found["mean KL in nats"] > 1e-3


def test_a_nan_is_equal_to_itself_and_comes_before_what_differs_less(compare, tmp_path, capsys):
    one, other = copy("tied_wide_heads", tmp_path / "one"), copy("tied_wide_heads", tmp_path / "other")
    tensors = load_file(one / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5:8] = np.nan, np.inf, -np.inf
    save_file(tensors, one / "model.safetensors")
    assert compare.main(compare.Options(one=str(one), other=str(one))) == 0
    assert "20 of 20 tensors are equal" in capsys.readouterr().out
    tensors["model.norm.weight"] += 0.5
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 0
    tensors["model.embed_tokens.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors")
    for pair in ((one, other), (other, one)):
        assert compare.main(compare.Options(one=str(pair[0]), other=str(pair[1]))) == 1
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "layers.1" in line or "." in line]
        names = [line[-1] for line in lines]
        assert names == ["layers.1.ffn.up.kernel", "final_norm.scale", "embedding.kernel"]
        assert lines[0][:2] == ["inf", "inf"]


def test_tensors_are_compared_in_blocks(compare, monkeypatch):
    """The same numbers as from the whole, with little more in memory than a block."""
    rng = np.random.default_rng(0)
    held = [rng.normal(size=(3000, 40, 10)).astype(np.float32) for _ in range(2)]
    one, other = (types.SimpleNamespace(read=lambda name, expert, of=of: of) for of in held)
    monkeypatch.setattr(compare, "BLOCK", 1000 * 13)
    tracemalloc.start()
    found = compare.compare(one, other, "table", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 8 * 1000 * 13
    a, b = (each.astype(np.float64) for each in held)
    assert found.largest == np.abs(a - b).max()
    np.testing.assert_allclose(found.relative, np.sqrt(np.square(a - b).mean() / np.square(a).mean()), rtol=1e-12)


def test_configurations_alone_may_differ(compare, tmp_path, capsys):
    one, other = copy("tied_wide_heads", tmp_path / "one"), copy("tied_wide_heads", tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": 0.25}))
    assert compare.main(compare.Options(one=str(one), other=str(other))) == 1
    printed = capsys.readouterr().out
    assert "20 of 20 tensors are equal" in printed
    assert "0.25" in printed


def test_shapes_that_differ_are_named(compare, tmp_path, capsys):
    options = compare.Options(one=str(TINY_MODELS / "gemma"), other=str(TINY_MODELS / "mistral_window"))
    assert compare.main(options) == 1
    printed = capsys.readouterr().out
    assert "family: gemma / mistral" in printed
    assert "layer 0: " in printed
    assert "embed_scale: 4.0 / 1.0" in printed


def test_what_a_device_of_a_mesh_would_hold(tmp_path, capsys):
    inspect = tool("inspect_checkpoint")
    inspect.main(inspect.Options(path=str(copy("tied_wide_heads", tmp_path / "one")), fsdp=2, tensor=2))
    printed = capsys.readouterr().out
    assert "segments.0.mixer.query.kernel: 2 x 8 x 2 x 8 of 2 x 16 x 4 x 8" in printed
    assert "final_norm.scale: 16 of 16" in printed


def test_what_a_device_would_hold_is_what_the_mesh_gives_it():
    inspect = tool("inspect_checkpoint")
    config, params = read_model(
        TINY_MODELS / "mixture", layout=Layout(make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2)))
    )
    lines = inspect.on_a_mesh(str(TINY_MODELS / "mixture"), {"fsdp": 2, "tensor": 2, "expert": 2})[1:-1]
    held = {".".join(path): leaf_at(params, path).addressable_shards[0].data.shape for path in stacked_schema(config)}
    assert [line.split(" of ")[0] for line in lines] == [
        f"{name}: {' x '.join(map(str, shape))}" for name, shape in held.items()
    ]


def test_of_a_run_the_student_is_laid_out(tmp_path, capsys):
    inspect, run = tool("inspect_checkpoint"), tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    (run / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"run that has not written its student yet.*Give a model"):
        inspect.main(inspect.Options(path=str(run), fsdp=2))
    copy("tied_wide_heads", run / "student")
    inspect.main(inspect.Options(path=str(run), fsdp=2))
    printed = capsys.readouterr().out
    assert "a run" in printed
    assert "segments.0.mixer.query.kernel: 2 x 8 x 4 x 8 of 2 x 16 x 4 x 8" in printed


def test_padded_layers_are_written_for_transformers(tmp_path, capsys):
    from tiny import lacking
    from tiny import params as tiny_params

    from jaxdistill.checkpoint.model import save_model
    from jaxdistill.jobs.convert import convert_model
    from jaxdistill.models.families.family import ConfigError
    from jaxdistill.models.padding import pad_layers

    save_model(tmp_path / "model", lacking(), tiny_params(lacking()), write_tokenizer=ByteTokenizer().save)
    with pytest.raises(ConfigError, match="--pad"):
        convert_model(str(tmp_path / "model"), str(tmp_path / "hf"), to="hf", dtype="float32")
    convert_model(str(tmp_path / "model"), str(tmp_path / "hf"), to="hf", dtype="float32", pad=True)
    config, params = read_model(tmp_path / "hf")
    wider, padded = pad_layers(lacking(), tiny_params(lacking()))
    assert config == wider
    up, expected = (tree["segments"]["0"]["ffn"]["up"]["kernel"] for tree in (params, padded))
    np.testing.assert_array_equal(up, expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 5


@pytest.mark.parametrize("name", ["convert_hf_to_orbax", "convert_orbax_to_hf", "convert_gguf"])
def test_every_converter_says_what_it_takes(name):
    options = tool(name).Options
    assert {"source", "destination", "dtype"} <= set(options.__dataclass_fields__)
