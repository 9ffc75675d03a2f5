"""Cutting models: nothing kept back changes nothing, orders do not matter, and what is cut is what was masked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILY_CASES, LAYOUTS, family_models, lacking, llama, packed_batch
from tiny import params as tiny_params

from jaxdistill.models.decoder import apply, scores
from jaxdistill.models.schema import param_shardings, stack, unstack
from jaxdistill.prune.baselines import random_importance
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.plan import depth_plan, whole_plan
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import Layout
from jaxdistill.specs import MixtureOfExperts, ModelConfig

UNTIED = llama(layers=3, tied=False)
THIN = llama(layers=1, mlp=24).layers[0]
MODELS = {
    "tied": llama(layers=2),
    "untied": UNTIED,
    "two segments": dataclasses.replace(UNTIED, layers=(*UNTIED.layers, THIN)),
    "lacking": lacking(),
    **family_models(),
}
CASES = ["tied", "untied", "two segments", "lacking", *FAMILY_CASES]


def logits(config: ModelConfig, params, rows=None):
    rows = packed_batch(0, vocab=config.vocab) if rows is None else rows
    outputs = jax.jit(lambda p: apply(config, p, rows))(params)
    return np.asarray(scores(outputs.hidden, outputs.head))


@pytest.mark.parametrize("layout", ["one device", "fsdp 8", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize("model", CASES)
def test_keeping_everything_changes_no_bit(model, layout):
    config, place = MODELS[model], LAYOUTS[layout]()
    params = jax.device_put(tiny_params(config), param_shardings(config, place))
    same, kept = prune_model(config, params, whole_plan(config), layout=place)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    np.testing.assert_array_equal(logits(config, kept), logits(config, params))


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize("model", CASES)
def test_an_order_changes_no_score(model, layout):
    """All axes permuted at once: channels, neurons, key-value heads and query heads within them."""
    config, place = MODELS[model], LAYOUTS[layout]()
    params = tiny_params(config)
    plan = choose(config, random_importance(config, 3), Target(), sort=True)
    assert plan != whole_plan(config)
    placed = jax.device_put(params, param_shardings(config, place))
    _, permuted = prune_model(config, placed, plan, layout=place)
    # Rounding adds up layer by layer.
    tolerance = 1e-5 * max(1, len(config.layers) / 3)
    np.testing.assert_allclose(logits(config, permuted), logits(config, params), atol=tolerance)


def masked(config: ModelConfig, params, plan):
    """The whole model with zeros where the plan keeps nothing (neurons and heads; not channels)."""
    flat = unstack(config, params)
    for layer in range(len(config.layers)):
        for name, axis in (("ffn.down.kernel", "mlp"), ("mixer.output.kernel", "heads")):
            dropped = sorted(set(range(config.layers[layer].widths[axis])) - set(plan.widths[axis][layer]))
            key = f"layers.{layer}.{name}"
            flat[key] = flat[key].at[np.asarray(dropped, int)].set(0.0)
    return flat


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize("target", [Target(mlp=8), Target(heads=2), Target(kv_heads=1), Target(mlp=12, heads=2)])
def test_what_is_cut_is_what_was_masked(target, layout):
    config, place = UNTIED, LAYOUTS[layout]()
    params = tiny_params(config)
    plan = choose(config, random_importance(config, 5), target)
    placed = jax.device_put(params, param_shardings(config, place))
    smaller, cut = prune_model(config, placed, plan, layout=place)
    expected = logits(config, stack(config, masked(config, params, plan)))
    np.testing.assert_allclose(logits(smaller, cut), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, to: x.sharding.is_equivalent_to(to, x.ndim) or pytest.fail(str(x.sharding)),
        cut,
        param_shardings(smaller, place),
    )


@pytest.mark.parametrize("model", FAMILY_CASES)
def test_what_is_cut_of_a_family_is_what_was_masked(model):
    """Where all heads have one norm together, fewer heads have another."""
    config = MODELS[model]
    if any(isinstance(spec.ffn, MixtureOfExperts) for spec in config.layers):
        pytest.skip("tests/prune/test_mixture.py has mixtures")
    together = any(spec.mixer.qk_norm == "all" for spec in config.layers)
    params, target = tiny_params(config), Target(mlp=12) if together else Target(mlp=12, heads=2)
    plan = choose(config, random_importance(config, 5), target)
    smaller, cut = prune_model(config, params, plan)
    expected = logits(config, stack(config, masked(config, params, plan)))
    np.testing.assert_allclose(logits(smaller, cut), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["untied", *FAMILY_CASES])
def test_channels_that_are_zero_leave_without_a_trace_when_norms_are_repaired(model):
    """Two channels of the residual stream never hold anything: nothing writes to them. Norms that have no exact repair
    are refused."""
    config = MODELS[model]
    flat = unstack(config, tiny_params(config))
    dead = np.array([3, 9])
    for name in flat:
        if name == "embedding.kernel" or name.endswith((".mixer.output.kernel", ".ffn.down.kernel")):
            flat[name] = flat[name].at[..., dead].set(0.0)
        if name.endswith((".mixer.output.bias", ".ffn.down.bias")):
            flat[name] = flat[name].at[dead].set(0.0)
    params = stack(config, flat)
    plan = dataclasses.replace(whole_plan(config), embed=tuple(i for i in range(config.embed) if i not in dead))
    if config.norm.kind == "layer" or any(spec.mixer.qk_norm for spec in config.layers):
        with pytest.raises(ValueError, match=r"norm_repair is 'exact'; a .* has none"):
            prune_model(config, params, plan, norm_repair="exact")
        return
    smaller, cut = prune_model(config, params, plan, norm_repair="exact")
    np.testing.assert_allclose(logits(smaller, cut), logits(config, params), atol=1e-5)
    assert smaller.norm_epsilon == pytest.approx(config.norm_epsilon * config.embed / (config.embed - 2))
    _, plain = prune_model(config, params, plan)
    assert np.abs(logits(plan.resize(config), plain) - logits(config, params)).max() > 1e-2


@pytest.mark.parametrize("model", ["tied", "untied", "two segments"])
def test_depth_and_widths_together_leave_the_named_rows(model):
    config = MODELS[model]
    params = tiny_params(config)
    target = Target(layers=len(config.layers) - 1, embed=10, mlp=7, heads=2)
    plan = choose(config, random_importance(config, 1), target)
    smaller, cut = prune_model(config, params, plan)
    old, new = unstack(config, params), unstack(smaller, cut)
    for at, layer in enumerate(plan.layers):
        expected = np.asarray(old[f"layers.{layer}.ffn.down.kernel"])[list(plan.widths["mlp"][at])][:, list(plan.embed)]
        np.testing.assert_array_equal(new[f"layers.{at}.ffn.down.kernel"], expected)
        query = np.asarray(old[f"layers.{layer}.mixer.query.kernel"])
        expected = query[list(plan.embed)][:, list(plan.widths["heads"][at])]
        np.testing.assert_array_equal(new[f"layers.{at}.mixer.query.kernel"], expected)
    assert np.isfinite(logits(smaller, cut)).all()


def test_the_original_stays_usable_and_the_dtype_stays():
    config = MODELS["tied"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params(config))
    _, cut = prune_model(config, params, depth_plan(config, (1,)), layout=Layout())
    assert {x.dtype for x in jax.tree.leaves(cut)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        np.asarray(cut["segments"]["0"]["ffn"]["up"]["kernel"][0], np.float32),
        np.asarray(params["segments"]["0"]["ffn"]["up"]["kernel"][1], np.float32),
    )


def test_dropped_query_heads_leave_a_residual_in_kept_ones():
    """Of three heads a group keeps two: the worse one becomes W + (W - W of the dropped one), the better one stays."""
    config = dataclasses.replace(UNTIED, layers=llama(layers=2, heads=6, kv_heads=2).layers)
    params, scores_ = tiny_params(config), random_importance(config, 2)
    plan = choose(config, scores_, Target(heads=4), merge_heads=True)
    _, cut = prune_model(config, params, plan)
    new = cut["segments"]["0"]["mixer"]
    plain = prune_model(config, params, dataclasses.replace(plan, head_partners=()))[1]["segments"]["0"]["mixer"]
    for layer in range(2):
        old = np.asarray(params["segments"]["0"]["mixer"]["query"]["kernel"][layer])
        for at, head in enumerate(plan.widths["heads"][layer]):
            group = range(head // 3 * 3, head // 3 * 3 + 3)
            best, worse, dropped = sorted(group, key=lambda i, s=scores_.widths["heads"][layer]: -s[i])
            expected = old[:, head] if head == best else 2 * old[:, worse] - old[:, dropped]
            np.testing.assert_allclose(new["query"]["kernel"][layer][:, at], expected, rtol=1e-5, atol=1e-6)
    for name in ("key", "value", "output"):
        np.testing.assert_array_equal(new[name]["kernel"], plain[name]["kernel"])
    with pytest.raises(ValueError, match="a head's partner is of its own key-value head"):
        dataclasses.replace(plan, head_partners=tuple(each[::-1] for each in plan.head_partners))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(mlp=17), "mlp would be 17, which the 2 devices that split it do not divide .*; choose 16 or 18"),
        (Target(embed=10), "embed would be 10, which the 4 devices .* choose 8 or 12"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_refused(target, message):
    place = LAYOUTS["fsdp 4 x tensor 2"]()
    plan = choose(UNTIED, random_importance(UNTIED, 0), target)
    with pytest.raises(ValueError, match=message):
        prune_model(UNTIED, tiny_params(UNTIED), plan, layout=place)


def test_layers_that_differ_are_cut_in_depth_on_a_mesh_that_never_divided_one():
    place = LAYOUTS["fsdp 4 x tensor 2"]()
    config = dataclasses.replace(UNTIED, layers=(*UNTIED.layers, llama(layers=1, mlp=21).layers[0]))
    _, same = prune_model(config, tiny_params(config), whole_plan(config), layout=place)
    jax.tree.map(np.testing.assert_array_equal, same, tiny_params(config))
    prune_model(config, tiny_params(config), depth_plan(config, (0, 3)), layout=place)


def test_the_smaller_model_shares_no_memory_with_the_original():
    """Its arrays may be donated."""
    params = tiny_params(UNTIED)
    for plan in (whole_plan(UNTIED), depth_plan(UNTIED, (0, 1))):
        _, cut = prune_model(UNTIED, params, plan)
        theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
        assert theirs.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cut))


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the plan was made for a model of"):
        prune_model(UNTIED, tiny_params(UNTIED), whole_plan(MODELS["tied"]))
