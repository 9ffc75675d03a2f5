"""Taps: the right values, from the right layers, at the cost of those layers alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import assert_gradients_close, packed_batch

from jaxdistill.models.decoder import TAP_POINTS, apply
from jaxdistill.models.schema import init_params, stack
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.types import Tap

LAYER = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=4), ffn=GatedMLP(mlp=20))
OTHER = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=4), ffn=GatedMLP(mlp=28))
UNIFORM = ModelConfig(family="llama", vocab=64, embed=12, layers=(LAYER,) * 7, tied=True)
MIXED = ModelConfig(family="llama", vocab=64, embed=12, layers=(LAYER, LAYER, OTHER, LAYER), tied=True)


def everything(values, mask):
    return dict(values)


def test_every_point_is_what_it_says():
    parameters = reference.random_parameters(UNIFORM)
    batch = packed_batch(0, rows=2)
    expected: list[dict] = []
    reference.hidden(
        UNIFORM, parameters, *map(np.asarray, (batch.tokens, batch.positions, batch.segment_ids)), points=expected
    )
    tap = Tap(points=TAP_POINTS, reduce=everything)
    seen = jax.jit(lambda p: apply(UNIFORM, p, batch, taps={"all": tap}).taps["all"])(stack(UNIFORM, parameters))
    assert set(seen) == set(TAP_POINTS)
    for point in TAP_POINTS:
        stacked = np.stack([layer[point] for layer in expected])
        np.testing.assert_allclose(seen[point], stacked, rtol=2e-5, atol=2e-5, err_msg=point)


def test_reduce_sees_the_mask():
    batch = packed_batch(0)
    tap = Tap(points=("mlp",), reduce=lambda v, mask: (mask, jnp.einsum("btm,bt->m", v["mlp"], mask)))
    outputs = jax.jit(lambda p: apply(UNIFORM, p, batch, taps={"t": tap}))(init_params(UNIFORM, jax.random.key(0)))
    mask, sums = outputs.taps["t"]
    np.testing.assert_array_equal(mask, np.broadcast_to(np.asarray(batch.segment_ids) > 0, (7, 8, 16)))
    assert sums.shape == (7, 20)


@pytest.mark.parametrize(("config", "layers"), [(UNIFORM, (2, 5)), (MIXED, (1, 2, 3))], ids=["uniform", "mixed"])
def test_a_subset_of_layers(config, layers):
    params = init_params(config, jax.random.key(0))
    batch = packed_batch(0)
    taps = {
        "all": Tap(points=("output",), reduce=everything),
        "some": Tap(points=("output",), reduce=everything, layers=layers),
    }
    both = jax.jit(lambda p: apply(config, p, batch, taps=taps))(params)
    some = jax.jit(lambda p: apply(config, p, batch, taps={"some": taps["some"]}))(params)
    np.testing.assert_allclose(some.hidden, both.hidden, rtol=1e-5, atol=1e-6)
    expected = both.taps["all"]["output"][jnp.asarray(layers)]
    np.testing.assert_allclose(both.taps["some"]["output"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(some.taps["some"]["output"], expected, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_a_tap():
    batch = packed_batch(0)
    params = init_params(UNIFORM, jax.random.key(0))
    some = Tap(points=("output",), reduce=lambda v, m: v["output"] * m[..., None], layers=(1, 4))

    def from_tap(params):
        return jnp.sum(apply(UNIFORM, params, batch, taps={"t": some}).taps["t"][0] ** 3)

    def from_shorter_model(params):
        """A model that ends after layer 1 gives the same residual stream."""
        short = ModelConfig(family="llama", vocab=64, embed=12, layers=(LAYER,) * 2, tied=True)
        segment = jax.tree.map(lambda x: x[:2], params["segments"]["0"])
        cut = {**params, "segments": {"0": segment}}
        last = Tap(points=("output",), reduce=lambda v, m: v["output"] * m[..., None])
        return jnp.sum(apply(short, cut, batch, taps={"t": last}).taps["t"][1] ** 3)

    gradients = jax.jit(jax.grad(from_tap))(params)
    assert_gradients_close(gradients, jax.jit(jax.grad(from_shorter_model))(params))
    assert not jnp.any(gradients["segments"]["0"]["ffn"]["up"]["kernel"][2:])


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars}
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    found |= shapes_in(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    found |= shapes_in(inner)
    return found


def test_layers_that_are_not_asked_for_cost_no_memory():
    batch = packed_batch(0)
    params = init_params(UNIFORM, jax.random.key(0))

    def shapes(layers, reduce=everything):
        tap = Tap(points=("output",), reduce=reduce, layers=layers)
        program = jax.make_jaxpr(lambda p: apply(UNIFORM, p, batch, taps={"t": tap}).taps["t"])(params)
        return shapes_in(program.jaxpr)

    def stacked(found):
        return {s[0] for s in found if len(s) == 4 and s[1:3] == (8, 16)} - {1, 8}

    assert stacked(shapes(None)) == {7}
    assert stacked(shapes((1, 5))) == {2}
    assert stacked(shapes(None, lambda v, mask: jnp.mean(v["output"], axis=(0, 1)))) == set()


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap(points=("logits",), reduce=everything), r"asks for the points \['logits'\]; allowed are \('input'"),
        (Tap(points=("input",), reduce=everything, layers=(3, 1)), "increasing indices from 0 to 3"),
        (Tap(points=("input",), reduce=everything, layers=(4,)), "increasing indices from 0 to 3"),
        (Tap(points=("input",), reduce=everything, layers=()), "increasing indices from 0 to 3"),
        (Tap(points=("mlp",), reduce=everything), "different shapes in different layers"),
    ],
)
def test_taps_that_cannot_be(tap, message):
    params = init_params(MIXED, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: apply(MIXED, p, packed_batch(0), taps={"t": tap}), params)
