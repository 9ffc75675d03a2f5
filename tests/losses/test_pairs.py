"""Terms on pairs of positions: paired as the definition says, and right by it on every mesh, from hidden states on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chunked import LearnedKL, shapes_in
from tiny import LAYOUTS, MESHES, assert_gradients_close, paired_batch, slow

from jaxdistill.losses import aligned
from jaxdistill.losses.aligned import aligned_means, reads_teacher
from jaxdistill.losses.alm import ALM, EndsChunk
from jaxdistill.losses.chunked import term_values
from jaxdistill.losses.pairs import ULD, MinED, pair_positions, sorted_distance
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, TeacherCrossEntropy, Term, TopOneAgreement
from jaxdistill.types import Head, Outputs

EMBED, TEACHER_EMBED = 16, 8


def terms_for(vocab: int, teacher_vocab: int) -> dict[str, Term]:
    ids = np.random.default_rng(5).integers(-1, teacher_vocab, vocab - 2).astype(np.int32)
    return {
        "cross_entropy": CrossEntropy(weight=0.3),
        "index": ULD(pairing="index", weight=2.0),
        "uld": ULD(temperature=1.5),
        "most": ULD(ranks=7),
        "mined": MinED(ids=ids, temperature=2.0, text_weight=0.4),
    }


def example(seed: int = 0, *, vocab: int = 64, teacher_vocab: int = 40):
    """(what is learned, the teacher's outputs, a batch in which a part of each segment is not supervised)"""
    rng = np.random.default_rng(seed)
    batch = paired_batch(seed, length=32, teacher_length=28, vocab=vocab, teacher_vocab=teacher_vocab)

    def with_prompts(rows):
        return dataclasses.replace(rows, loss_mask=rows.loss_mask * (rng.uniform(size=rows.tokens.shape) < 0.8))

    def outputs(rows, embed, vocab):
        hidden = rng.normal(size=(*rows.tokens.shape, embed))
        return {
            "hidden": jnp.float32(hidden),
            "kernel": jnp.float32(rng.normal(size=(vocab, embed)) / 2),
            "bias": jnp.float32(rng.normal(size=vocab)),
        }

    batch = with_prompts(dataclasses.replace(batch, teacher=with_prompts(batch.teacher)))
    teacher = outputs(batch.teacher, TEACHER_EMBED, teacher_vocab)
    teacher = Outputs(teacher["hidden"], Head(teacher["kernel"], teacher["bias"]))
    return outputs(batch, EMBED, vocab), teacher, batch


def student_of(learned) -> Outputs:
    return Outputs(learned["hidden"], Head(learned["kernel"], learned["bias"]))


def loss_of(learned, teacher, batch, terms, *, chunk=7, layout="one device"):
    options = {"ends": {}, "parameters": {}, "step": 0, "chunk": chunk, "layout": LAYOUTS[layout]()}
    means = aligned_means(terms, student_of(learned), teacher, batch, **options)
    return sum(term.weight * means[name].value for name, term in terms.items()), means


# Pairs.


def pairs_by_definition(batch, kind: str) -> dict[tuple[int, int], tuple[int, bool]]:
    """(row, student's position) → (teacher's position, whether both are alone in their chunk)."""
    found = {}
    own, theirs = np.asarray(batch.chunks), np.asarray(batch.teacher_chunks)
    for row in range(len(own)):
        if kind == "chunks":
            for number in range(1, own[row].max(initial=0) + 1):
                mine, other = np.flatnonzero(own[row] == number), np.flatnonzero(theirs[row] == number)
                if len(mine) and len(other):
                    found[row, mine[0]] = (other[0], len(mine) == len(other) == 1)
        else:
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                mine, other = (
                    np.flatnonzero(
                        (np.asarray(rows.segment_ids[row]) == segment) & (np.asarray(rows.loss_mask[row]) > 0)
                    )
                    for rows in (batch, batch.teacher)
                )
                found |= {(row, a): (b, False) for a, b in zip(mine, other, strict=False)}
    return found


@pytest.mark.parametrize("kind", ["chunks", "index"])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_the_definition(kind, seed):
    _, _, batch = example(seed)
    pairs = jax.jit(pair_positions, static_argnums=0)(kind, batch)
    expected = pairs_by_definition(batch, kind)
    assert len(expected) > 30
    assert kind == "index" or 3 < sum(alone for _, alone in expected.values()) < len(expected) - 5
    for place in np.ndindex(*batch.tokens.shape):
        position, alone = expected.get(place, (0, False))
        assert bool(pairs.exists[place]) == (place in expected)
        assert int(pairs.positions[place]) == position
        assert bool(pairs.one_to_one[place]) == alone


def test_a_chunk_that_one_side_lacks_has_no_pair():
    _, _, batch = example()
    number = int(batch.teacher_chunks[0].max())
    cut = dataclasses.replace(batch, teacher_chunks=jnp.where(batch.teacher_chunks == number, 0, batch.teacher_chunks))
    whole, less = (pair_positions("chunks", rows) for rows in (batch, cut))
    lost = np.asarray(whole.exists & ~less.exists)
    assert lost[0].sum() == 1
    assert np.all(np.asarray(batch.chunks)[lost] == number)
    assert not np.any(np.asarray(less.positions)[lost])


# Values.


def softmax64(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


def uld64(p: np.ndarray, q: np.ndarray, ranks: int | None = None) -> float:
    size = max(len(p), len(q))
    p, q = (np.sort(np.pad(x, (0, size - len(x))))[::-1] for x in (p, q))
    if ranks is None:
        return float(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
    return uld64(p[:ranks], q[:ranks]) + abs(p[ranks:].sum() - q[ranks:].sum())


def mined64(term: MinED, p: np.ndarray, scores: np.ndarray, target: int, alone: bool) -> float:
    """p: the teacher's scores; at the term's temperature."""
    q = softmax64(scores / term.temperature)
    square = term.temperature**2 if term.scale_by_square else 1.0
    if not alone:
        return square * term.text_weight * -np.log(q[target])
    p = softmax64(p / term.temperature)
    carried = np.array(
        [p[i] if i >= 0 else 0.0 for i in np.pad(term.ids, (0, len(q) - len(term.ids)), constant_values=-1)]
    )
    carried /= carried.sum()
    return square * sum(a * np.log(a / b) for a, b in zip(carried, q, strict=True) if a > 0)


def by_definition(learned, teacher, batch, terms) -> dict[str, tuple[float, float]]:
    """(total, count) of each term, one position after the other in float64."""
    sides = [
        np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64).T + np.asarray(bias, np.float64)
        for hidden, kernel, bias in (
            (learned["hidden"], learned["kernel"], learned["bias"]),
            (teacher.hidden, teacher.head.kernel, teacher.head.bias),
        )
    ]
    found = dict.fromkeys(terms, (0.0, 0.0))
    for name, term in terms.items():
        pairs = {} if name == "cross_entropy" else pairs_by_definition(batch, term.pairs)
        for row, t in np.argwhere(np.asarray(batch.loss_mask)):
            scores, target = sides[0][row, t], int(batch.targets[row, t])
            place, alone = pairs.get((row, t), (None, False))
            if isinstance(term, ULD):
                if place is None:
                    continue
                p, q = (softmax64(x / term.temperature) for x in (sides[1][row, place], scores))
                value = uld64(p, q, term.ranks)
            elif isinstance(term, MinED):
                value = mined64(term, sides[1][row, place or 0], scores, target, alone)
            else:
                value = -np.log(softmax64(scores)[target])
            found[name] = (found[name][0] + value, found[name][1] + 1)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_definition(seed):
    learned, teacher, batch = example(seed)
    terms = terms_for(64, 40)
    _, means = loss_of(learned, teacher, batch, terms)
    for name, (total, count) in by_definition(learned, teacher, batch, terms).items():
        assert float(means[name].count) == count > 20, name
        np.testing.assert_allclose(float(means[name].total), total, rtol=1e-5, err_msg=name)


def by_full_scores(learned, teacher, batch, terms):
    """The same loss from whole score arrays, without chunks, and without our sorting."""
    student = learned["hidden"] @ learned["kernel"].T + learned["bias"]
    loss = 0.0
    for name, term in terms.items():
        log_q = jax.nn.log_softmax(student / getattr(term, "temperature", 1.0))
        text = -jnp.take_along_axis(log_q, batch.targets[..., None], axis=-1)[..., 0]
        if name == "cross_entropy":
            values, mask = text, batch.loss_mask
        else:
            pairs = pair_positions(term.pairs, batch)
            scores = jnp.take_along_axis(
                teacher.hidden @ teacher.head.kernel.T + teacher.head.bias, pairs.positions[..., None], axis=1
            )
            scores = scores / term.temperature
            if isinstance(term, ULD):
                p, q = (jnp.sort(x, axis=-1)[..., ::-1] for x in (jax.nn.softmax(scores), jnp.exp(log_q)))
                gaps = jnp.pad(p, ((0, 0), (0, 0), (0, max(0, q.shape[-1] - p.shape[-1]))))
                gaps -= jnp.pad(q, ((0, 0), (0, 0), (0, max(0, p.shape[-1] - q.shape[-1]))))
                if term.ranks is not None:
                    rest = jnp.abs(gaps[..., term.ranks :].sum(-1, keepdims=True))
                    gaps = jnp.concatenate([gaps[..., : term.ranks], rest], axis=-1)
                values, mask = jnp.abs(gaps).sum(-1), pairs.exists * batch.loss_mask
            else:
                ids = np.pad(term.ids, (0, log_q.shape[-1] - len(term.ids)), constant_values=-1)
                named = np.flatnonzero(ids >= 0)
                log_p = jax.nn.log_softmax(scores[..., ids[named]])
                kl = (jnp.exp(log_p) * (log_p - log_q[..., named])).sum(-1)
                values = term.temperature**2 * jnp.where(pairs.one_to_one, kl, term.text_weight * text)
                mask = batch.loss_mask
        loss += term.weight * (values * mask).sum() / mask.sum()
    return loss


def assert_as_full_scores(*, layout: str, vocab: int, teacher_vocab: int):
    learned, teacher, batch = example(vocab=vocab, teacher_vocab=teacher_vocab)
    terms = terms_for(vocab, teacher_vocab)
    expected = jax.jit(jax.value_and_grad(lambda x: by_full_scores(x, teacher, batch, terms)))(learned)
    given = jax.jit(jax.value_and_grad(lambda x: loss_of(x, teacher, batch, terms, layout=layout)[0]))(learned)
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-5)
    assert_gradients_close(given[1], expected[1])


@pytest.mark.parametrize("layout", [slow("one device"), *MESHES[1:]])
def test_every_mesh_gives_the_loss_and_gradients_of_full_scores(layout):
    assert_as_full_scores(layout=layout, vocab=64, teacher_vocab=40)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [slow(64, 41), slow(63, 80)])
