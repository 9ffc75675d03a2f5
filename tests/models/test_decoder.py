"""The decoder against a float64 NumPy decoder, and what must not change its results."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import assert_gradients_close, llama, packed_batch
from tiny import params as tiny_params

from jaxdistill.models.attention import Scoring, causal_attention, query_block
from jaxdistill.models.decoder import Execution, Rows, apply, scores
from jaxdistill.models.modules import Context
from jaxdistill.models.schema import abstract_params, init_params, stack, unstack
from jaxdistill.sharding import Layout
from jaxdistill.specs import (
    Attention,
    GatedMLP,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    ModelConfig,
    Norm,
    PlainMLP,
    Rope,
    YarnScaling,
)

LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)


def model(*layers: LayerSpec, tied: bool = False, **more) -> ModelConfig:
    return ModelConfig(family="llama", vocab=32, embed=12, layers=layers, tied=tied, **more)


def layer(
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=20,
    activation="silu",
    biases=False,
    rope=Rope(),  # noqa: B008
    gate=True,
    norms="pre",
    **attention,
) -> LayerSpec:
    mixer = Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=biases, output_bias=biases, rope=rope, **attention
    )
    ffn = (GatedMLP if gate else PlainMLP)(mlp=mlp, activation=activation, bias=biases)
    return LayerSpec(mixer=mixer, ffn=ffn, norms=norms)


YARN = YarnScaling(factor=4.0, original_length=8, beta_fast=4.0, beta_slow=0.5, attention_factor=1.2)
LONG = LongRope(short=(1.0, 1.5, 2.0), long=(3.0, 4.0, 5.0), original_length=13, attention_factor=1.3)
LOCAL = layer(window=3, rope=Rope(theta=100.0))


MODELS = {
    "grouped queries": model(layer(), layer()),
    "tied": model(layer(), tied=True),
    "one key-value head, biases": model(layer(kv_heads=1, biases=True), layer(kv_heads=1, biases=True)),
    "linear rope": model(layer(rope=Rope(theta=500.0, scaling=LinearScaling(factor=4.0)))),
    "llama3 rope": model(layer(head_dim=16, rope=Rope(theta=100.0, scaling=LLAMA3))),
    "three segments": model(
        layer(),
        layer(),
        layer(heads=2, mlp=8, activation="gelu_tanh"),
        layer(rope=Rope(theta=100.0), activation="gelu"),
    ),
    "relu, relu2": model(layer(activation="relu"), layer(activation="relu2")),
    "window": model(layer(window=4), layer(window=1)),
    "yarn": model(layer(head_dim=16, rope=Rope(theta=50.0, scaling=YARN))),
    "yarn, part of the head": model(
        layer(head_dim=16, rope=Rope(theta=50.0, fraction=0.5, scaling=dataclasses.replace(YARN, truncate=False)))
    ),
    "long rope in a long row": model(layer(rope=Rope(scaling=LONG))),
    "long rope in a short row": model(layer(rope=Rope(scaling=dataclasses.replace(LONG, original_length=14)))),
    "no rotation": model(layer(rope=None), layer()),
    "norms of heads": model(layer(qk_norm="head"), layer(qk_norm="head", kv_heads=1)),
    "norms of all heads, after": model(layer(qk_norm="all", norms="post"), layer(qk_norm="all", norms="post")),
    "Gemma's": model(
        *([layer(norms="both", scale=0.3, soft_cap=2.0, window=5), layer(norms="both", scale=0.3, soft_cap=2.0)] * 2),
        tied=True,
        norm=Norm(one_plus=True),
        embed_scale=12**0.5,
        soft_cap=3.0,
    ),
    "layer norms, no gate": model(
        layer(gate=False, activation="relu2", rope=Rope(fraction=0.5), head_dim=8),
        norm=Norm(kind="layer", one_plus=True, bias=True),
    ),
    "halves that lack": model(
        layer(),
        dataclasses.replace(layer(), mixer=None),
        dataclasses.replace(layer(), ffn=None),
        dataclasses.replace(layer(), mixer=None, ffn=None),
        layer(),
    ),
    "turns of three and a rest": model(*[LOCAL, LOCAL, layer()] * 2, LOCAL, LOCAL),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition(name):
    config = MODELS[name]
    batch = packed_batch(3, rows=3, length=14, vocab=config.vocab)
    parameters = reference.random_parameters(config)
    outputs = jax.jit(lambda p: apply(config, p, batch))(stack(config, parameters))
    expected = reference.hidden(
        config, parameters, *map(np.asarray, (batch.tokens, batch.positions, batch.segment_ids))
    )
    np.testing.assert_allclose(outputs.hidden, expected, rtol=1e-5, atol=1e-5)
    head = parameters["embedding.kernel" if config.tied else "head.kernel"]
    expected = expected @ head.T
    if config.soft_cap is not None:
        expected = config.soft_cap * np.tanh(expected / config.soft_cap)
    np.testing.assert_allclose(scores(outputs.hidden, outputs.head), expected, rtol=1e-5, atol=3e-5)


def test_llama3_rope_of_this_test_has_all_three_ranges():
    rope = Rope(theta=100.0, scaling=LLAMA3)
    ratio = np.array(
        [
            reference.frequency(rope, 16, i, length=1) / reference.frequency(Rope(theta=100.0), 16, i, length=1)
            for i in range(8)
        ]
    )
    assert np.isclose(ratio, 1).any()
    assert np.isclose(ratio, 1 / 8).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_a_token_depends_on_exactly_its_past_in_its_segment():
    config = llama(vocab=12, tied=False)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]], np.int32)
    rows = Rows(jnp.arange(12)[None], jnp.arange(12)[None], jnp.asarray(segment_ids))  # every token occurs once
    params = init_params(config, jax.random.key(0))

    def at(position, params):
        return jnp.sum(apply(config, params, rows).hidden[0, position] ** 3)

    gradients = jax.jit(jax.grad(at, argnums=1))
    for position in range(12):
        gradient = gradients(position, params)["embedding"]["kernel"]
        depends = np.asarray(jnp.any(gradient != 0, axis=1))
        expected = (np.arange(12) <= position) & (segment_ids[0] == segment_ids[0, position])
        np.testing.assert_array_equal(depends, expected)


def loss_and_gradients(config, params, rows, weights, **options):
    def loss(params):
        outputs = apply(config, params, rows, **options)
        return jnp.sum(jnp.sin(outputs.hidden.astype(jnp.float32)) * weights), outputs.hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, gradients


def test_packing_is_the_same_as_separate_rows():
    config = llama(tied=False)
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, 15)
    weights = rng.standard_normal((15, config.embed)).astype(np.float32)
    cuts = [(0, 6), (6, 8), (8, 15)]
    packed = Rows(
        jnp.asarray(tokens[None]),
        jnp.concatenate([jnp.arange(b - a) for a, b in cuts])[None],
        jnp.concatenate([jnp.full(b - a, i + 1) for i, (a, b) in enumerate(cuts)])[None],
    )
    apart_tokens, apart_segments = np.zeros((3, 7), int), np.zeros((3, 7), int)
    apart_weights = np.zeros((3, 7, config.embed), np.float32)
    for row, (a, b) in enumerate(cuts):
        apart_tokens[row, : b - a], apart_segments[row, : b - a] = tokens[a:b], 1
        apart_weights[row, : b - a] = weights[a:b]
    apart = Rows(jnp.asarray(apart_tokens), jnp.tile(jnp.arange(7), (3, 1)), jnp.asarray(apart_segments))
    hidden, gradients = loss_and_gradients(config, params, packed, jnp.asarray(weights[None]))
    apart_hidden, apart_gradients = loss_and_gradients(config, params, apart, jnp.asarray(apart_weights))
    np.testing.assert_allclose(hidden[0], apart_hidden[apart_segments == 1], rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradients, apart_gradients)


def test_padding_is_finite_and_changes_nothing():
    config = llama(tied=False)
    params = init_params(config, jax.random.key(0))
    # A padding token whose embedding is absurd: its square overflows no norm, its products do nothing to others.
    params["embedding"]["kernel"] = params["embedding"]["kernel"].at[63].set(1e12)
    batch = packed_batch(1, vocab=63)
    real = batch.segment_ids > 0
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((*real.shape, config.embed)), jnp.float32)
    poisoned = dataclasses.replace(batch, tokens=jnp.where(real, batch.tokens, 63))
    hidden, gradients = loss_and_gradients(config, params, poisoned, weights * real[..., None])
    clean_hidden, clean_gradients = loss_and_gradients(config, params, batch, weights * real[..., None])
    assert bool(jnp.isfinite(hidden).all())
    np.testing.assert_array_equal(hidden[real], clean_hidden[real])
    assert_gradients_close(gradients, clean_gradients)
    assert not gradients["embedding"]["kernel"][63].any()


def test_what_is_kept_for_the_backward_pass_changes_no_gradient():
    config = MODELS["three segments"]
    params = stack(config, reference.random_parameters(config))
    batch = packed_batch(2, vocab=config.vocab)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, config.embed)), jnp.float32)
    none, dots, block = (
        loss_and_gradients(config, params, batch, weights, execution=Execution(remat=remat))
        for remat in ("none", "dots", "block")
    )
    for hidden, gradients in (dots, block):
        np.testing.assert_allclose(hidden, none[0], rtol=1e-6, atol=1e-6)
        assert_gradients_close(gradients, none[1])


def test_each_remat_keeps_less():
    config = llama(layers=8, embed=32, mlp=96)
    params = abstract_params(config)
    batch = packed_batch(0, length=128)

    def temporary_bytes(remat):
        def loss(params):
            return jnp.sum(apply(config, params, batch, execution=Execution(remat=remat)).hidden ** 3)

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("none") > 1.5 * temporary_bytes("dots")
    assert temporary_bytes("dots") > 1.5 * temporary_bytes("block")


def test_the_layers_parameters_are_not_copied():
    """Not by passes of equal layers or of layers in turn, with a cache or without, with the compiler's own flags."""
    script = """
import dataclasses
import jax
import jax.numpy as jnp
from jaxdistill.models.decoder import Rows, apply, apply_cached, init_cache
from jaxdistill.models.schema import abstract_params
from tiny import llama

def temporary_bytes(depth, turns, cached):
    config = llama(layers=depth, embed=64, mlp=512)
    layer, row = config.layers[0], jax.ShapeDtypeStruct((1, 8), jnp.int32)
    local = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=4))
    if turns:
        config = dataclasses.replace(config, layers=(layer, local) * (depth // 2))
    params, rows = abstract_params(config), Rows(row, row, row)
    if cached:
        program = jax.jit(lambda params, rows, cache: apply_cached(config, params, rows, cache)[0].hidden)
        lowered = program.lower(params, rows, init_cache(config, 1, 8))
    else:
        lowered = jax.jit(lambda params, rows: apply(config, params, rows).hidden).lower(params, rows)
    return lowered.compile().memory_analysis().temp_size_in_bytes

for turns in (False, True):
    for cached in (False, True):
        print(temporary_bytes(8, turns, cached) - temporary_bytes(4, turns, cached))
"""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    a_query_kernel = 64 * 16 * 4
    assert max(int(line) for line in done.stdout.split()) < 4 * a_query_kernel, done.stdout


