"""`jaxdistill prune` from end to end: what it writes, what it uses again, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import llama

from jaxdistill import cli
from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import open_config, open_model
from jaxdistill.data import DataConfig
from jaxdistill.jobs import prune as prune_job
from jaxdistill.models.cost import HARDWARE
from jaxdistill.models.schema import abstract_params
from jaxdistill.prune import measure
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.importance import Aggregation
from jaxdistill.prune.measure import Activations, calibrate
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.prune.slice import prune_model
from jaxdistill.search import HardwareName
from jaxdistill.sharding import MeshConfig
from jaxdistill.specs import Norm
from jaxdistill.tokenizers import ByteTokenizer

CONFIG = llama(layers=3, vocab=261)
SMALL = ("--batches", 2, "--length", 32, "--batch-size", 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prune")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract_params(CONFIG))
    save_model(directory / "model", CONFIG, params, write_tokenizer=ByteTokenizer().save)
    lines = [json.dumps({"text": "".join(map(chr, rng.integers(97, 123, 60)))}) for _ in range(40)]
    (directory / "text.jsonl").write_text("\n".join(lines))
    return directory


def run(*arguments) -> int:
    return cli.run(["prune", *map(str, arguments)])


def test_what_is_kept_is_what_python_keeps(files, tmp_path, capsys, monkeypatch):
    sizes = ("--layers", 2, "--mlp", 16)
    assert run(files / "model", "--data", files / "text.jsonl", "--out", tmp_path, *sizes, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "mlp 16" in printed
    assert "2" in printed
    model = open_model(files / "model")
    data = DataConfig(path=str(files / "text.jsonl"), length=32, batch_size=8)
    calibration = calibrate(model.config, model.params, model.tokenizer, data, batches=2)
    plan = choose(model.config, Activations()(calibration), Target(layers=2, mlp=16))
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    shape, params = prune_model(model.config, model.params, plan)
    cut = open_model(tmp_path / "model")
    assert cut.config == shape
    jax.tree.map(np.testing.assert_array_equal, cut.params, params)
    assert cut.tokenizer.fingerprint == model.tokenizer.fingerprint

    # Another size starts from the same scores; an existing model is not written over.
    monkeypatch.setattr(measure.Activations, "__call__", None)
    assert run(files / "model", "--data", files / "text.jsonl", "--out", tmp_path, "--mlp", 8, *SMALL) == 2
    assert "exists" in capsys.readouterr().err
    (tmp_path / "model").rename(tmp_path / "first")
    assert run(files / "model", "--data", files / "text.jsonl", "--out", tmp_path, "--mlp", 8, *SMALL) == 0
    assert "as measured before" in capsys.readouterr().out
    # A plan needs no text.
    assert run(files / "model", "--plan", tmp_path / "plan.json", "--out", tmp_path / "again", "--to", "hf") == 0
    again, second = open_model(tmp_path / "again" / "model"), open_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params, second.params)


@pytest.mark.parametrize("depth", ["loss", "block-by-kl"])
def test_layers_by_leaving_them_out(files, tmp_path, depth):
    arguments = ("--data", files / "text.jsonl", "--out", tmp_path, "--layers", 1, "--scorer", "weights")
    assert run(files / "model", *arguments, "--depth", depth, *SMALL) == 0
    assert len(open_model(tmp_path / "model").config.layers) == 1


def test_sorted_models_score_the_same_text_alike(files, tmp_path):
    assert run(files / "model", "--data", files / "text.jsonl", "--out", tmp_path, "--sort", *SMALL) == 0
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert sorted(plan.embed) == list(range(16))
    assert plan.embed != tuple(range(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to prune"),
        (("--mlp", 16), "importance is measured on text; give --data FILE"),
        (("--mlp", 33, "--data", "x.jsonl"), "mlp of layer 0: 33 of 32 are to be kept; choose from 1 to 32"),
        (("--heads", 3, "--data", "x.jsonl"), "3 query heads are to be kept with 2 key-value heads"),
        (("--embed", 10, "--data", "x.jsonl", "--to", "hf"), "transformers loads a llama only if"),
        (("--embed", 12, "--data", "x.jsonl"), "embed would be 12, which the 8 devices that split it do not divide"),
        (("--embed", 12, "--data", "x.jsonl", "--mesh.fsdp", 3), "choose sizes whose product is 8"),
        (("--mlp", 16, 8, "--data", "x.jsonl"), "mlp gives 2 sizes for 3 kept layers"),
        (("--mlp", 16, "--scorer", "weights", "--over-rows", "mean"), "leave them out for weights"),
        (("--layers", 2, "--keep-layers", 0, 1), "say how many, or which"),
        (("--plan", "nowhere.json"), "nowhere.json"),
        (("--plan", "nowhere.json", "--mlp", 16), "--plan has its own sizes"),
        (("--plan", "nowhere.json", "--sort"), "leave out --sort, --merge-heads, --depth"),
        (("--mlp", 16, "--depth", "loss", "--data", "x.jsonl"), "say how many to keep with --layers"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(files, tmp_path, capsys, arguments, message):
    assert run(files / "model", "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_norms_that_cannot_be_repaired_are_refused_before_the_model_is_read(files, tmp_path, capsys, monkeypatch):
    uncentred = dataclasses.replace(CONFIG, norm=Norm(kind="layer"))
    monkeypatch.setattr(prune_job, "open_config", lambda path: uncentred)
    monkeypatch.setattr(prune_job, "open_model", None)
    sizes = ("--embed", 8, "--scorer", "weights", "--norm-repair", "exact")
    assert run(files / "model", "--out", tmp_path / "out", *sizes) == 2
    assert "norm_repair is 'exact'" in capsys.readouterr().err


def test_sizes_of_layers_on_a_mesh_of_choice(files, tmp_path):
    """12 channels are 3 for each of 4 devices; with 8 they would be refused."""
    sizes = ("--layers", 2, "--mlp", 16, 8, "--embed", 12, "--mesh.fsdp", 4, "--mesh.tensor", 2)
    assert run(files / "model", "--out", tmp_path, *sizes, "--scorer", "weights") == 0
    cut = open_config(tmp_path / "model")
    assert (cut.embed, [layer.ffn.mlp for layer in cut.layers]) == (12, [16, 8])


def test_tokens_and_rows_become_one_number_as_asked(files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Activations, "__call__", lambda self, text: seen.append(self) or measure.random_importance(text.config, 0)
    )
    asked = ("--data", files / "text.jsonl", "--mlp", 16, "--out", tmp_path)
    assert run(files / "model", *asked, *SMALL, "--over-tokens", "l2", "--over-rows", "variance") == 0
    (tmp_path / "model").rename(tmp_path / "first")
    assert run(files / "model", *asked, *SMALL) == 0
    assert seen == [Activations(sequence="l2", batch="variance"), Activations()]


def test_scores_that_read_no_text_need_none(files, tmp_path):
    for scorer in ("weights", "random"):
        assert run(files / "model", "--out", tmp_path / scorer, "--mlp", 16, "--scorer", scorer) == 0


def test_another_model_at_the_same_path_is_measured_again(files, tmp_path, capsys):
    model = open_model(files / "model")
    for scale in (1.0, 2.0):
        save_model(
            tmp_path / "m",
            CONFIG,
            jax.tree.map(lambda x, s=scale: s * x, model.params),
            write_tokenizer=ByteTokenizer().save,
        )
        out = ("--out", tmp_path / "out", "--data", files / "text.jsonl", "--mlp", 16)
        assert run(tmp_path / "m", *out, *SMALL) == 0
        assert "as measured before" not in capsys.readouterr().out
        (tmp_path / "m").rename(tmp_path / f"m{scale}")
        (tmp_path / "out" / "model").rename(tmp_path / f"out{scale}")


def test_the_command_line_offers_what_there_is():
    hints = typing.get_type_hints(cli.prune)
    assert typing.get_args(hints["scorer"]) == typing.get_args(prune_job.ScorerName)
    assert typing.get_args(hints["depth"]) == typing.get_args(prune_job.Depth)
    assert typing.get_args(hints["over_tokens"]) == typing.get_args(Aggregation) == typing.get_args(hints["over_rows"])
    meshes = {name.removeprefix("mesh_") for name in hints if name.startswith("mesh_")}
    assert meshes == {field.name for field in dataclasses.fields(MeshConfig)}
    assert set(prune_job.SCORERS) < set(typing.get_args(prune_job.ScorerName))
    assert set(typing.get_args(HardwareName)) == set(HARDWARE)


def test_a_plan_of_another_model_is_refused(files, tmp_path, capsys):
    other = llama(layers=2, vocab=261)
    choose(other, measure.random_importance(other, 0), Target(mlp=8)).save(tmp_path / "plan.json")
    assert run(files / "model", "--plan", tmp_path / "plan.json", "--out", tmp_path / "out") == 2
    assert "the plan was made for a model of 2 layers" in capsys.readouterr().err
