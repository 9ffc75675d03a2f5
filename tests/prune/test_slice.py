"""Cutting models: nothing kept back changes nothing, orders do not matter, and what is cut is what was masked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_times
from tiny import FAMILY_CASES, LAYOUTS, family_models, lacking, llama, mixture, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill.models.decoder import apply, scores
from jaxdistill.models.export import write_hf
from jaxdistill.models.load import read_model
from jaxdistill.models.schema import abstract_params, leaf_at, param_shardings, schema, stack, unstack
from jaxdistill.prune.baselines import random_importance
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.plan import depth_plan, whole_plan
from jaxdistill.prune.slice import plan_cut, prune_model
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig, Norm

UNTIED = llama(layers=3, tied=False)
THIN = llama(layers=1, mlp=24).layers[0]
MODELS = {
    "tied": llama(layers=2),
    "untied": UNTIED,
    "two segments": dataclasses.replace(UNTIED, layers=(*UNTIED.layers, THIN)),
    "lacking": lacking(),
    "one plus": dataclasses.replace(llama(layers=2), norm=Norm(one_plus=True)),
    **family_models(),
}
PLACES = ["one device", "fsdp 4 x tensor 2", slow("fsdp 8")]
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


@pytest.mark.parametrize("layout", PLACES)
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
    """The whole model with zeros where the plan keeps nothing (neurons and heads; not channels).

    Where all heads have one norm together, its mean over the kept heads is that over all divided by their share.
    """
    flat = unstack(config, params)

    def zero(name: str, kept: tuple[int, ...], parts: int) -> None:
        """The parts are numbered along the first axes."""
        mask = np.isin(np.arange(parts), kept).astype(np.float32)
        shape = flat[name].shape
        flat[name] = (flat[name].reshape(parts, -1) * mask[:, None]).reshape(shape)

    for layer, spec in enumerate(config.layers):
        parts = spec.parts
        zero(f"layers.{layer}.ffn.down.kernel", plan.widths["mlp"][layer], parts["mlp"])
        zero(f"layers.{layer}.mixer.output.kernel", plan.widths["heads"][layer], parts["heads"])
        if spec.mixer.qk_norm != "all":
            continue
        for name, axis in (("query", "heads"), ("key", "kv_heads")):
            kept, key = plan.widths[axis][layer], f"layers.{layer}.mixer.{name}"
            mask = np.isin(np.arange(parts[axis]), kept).astype(np.float32)
            flat[f"{key}.kernel"] = flat[f"{key}.kernel"] * mask[:, None]
            flat[f"{key}_norm.scale"] = flat[f"{key}_norm.scale"] * np.sqrt(len(kept) / parts[axis])
    return flat


@pytest.mark.parametrize("layout", PLACES)
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


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("target", [Target(mlp=8, heads=2), Target(kv_heads=1)], ids=["mlp and heads", "kv_heads"])
@pytest.mark.parametrize("model", FAMILY_CASES)
def test_what_is_cut_of_a_family_is_what_was_masked(model, target, layout):
    # Beside no epsilon a norm of fewer heads is one of all heads times a constant.
    config, place = dataclasses.replace(MODELS[model], norm_epsilon=1e-12), LAYOUTS[layout]()
    if all(spec.mixer.kv_heads == 1 for spec in config.layers) and target.kv_heads:
        pytest.skip("one key-value head")
    if layout == "fsdp 4 x tensor 2" and target.resize(config).layers[0].mixer.heads < 2:
        pytest.skip("one head is not divided")
    params = tiny_params(config)
    plan = choose(config, random_importance(config, 5), target)
    placed = jax.device_put(params, param_shardings(config, place))
    smaller, cut = prune_model(config, placed, plan, layout=place)
    assert smaller != config
    expected = logits(config, stack(config, masked(config, params, plan)))
    np.testing.assert_allclose(logits(smaller, jax.device_get(cut)), expected, rtol=1e-4, atol=1e-5)


DEAD = np.array([0, 3, 5, 6, 9, 12, 13, 14])
"""Channels that nothing writes to; those that are left divide over 8 devices."""


def with_dead_channels(config: ModelConfig):
    flat = unstack(config, tiny_params(config))
    for name in flat:
        if name == "embedding.kernel" or name.endswith((".mixer.output.kernel", ".ffn.down.kernel")):
            flat[name] = flat[name].at[..., DEAD].set(0.0)
        if name.endswith((".mixer.output.bias", ".ffn.down.bias")):
            flat[name] = flat[name].at[DEAD].set(0.0)
    left = tuple(i for i in range(config.embed) if i not in DEAD)
    return stack(config, flat), dataclasses.replace(whole_plan(config), embed=left)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("untied", "one device"),
        ("one plus", "one device"),
        ("untied", "fsdp 4 x tensor 2"),
        slow("untied", "fsdp 8"),
        *(slow(name, "one device") for name in family_models() if name not in ("gemma3", "olmo2")),
    ],
)
def test_channels_that_are_zero_leave_without_a_trace_when_norms_are_repaired(model, layout):
    config, place = MODELS[model], LAYOUTS[layout]()
    params, plan = with_dead_channels(config)
    if unrepairable(config):
        pytest.skip("has no exact repair")
    placed = jax.device_put(params, param_shardings(config, place))
    smaller, cut = prune_model(config, placed, plan, layout=place, norm_repair="exact")
    np.testing.assert_allclose(logits(smaller, cut), logits(config, params), atol=2e-5)
    assert smaller.norm_epsilon == pytest.approx(config.norm_epsilon * config.embed / (config.embed - len(DEAD)))
    _, plain = prune_model(config, placed, plan, layout=place)
    assert np.abs(logits(plan.resize(config), plain) - logits(config, params)).max() > 1e-2


@pytest.mark.parametrize("axis", ["mlp", "embed", "heads", "kv_heads", "experts"])
@pytest.mark.parametrize("model", ["llama", slow("mixture")])
def test_a_prefix_of_a_sorted_model_is_the_model_of_that_size(model, axis):
    """Of channels, key-value heads and experts the first ones; of heads and of a mixture's neurons, the first ones of
    each key-value head and expert."""
    config = of_six_heads(llama(layers=2)) if model == "llama" else mixture(experts=4)
    if axis not in ("embed", *config.width_axes):
        pytest.skip("no such axis")
    params, scores_ = tiny_params(config), random_importance(config, 4)
    whole, in_order = prune_model(config, params, choose(config, scores_, Target(), sort=True))
    sizes = {"embed": config.embed, **config.layers[0].widths}
    groups = sizes["kv_heads"] if axis == "heads" else 1
    for size in (2, sizes[axis] - groups) if axis != "kv_heads" else (1,):
        smaller, cut = prune_model(config, params, choose(config, scores_, Target(**{axis: size}), sort=True))
        prefix = first_parts(whole, in_order, axis, size)
        assert smaller.layers[0].widths.get(axis, smaller.embed) == size
        jax.tree.map(np.testing.assert_array_equal, cut, stack(smaller, prefix))


def first_parts(config: ModelConfig, params, axis: str, size: int):
    """Of every parameter with the axis its first parts; heads go with their key-value heads, and by themselves evenly
    from each."""
    kv_heads, heads = (config.layers[0].widths[name] for name in ("kv_heads", "heads"))
    sizes = {axis: size} | ({"heads": size * heads // kv_heads} if axis == "kv_heads" else {})
    found = {}
    for name, spec in schema(config).items():
        value = np.asarray(unstack(config, params)[name])
        for position, own in enumerate(spec.axes):
            if own == axis == "heads":
                apart = value.reshape(*value.shape[:position], kv_heads, -1, *value.shape[position + 1 :])
                apart = apart.take(range(size // kv_heads), position + 1)
                value = apart.reshape(*value.shape[:position], size, *value.shape[position + 1 :])
            elif own in sizes:
                value = value.take(range(sizes[own]), position)
        found[name] = value
    return found


def unrepairable(config: ModelConfig) -> bool:
    own = any(spec.mixer.qk_norm or spec.norms != "pre" for spec in config.layers)
    return config.norm.kind == "layer" or own


@pytest.mark.parametrize("model", FAMILY_CASES)
def test_norms_that_have_no_exact_repair_are_refused(model):
    """Those of heads, LayerNorm, and norms of what is added to the stream, which do not read the stream."""
    config = MODELS[model]
    if not unrepairable(config):
        pytest.skip("has an exact repair")
    params, plan = with_dead_channels(config)
    with pytest.raises(ValueError, match=r"norm_repair is 'exact'; a .* has none"):
        prune_model(config, params, plan, norm_repair="exact")


@pytest.mark.parametrize("norms", ["post", "both"])
def test_norms_of_what_is_added_have_no_exact_repair(norms):
    layers = tuple(dataclasses.replace(spec, norms=norms) for spec in UNTIED.layers)
    config = dataclasses.replace(UNTIED, layers=layers)
    params, plan = with_dead_channels(config)
    with pytest.raises(ValueError, match=rf"a llama with norms \['{norms}'\] has none: a norm of what is added"):
        prune_model(config, params, plan, norm_repair="exact")


def test_a_repaired_scale_is_rounded_once():
    """In a model whose norms add 1 to it, a small scale of bfloat16."""
    config = MODELS["one plus"]
    params, plan = with_dead_channels(config)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params["final_norm"]["scale"] = jnp.linspace(-0.02, 0.02, config.embed, dtype=jnp.bfloat16)
    _, cut = prune_model(config, params, plan, norm_repair="exact")
    scale = np.asarray(params["final_norm"]["scale"], np.float64)[list(plan.embed)]
    expected = jnp.asarray((1 + scale) * np.sqrt(2) - 1, jnp.bfloat16)
    assert cut["final_norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(cut["final_norm"]["scale"], np.float32), np.asarray(expected, np.float32))


WIDE = {
    "dense": (llama(layers=4, embed=256, mlp=512, heads=8, kv_heads=8, vocab=512), Target(embed=192, mlp=384)),
    "mixture": (mixture(layers=2, embed=256, mlp=64, vocab=512), Target(layers=1, embed=192, mlp=48, experts=6)),
}


@pytest.mark.parametrize(
    ("model", "layout"),
    [("dense", "fsdp 8"), ("dense", "fsdp 4 x tensor 2"), slow("mixture", "fsdp 4 x tensor 2")],
)
def test_no_device_holds_a_whole_leaf_on_the_way(model, layout):
    (config, target), place = WIDE[model], LAYOUTS[layout]()
    places = param_shardings(config, place)
    shapes = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), abstract_params(config), places
    )
    _, cut = plan_cut(config, choose(config, random_importance(config, 0), target), layout=place)
    matrices = [leaf for path, leaf in cut.leaves.items() if path[-1] == "kernel"]
    assert len(matrices) >= 8
    for leaf in matrices:
        whole = sum(leaf_at(shapes, source).size * 4 for source in leaf.sources)
        needed = leaf.program.lower(*leaf.arguments(shapes)).compile().memory_analysis()
        assert needed.temp_size_in_bytes < whole / 2.5, leaf.sources


def test_leaves_that_are_alike_share_a_program(caplog):
    """The tables; both norms of layers; query; key and value; output; gate and up; down; the last norm."""
    config = dataclasses.replace(llama(layers=4, tied=False), layers=(*llama(layers=2).layers, THIN, THIN))
    plan = choose(config, random_importance(config, 0), Target(embed=13, mlp=11))
    with compiled_times(caplog) as count:
        prune_model(config, tiny_params(config), plan)
    assert count("cut") <= 8


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


def of_six_heads(config: ModelConfig) -> ModelConfig:
    """With three query heads for each of two key-value heads."""
    layers = tuple(layer.with_widths({"heads": 6, "kv_heads": 2}) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("model", ["untied", "qwen2_yarn", slow("qwen3"), slow("olmo2"), slow("gemma3")])
def test_dropped_query_heads_leave_a_residual_in_kept_ones(model, layout, tmp_path):
    """Of three heads a group keeps two: the worse one becomes W + (W - W of the dropped one), the better one stays.
    Biases are of the weights (qwen2); norms of heads (qwen3, olmo2) are not. What is written says the same."""
    config, place = of_six_heads(MODELS[model]), LAYOUTS[layout]()
    params, scores_ = tiny_params(config), random_importance(config, 2)
    plan = choose(config, scores_, Target(heads=4), merge_heads=True)
    placed = jax.device_put(params, param_shardings(config, place))
    smaller, cut = prune_model(config, placed, plan, layout=place)
    old, new = unstack(config, params), unstack(smaller, cut)
    plain = unstack(smaller, prune_model(config, params, dataclasses.replace(plan, head_partners=()))[1])
    for layer, spec in enumerate(config.layers):
        axes = {"kernel": 1, "bias": 0} if spec.mixer.bias else {"kernel": 1}
        for part, axis in axes.items():
            name = f"layers.{layer}.mixer.query.{part}"
            heads = np.moveaxis(np.asarray(old.pop(name)), axis, 0)
            found, _ = np.moveaxis(np.asarray(new.pop(name)), axis, 0), plain.pop(name)
            for at, head in enumerate(plan.widths["heads"][layer]):
                group = range(head // 3 * 3, head // 3 * 3 + 3)
                best, worse, dropped = sorted(group, key=lambda i, s=scores_.widths["heads"][layer]: -s[i])
                expected = heads[head] if head == best else 2 * heads[worse] - heads[dropped]
                np.testing.assert_allclose(found[at], expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, plain)
    read, again = read_model(write_hf(tmp_path / "out", smaller, cut, dtype="float32"))
    jax.tree.map(np.testing.assert_array_equal, again, cut)
    assert read == smaller


def test_partners_of_another_key_value_head_are_refused():
    config = of_six_heads(UNTIED)
    plan = choose(config, random_importance(config, 2), Target(heads=4), merge_heads=True)
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
