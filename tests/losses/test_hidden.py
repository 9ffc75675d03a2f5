"""Terms on hidden states by their definition; pairs of layers; what stands at padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.hidden import HiddenMatch, hidden_taps
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.train.config import TrainConfig
from jaxdistill.types import Outputs

RNG = np.random.default_rng(0)
MASK = np.array([[1.0, 1, 1, 0], [1, 0, 0, 0]], np.float32)
STUDENT, TEACHER = RNG.normal(size=(2, 2, 4, 3)), RNG.normal(size=(2, 2, 4, 5))
PROJECTION = RNG.normal(size=(3, 5))

DISTANCES = {
    "cosine": lambda s, t: 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t),
    "mse": lambda s, t: np.mean((s - t) ** 2),
    "normalized_mse": lambda s, t: np.sum((s - t) ** 2) / np.sum(t**2),
}


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_mean_over_pairs_and_supervised_positions(distance):
    term = HiddenMatch(layers=((0, 4), (3, 2)), distance=distance)
    mean = term(*(jnp.asarray(x, jnp.float32) for x in (STUDENT, TEACHER, MASK)), {"projection": PROJECTION})
    expected = [
        DISTANCES[distance](STUDENT[s, row, at] @ PROJECTION, TEACHER[t, row, at])
        # As tapped: the student's layers are 0 and 3, the teacher's 2 and 4.
        for s, t in ((0, 1), (1, 0))
        for row, at in np.argwhere(MASK)
    ]
    assert float(mean.value) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(mean.count) == 4


def test_one_layer_may_stand_in_several_pairs():
    term = HiddenMatch(layers=((1, 2), (1, 0)), distance="mse")
    assert hidden_taps({"states": term, "kl": ForwardKL()}, "student")["states"].layers == (1,)
    assert term.tap("teacher").layers == (0, 2)
    student = jnp.asarray(STUDENT[:1], jnp.float32)
    teacher = jnp.stack([student[0], student[0] + 2.0])
    assert float(term(student, teacher, jnp.asarray(MASK), {}).value) == pytest.approx(2.0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_stands_at_padding_reaches_no_gradient(distance, poison):
    term = HiddenMatch(layers=((0, 0), (1, 1)), distance=distance)
    bad = jnp.asarray(np.where(MASK[..., None] == 0, poison, STUDENT), jnp.float32)

    def value(states, projection):
        return term(states, jnp.asarray(TEACHER, jnp.float32), jnp.asarray(MASK), {"projection": projection}).value

    slopes = jax.grad(value, argnums=(0, 1))(bad, jnp.asarray(PROJECTION, jnp.float32))
    clean = jax.grad(value, argnums=(0, 1))(jnp.asarray(STUDENT, jnp.float32), jnp.asarray(PROJECTION, jnp.float32))
    np.testing.assert_allclose(slopes[1], clean[1], rtol=1e-5)
    np.testing.assert_allclose(slopes[0], np.where(MASK[..., None] == 0, 0, clean[0]), rtol=1e-5)


def test_the_map_between_widths_is_not_rounded_on_the_way():
    """Accelerators multiply float32 in fewer bits unless they are told otherwise, forward and backward."""
    term = HiddenMatch(layers=((0, 0), (1, 1)))
    states, projection = (jnp.asarray(x, jnp.float32) for x in (STUDENT, PROJECTION))

    def value(states, projection):
        return term(states, jnp.asarray(TEACHER), jnp.asarray(MASK), {"projection": projection}).value

    program = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(states, projection))
    assert program.count("dot_general") > 2
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_equal_states_have_distance_zero_and_no_slope():
    states = jnp.asarray(TEACHER, jnp.float32)
    for distance in DISTANCES:
        term = HiddenMatch(layers=((0, 0), (1, 1)), distance=distance)
        value, slope = jax.value_and_grad(lambda s, term=term: term(s, states, jnp.asarray(MASK), {}).value)(states)
        assert float(value) == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_pairs_are_resolved_against_both_models():
    def resolved(layers=None, kept=None, student_depth=2, teacher_depth=4):
        term = HiddenMatch(layers=layers)
        return term.resolved(student_depth=student_depth, teacher_depth=teacher_depth, kept=kept).layers

    assert resolved(((-2, -2), (0, 1))) == ((0, 2), (0, 1))
    assert resolved(kept=(0, 3)) == ((0, 0), (1, 3))
    assert resolved(student_depth=4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    with pytest.raises(ValueError, match="is not known; give pairs"):
        resolved()
    with pytest.raises(ValueError, match=r"pairs \[\(2, 0\)\]; the student has 2 layers and the teacher 4"):
        resolved(((2, 0), (1, 3)))
    with pytest.raises(ValueError, match=r"the pairs \[\(1, 3\)\] more than once"):
        resolved(((1, 3), (-1, -1)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "at least one pair"),
        ((0, 3), r"is \(0, 3\); give pairs of whole numbers"),
        (((0, 1, 2),), "give pairs of whole numbers"),
        (((0, 1.0),), "give pairs of whole numbers"),
        (((0, 1), (1, 2), (0, 1)), r"the pairs \[\(0, 1\)\] more than once"),
    ],
)
def test_what_is_wrong_whatever_the_models_are_is_refused_at_once(layers, message):
    with pytest.raises(ValueError, match=message):
        HiddenMatch(layers=layers)


@pytest.mark.parametrize(("field", "given"), [("distance", "cos"), ("point", "mlp")])
def test_unknown_kinds_are_refused(field, given):
    with pytest.raises(ValueError, match=f"HiddenMatch.{field} is '{given}'; allowed are"):
        HiddenMatch(**{field: given})


@pytest.mark.parametrize("layers", [None, ((-2, -2),)])
def test_only_resolved_pairs_are_tapped(layers):
    with pytest.raises(ValueError, match="call `resolved` first"):
        HiddenMatch(layers=layers).tap("student")


def test_states_after_the_final_norm_have_no_layer():
    term = HiddenMatch(point="final_normed", distance="mse")
    assert term.resolved(student_depth=2, teacher_depth=4, kept=None) == term
    assert hidden_taps({"states": term}, "student") == {}
    hidden = jnp.asarray(STUDENT[0], jnp.float32)
    states = term.states("states", Outputs(hidden, head=None, taps={}))
    value = term(states, hidden[None] + 2.0, jnp.asarray(MASK), {}).value
    assert float(value) == pytest.approx(4.0)
    with pytest.raises(ValueError, match=r"layers is \(\(-1, -1\),\) and point 'final_normed', which no layer has"):
        HiddenMatch(layers=((-1, -1),), point="final_normed")


def test_equal_widths_learn_no_map():
    term = HiddenMatch(layers=((0, 0),))
    assert term.parameters(jax.random.key(0), student_embed=8, teacher_embed=8) == {}
    assert term.parameters(jax.random.key(0), student_embed=8, teacher_embed=6)["projection"].shape == (8, 6)


def test_a_term_is_balanced_with_one_on_scores():
    with pytest.raises(ValueError, match=r"losses\.a is balanced with 'b'; allowed are the terms on scores: \['kl'\]"):
        TrainConfig(out="", losses={"kl": ForwardKL(), "a": HiddenMatch(balance="b"), "b": HiddenMatch()})
