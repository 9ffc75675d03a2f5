"""Writing Hugging Face directories: bit for bit what was read, complete or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tiny import family_models, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.parts import SavedInParts
from jaxdistill.models.decoder import apply, scores
from jaxdistill.models.export import check_exportable, write_hf, write_hf_parts
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.load import read_model
from jaxdistill.prune.baselines import random_importance
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import Layout, MeshConfig, make_mesh
from jaxdistill.specs import GatedMLP
from jaxdistill.tokenizers.base import SpecialTokens

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_models"
DTYPES = {
    "tied_wide_heads": jnp.float32,
    "biases_linear": jnp.bfloat16,
    "llama3_rope": jnp.float32,
    "mixture": jnp.float32,
}


def raw_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor's dtype, shape and bytes, through the safetensors package and the index."""
    found = {}
    for file in folder.glob("*.safetensors"):
        header_length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + header_length])
        with safe_open(file, "numpy") as opened:
            names = set(opened.keys())
        assert names == set(header) - {"__metadata__"}
        for name in names:
            begin, end = header[name]["data_offsets"]
            data = file.read_bytes()[8 + header_length + begin : 8 + header_length + end]
            found[name] = (header[name]["dtype"], header[name]["shape"], data)
    return found


class FakeTokenizer:
    """The two members that exporting uses."""

    special = SpecialTokens(bos=1, eos=2, pad=3, stop=frozenset({2, 5}))

    def save(self, directory) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tensor=2)])
def test_reading_and_writing_gives_back_every_byte(name, mesh, tmp_path):
    layout = Layout() if mesh is None else Layout(make_mesh(mesh))
    config, params = read_model(GOLDEN / name, layout=layout)
    assert write_hf(tmp_path / "out", config, params, dtype=DTYPES[name]) == tmp_path / "out"
    assert raw_tensors(tmp_path / "out") == raw_tensors(GOLDEN / name)
    again, reread = read_model(tmp_path / "out")
    assert again == config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), reread, params)


def test_large_models_are_written_in_shards(tmp_path):
    config, params = read_model(GOLDEN / "llama3_rope")
    write_hf(tmp_path / "out", config, params, dtype="float32", max_shard_bytes=8000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert raw_tensors(tmp_path / "out") == raw_tensors(GOLDEN / "llama3_rope")
    assert not list((tmp_path / "out").glob(".*"))


def test_config_and_generation_settings(tmp_path):
    config, params = read_model(GOLDEN / "tied_wide_heads")
    write_hf(tmp_path / "out", config, params, dtype="bfloat16", tokenizer=FakeTokenizer())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert fields["model_type"] == "llama"
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 2, 3)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert {dtype for dtype, _, _ in raw_tensors(tmp_path / "out").values()} == {"BF16"}
    assert "lm_head.weight" not in raw_tensors(tmp_path / "out")


def logits(config, params) -> np.ndarray:
    outputs = jax.jit(lambda p: apply(config, p, packed_batch(0, vocab=config.vocab)))(params)
    return np.asarray(scores(outputs.hidden, outputs.head))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gemma", slow("gemma2"), slow("gemma3"), slow("nemotron")])
def test_a_scale_of_embeddings_that_files_do_not_have_moves_into_the_parameters(name, tied, tmp_path):
    """Gemma's is the root of the width, in files that of the smaller one. Nemotron has none, and a final norm with a
    bias. Only where the head is the table does the final norm change."""
    config = dataclasses.replace(family_models()[name], tied=tied)
    if name == "nemotron":
        config = dataclasses.replace(config, embed_scale=3.0)
    params = tiny_params(config)
    config, params = prune_model(config, params, choose(config, random_importance(config, 0), Target(embed=12)))
    expected = logits(config, params)
    save_model(tmp_path / "ours", config, params)
    write_hf(tmp_path / "whole", config, params, dtype="float32")
    write_hf_parts(tmp_path / "parts", SavedInParts.open(tmp_path / "ours"), dtype="float32", source="it")
    assert raw_tensors(tmp_path / "whole") == raw_tensors(tmp_path / "parts")
    read, again = read_model(tmp_path / "whole")
    assert read == dataclasses.replace(config, embed_scale=1.0 if name == "nemotron" else 12**0.5)
    np.testing.assert_allclose(logits(read, again), expected, rtol=1e-5, atol=1e-5)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), again, params)
    assert changed["embedding"]["kernel"]
    assert {*jax.tree.leaves(changed["final_norm"])} == {tied}
    assert not any(jax.tree.leaves(changed["segments"]))


def test_layers_that_differ_are_refused_by_name(tmp_path):
    config, _ = read_model(GOLDEN / "llama3_rope")
    other = dataclasses.replace(config.layers[0], ffn=GatedMLP(mlp=7))
    layers = (config.layers[0], config.layers[0], other, config.layers[0])
    config = dataclasses.replace(config, layers=layers)
    with pytest.raises(ConfigError, match=r"layers \[2\] are .*mlp=7"):
        write_hf(tmp_path / "out", config, {}, dtype="float32")
    assert not list(tmp_path.iterdir())


def test_unknown_family_and_dtype_are_refused(tmp_path):
    config, params = read_model(GOLDEN / "llama3_rope")
    with pytest.raises(ConfigError, match="'other'; allowed are llama"):
        check_exportable(dataclasses.replace(config, family="other"))
    with pytest.raises(ValueError, match="int8; allowed are float32, bfloat16, float16"):
        write_hf(tmp_path / "out", config, params, dtype="int8")


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    config, params = read_model(GOLDEN / "llama3_rope")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values up to 1e\+05"):
        write_hf(tmp_path / "out", config, params, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept_unless_replaced(tmp_path):
    config, params = read_model(GOLDEN / "llama3_rope")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError):
        write_hf(tmp_path / "out", config, params, dtype="float32")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    write_hf(tmp_path / "out", config, params, dtype="float32", replace=True)
    assert raw_tensors(tmp_path / "out") == raw_tensors(GOLDEN / "llama3_rope")