def test_vocabularies_that_the_mesh_does_not_divide_are_left_whole(vocab, teacher_vocab):
    assert_as_full_scores(layout="fsdp 4 x tensor 2", vocab=vocab, teacher_vocab=teacher_vocab)


@pytest.mark.parametrize("chunk", [slow(1), slow(1000)])
def test_the_chunk_of_the_head_changes_nothing(chunk):
    learned, teacher, batch = example(1)
    terms = terms_for(64, 40)
    expected, given = (
        jax.jit(jax.value_and_grad(lambda x, size=size: loss_of(x, teacher, batch, terms, chunk=size)[0]))(learned)
        for size in (16, chunk)
    )
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-6)
    assert_gradients_close(given[1], expected[1])


@pytest.mark.parametrize(("kind", "poison"), [("chunks", np.nan), ("index", np.inf)])
def test_poisoned_padding_and_positions_without_a_pair_reach_neither_value_nor_gradient(kind, poison):
    learned, teacher, batch = example(7)
    terms = {name: term for name, term in terms_for(64, 40).items() if getattr(term, "pairs", kind) == kind}
    expected = jax.jit(jax.value_and_grad(lambda x: loss_of(x, teacher, batch, terms)[0]))(learned)
    read = np.zeros(batch.teacher.tokens.shape, bool)
    for (row, _), (position, _) in pairs_by_definition(batch, kind).items():
        read[row, position] = True
    assert (np.asarray(batch.teacher.segment_ids)[~read] > 0).any()
    assert not read[:, 0].all(), "the first position is a partner in every row"
    dirty = learned | {"hidden": jnp.where(batch.segment_ids[..., None] == 0, poison, learned["hidden"])}
    theirs = dataclasses.replace(teacher, hidden=jnp.where(read[..., None], teacher.hidden, poison))
    given = jax.jit(jax.value_and_grad(lambda x: loss_of(x, theirs, batch, terms)[0]))(dirty)
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-6)
    assert_gradients_close(given[1], expected[1])


