"""Terms across tokenizers, from hidden states on: equal to those of whole score arrays, on every mesh, without them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chunked import shapes_in
from tiny import LAYOUTS, MESHES, assert_gradients_close, paired_batch, slow

from jaxdistill.losses.aligned import Ends, aligned_means, at_chunk_ends
from jaxdistill.losses.alm import ALM, EndsChunk, Path
from jaxdistill.losses.chunked import term_values
from jaxdistill.losses.scores import Scores
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Positions, Term
from jaxdistill.types import Head, Outputs

EMBED, TEACHER_EMBED, VOCAB, TEACHER_VOCAB = 16, 8, 64, 40
TERMS = {"alm": ALM(temperature=5.0, merge_threshold=0.2), "cross_entropy": CrossEntropy()}
ENDS = {"alm": Ends(np.arange(60) % 3 == 0, np.arange(TEACHER_VOCAB) % 4 == 1)}


def example(seed: int = 0):
    """(what is learned, the teacher's outputs, a batch)"""
    rng = np.random.default_rng(seed)
    batch = paired_batch(seed, vocab=VOCAB, teacher_vocab=TEACHER_VOCAB)

    def outputs(rows, embed, vocab):
        hidden = rng.normal(size=(*rows.tokens.shape, embed))
        return {"hidden": jnp.float32(hidden), "kernel": jnp.float32(rng.normal(size=(vocab, embed)) / 2)}

    teacher = outputs(batch.teacher, TEACHER_EMBED, TEACHER_VOCAB)
    return outputs(batch, EMBED, VOCAB), Outputs(teacher["hidden"], Head(teacher["kernel"])), batch


def loss_of(learned, teacher, batch, *, terms=TERMS, chunk=7, layout=None):
    student = Outputs(learned["hidden"], Head(learned["kernel"]))
    options = {"ends": ENDS, "parameters": {}, "step": 0, "chunk": chunk}
    means = aligned_means(terms, student, teacher, batch, layout=layout or LAYOUTS["one device"](), **options)
    return sum(mean.value for mean in means.values()), means


def by_full_scores(learned, teacher, batch):
    """The same loss from whole score arrays."""

    def path(outputs, rows, chunks, ids):
        log_probs = jax.nn.log_softmax(outputs.hidden @ outputs.head.kernel.T)
        chosen = jnp.arange(log_probs.shape[-1])[jnp.pad(ids, (0, log_probs.shape[-1] - len(ids)))]
        return Path(
            log_probs=jnp.take_along_axis(log_probs, rows.targets[..., None], axis=-1)[..., 0],
            ends=jax.nn.logsumexp(log_probs[..., chosen], axis=-1),
            chunks=chunks,
            segment_ids=rows.segment_ids,
        )

    student = Outputs(learned["hidden"], Head(learned["kernel"]))
    own = path(student, batch, batch.chunks, ENDS["alm"].student)
    theirs = path(teacher, batch.teacher, batch.teacher_chunks, ENDS["alm"].teacher)
    cross_entropy = -(own.log_probs * batch.loss_mask).sum() / batch.loss_mask.sum()
    return TERMS["alm"](own, theirs).value + cross_entropy


@pytest.mark.parametrize("layout", [slow("one device"), *MESHES[1:]])
def test_every_mesh_gives_the_loss_and_gradients_of_full_scores(layout):
    learned, teacher, batch = example()
    expected = jax.value_and_grad(by_full_scores)(learned, teacher, batch)
    (loss, _), gradients = jax.jit(
        jax.value_and_grad(lambda x: loss_of(x, teacher, batch, layout=LAYOUTS[layout]()), has_aux=True)
    )(learned)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert_gradients_close(gradients, expected[1])


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_the_chunk_of_the_head_changes_nothing(chunk):
    learned, teacher, batch = example(1)
    expected, given = (
        jax.value_and_grad(lambda x, size=size: loss_of(x, teacher, batch, chunk=size)[0])(learned)
        for size in (16, chunk)
    )
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-6)
    assert_gradients_close(given[1], expected[1])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poisoned_padding_reaches_neither_value_nor_gradient(poison):
    learned, teacher, batch = example(2)
    expected = jax.value_and_grad(lambda x: loss_of(x, teacher, batch)[0])(learned)
    assert all((rows.segment_ids == 0).any() for rows in (batch, batch.teacher))
    dirty = learned | {"hidden": jnp.where(batch.segment_ids[..., None] == 0, poison, learned["hidden"])}
    theirs = dataclasses.replace(
        teacher, hidden=jnp.where(batch.teacher.segment_ids[..., None] == 0, poison, teacher.hidden)
    )
    given = jax.value_and_grad(lambda x: loss_of(x, theirs, batch)[0])(dirty)
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-6)
    assert_gradients_close(given[1], expected[1])