def test_the_program_does_not_grow_with_depth():
    def program(depth):
        config = llama(layers=depth)
        params = abstract_params(config)
        batch = packed_batch()
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(config, p, batch).hidden)))(params))

    assert program(12).count(" = ") == program(3).count(" = ")


def test_bfloat16_is_close_and_keeps_norms_in_float32():
    config = llama(layers=4)
    params = init_params(config, jax.random.key(0))
    batch = packed_batch()
    half = jax.jit(lambda p: apply(config, p, batch, execution=Execution(activation_dtype="bfloat16")))(params)
    full = jax.jit(lambda p: apply(config, p, batch))(params)
    assert half.hidden.dtype == jnp.bfloat16
    assert half.head.kernel.dtype == jnp.float32
    error = jnp.abs(half.hidden.astype(jnp.float32) - full.hidden)
    assert float(jnp.sqrt(jnp.mean(error**2))) < 0.02  # bfloat16 has 8 bits; hidden states have root mean square 1


def test_open_gates_of_layers_change_no_bit_of_bfloat16():
    config, batch, execution = llama(layers=3), packed_batch(0), Execution(activation_dtype="bfloat16")
    run = jax.jit(lambda gates: apply(config, tiny_params(config), batch, execution=execution, gates=gates).hidden)
    gates = [{"0": {"layer": jnp.asarray(x, jnp.float32).reshape(3, 1, 1)}} for x in ([1, 1, 1], [1, 0, 1])]
    np.testing.assert_array_equal(*(np.asarray(run(each), np.float32) for each in (gates[0], {})))
    cut = dataclasses.replace(config, layers=config.layers[:2])
    rest = unstack(config, tiny_params(config))
    rest = {name.replace("layers.2", "layers.1"): x for name, x in rest.items() if not name.startswith("layers.1.")}
    left = jax.jit(lambda p: apply(cut, p, batch, execution=execution).hidden)(stack(cut, rest))
    np.testing.assert_array_equal(np.asarray(run(gates[1]), np.float32), np.asarray(left, np.float32))


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_a_factor_between_two_values_is_exact_at_its_ends_and_has_the_slope_of_a_product(factor):
    rng = np.random.default_rng(0)
    without, value, weights = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.bfloat16) for _ in range(3))
    context = Context({}, lambda scoring: None, Layout(), jnp.dtype(jnp.bfloat16))

    def mixed(factor, without, value):
        gates = {"layer": jnp.full((1, 1), factor)}
        return dataclasses.replace(context, gates=gates).between("layer", without, value)

    found, pull = jax.vjp(mixed, jnp.float32(factor), without, value)
    slope, *slopes = pull(weights)
    if factor in (0, 1):
        np.testing.assert_array_equal(found, value if factor else without)
    exact = [np.asarray(x, np.float64) for x in (without, value, weights)]
    np.testing.assert_allclose(np.asarray(found, np.float64), exact[0] + factor * (exact[1] - exact[0]), atol=0.03)
    np.testing.assert_allclose(slope, (exact[2] * (exact[1] - exact[0])).sum(), rtol=0.03)
    for found_slope, share in zip(slopes, (1 - factor, factor), strict=True):
        np.testing.assert_allclose(np.asarray(found_slope, np.float64), share * exact[2], atol=0.02)