def test_no_array_of_all_positions_by_vocabulary_exists():
    learned, teacher, batch = example()
    terms = terms_for(64, 40)
    program = jax.make_jaxpr(jax.grad(lambda x: loss_of(x, teacher, batch, terms, chunk=6)[0]))(learned)
    sizes = {int(np.prod(shape)) for shape in shapes_in(program.jaxpr) if 64 in shape or 40 in shape}
    assert {6 * 64, 6 * 40} <= sizes, "the search is broken"
    assert max(sizes) <= 64 * EMBED, "only a head may be larger than a chunk of scores"


def test_equal_models_on_equal_tokens_have_no_loss_and_no_gradient():
    learned, _, batch = example()
    numbers = jnp.where(batch.segment_ids > 0, jnp.arange(1, batch.tokens.shape[1] + 1), 0)
    batch = dataclasses.replace(batch, chunks=numbers, teacher=batch, teacher_chunks=numbers)
    terms = terms_for(64, 64) | {"mined": MinED(ids=np.arange(64))}
    terms.pop("cross_entropy")
    for name, term in terms.items():
        loss, gradient = jax.value_and_grad(lambda x, one={name: term}: loss_of(x, student_of(learned), batch, one)[0])(
            learned
        )
        np.testing.assert_allclose(loss, 0, atol=1e-6, err_msg=name)
        # What rounding leaves of some ranks has a sign, and so a slope.
        assert name == "most" or max(float(jnp.abs(g).max()) for g in gradient.values()) < 1e-6, name