def test_no_array_of_all_positions_by_vocabulary_exists():
    learned, teacher, batch = example()
    program = jax.make_jaxpr(jax.grad(lambda x: loss_of(x, teacher, batch, chunk=6)[0]))(learned)
    found = [shape for shape in shapes_in(program.jaxpr) if VOCAB in shape or TEACHER_VOCAB in shape]
    sizes = [int(np.prod(shape)) for shape in found]
    assert {6 * VOCAB, 6 * TEACHER_VOCAB} <= {*sizes}, "the search is broken"
    assert max(sizes) <= VOCAB * EMBED, "only a head may be larger than a chunk of scores"


def test_memory_grows_with_the_length_not_with_its_square():
    """Of the loss and its gradient, from hidden states on; matrices of chunks by positions would take 64 times."""

    def temporary(length: int) -> int:
        def resized(x):
            return jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype)

        learned, teacher, batch = example()
        learned = learned | {"hidden": resized(learned["hidden"])}
        teacher = dataclasses.replace(teacher, hidden=resized(teacher.hidden))
        gradient = jax.jit(jax.grad(lambda *given: loss_of(*given, chunk=32)[0]))
        program = gradient.lower(learned, teacher, jax.tree.map(resized, batch)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 1.1 * 8 * temporary(1024)


def test_equal_models_on_equal_tokens_have_no_loss():
    """Where both sides are one tokenizer: chunks of one token, and nothing to learn."""
    learned, _, batch = example()
    batch = dataclasses.replace(
        batch,
        chunks=jnp.where(batch.segment_ids > 0, jnp.arange(1, batch.tokens.shape[1] + 1), 0),
        teacher=batch,
    )
    batch = dataclasses.replace(batch, teacher_chunks=batch.chunks)
    same = Outputs(learned["hidden"], Head(learned["kernel"]))
    term = {"alm": ALM(merge_threshold=None)}
    ends = {"alm": Ends(ENDS["alm"].student, ENDS["alm"].student)}

    def loss(x):
        student = Outputs(x["hidden"], Head(x["kernel"]))
        return aligned_means(term, student, same, batch, ends=ends, parameters={}, step=0, chunk=9)["alm"]

    assert float(loss(learned).count) == int((batch.segment_ids > 0).sum())
    np.testing.assert_allclose(loss(learned).value, 0, atol=1e-7)
    gradient = jax.grad(lambda x: loss(x).value)(learned)
    assert max(float(jnp.abs(g).max()) for g in gradient.values()) < 1e-6


def test_packed_is_separate():
    """Segments of one row, each in a row of its own: the same total and count."""
    learned, teacher, batch = example(4)
    (_, whole) = loss_of(learned, teacher, batch)
    total = count = 0.0
    for segment in range(1, int(batch.segment_ids.max()) + 1):
        inside, also = batch.segment_ids == segment, batch.teacher.segment_ids == segment
        alone = dataclasses.replace(
            batch,
            segment_ids=jnp.where(inside, 1, 0),
            chunks=jnp.where(inside, batch.chunks, 0),
            teacher_chunks=jnp.where(also, batch.teacher_chunks, 0),
            teacher=dataclasses.replace(batch.teacher, segment_ids=jnp.where(also, 1, 0)),
        )
        mean = loss_of(learned, teacher, alone)[1]["alm"]
        total, count = total + float(mean.total), count + float(mean.count)
    assert count == float(whole["alm"].count)
    np.testing.assert_allclose(total, float(whole["alm"].total), rtol=1e-5)


def test_states_at_the_ends_of_chunks():
    _, _, batch = example(3)
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(2, *rows.tokens.shape, 3)).astype(np.float32) for rows in (batch, batch.teacher)]
    own, theirs, mask = jax.jit(at_chunk_ends)(batch, *states)
    sides = [(batch.chunks, batch.segment_ids), (batch.teacher_chunks, batch.teacher.segment_ids)]
    seen = 0
    for row, slot in np.ndindex(*mask.shape):
        after = []
        for chunks, segments in sides:
            where = np.flatnonzero(np.asarray(chunks[row]) == slot + 1)
            position = where[-1] + 1 if len(where) else len(chunks[row])
            inside = position < len(chunks[row]) and segments[row, position] == segments[row, position - 1]
            after.append(position if inside else None)
        assert (None not in after) == bool(mask[row, slot])
        if None not in after:
            seen += 1
            np.testing.assert_array_equal(own[:, row, slot], states[0][:, row, after[0]])
            np.testing.assert_array_equal(theirs[:, row, slot], states[1][:, row, after[1]])
    assert seen > 20


