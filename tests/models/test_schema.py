"""The schema: fixed names, two views of one model, placement, initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import random_parameters
from tiny import LAYOUTS, llama

from jaxdistill.models import schema as s
from jaxdistill.sharding import Layout
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig

SMALL = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=8, bias=True, output_bias=True), ffn=GatedMLP(mlp=24))
WIDE = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=8), ffn=GatedMLP(mlp=40, bias=True))
MIXED = ModelConfig(family="llama", vocab=32, embed=16, layers=(SMALL, SMALL, WIDE, SMALL, SMALL), tied=False)


def test_names_shapes_and_axes():
    found = {name: (spec.shape, spec.axes) for name, spec in s.schema(MIXED).items()}
    layer_0 = {n.removeprefix("layers.0."): v for n, v in found.items() if n.startswith("layers.0.")}
    assert layer_0 == {
        "mixer.norm.scale": ((16,), ("embed",)),
        "mixer.query.kernel": ((16, 4, 8), ("embed", "heads", "head_dim")),
        "mixer.query.bias": ((4, 8), ("heads", "head_dim")),
        "mixer.key.kernel": ((16, 2, 8), ("embed", "kv_heads", "head_dim")),
        "mixer.key.bias": ((2, 8), ("kv_heads", "head_dim")),
        "mixer.value.kernel": ((16, 2, 8), ("embed", "kv_heads", "head_dim")),
        "mixer.value.bias": ((2, 8), ("kv_heads", "head_dim")),
        "mixer.output.kernel": ((4, 8, 16), ("heads", "head_dim", "embed")),
        "mixer.output.bias": ((16,), ("embed",)),
        "ffn.norm.scale": ((16,), ("embed",)),
        "ffn.gate.kernel": ((16, 24), ("embed", "mlp")),
        "ffn.up.kernel": ((16, 24), ("embed", "mlp")),
        "ffn.down.kernel": ((24, 16), ("mlp", "embed")),
    }
    biases = {n: v for n, v in found.items() if n.startswith("layers.2.") and n.endswith("bias")}
    assert biases == {
        "layers.2.ffn.gate.bias": ((40,), ("mlp",)),
        "layers.2.ffn.up.bias": ((40,), ("mlp",)),
        "layers.2.ffn.down.bias": ((16,), ("embed",)),
    }
    assert found["embedding.kernel"] == found["head.kernel"] == ((32, 16), ("vocab", "embed"))
    assert found["final_norm.scale"] == ((16,), ("embed",))
    order = [n.split(".")[0] + "." + n.split(".")[1] for n in found]
    assert list(dict.fromkeys(order)) == [
        "embedding.kernel", *(f"layers.{i}" for i in range(5)), "final_norm.scale", "head.kernel",
    ]  # fmt: skip
    assert "head.kernel" not in s.schema(llama(tied=True))


def test_count_of_a_known_model():
    """SmolLM2-135M: 134,515,008 parameters, as its publishers state."""
    layer = LayerSpec(mixer=Attention(heads=9, kv_heads=3, head_dim=64), ffn=GatedMLP(mlp=1536))
    config = ModelConfig(family="llama", vocab=49152, embed=576, layers=(layer,) * 30, tied=True)
    assert s.count_parameters(config) == 134_515_008


def test_stack_and_unstack_are_inverse_and_located():
    per_layer = random_parameters(MIXED)
    params = s.stack(MIXED, per_layer)
    assert set(params["segments"]) == {"0", "1", "2"}
    assert params["segments"]["2"]["ffn"]["gate"]["kernel"].shape == (2, 16, 24)
    back = s.unstack(MIXED, params)
    assert list(back) == list(per_layer)
    for name, value in per_layer.items():
        np.testing.assert_array_equal(back[name], value)
        path, index = s.locate(MIXED, name)
        leaf = params
        for key in path:
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf if index is None else leaf[index], value)
    assert s.locate(MIXED, "layers.4.ffn.up.kernel") == (("segments", "2", "ffn", "up", "kernel"), 1)
    assert s.locate(MIXED, "final_norm.scale") == (("final_norm", "scale"), None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, s.abstract_params(MIXED))
    assert jax.tree.leaves(s.abstract_params(MIXED, jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_wrong_names_are_named():
    per_layer = random_parameters(MIXED)
    del per_layer["layers.3.ffn.up.kernel"]
    per_layer["layers.9.ffn.up.kernel"] = np.zeros(1)
    with pytest.raises(ValueError, match=r"layers\.3\.ffn\.up\.kernel.*layers\.9\.ffn\.up\.kernel"):
        s.stack(MIXED, per_layer)
    with pytest.raises(KeyError, match=r"no parameter 'layers\.9\.ffn\.up\.kernel'"):
        s.locate(MIXED, "layers.9.ffn.up.kernel")


def test_initial_values_depend_on_the_name_alone():
    def by_name(config, layout=Layout()):
        return s.unstack(config, s.init_params(config, jax.random.key(3), layout))

    config = llama(layers=3)
    expected = by_name(config)
    for name in ("fsdp 8", "data 2 x fsdp 2 x tensor 2"):
        for leaf, value in by_name(config, LAYOUTS[name]()).items():
            np.testing.assert_array_equal(value, expected[leaf])
    wide = LayerSpec(mixer=config.layers[0].mixer, ffn=GatedMLP(mlp=8))
    split = ModelConfig(
        family="llama", vocab=64, embed=16, layers=(config.layers[0], wide, config.layers[2]), tied=True
    )
    other = by_name(split)
    for leaf in ("layers.0.mixer.query.kernel", "layers.2.ffn.down.kernel", "embedding.kernel"):
        np.testing.assert_array_equal(other[leaf], expected[leaf])
    kernels = [v for n, v in expected.items() if n.endswith("query.kernel")]
    assert not np.allclose(kernels[0], kernels[1])


def test_initial_spread():
    config = llama(embed=64, mlp=256, layers=8, heads=8)
    values = s.unstack(config, s.init_params(config, jax.random.key(0)))
    for name, fan_in, scale in (
        ("mixer.query", 64, 1.0), ("ffn.gate", 64, 1.0), ("ffn.down", 256, 0.25), ("mixer.output", 8 * 4, 0.25),
    ):  # fmt: skip
        np.testing.assert_allclose(np.std(values[f"layers.5.{name}.kernel"]), scale * fan_in**-0.5, rtol=0.1)
    assert (values["layers.0.ffn.norm.scale"] == 1).all()


def test_placement_follows_the_axes_and_vectors_stay_whole():
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    specs = jax.tree.map(lambda x: x.spec, s.param_shardings(MIXED, layout))
    first = specs["segments"]["0"]
    assert first["mixer"]["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert first["mixer"]["query"]["bias"] == PartitionSpec(None, "tensor", None)
    assert first["mixer"]["output"]["kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert first["mixer"]["output"]["bias"] == PartitionSpec(None, None)
    assert first["mixer"]["norm"]["scale"] == PartitionSpec(None, None)
    assert first["ffn"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["segments"]["1"]["ffn"]["gate"]["bias"] == PartitionSpec(None, None)
    assert specs["embedding"]["kernel"] == PartitionSpec("tensor", "fsdp")
    params = s.init_params(MIXED, jax.random.key(0), layout)
    assert jax.tree.map(lambda x: x.sharding, params) == s.param_shardings(MIXED, layout)
    assert params["head"]["kernel"].addressable_shards[0].data.shape == (16, 4)
