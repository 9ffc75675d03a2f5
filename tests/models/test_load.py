"""Reading models of other formats: the same scores as transformers, on any mesh, and nothing missed or made up."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import defaultdict
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.formats.source import FormatError, TensorInfo
from jaxdistill.models.decoder import Rows, apply, scores
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.load import WeightsError, model_config, open_checkpoint, read_model, read_params
from jaxdistill.models.schema import unstack
from jaxdistill.sharding import Layout, MeshConfig, make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = tuple(sorted(folder.name for folder in (GOLDEN / "tiny_models").iterdir()))
"""Every family, with what its config can say."""
IN_GGUF = ("tied_wide_heads", "biases_linear", "llama3_rope")


def golden(name: str) -> Path:
    return GOLDEN / "tiny_models" / name


def copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(golden(name), to / name))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")


def assert_equal_params(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_transformers(name):
    with np.load(GOLDEN / "tiny_models.npz") as arrays:
        tokens, mask, expected = (arrays[f"{name}.{part}"] for part in ("tokens", "mask", "scores"))
    config, params = read_model(golden(name))
    assert config == model_config(golden(name))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    outputs = jax.jit(lambda p: apply(config, p, Rows(tokens, positions, mask)))(params)
    found = np.asarray(scores(outputs.hidden, outputs.head))
    assert np.abs(expected).max() > 2.5  # the models say something
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "fsdp and tensor": MeshConfig(fsdp=4, tensor=2),
    "data and tensor": MeshConfig(data=4, fsdp=1, tensor=2),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_holds_the_same_bits_as_one_device(name, mesh):
    layout = Layout(make_mesh(MESHES[mesh]))
    _, sharded = read_model(golden(name), layout=layout)
    _, single = read_model(golden(name))
    assert_equal_params(sharded, single)
    query = sharded["segments"]["0"]["mixer"]["query"]["kernel"]
    assert query.sharding == layout.sharding(("layers", "embed", "heads", "head_dim"), query.shape)
    assert query.addressable_shards[0].data.size * (2 if mesh == "data and tensor" else 8) == query.size


def test_a_split_inside_a_head_reads_the_same_bits(tmp_path):
    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    layout = dataclasses.replace(layout, rules=layout.rules.replace(heads=None, kv_heads=None, head_dim="tensor"))
    write_gguf(tmp_path / "m.gguf", "llama3_rope", gguf.GGMLQuantizationType.F32)
    for path in (golden("biases_linear"), tmp_path / "m.gguf"):
        _, sharded = read_model(path, layout=layout)
        _, single = read_model(path)
        assert_equal_params(sharded, single)


class Counted:
    """A source that remembers how many bytes of the mapped file every read looks at."""

    def __init__(self, source):
        self.source = source
        self.reads = defaultdict(list)

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def read_slice(self, name, index):
        part = self.source.read_slice(name, index)
        self.reads[name].append(part.nbytes)
        return part


@pytest.mark.parametrize("mesh", ["fsdp", "fsdp and tensor"])
def test_each_device_part_is_read_once_and_nothing_more(mesh):
    with open_checkpoint(golden("tied_wide_heads")) as checkpoint:
        source = Counted(checkpoint.source)
        read_params(dataclasses.replace(checkpoint, source=source), layout=Layout(make_mesh(MESHES[mesh])))
        assert set(source.reads) == set(source.names())
        for name, reads in source.reads.items():
            info = source.info(name)
            # Matrices are split over all eight devices, vectors are whole and shared by them.
            parts = 8 if len(info.shape) == 2 else 1
            assert reads == [info.nbytes // parts] * parts, name


def test_dtype_of_the_parameters_is_the_callers():
    _, params = read_model(golden("biases_linear"), dtype=jnp.bfloat16)
    _, exact = read_model(golden("biases_linear"))
    assert_equal_params(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))
    # The file is bfloat16 itself: nothing was lost.
    assert_equal_params(jax.tree.map(lambda x: x.astype(jnp.float32), params), exact)


def write_gguf(
    path: Path,
    name: str,
    encoding: gguf.GGMLQuantizationType,
    *,
    theta: float = 500.0,
    rope_factors: np.ndarray | None = None,
) -> None:
    """A golden model as llama.cpp would convert it: its names, its row order of query and key."""
    fields = json.loads((golden(name) / "config.json").read_text())
    tensors = {k: v for f in sorted(golden(name).glob("*.safetensors")) for k, v in load_file(f).items()}
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.add_vocab_size(fields["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, fields["num_hidden_layers"])
    for hf_name, tensor in tensors.items():
        tensor = tensor.astype(np.float32)
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in hf_name:
                shape = tensor.shape
                tensor = tensor.reshape(count, 2, shape[0] // count // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        target = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if encoding == gguf.GGMLQuantizationType.F32 or tensor.ndim == 1:
            writer.add_tensor(target, tensor)
        else:
            blocks = gguf.quants.quantize(tensor, encoding)
            writer.add_tensor(target, blocks, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_holds_the_same_parameters_as_the_directory(name, tmp_path):
    write_gguf(tmp_path / "m.gguf", name, gguf.GGMLQuantizationType.F32)
    config, params = read_model(tmp_path / "m.gguf")
    original, expected = read_model(golden(name))
    assert_equal_params(params, expected)
    assert (config.tied, config.norm_epsilon, config.max_length) == (
        original.tied,
        original.norm_epsilon,
        original.max_length,
    )
    assert config.layers[0].mixer.bias == config.layers[0].mixer.output_bias == (name == "biases_linear")
    assert config.layers[0].mixer.rope.theta == 500.0
    assert config == model_config(tmp_path / "m.gguf")


def test_gguf_with_factors_of_rotary_frequencies_is_the_directory_with_their_rule(tmp_path):
    folder = copy("llama3_rope", tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_parameters"] |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    fields["rope_parameters"]["original_max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(fields))
    # Wavelengths of 6, 167, 4,443 and 118,141 tokens: the third is between 8192 / 4 and 8192.
    kept = (8192 * 5e5**-0.5 / (2 * np.pi) - 1) / 3
    factors = np.array([1, 1, 1 / (kept + (1 - kept) / 8), 8], np.float32)
    write_gguf(tmp_path / "m.gguf", "llama3_rope", gguf.GGMLQuantizationType.F32, theta=5e5, rope_factors=factors)
    (config, params), (expected, theirs) = read_model(tmp_path / "m.gguf"), read_model(folder)
    assert config.layers == expected.layers
    assert_equal_params(params, theirs)


def test_missing_and_left_over_tensors_are_named(tmp_path):
    folder = copy("llama3_rope", tmp_path)

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)

    edit_tensors(folder, change)
    with pytest.raises(WeightsError) as error:
        read_model(folder)
    message = str(error.value)
    assert "Missing: lm_head.weight, model.layers.1.mlp.up_proj.weight (2)" in message
    assert "Not in the model: model.layers.0.self_attn.q_norm.weight (1)" in message


def test_long_lists_of_names_are_cut(tmp_path):
    folder = copy("llama3_rope", tmp_path)
    edit_tensors(folder, lambda t: t.update({f"extra.{i:02d}": np.ones(1) for i in range(40)}))
    with pytest.raises(WeightsError, match=r"extra\.11 and 28 more \(40\)"):
        read_model(folder)


def test_layers_that_the_config_does_not_have_are_left_over(tmp_path):
    folder = copy("llama3_rope", tmp_path)
    fields = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=r"Missing: none. Not in the model: model\.layers\.1\..*\(9\)"):
        read_model(folder)


def test_wrong_shape_and_wrong_dtype_are_named(tmp_path):
    folder = copy("llama3_rope", tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((16, 8), np.float32)
        tensors["model.norm.weight"] = np.ones(16, np.int8)

    edit_tensors(folder, change)
    with pytest.raises(WeightsError) as error:
        read_model(folder)
    assert "model.layers.0.self_attn.k_proj.weight has shape (16, 8), the config expects (8, 16)" in str(error.value)
    assert "model.norm.weight has dtype int8" in str(error.value)


def test_tied_model_may_repeat_its_table_but_not_change_it(tmp_path):
    folder = copy("tied_wide_heads", tmp_path)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    _, params = read_model(folder)
    assert_equal_params(params, read_model(golden("tied_wide_heads"))[1])

    def one_bit(tensors):
        tensors["lm_head.weight"].view(np.uint32)[-1, -1] ^= 1

    edit_tensors(folder, one_bit)
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_model(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.float16)}))
    with pytest.raises(WeightsError, match="differs"):
        read_model(folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    folder = copy("llama3_rope", tmp_path)
    edit_tensors(folder, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert_equal_params(read_model(folder)[1], read_model(golden("llama3_rope"))[1])


def test_config_is_read_without_weights(tmp_path):
    shutil.copy(golden("llama3_rope") / "config.json", tmp_path)
    assert model_config(tmp_path) == read_model(golden("llama3_rope"))[0]


def test_unknown_kinds_of_model_are_refused(tmp_path):
    folder = copy("llama3_rope", tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="'gpt2'; allowed are llama"):
        read_model(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"attention_dropout": 0.5}))
    with pytest.raises(ConfigError, match="attention_dropout") as error:
        read_model(folder)
    assert str(folder) in error.value.__notes__[0]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="'mamba'; allowed are llama"):
        model_config(tmp_path / "m.gguf")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_unreadable_config_is_a_format_error(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_model(tmp_path)


def test_a_path_of_another_kind_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="Give a Hugging Face directory"):
        read_model(tmp_path / "pytorch_model.bin")


def test_quantised_gguf_is_read_in_parts_as_in_whole(tmp_path):
    """Rows of blocks split over devices; 128 = 4 blocks of 32."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    shapes = {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128)}
    shapes |= {"ffn_gate": (64, 128), "ffn_up": (64, 128), "ffn_down": (128, 64)}
    shapes = {"token_embd": (32, 128)} | {f"blk.0.{k}": v for k, v in shapes.items()}
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", rng.normal(size=128).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, single = read_model(tmp_path / "m.gguf")
    _, sharded = read_model(tmp_path / "m.gguf", layout=Layout(make_mesh(MeshConfig(fsdp=4, tensor=2))))
    assert_equal_params(sharded, single)
    assert unstack(config, single)["layers.0.mixer.key.kernel"].shape == (128, 2, 32)