def test_values_are_differentiable_one_by_one():
    """`term_values` with arbitrary slopes, with a teacher: as automatic differentiation of full scores gives them."""
    learned, _, batch = example()
    rng = np.random.default_rng(3)
    slopes, mask = (jnp.float32(rng.uniform(size=batch.tokens.shape)) for _ in range(2))
    teacher = Outputs(
        jnp.float32(rng.normal(size=(*batch.tokens.shape, 5))), Head(jnp.float32(rng.normal(size=(VOCAB, 5))))
    )

    def given(x):
        student = Outputs(x["hidden"], Head(x["kernel"]))
        terms = {"kl": ForwardKL(), "share": EndsChunk(ids=ENDS["alm"].student)}
        values = term_values(terms, student, teacher, targets=batch.targets, loss_mask=mask, chunk=10)
        return ((values["kl"] + values["share"]) * slopes).sum()

    def expected(x):
        log_p = jax.nn.log_softmax(teacher.hidden @ teacher.head.kernel.T)
        log_q = jax.nn.log_softmax(x["hidden"] @ x["kernel"].T)
        share = jax.nn.logsumexp(jnp.where(ENDS["alm"].student, log_q[..., : len(ENDS["alm"].student)], -jnp.inf), -1)
        return (((jnp.exp(log_p) * (log_p - log_q)).sum(-1) + share) * mask * slopes).sum()

    (value, gradients), (right, right_gradients) = (jax.value_and_grad(f)(learned) for f in (given, expected))
    np.testing.assert_allclose(value, right, rtol=1e-5)
    np.testing.assert_allclose(given(learned), right, rtol=1e-5)
    assert_gradients_close(gradients, right_gradients)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm(Term):
    """The root of the first score's probability, at a temperature that is learned: its slope at 0 is infinite."""

    def parameters(self, key, *, student_embed, teacher_embed):
        return {"log_temperature": jnp.float32(0.0)}

    def __call__(self, student, teacher, at, parameters):
        warm = student.at_temperature(jnp.exp(parameters["log_temperature"]))
        return jnp.sqrt(jnp.where(at.targets % 8 == 7, 0.0, 1.0) * warm.probs()[:, 0])


def test_terms_on_the_student_alone():
    """With parameters of their own, and blind to positions that are not supervised."""
    learned, teacher, batch = example(5)
    batch = dataclasses.replace(batch, loss_mask=jnp.where(batch.targets % 8 == 7, 0.0, batch.loss_mask))
    assert ((batch.targets % 8 == 7) & (batch.segment_ids > 0)).any()

    def loss(x, log_temperature):
        student = Outputs(x["hidden"], Head(x["kernel"]))
        parameters = {"warm": {"log_temperature": log_temperature}}
        terms = {"warm": Warm(), "alm": TERMS["alm"]}
        means = aligned_means(terms, student, teacher, batch, ends=ENDS, parameters=parameters, step=0, chunk=9)
        return means["warm"].value

    def expected(x, log_temperature):
        probability = jax.nn.softmax(x["hidden"] @ x["kernel"].T / jnp.exp(log_temperature))[..., 0]
        return (jnp.sqrt(probability) * batch.loss_mask).sum() / batch.loss_mask.sum()

    for log_temperature in (0.0, 0.7):
        # What is infinite at a position reaches the term's own parameters whatever its mask is: the scores alone are
        # guarded.
        found, gradient = jax.value_and_grad(loss)(learned, jnp.float32(log_temperature))
        value, slope = jax.value_and_grad(expected)(learned, log_temperature)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        assert_gradients_close(gradient, slope)


def test_ends_without_ids_are_refused():
    with pytest.raises(ValueError, match="no id can follow the end of a chunk"):
        Ends(np.zeros(4, bool), np.ones(4, bool))


def test_the_end_of_a_chunk_is_the_log_of_a_sum():
    scores = jnp.float32(np.random.default_rng(0).normal(size=(5, 12)) * 30)
    term = EndsChunk(ids=np.arange(10) < 3)
    at = Positions(targets=jnp.zeros(5, jnp.int32), step=jnp.int32(0))
    given = term(Scores(scores), Scores(scores), at, {})
    np.testing.assert_allclose(
        given, jax.nn.logsumexp(jax.nn.log_softmax(scores)[:, :3], axis=-1), rtol=1e-5, atol=3e-7
    )
    assert given.min() < -20, "without underflow"