def test_packed_is_separate():
    """Segments of one row, each in a row of its own: the same totals and counts."""
    learned, teacher, batch = example(4)
    terms = terms_for(64, 40)
    _, whole = loss_of(learned, teacher, batch, terms)
    totals = dict.fromkeys(terms, 0.0)
    counts = dict.fromkeys(terms, 0.0)
    for segment in range(1, int(batch.segment_ids.max()) + 1):

        def only(rows, inside):
            return {"segment_ids": jnp.where(inside, 1, 0), "loss_mask": jnp.where(inside, rows.loss_mask, 0)}

        inside, also = batch.segment_ids == segment, batch.teacher.segment_ids == segment
        alone = dataclasses.replace(
            batch,
            **only(batch, inside),
            chunks=jnp.where(inside, batch.chunks, 0),
            teacher_chunks=jnp.where(also, batch.teacher_chunks, 0),
            teacher=dataclasses.replace(batch.teacher, **only(batch.teacher, also)),
        )
        for name, mean in loss_of(learned, teacher, alone, terms)[1].items():
            totals[name] += float(mean.total)
            counts[name] += float(mean.count)
    for name, mean in whole.items():
        assert counts[name] == float(mean.count), name
        np.testing.assert_allclose(totals[name], float(mean.total), rtol=1e-5, err_msg=name)


# The parts.


@pytest.mark.parametrize("sizes", [(30, 30), (30, 12), (12, 30)])
def test_the_slope_of_a_probability_is_that_of_its_rank(sizes):
    rng = np.random.default_rng(0)
    student, teacher = (jnp.float32(rng.dirichlet(np.ones(size), 4)) for size in sizes)
    value, slopes = jax.value_and_grad(lambda p: sorted_distance(p, teacher).sum())(student)
    np.testing.assert_allclose(
        value, sum(uld64(*pair) for pair in zip(np.float64(teacher), np.float64(student), strict=True)), rtol=1e-6
    )
    size = max(sizes)
    for row in range(4):
        own, theirs = (np.pad(np.sort(x[row])[::-1], (0, size - x.shape[1])) for x in (student, teacher))
        for index, p in enumerate(np.asarray(student[row])):
            rank = int((np.asarray(student[row]) > p).sum())
            assert slopes[row, index] == np.sign(own[rank] - theirs[rank])


def test_fewer_ranks_are_a_lower_bound_and_all_of_them_exact():
    learned, teacher, batch = example()
    exact, *fewer, all_of_them = (
        float(loss_of(learned, teacher, batch, {"uld": ULD(ranks=ranks)})[0]) for ranks in (None, 1, 4, 16, 1000)
    )
    np.testing.assert_allclose(all_of_them, exact, rtol=1e-6)
    assert 0 < fewer[0] < fewer[1] < fewer[2] < exact


