"""The decoder on meshes of eight devices: same results, and a program that moves what it should."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILY_CASES, LAYOUTS, MODEL_MESHES, assert_gradients_close, family_models, llama, packed_batch, slow

from jaxdistill.models.decoder import Execution, apply, apply_cached, init_cache
from jaxdistill.models.embedding import look_up
from jaxdistill.models.schema import init_params, param_shardings
from jaxdistill.sharding import DEFAULT_RULES, Layout, MeshConfig, make_mesh, put_batch

MESHES = MODEL_MESHES[1:]
CONFIG = llama(layers=3, tied=False)


def step(layout: Layout):
    """(params, batch) -> hidden states and the gradients of a function of them."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, CONFIG.embed)), jnp.float32)

    def loss(params, batch):
        hidden = apply(CONFIG, params, batch, layout=layout).hidden
        return jnp.sum(jnp.sin(hidden) * weights * (batch.segment_ids > 0)[..., None]), hidden

    return jax.jit(jax.grad(loss, has_aux=True), out_shardings=(param_shardings(CONFIG, layout), None))


@pytest.fixture(scope="module")
def one_device():
    return step(Layout())(init_params(CONFIG, jax.random.key(0)), packed_batch())


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same(name, one_device):
    layout = LAYOUTS[name]()
    params = init_params(CONFIG, jax.random.key(0), layout)
    batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch()))
    gradients, hidden = step(layout)(params, batch)
    expected_gradients, expected_hidden = one_device
    np.testing.assert_allclose(hidden, expected_hidden, rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients, expected_gradients)
    rows = layout.sharding(("batch", "length", None), hidden.shape)
    assert hidden.sharding.is_equivalent_to(rows, hidden.ndim)


@pytest.mark.parametrize("family", FAMILY_CASES)
@pytest.mark.parametrize("name", ["fsdp 4 x tensor 2", slow("fsdp 8")])
def test_every_family_on_a_mesh(family, name):
    config, layout = family_models()[family], LAYOUTS[name]()
    params, batch = init_params(config, jax.random.key(0)), packed_batch(vocab=config.vocab)

    def loss(layout, params, batch):
        hidden = apply(config, params, batch, layout=layout).hidden
        return jnp.sum(jnp.sin(hidden) * (batch.segment_ids > 0)[..., None])

    expected = jax.jit(jax.grad(functools.partial(loss, Layout())))(params, batch)
    placed = jax.device_put(params, param_shardings(config, layout))
    rows = put_batch(layout, jax.tree.map(np.asarray, batch))
    given = jax.jit(jax.grad(functools.partial(loss, layout)))(placed, rows)
    # Norms after the halves divide by what random parameters leave small: rounding grows threefold.
    assert_gradients_close(given, expected, rtol=3e-5)


def test_key_value_heads_that_the_mesh_does_not_divide(one_device):
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    config = llama(heads=6, kv_heads=3, mlp=33, vocab=63)
    batch = packed_batch(vocab=63)
    expected = jax.jit(lambda p: apply(config, p, batch).hidden)(init_params(config, jax.random.key(0)))
    given = jax.jit(lambda p: apply(config, p, batch, layout=layout).hidden)(
        init_params(config, jax.random.key(0), layout)
    )
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_on_a_mesh():
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    params = init_params(CONFIG, jax.random.key(0), layout)
    batch = packed_batch()

    @jax.jit
    def both(params):
        cache = init_cache(CONFIG, 8, 16, layout=layout)
        return apply(CONFIG, params, batch, layout=layout).hidden, *apply_cached(
            CONFIG, params, batch, cache, layout=layout
        )

    whole, cached, cache = both(params)
    np.testing.assert_allclose(cached.hidden, whole, rtol=1e-5, atol=1e-5)
    assert cache.keys["0"].addressable_shards[0].data.shape == (3, 2, 1, 16, 4)  # rows over fsdp, heads over tensor


TABLES = {
    **{name: LAYOUTS[name] for name in LAYOUTS if name != "one device"},
    "vocab over fsdp": lambda: Layout(
        make_mesh(MeshConfig(fsdp=2, tensor=4)), DEFAULT_RULES.replace(vocab="fsdp", embed="tensor")
    ),
    "vocab over data and fsdp": lambda: Layout(
        make_mesh(MeshConfig(data=2, fsdp=4)), DEFAULT_RULES.replace(vocab=("data", "fsdp"), embed=None)
    ),
    "embed over data and fsdp": lambda: Layout(
        make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), DEFAULT_RULES.replace(embed=("data", "fsdp"))
    ),
    "vocab over data, embed over fsdp": lambda: Layout(
        make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), DEFAULT_RULES.replace(vocab="data")
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_look_up_is_the_row_of_the_table(name):
    check_look_up(TABLES[name](), rows=8)


def test_look_up_of_rows_that_the_mesh_does_not_divide():
    check_look_up(TABLES["fsdp 4 x tensor 2"](), rows=3)


def check_look_up(layout: Layout, rows: int) -> None:
    rng = np.random.default_rng(0)
    table, weights = (rng.standard_normal(s).astype(np.float32) for s in ((64, 16), (rows, 16, 16)))
    tokens = rng.integers(0, 64, (rows, 16))
    placed = jax.device_put(table, layout.sharding(("vocab", "embed"), table.shape))

    def loss(table):
        found = look_up(table, jnp.asarray(tokens), layout=layout, dtype=jnp.dtype("float32"))
        return jnp.sum(found * weights), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(placed)
    np.testing.assert_array_equal(found, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def program(layout: Layout, config, execution=Execution()) -> str:
    params = init_params(config, jax.random.key(0), layout)
    batch = packed_batch(vocab=config.vocab)
    run = jax.jit(lambda p: apply(config, p, batch, layout=layout, execution=execution).hidden)
    return run.lower(params).compile().as_text()


def gathered(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of everything that an all-gather makes."""
    made = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather", text)
    return [(dtype, tuple(int(n) for n in shape.split(","))) for dtype, shape in made]


def test_the_program_gathers_one_layer_at_a_time_and_never_the_table():
    config = llama(layers=5, vocab=512, mlp=96)
    shapes = gathered(program(LAYOUTS["fsdp 8"](), config))
    sizes = {int(np.prod(shape)) for _, shape in shapes}
    assert config.embed * 96 in sizes  # one layer's gate
    assert max(sizes) == config.embed * 96


def test_tensor_parallel_activations_are_split():
    config = llama(layers=2, mlp=96)
    text = program(LAYOUTS["fsdp 4 x tensor 2"](), config)
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    sizes = {int(np.prod(s)) for s in shapes}
    assert 2 * 16 * 48 in sizes  # a device's rows × length × its half of mlp
    assert not any(s[-1] == 96 and np.prod(s[:-1]) >= 2 * 16 for s in shapes)
