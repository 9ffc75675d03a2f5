"""Likelihood matching: right by its definition in float64, for every option; chunks, groups and gaps included."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_alignment

from jaxdistill.losses.alm import ALM, Denominator, Divergence, Path, divergence

DIVERGENCES = get_args(Divergence)


def binary(t: float, s: float) -> float:
    """KL of (e^t, 1 - e^t) from (e^s, 1 - e^s)."""
    return math.exp(t) * (t - s) - math.expm1(t) * (math.log(-math.expm1(t)) - math.log(-math.expm1(s)))


def divergence64(kind: str, s: float, t: float, *, temperature: float, epsilon: float) -> float:
    """Of the log-likelihoods of student and teacher, by the words of the definition."""
    r = (t - s) / temperature
    simple = {"absolute": abs(t - s), "k2": r * r / 2, "k3": math.exp(r) - 1 - r}
    if kind in simple:
        return simple[kind]
    if kind == "temperature_limit":
        s, t = s - epsilon, t - epsilon
        return (t - s) + t * math.log(s / t)
    s, t = s / temperature - epsilon, t / temperature - epsilon
    p, q = math.exp(t), math.exp(s)
    return {
        "absolute_probability": lambda: abs(p - q),
        "binary_kl": lambda: binary(t, s),
        "reverse_binary_kl": lambda: binary(s, t),
        "binary_cross_entropy": lambda: -(p * s + (1 - p) * math.log(1 - q)),
    }[kind]()


def chunks64(log_probs, ends, chunks, segments) -> list[tuple[float, float, bool, bool, bool]]:
    """(likelihood, end, whether the end is known, whether the next chunk follows) of each chunk of one row."""
    found = []
    for number in range(1, chunks.max(initial=0) + 1):
        where = [i for i in range(len(chunks)) if chunks[i] == number]
        after = where[-1] + 1
        known = after < len(chunks) and segments[after] == segments[where[-1]]
        follows = known and chunks[after] == number + 1
        found.append((sum(log_probs[i] for i in where), ends[after] if known else 0.0, known, follows, len(where)))
    return found


def alm64(term: ALM, own: dict, theirs: dict) -> tuple[float, float]:
    """(total, count) of a batch."""
    total, chunk_count, group_count, token_count = 0.0, 0, 0, 0
    for row in range(len(own["chunks"])):
        sides = [
            chunks64(*(side[name][row] for name in ("log_probs", "ends", "chunks", "segment_ids")))
            for side in (own, theirs)
        ]
        student = teacher = 0.0
        for (s, s_end, s_known, s_follows, _), (t, t_end, t_known, t_follows, tokens) in zip(*sides, strict=True):
            chunk_count, token_count = chunk_count + 1, token_count + tokens
            if not (s_known and t_known):
                s_end = t_end = 0.0
            student, teacher = student + s, teacher + t
            closes = term.merge_threshold is None or math.exp(t_end) > term.merge_threshold
            if not closes and s_follows and t_follows:
                continue
            if term.append_end:
                student, teacher = student + s_end, teacher + t_end
            group_count += 1
            total += divergence64(term.divergence, student, teacher, temperature=term.temperature, epsilon=term.epsilon)
            student = teacher = 0.0
    return total, {"chunks": chunk_count, "groups": group_count, "teacher_tokens": token_count}[term.denominator]


def paths(seed: int) -> tuple[dict, dict]:
    """Both sides of a random alignment with random log-probabilities, float64."""
    found, rng = random_alignment(seed), np.random.default_rng(seed + 1000)

    def side(prefix: str) -> dict:
        chunks = found[f"{prefix}chunks"]
        log_probs = -rng.gamma(1.0, 1.5, chunks.shape) - 0.01
        ends = -rng.gamma(1.0, 2.0, chunks.shape) - 0.01
        return {"log_probs": log_probs, "ends": ends, "chunks": chunks, "segment_ids": found[f"{prefix}segment_ids"]}

    return side(""), side("teacher_")


def as_path(side: dict) -> Path:
    return Path(**{name: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None) for name, x in side.items()})


def value(term: ALM, own: dict, theirs: dict):
    return term(as_path(own), as_path(theirs))


OPTIONS = [
    ALM(divergence=kind, temperature=temperature, merge_threshold=threshold, append_end=append)
    for kind, (temperature, threshold, append) in itertools.product(
        DIVERGENCES, [(100.0, 0.1, True), (1.0, None, False), (7.0, 0.3, False), (7.0, None, True)]
    )
]


@pytest.mark.parametrize("term", OPTIONS, ids=str)
def test_value_and_gradient_are_those_of_the_definition(term):
    own, theirs = paths(3)
    found = jax.jit(term)(as_path(own), as_path(theirs))
    total, count = alm64(term, own, theirs)
    assert float(found.count) == count > 5
    np.testing.assert_allclose(float(found.total), total, rtol=2e-5, atol=1e-7)

    gradient = jax.grad(lambda path: term(path, as_path(theirs)).total, allow_int=True)(as_path(own))
    for name in ("log_probs", "ends"):
        expected, small = np.zeros_like(own[name]), 1e-6
        for index in np.ndindex(*expected.shape):
            moved = [own | {name: own[name].copy()} for _ in range(2)]
            moved[0][name][index] += small
            moved[1][name][index] -= small
            expected[index] = (alm64(term, moved[0], theirs)[0] - alm64(term, moved[1], theirs)[0]) / (2 * small)
        scale = np.abs(expected).max()
        assert (scale > 0) == (name == "log_probs" or term.append_end)
        np.testing.assert_allclose(np.asarray(getattr(gradient, name)), expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("denominator", get_args(Denominator))
def test_what_the_sum_is_divided_by(denominator):
    own, theirs = paths(5)
    term = ALM(denominator=denominator, merge_threshold=0.3)
    total, count = alm64(term, own, theirs)
    np.testing.assert_allclose(float(value(term, own, theirs).value), total / count, rtol=1e-5)
    counts = {kind: alm64(ALM(denominator=kind, merge_threshold=0.3), own, theirs)[1] for kind in get_args(Denominator)}
    assert len({*counts.values()}) == 3, "the example tells them apart"


def test_the_denominator_counts_groups_once():
    """Not merged counts merged again, and not those of a micro-batch: the count of two batches is the sum."""
    own, theirs = paths(8)
    term = ALM(merge_threshold=0.3)
    whole = value(term, own, theirs)
    parts = [value(term, *({k: v[i : i + 1] for k, v in side.items()} for side in (own, theirs))) for i in range(3)]
    assert float(whole.count) == sum(float(part.count) for part in parts) == alm64(term, own, theirs)[1]
    np.testing.assert_allclose(float(whole.total), sum(float(part.total) for part in parts), rtol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_equal_likelihoods_are_a_minimum(kind):
    likelihood = -jnp.array([1e-6, 0.01, 0.7, 3.0, 40.0])
    found = divergence(kind, likelihood, likelihood, temperature=7.0)
    if kind != "binary_cross_entropy":
        np.testing.assert_allclose(found, 0, atol=1e-6)
    if kind not in ("absolute", "absolute_probability"):
        slope = jax.grad(lambda s: divergence(kind, s, likelihood, temperature=7.0).sum())(likelihood)
        np.testing.assert_allclose(slope, 0, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(-60, -1e-4), st.floats(-60, -1e-4), st.sampled_from(DIVERGENCES), st.sampled_from([1.0, 10.0, 100.0]))
def test_no_divergence_is_negative(s, t, kind, temperature):
    found = float(divergence(kind, jnp.float32(s), jnp.float32(t), temperature=temperature))
    assert found >= -2e-6 * max(1.0, abs(s), abs(t))


def test_the_temperature_limit_is_the_limit():
    s, t = jnp.array([-0.5, -2.0, -9.0]), jnp.array([-0.7, -1.0, -3.0])
    limit = divergence("temperature_limit", s, t)
    warm = [divergence("binary_kl", s, t, temperature=x) * x for x in (10.0, 300.0)]
    np.testing.assert_allclose(warm[1], limit, rtol=2e-2)
    assert (jnp.abs(warm[1] - limit) < jnp.abs(warm[0] - limit)).all()


@pytest.mark.parametrize("kind", ["binary_kl", "binary_cross_entropy"])
def test_single_token_chunks_have_the_closed_gradient(kind):
    """d/ds = (q - p) / (1 - q) / temperature."""
    own, theirs = paths(1)
    side = {"chunks": np.tile(np.arange(1, 9, dtype=np.int32), (2, 1)), "segment_ids": np.ones((2, 8), np.int32)}
    own, theirs = ({name: x[:2, :8] for name, x in each.items()} | side for each in (own, theirs))
    term = ALM(divergence=kind, merge_threshold=None, append_end=False, temperature=5.0)
    gradient = jax.grad(lambda path: term(path, as_path(theirs)).total, allow_int=True)(as_path(own)).log_probs
    p, q = np.exp(theirs["log_probs"] / 5), np.exp(own["log_probs"] / 5)
    np.testing.assert_allclose(gradient, (q - p) / (1 - q) / 5, rtol=1e-3, atol=1e-6)


def test_merging_stops_at_segments_and_gaps():
    """Chunks of two segments, or with something unsupervised between them, are never one group."""
    log_probs = np.full((1, 6), -1.0)
    never = np.full((1, 6), -50.0)
    side = {"log_probs": log_probs, "ends": never}
    one = {"chunks": np.array([[1, 2, 3, 4, 0, 0]], np.int32), "segment_ids": np.array([[1, 1, 1, 1, 1, 0]], np.int32)}
    two = one | {"segment_ids": np.array([[1, 1, 2, 2, 2, 0]], np.int32)}
    gap = one | {"chunks": np.array([[1, 2, 0, 3, 4, 0]], np.int32)}
    counts = [float(value(ALM(), side | rows, side | rows).count) for rows in (one, two, gap)]
    assert counts == [1, 2, 2]


def test_nothing_aligned_is_zero_with_zero_gradient():
    own, theirs = paths(2)
    own, theirs = (side | {"chunks": np.zeros_like(side["chunks"])} for side in (own, theirs))
    mean = value(ALM(), own, theirs)
    assert float(mean.value) == float(mean.count) == 0
    gradient = jax.grad(lambda path: ALM()(path, as_path(theirs)).total, allow_int=True)(as_path(own))
    assert not np.asarray(gradient.log_probs).any()


def test_the_teacher_is_never_differentiated():
    own, theirs = paths(2)
    gradient = jax.grad(lambda path: ALM()(as_path(own), path).total, allow_int=True)(as_path(theirs))
    assert not np.asarray(gradient.log_probs).any()
    assert not np.asarray(gradient.ends).any()


def test_certain_tokens_keep_gradients_finite():
    """Likelihoods of exactly 1, and ones that rounding put above it."""
    own, theirs = paths(2)
    for kind, height in itertools.product(DIVERGENCES, (0.0, 1e-7)):
        flat = own | {"log_probs": np.full_like(own["log_probs"], height), "ends": np.zeros_like(own["ends"])}
        term = ALM(divergence=kind)
        total, gradient = jax.value_and_grad(lambda path, t=term: t(path, as_path(theirs)).total, allow_int=True)(
            as_path(flat)
        )
        assert np.isfinite([float(total), *np.ravel(gradient.log_probs)]).all(), kind


def test_options_that_do_not_exist_are_refused():
    for wrong, message in (
        ({"divergence": "kl"}, "allowed are binary_kl"),
        ({"denominator": "tokens"}, "allowed are groups"),
        ({"temperature": 0.0}, "must be positive"),
        ({"merge_threshold": 1.5}, "probability"),
    ):
        with pytest.raises(ValueError, match=message):
            ALM(**wrong)
