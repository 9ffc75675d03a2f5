"""Mixtures of experts: each token's experts and no others, on every mesh, and what taps and gates see of them."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import LAYOUTS, assert_gradients_close, llama, mixture, packed_batch, slow

from jaxdistill.models.decoder import MIXTURE_TAP_POINTS, TAP_POINTS, Execution, apply, apply_cached, init_cache
from jaxdistill.models.schema import param_shardings, stack
from jaxdistill.sharding import DEFAULT_RULES, Layout, MeshConfig, make_mesh, put_batch
from jaxdistill.specs import MixtureOfExperts
from jaxdistill.types import Tap

CONFIG = mixture()
BATCH = packed_batch(0)
MESHES = {name: LAYOUTS[name] for name in ("fsdp 4 x tensor 2", "sequence 2 x fsdp 4")} | {
    "expert 4 x fsdp 2": lambda: Layout(make_mesh(MeshConfig(expert=4, fsdp=2))),
    "expert 2 x tensor 2 x data 2": lambda: Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2, fsdp=1))),
}


@pytest.mark.parametrize("renormalize", [True, False])
def test_scores_and_taps_are_those_of_a_loop_over_tokens(renormalize):
    spec = dataclasses.replace(CONFIG.layers[0].ffn, renormalize=renormalize)
    layer = dataclasses.replace(CONFIG.layers[0], ffn=spec)
    config = dataclasses.replace(CONFIG, layers=(layer,) * 2)
    parameters, batch = reference.random_parameters(config), packed_batch(0, rows=2)
    points: list[dict] = []
    hidden = reference.hidden(
        config, parameters, *map(np.asarray, (batch.tokens, batch.positions, batch.segment_ids)), points=points
    )
    tap = Tap(points=(*TAP_POINTS, *MIXTURE_TAP_POINTS), reduce=lambda values, mask: dict(values))
    outputs = jax.jit(lambda p: apply(config, p, batch, taps={"all": tap}))(stack(config, parameters))
    np.testing.assert_allclose(outputs.hidden, hidden, rtol=1e-4, atol=1e-4)
    for point in (*TAP_POINTS, *MIXTURE_TAP_POINTS):
        expected = np.stack([layer[point] for layer in points])
        np.testing.assert_allclose(outputs.taps["all"][point], expected, rtol=1e-4, atol=1e-4, err_msg=point)


def step(layout: Layout):
    """(params, batch) -> hidden states, taps, and gradients of a function of the hidden states."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, CONFIG.embed)), jnp.float32)
    tap = Tap(points=("mlp", "experts"), reduce=lambda values, mask: dict(values))

    def loss(params, batch):
        outputs = apply(CONFIG, params, batch, layout=layout, taps={"all": tap})
        weighted = jnp.sin(outputs.hidden) * weights * (batch.segment_ids > 0)[..., None]
        return jnp.sum(weighted), (outputs.hidden, outputs.taps["all"])

    return jax.jit(jax.grad(loss, has_aux=True), out_shardings=(param_shardings(CONFIG, layout), None))


@pytest.fixture(scope="module")
def one_device():
    return step(Layout())(stack(CONFIG, reference.random_parameters(CONFIG)), BATCH)


@pytest.mark.parametrize("name", [slow("fsdp 4 x tensor 2"), *list(MESHES)[2:], slow("sequence 2 x fsdp 4")])
def test_every_mesh_gives_the_same(name, one_device):
    layout = MESHES[name]()
    placed = jax.device_put(stack(CONFIG, reference.random_parameters(CONFIG)), param_shardings(CONFIG, layout))
    gradients, (hidden, seen) = step(layout)(placed, put_batch(layout, jax.tree.map(np.asarray, BATCH)))
    expected_gradients, (expected_hidden, expected_seen) = one_device
    np.testing.assert_allclose(hidden, expected_hidden, rtol=1e-5, atol=1e-5)
    for point, values in expected_seen.items():
        np.testing.assert_allclose(seen[point], values, rtol=1e-4, atol=1e-5, err_msg=point)
    assert_gradients_close(gradients, expected_gradients)


def test_parameters_are_split_by_experts_and_neurons():
    layout = MESHES["expert 2 x tensor 2 x data 2"]()
    place = param_shardings(CONFIG, layout)["segments"]["0"]["ffn"]["gate"]["kernel"]
    assert place.shard_shape((2, 8, 16, 12)) == (2, 4, 16, 6)


def test_no_traffic_for_what_nobody_taps():
    """What a token's single experts add is summed over devices only where a tap asks for it."""
    layout = MESHES["expert 4 x fsdp 2"]()
    params = jax.eval_shape(lambda: stack(CONFIG, reference.random_parameters(CONFIG)))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, param_shardings(CONFIG, layout)
    )
    program = jax.jit(lambda p, b: apply(CONFIG, p, b, layout=layout).hidden).lower(placed, BATCH).compile().as_text()
    reduced = [line for line in program.splitlines() if " all-reduce(" in line]
    assert not re.search(r"= f32\[8,16,8\]\S* all-gather\(", program)  # the router's shares of all rows
    rows = "f32[4,16,"  # half of the rows
    assert any(f"{rows}16]" in line for line in reduced)
    assert not any(f"{rows}2,16]" in line or f"{rows}2,12]" in line for line in reduced)