def test_ids_of_the_teacher_count_in_full_for_each_and_are_made_a_distribution_again():
    """Two ids take the teacher's first, nobody takes its last."""
    teacher = Outputs(jnp.ones((1, 1, 1)), Head(jnp.log(jnp.float32([[0.5], [0.2], [0.3]]))))
    student = Outputs(jnp.ones((1, 1, 1)), Head(jnp.log(jnp.float32([[0.1], [0.6], [0.3]]))))
    values = term_values(
        {"mined": MinED(ids=np.array([0, 0, 1]))},
        student,
        teacher,
        targets=jnp.zeros((1, 1), jnp.int32),
        loss_mask=jnp.ones((1, 1)),
        one_to_one=jnp.ones((1, 1), bool),
        chunk=1,
    )
    carried = np.array([0.5, 0.5, 0.2]) / 1.2
    np.testing.assert_allclose(values["mined"], (carried * np.log(carried / [0.1, 0.6, 0.3])).sum(), rtol=1e-5)


def test_terms_share_a_pass_of_the_head(monkeypatch):
    """One for all terms of one kind of pairs and those on the student alone; without pairs no teacher is scored."""
    learned, teacher, batch = example()
    seen = []

    def counting(terms, student, teacher, **options):
        seen.append((sorted(terms), teacher is not None))
        return term_values(terms, student, teacher, **options)

    monkeypatch.setattr(aligned, "term_values", counting)
    terms = terms_for(64, 40)
    loss_of(learned, teacher, batch, terms)
    assert seen == [(["cross_entropy", "index"], True), (["mined", "most", "uld"], True)]
    seen.clear()
    loss_of(learned, teacher, batch, {"cross_entropy": terms["cross_entropy"]})
    assert seen == [(["cross_entropy"], False)]
    seen.clear()
    loss_of(learned, teacher, batch, {name: terms[name] for name in ("cross_entropy", "uld", "mined")})
    assert seen == [(["cross_entropy", "mined", "uld"], True)]


# What is refused.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharpened(Term):
    """Cross-entropy at a learned temperature: parameters, and no teacher."""

    def parameters(self, key, *, student_embed, teacher_embed):
        return {"temperature": jax.random.uniform(key)}

    def __call__(self, student, teacher, at, parameters):
        student = student.at_temperature(parameters["temperature"])
        return student.log_normalizer() - student.take(at.targets)


@pytest.mark.parametrize(
    ("term", "reads"),
    [
        (CrossEntropy(), False),
        (EndsChunk(ids=np.arange(5) < 2), False),
        (Sharpened(), False),
        (ForwardKL(temperature=lambda step: 1.0 + step), True),
        (TeacherCrossEntropy(), True),
        (TopOneAgreement(), True),
        (LearnedKL(), True),
        (ULD(), True),
        (MinED(ids=np.zeros(8, np.int32)), True),
    ],
    ids=lambda x: str(x) if isinstance(x, bool) else type(x).__name__,
)
def test_whether_a_term_reads_the_teacher(term, reads):
    assert reads_teacher(term) == reads


def test_an_error_of_a_term_is_not_taken_for_an_answer():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Broken(Term):
        def __call__(self, student, teacher, at, parameters):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reads_teacher(Broken())


def test_terms_on_equal_ids_are_refused():
    """The student's own scores would stand in for the teacher's, silently."""
    learned, teacher, batch = example(vocab=40)
    for term in (ForwardKL(), TopOneAgreement(), TeacherCrossEntropy()):
        with pytest.raises(
            ValueError, match=rf"\{{'mine': '{type(term).__name__}'\}} read.*Allowed are .*CrossEntropy"
        ):
            loss_of(learned, teacher, batch, {"alm": ALM(), "mine": term})


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="allowed are chunks, index"):
        ULD(pairing="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, or None"):
        ULD(ranks=0)
    for term in (ULD, MinED):
        with pytest.raises(ValueError, match=rf"{term.__name__}.temperature is 0; it must be positive"):
            term(temperature=0)
    with pytest.raises(ValueError, match="must not be negative"):
        MinED(text_weight=-1.0)
    learned, teacher, batch = example()
    with pytest.raises(ValueError, match="call `resolved` first"):
        loss_of(learned, teacher, batch, {"mined": MinED()})
    with pytest.raises(ValueError, match="the teacher's id 40, and the teacher scores 40"):
        loss_of(learned, teacher, batch, {"mined": MinED().resolved(np.full(64, 40))})