def test_gradients_reach_parameters_in_float32_from_bfloat16_activations():
    config = llama()
    params = init_params(config, jax.random.key(0))
    batch = packed_batch()
    weights = jnp.ones((8, 16, config.embed))
    _, gradients = loss_and_gradients(config, params, batch, weights, execution=Execution(activation_dtype="bfloat16"))
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block", [5, 17])
def test_query_blocks_change_nothing(block, window):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 17, h, 4)), jnp.float32) for h in (6, 2, 2))
    segment_ids = jnp.asarray([[1] * 9 + [2] * 6 + [0] * 2, [1] * 17])
    spec = Attention(heads=6, kv_heads=2, head_dim=4, rope=None, window=window)
    layer = {}  # projections that only choose their part of the input, and no rotation: positions are 0
    wide = np.concatenate([x.reshape(2, 17, -1) for x in map(np.asarray, (query, key, value))], axis=-1)
    starts = {"query": (0, 6), "key": (24, 2), "value": (32, 2)}
    for name, (start, heads) in starts.items():
        layer[f"mixer.{name}.kernel"] = np.eye(40)[:, start : start + 4 * heads].reshape(40, heads, 4)
    expected = reference.attention(None, spec, layer, wide, np.zeros((2, 17)), np.asarray(segment_ids), {})
    attention = functools.partial(causal_attention, scoring=Scoring.of(spec), query_block=block)
    given = jax.jit(attention)(query, key, value, segment_ids)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_query_blocks_are_tiles_and_few():
    assert [query_block(n) for n in (16, 512, 2048, 2049, 8192)] == [128, 128, 128, 129, 512]
