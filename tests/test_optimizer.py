"""Optimizers and schedules against hand values, the formulas in NumPy, and optax's own AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.optimizer import AdamW, Optax, WarmupCosine, WarmupStableDecay, scale_by_step, stored_as


def params():
    random = np.random.default_rng(0)
    shapes = {"embedding": {"kernel": (6, 4)}, "ffn": {"kernel": (4, 8), "bias": (8,)}, "norm": {"scale": (4,)}}
    student = jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {"student": student, "objective": {"projector": {"kernel": jnp.full((4, 4), 0.5)}}}


def gradients(seed, scale=1.0):
    random = np.random.default_rng(100 + seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * random.standard_normal(x.shape), jnp.float32), params())


def follow(transformation, steps, *, scale=1.0, **extra):
    """Parameters after some steps of given gradients."""

    @jax.jit
    def one(gradients, state, now, more):
        updates, state = transformation.update(gradients, state, now, **more)
        return optax.apply_updates(now, updates), state

    now = params()
    state = transformation.init(now)
    for step in range(steps):
        now, state = one(gradients(step, scale), state, now, {name: value(step) for name, value in extra.items()})
    return now, state


def by_step(transformation, steps, **options):
    return follow(transformation, steps, step=lambda step: step, **options)


def assert_close(given, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), given, expected)


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 1 / 10),
        (4, 5 / 10),
        (9, 1.0),  # the last step of the warm-up
        (10, 1.0),  # the cosine begins at its top
        (55, 0.2 + 0.8 * 0.5),  # half way: the middle of 1 and 0.2
        (100, 0.2),
        (400, 0.2),
    ],
)
def test_warmup_and_cosine(step, share):
    rate = WarmupCosine(peak=3.0, warmup=0.1, final=0.2).over(100)
    np.testing.assert_allclose(rate(step), 3.0 * share, rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.1), (9, 1.0), (40, 1.0), (80, 1.0), (90, 0.75), (95, 0.625), (100, 0.5), (300, 0.5)]
)
def test_warmup_stable_and_decay(step, share):
    rate = WarmupStableDecay(peak=2.0, warmup=0.1, decay=0.2, final=0.5).over(100)
    np.testing.assert_allclose(rate(step), 2.0 * share, rtol=1e-6)


def test_schedules_without_warmup_begin_at_their_peak():
    assert WarmupCosine(peak=1.0, warmup=0.0).over(10)(0) == 1.0
    assert WarmupStableDecay(peak=1.0, warmup=0.0, decay=0.0).over(10)(9) == 1.0


@pytest.mark.parametrize("kind", [WarmupCosine, WarmupStableDecay])
@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"peak": 1.0, "warmup": 1.5}, {"peak": 1.0, "warmup": -0.1}])
def test_schedules_that_make_no_sense_are_refused(kind, wrong):
    with pytest.raises(ValueError, match="between 0 and 1"):
        kind(**wrong)


def test_adamw_is_optax_adamw_with_a_mask():
    decayed = {
        "student": {"embedding": {"kernel": False}, "ffn": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "objective": {"projector": {"kernel": False}},
    }
    schedule = optax.linear_schedule(1e-2, 5e-3, 5)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=decayed),
    )
    expected, _ = follow(reference, 5)
    # The last 5 of 5 steps: from peak down to half of it, as the reference's.
    ours = AdamW(learning_rate=WarmupStableDecay(peak=1e-2, warmup=0.0, decay=1.0, final=0.5), weight_decay=0.3)
    given, _ = by_step(ours.build(5), 5)
    assert_close(given, expected)


def test_adamw_by_its_formula():
    """Two steps of one weight, in float64 by hand: moments, bias corrections, decoupled decay; clipped at norm 1."""
    rate, b1, b2, decay = 0.1, 0.9, 0.95, 0.2
    optimizer = AdamW(
        learning_rate=rate, first_decay=b1, second_decay=b2, weight_decay=decay, clip_norm=1.0, no_decay=()
    ).build(2)
    weight, m, v = 2.0, 0.0, 0.0
    given = {"w": jnp.float32(weight)}
    state = optimizer.init(given)
    for step, gradient in enumerate((4.0, -0.5)):
        clipped = gradient / max(1.0, abs(gradient))
        m, v = b1 * m + (1 - b1) * clipped, b2 * v + (1 - b2) * clipped**2
        corrected = (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8)
        weight -= rate * (corrected + decay * weight)
        updates, state = optimizer.update({"w": jnp.float32(gradient)}, state, given, step=step)
        given = optax.apply_updates(given, updates)
        np.testing.assert_allclose(given["w"], weight, rtol=1e-5)


def test_names_that_are_not_decayed():
    """Gradients of 0: all that moves is decay."""
    start = params()
    zeros = jax.tree.map(jnp.zeros_like, start)
    for patterns, moved in (
        (AdamW().no_decay, {"ffn.kernel"}),
        ((), {"embedding.kernel", "ffn.kernel", "ffn.bias", "norm.scale", "projector.kernel"}),
        (("student.ffn.*",), {"embedding.kernel", "norm.scale", "projector.kernel"}),
    ):
        optimizer = AdamW(learning_rate=0.1, weight_decay=0.5, no_decay=patterns).build(1)
        updates, _ = optimizer.update(zeros, optimizer.init(start), start, step=0)
        found = set()
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            if np.any(update):
                found.add(".".join(key.key for key in path[1:]).removeprefix("student."))
        assert {".".join(name.split(".")[-2:]) for name in found} == moved
        if "ffn.kernel" in moved:
            np.testing.assert_allclose(
                updates["student"]["ffn"]["kernel"], -0.1 * 0.5 * start["student"]["ffn"]["kernel"], rtol=1e-6
            )


def test_clipping_scales_all_gradients_by_their_common_norm():
    """Adam does not see a gradient's scale: large gradients that are clipped give what unclipped ones do, but a mixture
    of sizes shows the difference."""
    clipped, _ = by_step(AdamW(learning_rate=1e-2, clip_norm=1.0).build(3), 3, scale=1e3)
    same, _ = by_step(AdamW(learning_rate=1e-2, clip_norm=1.0).build(3), 3, scale=1e5)
    assert_close(clipped, same, rtol=1e-5)
    free, _ = by_step(AdamW(learning_rate=1e-2, clip_norm=None).build(3), 3)
    unclipped, _ = by_step(AdamW(learning_rate=1e-2, clip_norm=1e9).build(3), 3)
    assert_close(free, unclipped)
    with pytest.raises(ValueError, match="positive norm, or None"):
        AdamW(clip_norm=0.0)


def test_moments_in_bfloat16_are_rounded_once_per_step():
    optimizer = AdamW(learning_rate=1e-2, state_dtype="bfloat16").build(5)
    given, state = by_step(optimizer, 5)
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floating
    assert all(x.dtype == jnp.bfloat16 for x in floating)
    # First step: moments come from float32 gradients, so the update is Adam's to rounding of nothing.
    exact, _ = by_step(AdamW(learning_rate=1e-2).build(5), 1)
    once, _ = by_step(optimizer, 1)
    assert_close(once, exact)
    # Later: bfloat16 keeps 8 bits, so moments are within 0.4 % and updates of 0.01 within 1 % of their size.
    far, _ = by_step(AdamW(learning_rate=1e-2).build(5), 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-2 * 1e-2 * 5), given, far)


def test_the_first_moment_is_stored_as_the_nearest_bfloat16():
    adam = stored_as(optax.scale_by_adam(b1=0.9, b2=0.95), jnp.bfloat16)
    gradient = {"w": jnp.asarray([1.2345678, -3.3333333])}
    _, state = adam.update(gradient, adam.init(gradient), gradient)
    np.testing.assert_array_equal(state.mu["w"], (0.1 * gradient["w"]).astype(jnp.bfloat16))


def test_moments_are_read_from_bfloat16_and_computed_in_float32():
    """Not jitted: XLA may leave out roundings to bfloat16 inside a program."""
    adam = stored_as(optax.scale_by_adam(b1=0.9, b2=0.95, eps=0.0), jnp.bfloat16)
    first, second = (np.array(g, np.float32) for g in ([1.2345678, -3.3333333], [0.7654321, 2.7182818]))
    state = adam.init({"w": jnp.asarray(first)})
    _, state = adam.update({"w": jnp.asarray(first)}, state)
    updates, _ = adam.update({"w": jnp.asarray(second)}, state)
    stored = [np.asarray(jnp.asarray(m, jnp.bfloat16), np.float64) for m in (0.1 * first, 0.05 * first**2)]
    mean, square = 0.9 * stored[0] + 0.1 * second, 0.95 * stored[1] + 0.05 * second**2
    expected = mean / (1 - 0.9**2) / np.sqrt(square / (1 - 0.95**2))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_scale_by_step_follows_the_given_step_alone():
    scaled = scale_by_step(lambda step: 10.0 * step)
    state = scaled.init({})
    for step in (3, 3, 0, 7):
        updates, state = scaled.update({"w": jnp.ones(2)}, state, step=step)
        np.testing.assert_array_equal(updates["w"], 10.0 * step)


def test_rates_as_logged():
    assert AdamW(learning_rate=0.5).rate(10)(3) == 0.5
    assert AdamW(learning_rate=WarmupCosine(peak=1.0, warmup=0.5)).rate(10)(0) == pytest.approx(0.2)
    assert Optax(optax.sgd(0.1)).rate(10) is None


def test_any_transformation_takes_the_step_that_it_does_not_use():
    given, _ = by_step(Optax(optax.sgd(0.1)).build(3), 1)
    jax.tree.map(
        lambda after, before, gradient: np.testing.assert_allclose(after, before - 0.1 * gradient, rtol=1e-6),
        given,
        params(),
        gradients(0),
    )
