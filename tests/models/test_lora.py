"""Adapters: what they do to a model, what is differentiated, where they live and what they cost."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import LAYOUTS, llama, mixture, packed_batch, slow

from jaxdistill import partition
from jaxdistill.models.decoder import Execution, Rows, apply, apply_cached, init_cache
from jaxdistill.models.flops import adapter_flops
from jaxdistill.models.lora import (
    Lora,
    adapted,
    adapted_kernels,
    adapter_schema,
    adapter_shardings,
    init_adapters,
    merge_adapters,
)
from jaxdistill.models.schema import param_shardings, schema, stack, unstack
from jaxdistill.sharding import Layout, MeshConfig, make_mesh, put_batch

LORA = Lora(rank=3, scale=6.0)
TABLES = Lora(rank=2, scale=6.0, targets=("segments.0.mixer.*", "embedding.*"))
DENSE = llama(layers=1, mlp=20).layers[0]
MIXED = dataclasses.replace(mixture(), layers=(*mixture().layers, DENSE))
"""Two layers with experts, then one without."""
MODELS = {
    "all kernels of the layers": (llama(tied=False), LORA),
    "a tied table": (llama(), TABLES),
    "experts": (MIXED, LORA),
}
BATCH = packed_batch(1)


def random_adapters(config, lora):
    """Adapters whose `up` is not 0 either, in a seeded order of names."""
    rng = np.random.default_rng(7)
    leaves = {".".join(path): leaf.shape for path, leaf in adapter_schema(config, lora).items()}
    return partition.nest({n: jnp.asarray(0.1 * rng.standard_normal(s), jnp.float32) for n, s in leaves.items()})


def base_of(config):
    return jax.tree.map(jnp.asarray, stack(config, reference.random_parameters(config)))


def with_adapters(config, lora):
    return partition.merge(base_of(config), random_adapters(config, lora))


def dense(config, lora, params) -> dict[str, np.ndarray]:
    """The merged model by its definition: for each layer (and expert) the product of two matrices, in float64."""
    flat = {name: np.asarray(x, np.float64) for name, x in partition.names(params).items()}
    merged = {name: x for name, x in flat.items() if "lora" not in name}
    for name in [n.removesuffix(".lora_down") for n in flat if n.endswith(".lora_down")]:
        kernel, down, up = (flat[f"{name}.{part}"] for part in ("kernel", "lora_down", "lora_up"))
        lead = down.ndim + up.ndim - 2 - kernel.ndim
        for at in np.ndindex(kernel.shape[:lead]):
            change = down[at].reshape(-1, lora.rank) @ up[at].reshape(lora.rank, -1)
            merged[f"{name}.kernel"][at] += lora.scale / lora.rank * change.reshape(kernel.shape[lead:])
    return merged


def loss_of(config, params, batch=BATCH, *, layout=Layout(), execution=Execution()):
    outputs = apply(config, params, batch, layout=layout, execution=execution)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(outputs.hidden.shape), jnp.float32)
    real = (batch.segment_ids > 0)[..., None]
    head = jnp.sin(outputs.head.kernel.astype(jnp.float32)).sum()
    return jnp.sum(jnp.sin(outputs.hidden) * weights * real) + head, outputs.hidden


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_is_the_merged_one(name):
    config, lora = MODELS[name]
    params = with_adapters(config, lora)
    expected = stack_of(dense(config, lora, params))
    merged = merge_adapters(params, lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)
    rows = map(np.asarray, (BATCH.tokens, BATCH.positions, BATCH.segment_ids))
    hidden = reference.hidden(config, unstack(config, expected), *rows)
    found = jax.jit(lambda p: apply(config, adapted(p, lora), BATCH).hidden)(params)
    real = np.asarray(BATCH.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(found)[real], hidden[real], rtol=1e-4, atol=1e-4)
    base = jax.jit(lambda p: apply(config, p, BATCH).hidden)(base_of(config))
    assert np.abs(np.asarray(base)[real] - hidden[real]).max() > 0.01


def stack_of(flat: dict[str, np.ndarray]):
    return partition.nest({name: np.asarray(x, np.float32) for name, x in flat.items()})


@pytest.mark.parametrize("remat", ["dots", slow("block")])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_follow_from_those_of_the_merged_kernels(name, remat):
    """d down = factor · dW · upᵀ and d up = factor · downᵀ · dW; all else has the gradient of the merged model."""
    config, lora = MODELS[name]
    params, execution = with_adapters(config, lora), Execution(remat=remat)
    found = partition.names(
        jax.jit(jax.grad(lambda p: loss_of(config, adapted(p, lora), execution=execution)[0]))(params)
    )
    merged = merge_adapters(params, lora)
    whole = partition.names(jax.jit(jax.grad(lambda p: loss_of(config, p)[0]))(merged))
    flat, expected = partition.names(params), dict(whole)
    for stem in [n.removesuffix(".lora_down") for n in flat if n.endswith(".lora_down")]:
        slope, down, up = (
            np.asarray(x, np.float64)
            for x in (whole[f"{stem}.kernel"], flat[f"{stem}.lora_down"], flat[f"{stem}.lora_up"])
        )
        of_down, of_up = np.zeros_like(down), np.zeros_like(up)
        lead = down.ndim + up.ndim - 2 - slope.ndim
        for at in np.ndindex(slope.shape[:lead]):
            rows = math.prod(down.shape[lead:-1])
            matrix = lora.factor * slope[at].reshape(rows, -1)
            of_down[at] = (matrix @ up[at].reshape(lora.rank, -1).T).reshape(down.shape[lead:])
            of_up[at] = (down[at].reshape(rows, -1).T @ matrix).reshape(up.shape[lead:])
        expected |= {f"{stem}.lora_down": of_down, f"{stem}.lora_up": of_up}
    assert found.keys() == expected.keys()
    for leaf, value in found.items():
        scale = float(np.abs(expected[leaf]).max())
        np.testing.assert_allclose(value, expected[leaf], rtol=1e-4, atol=2e-6 * scale, err_msg=leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_sees_the_base_bit_for_bit(dtype):
    config = MIXED
    base = jax.tree.map(lambda x: x.astype(dtype), base_of(config))
    params = partition.merge(base, init_adapters(config, LORA, jax.random.key(0)))
    run = jax.jit(lambda p: apply(config, p, BATCH, execution=Execution(activation_dtype=dtype)).hidden)
    np.testing.assert_array_equal(run(adapted(params, LORA)), run(base))
    jax.tree.map(np.testing.assert_array_equal, merge_adapters(params, LORA), base)


def test_a_cache_goes_through_adapters_too():
    config, lora = MODELS["all kernels of the layers"]
    params = adapted(with_adapters(config, lora), lora)
    rows = Rows(BATCH.tokens, BATCH.positions, BATCH.segment_ids)

    @jax.jit
    def both(params):
        cached, _ = apply_cached(config, params, rows, init_cache(config, 8, 16))
        return apply(config, params, rows).hidden, cached.hidden

    whole, cached = both(params)
    np.testing.assert_allclose(cached, whole, rtol=1e-5, atol=1e-5)


OTHER_MESHES = ("fsdp 8", "data 2 x fsdp 2 x tensor 2", "sequence 2 x fsdp 4")
MESHES = [("all kernels of the layers", "fsdp 4 x tensor 2")]
MESHES += [slow("all kernels of the layers", mesh) for mesh in OTHER_MESHES]
EXPERT_MESH = {"expert 2 x fsdp 2 x tensor 2": lambda: Layout(make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2)))}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*MESHES, slow("a tied table", "fsdp 4 x tensor 2"), slow("experts", "expert 2 x fsdp 2 x tensor 2")],
)
def test_every_mesh_gives_the_same(name, mesh):
    config, lora = MODELS[name]
    layout = (LAYOUTS | EXPERT_MESH)[mesh]()
    places = partition.merge(param_shardings(config, layout), adapter_shardings(config, lora, layout))
    params = with_adapters(config, lora)
    found = {}
    for where, given in ((Layout(), params), (layout, jax.device_put(params, places))):
        batch = put_batch(where, jax.tree.map(np.asarray, BATCH))
        slope = jax.grad(lambda p, w=where, b=batch: loss_of(config, adapted(p, lora), b, layout=w), has_aux=True)
        found[where.mesh is None] = jax.jit(slope)(given)
    np.testing.assert_allclose(found[False][1], found[True][1], rtol=1e-5, atol=1e-5)
    # The house's tolerance, five times: the kernels have entries of 1, and so the tiny model amplifies rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * float(jnp.abs(b).max())),
        found[False][0],
        found[True][0],
    )


def test_adapters_are_split_as_their_kernels_are():
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    places = partition.names(adapter_shardings(llama(), LORA, layout))
    split = {name.removeprefix("segments.0."): tuple(place.spec) for name, place in places.items()}
    assert split["mixer.query.lora_down"] == (None, "fsdp", None)
    assert split["mixer.query.lora_up"] == (None, None, "tensor", None)
    assert split["mixer.output.lora_down"] == (None, "tensor", None, None)
    assert split["mixer.output.lora_up"] == (None, None, "fsdp")
    expert = EXPERT_MESH["expert 2 x fsdp 2 x tensor 2"]()
    places = partition.names(adapter_shardings(mixture(), LORA, expert))
    assert tuple(places["segments.0.ffn.down.lora_down"].spec) == (None, "expert", "tensor", None)
    assert tuple(places["segments.0.ffn.down.lora_up"].spec) == (None, "expert", None, "fsdp")


def test_fresh_adapters_do_not_depend_on_the_mesh():
    config, lora, key = llama(embed=64), Lora(rank=16), jax.random.key(3)
    one = partition.names(init_adapters(config, lora, key))
    mesh = partition.names(init_adapters(config, lora, key, LAYOUTS["fsdp 4 x tensor 2"]()))
    downs = np.concatenate([np.ravel(x) for name, x in one.items() if name.endswith("lora_down")])
    assert downs.std() == pytest.approx(1 / 16, rel=0.05)
    assert abs(downs.mean()) < 0.003
    for name, value in one.items():
        np.testing.assert_array_equal(mesh[name], value)
        assert value.dtype == jnp.float32
        assert name.endswith("lora_down") or not value.any()
    query = one["segments.0.mixer.query.lora_down"]
    assert not np.array_equal(query[0], query[1])


@pytest.mark.parametrize("config", [llama(), MIXED])
def test_all_linears_of_the_layers_by_default(config):
    linears = adapted_kernels(config, Lora())
    declared = {name for name in schema(config) if name.startswith("layers.") and name.endswith(".kernel")}
    assert {member for leaf in linears.values() for member in leaf.members} == declared


def test_effective_kernels_of_only_one_layer_exist_at_a_time():
    """A training program's temporary memory does not grow with depth by what the kernels weigh: neither the kernels,
    nor changes that rematerialisation takes for results worth keeping, nor gradients of the kernels' size."""
    kernels = 3 * 64 * 1024 * 4
    batch = packed_batch(rows=1, length=8)

    def temporary(depth: int) -> int:
        config, lora = llama(layers=depth, embed=64, mlp=1024), Lora(rank=1)
        adapters, base = random_adapters(config, lora), base_of(config)

        def loss(adapters, base):
            return loss_of(config, adapted(partition.merge(base, adapters), lora), batch)[0]

        compiled = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(9) - temporary(5) < kernels