def test_rows_of_other_devices_may_hold_anything(monkeypatch, one_device):
    """Grouped products promise nothing about rows in no group, nor about their gradients."""

    @jax.custom_vjp
    def with_garbage(rows, kernel, sizes):
        tail = jnp.arange(len(rows)) >= sizes.sum()
        return jnp.where(tail[:, None], jnp.nan, plain(rows, kernel, sizes))

    def backward(saved, cotangent):
        rows, kernel, sizes = saved
        tail = (jnp.arange(len(rows)) >= sizes.sum())[:, None]
        of_rows, of_kernel = jax.vjp(lambda r, k: plain(r, k, sizes), rows, kernel)[1](cotangent)
        return jnp.where(tail, jnp.nan, of_rows), of_kernel, None

    with_garbage.defvjp(lambda *given: (with_garbage(*given), given), backward)
    plain = jax.lax.ragged_dot
    monkeypatch.setattr(jax.lax, "ragged_dot", with_garbage)
    layout = MESHES["expert 4 x fsdp 2"]()
    placed = jax.device_put(stack(CONFIG, reference.random_parameters(CONFIG)), param_shardings(CONFIG, layout))
    gradients, (hidden, _) = step(layout)(placed, put_batch(layout, jax.tree.map(np.asarray, BATCH)))
    np.testing.assert_allclose(hidden, one_device[1][0], rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients, one_device[0])


@pytest.mark.parametrize(("remat", "products"), [("dots", 9), ("block", 12)])
def test_products_of_experts_are_kept_for_the_backward_pass(remat, products):
    """Three forwards and two for each of them backwards; "block" does the first three again."""
    params = stack(CONFIG, reference.random_parameters(CONFIG))
    execution = Execution(remat=remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: apply(CONFIG, p, BATCH, execution=execution).hidden.sum()))(params)
    assert str(jaxpr).count("ragged_dot_general[") == products


def test_sizes_that_the_mesh_does_not_divide():
    config = mixture(experts=6, mlp=13)
    layout, params = MESHES["expert 4 x fsdp 2"](), stack(config, reference.random_parameters(config))
    batch = jax.tree.map(lambda x: x[:3], BATCH)
    found = jax.jit(lambda p: apply(config, p, batch, layout=layout).hidden)(params)
    np.testing.assert_allclose(found, apply(config, params, batch).hidden, rtol=1e-5, atol=1e-5)


def test_a_cache_gives_the_same():
    params = stack(CONFIG, reference.random_parameters(CONFIG))
    whole = apply(CONFIG, params, BATCH).hidden
    cached, _ = apply_cached(CONFIG, params, BATCH, init_cache(CONFIG, 8, 16))
    np.testing.assert_allclose(cached.hidden, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["one device", "expert 4 x fsdp 2"])
def test_gates_are_factors_of_experts_and_neurons(layout):
    """Against a model whose down projections carry the factors."""
    place = Layout() if layout == "one device" else MESHES[layout]()
    parameters, rng = reference.random_parameters(CONFIG), np.random.default_rng(1)
    experts, neurons = rng.uniform(0.5, 2, (2, 8)), rng.uniform(0.5, 2, (2, 8, 12))
    scaled = dict(parameters)
    for layer in range(2):
        name = f"layers.{layer}.ffn.down.kernel"
        scaled[name] = parameters[name] * (experts[layer][:, None] * neurons[layer])[..., None]
    gates = {"experts": experts[:, None], "mlp": neurons.reshape(2, 1, -1)}
    for rows in (1, 8):
        given = {point: jnp.repeat(jnp.asarray(f, jnp.float32), rows, axis=1) for point, f in gates.items()}
        found = jax.jit(lambda p, g: apply(CONFIG, p, BATCH, gates={"0": g}, layout=place).hidden)(
            stack(CONFIG, parameters), given
        )
        expected = apply(CONFIG, stack(CONFIG, scaled), BATCH).hidden
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_close():
    params = stack(CONFIG, reference.random_parameters(CONFIG))
    hidden = apply(CONFIG, params, BATCH, execution=Execution(activation_dtype="bfloat16")).hidden
    assert hidden.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(hidden, np.float32) - np.asarray(apply(CONFIG, params, BATCH).hidden))
    assert difference[np.asarray(BATCH.segment_ids) > 0].max() < 0.1


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="4 experts and 5 of them for each token"):
        MixtureOfExperts(experts=4, experts_per_token=5, mlp=8)


def test_a_tap_of_experts_where_there_are_none_is_refused():
    with pytest.raises(ValueError, match="allowed are"):
        apply(
            dataclasses.replace(CONFIG, layers=(*CONFIG.layers, *llama(layers=1).layers)),
            {},
            BATCH,
            taps={"t": Tap(points=("experts",), reduce=lambda v, m: v)},
        )


def test_experts_split_as_the_rows_are_is_refused():
    layout = Layout(make_mesh(MeshConfig(fsdp=8)), DEFAULT_RULES.replace(experts="fsdp", embed=None))
    with pytest.raises(ValueError, match="split both tokens and experts"):
        apply(CONFIG, stack(CONFIG, reference.random_parameters(CONFIG)), BATCH, layout=layout)
