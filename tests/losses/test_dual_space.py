"""Dual-space distillation: right by its definition, segment by segment, on every mesh, without whole score arrays."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chunked import shapes_in
from tiny import LAYOUTS, MESHES, assert_gradients_close, paired_batch, slow

from jaxdistill.losses.aligned import aligned_means
from jaxdistill.losses.dual_space import DSKD
from jaxdistill.losses.hidden import hidden_taps
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.types import Head, Outputs

EMBED, TEACHER_EMBED, VOCAB, TEACHER_VOCAB = 16, 8, 64, 40
TERM = DSKD(teacher_space=ForwardKL(temperature=1.5), weight=0.7)


def example(seed: int = 0):
    """(what is learned, the teacher's outputs, a batch in which a part of each segment is not supervised). Targets are
    next tokens, embeddings are rows of a table; what projections find is right for about half of the positions."""
    rng = np.random.default_rng(seed)
    batch = paired_batch(seed, vocab=VOCAB, teacher_vocab=TEACHER_VOCAB)

    def with_prompts(rows):
        return dataclasses.replace(rows, loss_mask=rows.loss_mask * (rng.uniform(size=rows.tokens.shape) < 0.9))

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    batch = with_prompts(dataclasses.replace(batch, teacher=with_prompts(batch.teacher)))
    tables = normal(VOCAB, EMBED), normal(TEACHER_VOCAB, TEACHER_EMBED)
    parameters = TERM.parameters(jax.random.key(seed), student_embed=EMBED, teacher_embed=TEACHER_EMBED)
    parameters = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), parameters)
    learned = {
        "hidden": normal(*batch.tokens.shape, EMBED),
        "kernel": normal(VOCAB, EMBED) / 2,
        "embeddings": tables[0][batch.tokens][None],
        "parameters": parameters,
    }
    teacher = Outputs(
        normal(*batch.teacher.tokens.shape, TEACHER_EMBED),
        Head(normal(TEACHER_VOCAB, TEACHER_EMBED)),
        {"dskd": tables[1][batch.teacher.tokens][None]},
    )
    # Only the text is compared with what the projected teacher ranks first.
    found = jax.jit(by_definition, static_argnames="term")(learned, teacher, batch, term=TERM)
    some = rng.uniform(size=batch.tokens.shape) < 0.5
    return learned, teacher, dataclasses.replace(batch, targets=jnp.where(some, found["first"], batch.targets))


def student_of(learned) -> Outputs:
    return Outputs(learned["hidden"], Head(learned["kernel"]), {"dskd": learned["embeddings"]})


def mean_of(learned, teacher, batch, *, term=TERM, chunk=7, layout="one device"):
    options = {"ends": {}, "step": 0, "chunk": chunk, "layout": LAYOUTS[layout]()}
    parameters = {"dskd": learned["parameters"]}
    return aligned_means({"dskd": term}, student_of(learned), teacher, batch, parameters=parameters, **options)["dskd"]


def by_definition(learned, teacher, batch, *, term):
    """The total, the count and what the projected teacher ranks first, from all scores of one segment at a time."""
    stop, maps = jax.lax.stop_gradient, learned["parameters"]
    lengths = batch.segment_ids.shape[1], batch.teacher.segment_ids.shape[1]
    total, count, first = 0.0, 0.0, jnp.zeros(batch.tokens.shape, jnp.int32)

    def mapped(name, x):
        return x @ maps[name] + maps[f"{name}_bias"]

    def deviation(x, used):
        mean = (x * used[:, None]).sum() / (used.sum() * x.shape[1])
        return jnp.where(
            used.any(), jnp.sqrt((((x - mean) * used[:, None]) ** 2).sum() / (used.sum() * x.shape[1])), 1.0
        )

    def kl(kind, scores, other):
        p, q = (jax.nn.log_softmax(x / kind.temperature) for x in (other, scores))
        square = kind.temperature**2 if kind.scale_by_square else 1.0
        return square * (jnp.exp(p) * (p - q)).sum(-1)

    def one_segment(row, segment):
        sides = []
        for rows, embeddings, length in (
            (batch, stop(learned["embeddings"][0]), lengths[0]),
            (batch.teacher, teacher.taps["dskd"][0], lengths[1]),
        ):
            inside = rows.segment_ids[row] == segment
            followed = jnp.append(inside[1:], False) & inside
            used = (followed & (rows.loss_mask[row] > 0)).astype(jnp.float32)
            after = embeddings[row, jnp.minimum(jnp.arange(length) + 1, length - 1)]
            sides.append((embeddings[row], after, used))
        (tokens, targets, used), (their_tokens, their_targets, their_used) = sides
        keys = jnp.concatenate([their_tokens, their_targets], -1)
        keys = keys / deviation(keys, their_used)
        queries = mapped("query", jnp.concatenate([tokens, targets], -1))
        scores = queries @ keys.T / np.sqrt(2 * TEACHER_EMBED)
        states, their_states = learned["hidden"][row], teacher.hidden[row]
        values = their_states / deviation(their_states, their_used)
        values = values + their_targets / deviation(their_targets, their_used)
        weights = jnp.exp(scores - stop(scores).max()) * used[:, None] * their_used
        to_student, to_teacher = (w / jnp.where(w.any(1), w.sum(1), 1.0)[:, None] for w in (weights, weights.T))
        kernel = learned["kernel"]
        brought = to_student @ mapped("to_student", values) @ stop(kernel).T
        sent = to_teacher @ mapped("to_teacher", states) @ teacher.head.kernel.T
        text = -jnp.take_along_axis(jax.nn.log_softmax(brought), batch.targets[row][:, None], axis=1)[:, 0]
        right = (brought.argmax(-1) == batch.targets[row]) if term.only_right else 1.0
        student_space = right * kl(term.student_space, states @ kernel.T, stop(brought))
        teacher_space = kl(term.teacher_space, sent, their_states @ teacher.head.kernel.T)
        both = used.any() & their_used.any()
        value = ((text + student_space) * used).sum() + (teacher_space * their_used).sum()
        return jnp.where(both, value, 0.0), jnp.where(both, used.sum(), 0.0), brought.argmax(-1) * (used > 0)

    for row in range(batch.tokens.shape[0]):
        values, counts, ranked = jax.vmap(lambda s, row=row: one_segment(row, s))(jnp.arange(1, lengths[0] // 2))
        total, count = total + values.sum(), count + counts.sum()
        first = first.at[row].set(ranked.sum(0))
    return {"total": total, "count": count, "first": first}


def reference(learned, teacher, batch, term=TERM):
    def loss(learned):
        found = by_definition(learned, teacher, batch, term=term)
        return found["total"] / found["count"], found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)


@pytest.mark.parametrize("only_right", [slow(True), slow(False)])
def test_value_and_gradients_are_those_of_the_definition(only_right):
    learned, teacher, batch = example()
    term = dataclasses.replace(TERM, only_right=only_right)
    (loss, expected), expected_gradients = reference(learned, teacher, batch, term)
    mean, gradients = jax.jit(jax.value_and_grad(lambda x: mean_of(x, teacher, batch, term=term).value))(learned)
    np.testing.assert_allclose(mean, loss, rtol=1e-5)
    assert_gradients_close(gradients, expected_gradients)
    assert float(expected["count"]) == float(mean_of(learned, teacher, batch, term=term).count) > 60
    # Tokens and targets are what positions are found by, not what is learned; everything else learns.
    assert not np.any(gradients.pop("embeddings"))
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_only_the_students_states_learn_in_its_space():
    """Of the projections cross-entropy alone is seen, and the head's gradient is that of the KL at the student."""
    learned, teacher, batch = example(1)
    silent = dataclasses.replace(TERM, teacher_space=ForwardKL(), student_space=ForwardKL(temperature=1e4))
    loud = dataclasses.replace(silent, student_space=ForwardKL())
    without, given = (
        jax.jit(jax.grad(lambda x, term=term: mean_of(x, teacher, batch, term=term).value))(learned)
        for term in (silent, loud)
    )
    assert_gradients_close(given["parameters"], without["parameters"])
    assert np.abs(given["kernel"]).max() > 1e-3


@pytest.mark.parametrize("layout", MESHES[1:])
def test_every_mesh_gives_the_same_loss_and_gradients(layout):
    learned, teacher, batch = example()
    (loss, _), expected = reference(learned, teacher, batch)
    mean, gradients = jax.jit(jax.value_and_grad(lambda x: mean_of(x, teacher, batch, layout=layout).value))(learned)
    np.testing.assert_allclose(mean, loss, rtol=1e-5)
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("poison", [slow(np.nan), np.inf])
def test_poisoned_positions_that_take_no_part_reach_neither_value_nor_gradient(poison):
    """Padding, and what is not supervised, on either side."""
    learned, teacher, batch = example(2)
    (expected, _), expected_gradients = reference(learned, teacher, batch)

    def dirty(values, rows):
        idle = (rows.segment_ids == 0) | (rows.loss_mask == 0)
        return jnp.where(idle[..., None], poison, values)

    theirs = Outputs(dirty(teacher.hidden, batch.teacher), teacher.head, teacher.taps)
    poisoned = learned | {"hidden": dirty(learned["hidden"], batch)}
    value, gradients = jax.jit(jax.value_and_grad(lambda x: mean_of(x, theirs, batch).value))(poisoned)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_gradients_close(gradients, expected_gradients)
    padding = jnp.where((batch.segment_ids == 0)[..., None], poison, learned["embeddings"])
    np.testing.assert_allclose(mean_of(learned | {"embeddings": padding}, teacher, batch).value, expected, rtol=1e-5)


def test_no_array_of_all_positions_by_vocabulary_exists():
    learned, teacher, batch = example()
    program = jax.make_jaxpr(jax.grad(lambda x: mean_of(x, teacher, batch, chunk=6).value))(learned)
    sizes = {int(np.prod(shape)) for shape in shapes_in(program.jaxpr) if VOCAB in shape or TEACHER_VOCAB in shape}
    assert {6 * VOCAB, 6 * TEACHER_VOCAB} <= sizes, "the search is broken"
    assert max(sizes) <= VOCAB * EMBED, "only a head may be larger than a chunk of scores"


def test_a_scale_of_the_teachers_states_and_embeddings_changes_nothing_in_the_students_space():
    learned, teacher, batch = example()
    # In the teacher's space nothing is left of a teacher's scores at so high a temperature.
    term = dataclasses.replace(TERM, teacher_space=ForwardKL(temperature=1e9, scale_by_square=False))
    scaled = Outputs(5 * teacher.hidden, teacher.head, {"dskd": 0.1 * teacher.taps["dskd"]})
    means = [mean_of(learned, each, batch, term=term) for each in (teacher, scaled)]
    np.testing.assert_allclose(means[1].value, means[0].value, rtol=1e-5)


def test_a_text_without_supervised_targets_on_one_side_takes_no_part():
    learned, teacher, batch = example()
    none = dataclasses.replace(
        batch, teacher=dataclasses.replace(batch.teacher, loss_mask=jnp.zeros_like(batch.teacher.loss_mask))
    )
    mean, gradients = jax.value_and_grad(lambda x: mean_of(x, teacher, none).value)(learned)
    assert float(mean) == float(mean_of(learned, teacher, none).count) == 0
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_both_models_return_the_embeddings_of_their_tokens():
    for side in ("student", "teacher"):
        tap = hidden_taps({"dskd": TERM}, side)["dskd"]
        assert tap.points == ("input",)
        assert tap.layers == (0,)