def test_no_gradient_of_a_kernels_size_is_made():
    """Products as large as a kernel only form effective kernels, over the rank; none sums over tokens."""
    config, lora = llama(embed=24, mlp=88), Lora(rank=2)
    adapters, base = random_adapters(config, lora), base_of(config)

    def loss(adapters, base):
        return loss_of(config, adapted(partition.merge(base, adapters), lora))[0]

    program = jax.jit(jax.grad(loss)).lower(adapters, base).compile().as_text()
    large = re.findall(r"= f32\[(?:24,88|88,24)\]\S* dot\((.*)", program)
    thin = re.findall(r"= f32\[(?:24,2|2,24|88,2|2,88)\]\S* dot\(", program)
    assert len(large) == 6  # gate, up and down, in the loop forwards and in the one backwards
    assert all("operand_precision={highest" in line for line in large)
    assert len(thin) == 7 + 3  # seven have 24 channels at one end, three 88 neurons at the other


def test_flops_by_hand():
    config, rank, tokens = llama(layers=3), 2, 100
    # Per layer: query 16·16, key and value 16·8 each, output 16·16, gate, up and down 16·32 each.
    numbers = 256 + 2 * 128 + 256 + 3 * 512
    fans = 32 + 2 * 24 + 32 + 3 * 48
    expected = 3 * (4 * rank * fans + 4 * numbers * rank / tokens)
    assert adapter_flops(config, Lora(rank=rank), tokens=tokens) == pytest.approx(expected)
    table = Lora(rank=rank, targets=("embedding.*",))
    assert adapter_flops(config, table, tokens=tokens) == 2 * 1024 + 8 * 1024 * rank / tokens
    assert adapter_flops(llama(tied=False), table, tokens=tokens) == 8 * 1024 * rank / tokens
    up = Lora(rank=rank, targets=("*.ffn.up.kernel",))
    expert = 16 * 12
    assert adapter_flops(mixture(), up, tokens=tokens) == 2 * (2 * 2 * expert + 8 * 8 * expert * rank / tokens)


@pytest.mark.parametrize("given", [{"rank": 0}, {"scale": 0.0}, {"targets": ()}])
def test_sizes_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="must be positive"):
        Lora(**given)


def test_a_pattern_that_matches_no_kernel_is_refused_with_names():
    with pytest.raises(ValueError, match=r"'\*\.norm\.scale'.*embedding\.kernel, segments\.0\.mixer\.query\.kernel"):
        adapted_kernels(llama(), Lora(targets=("segments.*", "*.norm.scale")))
