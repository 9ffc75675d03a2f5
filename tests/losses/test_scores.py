"""Scores: the same reductions on a whole vocabulary and on one that is split over devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import ForwardKL, Positions, forward_kl
from jaxdistill.sharding import MeshConfig, make_mesh

POSITIONS, VOCAB = 5, 32


def whole(function, *arrays):
    return function(*[Scores(jnp.asarray(a)) for a in arrays])


def split(function, *arrays):
    """The same on 8 devices, the vocabulary split over two mesh axes."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=4, expert=2))
    axes = ("tensor", "expert")
    run = jax.shard_map(
        lambda *shards: function(*[Scores(s, axes) for s in shards]),
        mesh=mesh,
        in_specs=PartitionSpec(None, axes),
        out_specs=PartitionSpec(),
    )
    return run(*[jnp.asarray(a) for a in arrays])


def random_scores(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(POSITIONS, VOCAB)) * scale).astype(np.float32)


IDS = jnp.asarray([0, 31, 7, 8, 20])
CHOSEN = np.arange(VOCAB - 2)[::-1] % 3 == 0  # not to the end: ids beyond it are not chosen, though its last one is
AT = Positions(targets=IDS, step=jnp.int32(0))
REDUCTIONS = {
    "log_normalizer": (lambda s: s.log_normalizer(), lambda x: np.log(np.exp(x).sum(-1))),
    "log_share": (
        lambda s: s.log_share(CHOSEN),
        lambda x: np.log(np.exp(x)[:, :-2][:, CHOSEN].sum(-1) / np.exp(x).sum(-1)),
    ),
    "take": (lambda s: s.take(IDS), lambda x: x[np.arange(POSITIONS), np.asarray(IDS)]),
    "max": (lambda s: s.max(), lambda x: x.max(-1)),
    "argmax": (lambda s: s.argmax(), lambda x: x.argmax(-1)),
    "top scores": (lambda s: s.top_k(6)[0], lambda x: -np.sort(-x, -1)[:, :6]),
    "top ids": (lambda s: s.top_k(6)[1], lambda x: np.argsort(-x, -1)[:, :6]),
    "sum": (lambda s: s.sum(s.local**2), lambda x: (x**2).sum(-1)),
    "expect": (lambda s: s.expect(s.local**2), lambda x: (np.exp(x) * x**2).sum(-1) / np.exp(x).sum(-1)),
    "gather_chunk": (lambda s: s.gather_chunk().local, lambda x: x),
    "at_temperature": (lambda s: s.at_temperature(2.0).log_normalizer(), lambda x: np.log(np.exp(x / 2).sum(-1))),
}


@pytest.mark.parametrize("place", [whole, split])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_follow_their_definition(name, place):
    reduce, define = REDUCTIONS[name]
    x = random_scores()
    np.testing.assert_allclose(place(reduce, x), define(x.astype(np.float64)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("place", [whole, split])
def test_the_lowest_of_equal_ids_is_the_argmax(place):
    x = np.zeros((POSITIONS, VOCAB), np.float32)
    x[:, [9, 25]] = 1.0
    np.testing.assert_array_equal(place(lambda s: s.argmax(), x), 9)


@pytest.mark.parametrize("place", [whole, split])
def test_the_normalizers_gradient_is_the_softmax(place):
    x = random_scores(1)
    weights = jnp.arange(1.0, POSITIONS + 1)
    gradient = jax.grad(lambda x: (place(lambda s: s.log_normalizer(), x) * weights).sum())(jnp.asarray(x))
    softmax = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, softmax * weights[:, None], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("place", [whole, split])
def test_the_gradient_of_a_share(place):
    """The softmax among the chosen less the softmax of all; none where the share is too small to have one."""
    x = random_scores(1)
    x[0, np.flatnonzero(CHOSEN)] -= 200.0
    x[1, np.flatnonzero(CHOSEN)] -= 40.0
    weights = np.arange(1.0, POSITIONS + 1)
    value, gradient = jax.value_and_grad(lambda x: (place(lambda s: s.log_share(CHOSEN), x) * weights).sum())(
        jnp.asarray(x)
    )
    assert np.isfinite(value)
    exponentials = np.exp(x.astype(np.float64))
    among = np.where(np.append(CHOSEN, [False, False]), exponentials, 0.0)
    expected = among / among.sum(-1, keepdims=True) - exponentials / exponentials.sum(-1, keepdims=True)
    expected[0] = 0.0
    np.testing.assert_allclose(gradient, expected * weights[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [whole, split])
def test_gradients_through_gathered_scores_are_not_multiplied_by_the_shards(place):
    x = random_scores(2)

    def sorted_head(s):
        return jnp.sort(s.gather_chunk().local, axis=-1)[:, -3:].sum(-1) + s.top_k(2)[0].sum(-1)

    gradient = np.asarray(jax.grad(lambda x: place(sorted_head, x).sum())(jnp.asarray(x)))
    order = np.argsort(-x, -1)
    expected = np.zeros_like(x)
    np.put_along_axis(expected, order[:, :3], 1.0, -1)
    np.put_along_axis(expected, order[:, :2], 2.0, -1)
    np.testing.assert_allclose(gradient, expected)


@pytest.mark.parametrize("place", [whole, split])
def test_scores_of_minus_infinity_are_impossible_ids(place):
    x = random_scores(3)
    x[:, 4:] = -np.inf
    expected = np.log(np.exp(x[:, :4].astype(np.float64)).sum(-1))
    np.testing.assert_allclose(place(lambda s: s.log_normalizer(), x), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: place(lambda s: s.log_normalizer(), x).sum())(jnp.asarray(x))
    assert np.all(np.isfinite(gradient))


scores = arrays(np.float32, (2, 9), elements=st.floats(-15, 15, width=32))


@given(scores, scores)
@settings(deadline=None, max_examples=100)
def test_forward_kl_is_a_divergence(teacher, student):
    kl = functools.partial(whole, lambda t, s: forward_kl(t, s))
    value = np.asarray(kl(teacher, student))
    assert np.all(value >= -1e-5)
    np.testing.assert_array_equal(kl(teacher, teacher), 0.0)
    np.testing.assert_allclose(kl(teacher + 3, student - 5), value, rtol=1e-4, atol=3e-5)
    p, q = (np.exp(x.astype(np.float64)) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=2e-5)


def test_a_high_temperature_compares_scores_by_their_squared_distance():
    """KL(T)·T² → ½ Var-like distance of centred scores ÷ vocabulary (Hinton et al. 2015, section 2.1)."""
    teacher, student = random_scores(4, 1.0), random_scores(5, 1.0)
    value = ForwardKL(temperature=200.0)(Scores(jnp.asarray(student)), Scores(jnp.asarray(teacher)), AT, {})
    gap = (teacher - teacher.mean(-1, keepdims=True)) - (student - student.mean(-1, keepdims=True))
    np.testing.assert_allclose(value, (gap**2).sum(-1) / (2 * VOCAB), rtol=0.05)


def test_the_temperature_factor_can_be_left_out():
    teacher, student = (Scores(jnp.asarray(random_scores(s))) for s in (6, 7))
    scaled = ForwardKL(temperature=3.0)(student, teacher, AT, {})
    bare = ForwardKL(temperature=3.0, scale_by_square=False)(student, teacher, AT, {})
    np.testing.assert_allclose(scaled, 9 * bare, rtol=1e-6)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"ForwardKL\.temperature is 0.*positive"):
        ForwardKL(temperature=0)
