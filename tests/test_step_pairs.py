"""The train step where the teacher has another tokenizer: settings that should not change a result do not."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import LAYOUTS, assert_changes_close, llama, packed_batch, paired_batch, slow
from tiny import params as tiny_params

from jaxdistill.losses.aligned import Ends, aligned_means, at_chunk_ends
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.dual_space import DSKD
from jaxdistill.losses.hidden import HiddenMatch, hidden_taps
from jaxdistill.losses.pairs import ULD, MinED
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
from jaxdistill.models.decoder import apply
from jaxdistill.models.schema import param_shardings
from jaxdistill.objective import Objective, Seen
from jaxdistill.optimizer import Optax, side_by_side
from jaxdistill.sharding import put_batch
from jaxdistill.step import init_state, make_eval_step, make_train_step, state_shardings
from jaxdistill.types import as_batch

STUDENT = llama(layers=2, vocab=64)
TEACHER = llama(layers=3, embed=24, mlp=40, tied=False, vocab=40)
TERMS = {
    "alm": ALM(temperature=5.0, merge_threshold=0.03),
    "hidden": HiddenMatch(layers=((1, 2), (0, 0)), distance="channelwise", weight=0.1),
    "states": HiddenMatch(layers=((1, 1),), balance="alm", weight=0.5),
    "final": HiddenMatch(point="final_normed", distance="channelwise", weight=0.2),
    "cross_entropy": CrossEntropy(weight=0.3),
}
BASELINES = {
    "uld": ULD(pairing="index", weight=1.5),
    "mined": MinED(ids=np.arange(64) * 7 % 40),
    "dskd": DSKD(),
    "cross_entropy": CrossEntropy(),
    "states": HiddenMatch(layers=((1, 1),), balance="mined", weight=0.5),
}
ENDS = {"alm": Ends(np.arange(64) % 3 == 0, np.arange(40) % 4 == 1)}


def run(layout: str, *, accumulate: int = 1, steps: int = 10, terms=TERMS, corrected=None, weighting="fixed"):
    """Losses of some steps of SGD, the change of all parameters in the first, and its metrics."""
    place = LAYOUTS[layout]()
    optimizer = Optax(optax.sgd(0.5)).build(10)
    if corrected:
        optimizer = side_by_side(optimizer, Optax(optax.sgd(0.1)).build(10))
    student, teacher = (
        jax.device_put(tiny_params(shape, seed, head_scale=scale), param_shardings(shape, place))
        for shape, seed, scale in ((STUDENT, 0, 1.0), (TEACHER, 1, 3.0))
    )
    learner = teacher if corrected else None
    start = functools.partial(
        init_state, terms=terms, optimizer=optimizer, key=jax.random.key(0), student_embed=16, teacher_embed=24
    )
    shardings = state_shardings(
        jax.eval_shape(start, student, teacher=learner),
        param_shardings(STUDENT, place),
        place,
        optimizer,
        teacher=param_shardings(TEACHER, place) if corrected else None,
    )
    state = jax.jit(start, out_shardings=shardings)(student, teacher=learner)
    step = make_train_step(
        functools.partial(apply, STUDENT, layout=place, taps=hidden_taps(terms, "student")),
        functools.partial(apply, TEACHER, layout=place, taps=hidden_taps(terms, "teacher")),
        terms,
        optimizer,
        chunk=32,
        accumulate=accumulate,
        layout=place,
        gradient_shardings=shardings.params,
        correction=corrected,
        ends=ENDS,
        weighting=weighting,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    losses, change, first = [], None, None
    for number in range(steps):
        before = jax.tree.map(np.asarray, state.params)
        batch = put_batch(place, jax.tree.map(np.asarray, paired_batch(number, teacher_vocab=40)))
        state, metrics = step(state, {}, teacher, batch)
        losses.append(float(metrics["loss"]))
        if number == 0:
            change = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
            first = metrics
    return np.array(losses), change, first


REFERENCE = functools.cache(lambda: run("one device"))


@pytest.mark.parametrize(
    ("layout", "accumulate"),
    [slow("one device", 2), slow("fsdp 8", 1), ("fsdp 4 x tensor 2", 2), slow("sequence 2 x fsdp 4", 2)],
)
def test_the_mesh_and_micro_batches_change_nothing(layout, accumulate):
    losses, change, metrics = run(layout, accumulate=accumulate)
    expected, first_change, first = REFERENCE()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_changes_close(change, first_change)
    for name, mean in first["terms"].items():
        np.testing.assert_allclose(metrics["terms"][name].value, mean.value, rtol=1e-5, err_msg=name)


BASELINE_REFERENCE = functools.cache(lambda: run("one device", terms=BASELINES, steps=4))


@pytest.mark.parametrize(("layout", "accumulate"), [slow("one device", 2), slow("fsdp 4 x tensor 2", 2)])
def test_the_mesh_and_micro_batches_change_nothing_for_other_methods(layout, accumulate):
    losses, change, metrics = run(layout, accumulate=accumulate, terms=BASELINES, steps=4)
    expected, first_change, first = BASELINE_REFERENCE()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_changes_close(change, first_change)
    for name, mean in first["terms"].items():
        np.testing.assert_allclose(metrics["terms"][name].value, mean.value, rtol=1e-5, err_msg=name)
    assert all(np.abs(part).max() > 0 for part in jax.tree.leaves(change["objective"]["dskd"]))


def test_the_loss_is_the_weighted_sum_of_the_terms():
    losses, change, metrics = REFERENCE()
    values = {name: float(mean.value) for name, mean in metrics["terms"].items()}
    # The balanced term counts as much as its weight says of the term that it is balanced with.
    expected = values["alm"] * (1 + 0.5) + 0.1 * values["hidden"] + 0.2 * values["final"]
    expected += 0.3 * values["cross_entropy"]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    assert losses[-1] < losses[0]
    assert all(np.abs(change["objective"][name]["projection"]).max() > 0 for name in ("hidden", "final"))


@pytest.mark.slow
def test_a_corrected_teacher_learns_from_its_own_rows():
    """Divided by the teacher's supervised positions, not the student's, also in micro-batches."""
    corrected = {"cross_entropy": CrossEntropy()}
    one, two = (run("one device", accumulate=n, steps=1, corrected=corrected, terms={"alm": ALM()}) for n in (1, 2))
    rows = paired_batch(0, teacher_vocab=40).teacher
    assert float(one[2]["terms"]["teacher/cross_entropy"].count) == float(rows.loss_mask.sum())
    assert rows.loss_mask.sum() != paired_batch(0).loss_mask.sum()
    assert_changes_close(two[1]["teacher"], one[1]["teacher"])
    assert np.abs(one[1]["teacher"]["head"]["kernel"]).max() > 0
    np.testing.assert_allclose(
        one[0][0],
        float(one[2]["terms"]["alm"].value) + float(one[2]["terms"]["teacher/cross_entropy"].value),
        rtol=1e-5,
    )


BY_SIZE = "gradient_magnitude"
WEIGHED = {name: TERMS[name] for name in ("alm", "hidden", "final", "cross_entropy")}


@functools.cache
def weighed(layout: str = "one device", accumulate: int = 1):
    return run(layout, accumulate=accumulate, steps=3, terms=WEIGHED, weighting=BY_SIZE)


@pytest.mark.slow
def test_gradients_have_the_sizes_that_weights_say():
    """Against the gradients of each term alone, and their norms by relative changes of what the student returns."""
    batch, taps = paired_batch(0, teacher_vocab=40), hidden_taps(WEIGHED, "student")
    outputs = apply(STUDENT, tiny_params(STUDENT, 0), batch, taps=taps)
    teacher = apply(
        TEACHER, tiny_params(TEACHER, 1, head_scale=3.0), batch.teacher, taps=hidden_taps(WEIGHED, "teacher")
    )
    given = {"hidden": outputs.hidden, "taps": outputs.taps}
    theirs = {"hidden": teacher.taps["hidden"], "final": teacher.hidden[None]}

    def value(name, place, read):
        own = {"hidden": read["taps"]["hidden"], "final": read["hidden"][None]}
        if name in own:
            key = jax.random.fold_in(jax.random.key(0), place)
            *states, mask = at_chunk_ends(batch, own[name], theirs[name])
            mean = WEIGHED[name](*states, mask, WEIGHED[name].parameters(key, student_embed=16, teacher_embed=24))
            return (mean.total / mean.count).mean()
        student = dataclasses.replace(outputs, hidden=read["hidden"])
        terms = {name: WEIGHED[name]}
        return aligned_means(terms, student, teacher, batch, ends=ENDS, parameters={}, step=0, chunk=8)[name].value

    inverse, alone = {}, {}
    for place, name in enumerate(WEIGHED):
        gradient = jax.grad(functools.partial(value, name, place))(given)
        relative = jax.tree.map(lambda g, state: g * np.sqrt((state**2).mean(-1, keepdims=True)), gradient, given)
        inverse[name] = 1 / np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(relative)))
        # The key of a projection is drawn by the place of its term.
        terms = {other: dataclasses.replace(each, weight=float(other == name)) for other, each in WEIGHED.items()}
        alone[name] = run("one device", steps=1, terms=terms)[1]
    factors = {name: WEIGHED[name].weight * inverse[name] / sum(inverse.values()) for name in WEIGHED}
    expected = jax.tree.map(lambda *g: sum(f * x for f, x in zip(factors.values(), g, strict=True)), *alone.values())
    assert_changes_close(weighed()[1], expected)
    assert max(inverse.values()) > 3 * min(inverse.values()), "the example has gradients of different sizes"


@pytest.mark.parametrize(("layout", "accumulate"), [slow("one device", 2), slow("fsdp 4 x tensor 2", 1)])
def test_gradients_weigh_the_same_on_every_mesh_and_in_micro_batches(layout, accumulate):
    losses, change, _ = weighed(layout, accumulate)
    np.testing.assert_allclose(losses, weighed()[0], rtol=1e-5)
    assert_changes_close(change, weighed()[1])


def test_the_size_of_a_models_states_does_not_weigh():
    """Models whose layers hand on states ten times as large, and which predict the same."""
    terms = {
        "kl": ForwardKL(),
        "embedding": HiddenMatch(layers=((0, 0),), point="input"),
        "blocks": HiddenMatch(layers=((0, 1), (1, 0)), distance="channelwise"),
    }
    shape, batch = dataclasses.replace(STUDENT, tied=False, norm_epsilon=1e-12), packed_batch()

    read = jax.jit(functools.partial(apply, shape, taps=hidden_taps(terms, "student")))

    def states(seed, size):
        given = tiny_params(shape, seed)
        layers = given["segments"]["0"]
        for part in (given["embedding"], layers["ffn"]["down"], layers["mixer"]["output"]):
            part["kernel"] *= size
        return read(given, batch)

    values = jax.jit(functools.partial(weighed_values, terms))
    small, large = (values(states(0, size), states(1, size), batch) for size in (1.0, 10.0))
    np.testing.assert_allclose(small, large, rtol=1e-4)
    assert small.min() > 0.01 * small.max()


def weighed_values(terms, student, teacher, batch):
    """What the terms add to the loss, one after the other."""
    seen, objective = Seen(student, teacher), Objective(terms=terms, chunk=16, weighting=BY_SIZE)
    known = objective.known(batch, 0)
    means = objective.means(seen, batch, {}, known)[1]
    squares = functools.partial(objective.squared_gradients, seen, batch, {}, known)
    found = objective.factors(means, batch, known, squares)
    return jnp.stack([(factor * means[name].total).sum() for name, factor in found.items()])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_stands_at_padding_does_not_weigh(poison):
    terms, batch = {"kl": ForwardKL(), "final": HiddenMatch(point="final_normed")}, packed_batch()
    student, teacher = (apply(STUDENT, tiny_params(STUDENT, seed), batch) for seed in (0, 1))
    padding = batch.segment_ids[..., None] == 0
    assert padding.any()
    bad = dataclasses.replace(student, hidden=jnp.where(padding, poison, student.hidden))
    values = jax.jit(functools.partial(weighed_values, terms))
    np.testing.assert_allclose(values(bad, teacher, batch), values(student, teacher, batch), rtol=1e-6)


def test_evaluation_gives_the_same_means():
    terms = {name: term for name, term in TERMS.items() if name in ("alm", "cross_entropy")}
    step = make_eval_step(
        functools.partial(apply, STUDENT), functools.partial(apply, TEACHER), terms, chunk=16, ends=ENDS
    )
    means = jax.jit(step)(
        tiny_params(STUDENT, 0), tiny_params(TEACHER, 1, head_scale=3.0), paired_batch(0, teacher_vocab=40)
    )
    for name in terms:
        np.testing.assert_allclose(means[name].value, REFERENCE()[2]["terms"][name].value, rtol=1e-5)


@pytest.mark.parametrize(
    ("terms", "again"),
    [({"alm": ALM()}, True), slow({"mined": BASELINES["mined"], "dskd": DSKD()}, False)],
    ids=["alm", "other"],
)
def test_counts_of_micro_batches_cost_no_model(terms, again):
    """The first pass finds what totals are divided by. For likelihood matching the teacher says it, else the data."""

    def dots(accumulate):
        optimizer = Optax(optax.sgd(0.5)).build(10)
        step = make_train_step(
            functools.partial(apply, STUDENT, taps=hidden_taps(terms, "student")),
            functools.partial(apply, TEACHER, taps=hidden_taps(terms, "teacher")),
            terms,
            optimizer,
            chunk=32,
            accumulate=accumulate,
            ends=ENDS,
        )
        state = init_state(
            tiny_params(STUDENT), terms, optimizer, key=jax.random.key(0), student_embed=16, teacher_embed=24
        )
        text = jax.jit(step).lower(state, {}, tiny_params(TEACHER), paired_batch(0, teacher_vocab=40)).compile()
        return [line for line in text.as_text().splitlines() if " dot(" in line]

    def of_width(lines, width):
        return sum(f",{width}]" in line.split("dot(")[0] for line in lines)

    one, two = dots(1), dots(2)
    assert (of_width(two, TEACHER.layers[0].ffn.mlp) > of_width(one, TEACHER.layers[0].ffn.mlp)) == again
    assert of_width(two, STUDENT.layers[0].ffn.mlp) == of_width(one, STUDENT.layers[0].ffn.mlp) > 0
    assert again or len(two) == len(one)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endless(Term):
    """Infinite everywhere."""

    def __call__(self, student, teacher, at, parameters):
        return jnp.inf * jnp.exp(student.log_normalizer())


def test_a_term_of_weight_zero_is_only_reported():
    losses, change, metrics = run(
        "one device", steps=1, terms={"cross_entropy": CrossEntropy(), "endless": Endless(weight=0.0)}
    )
    assert np.isfinite(losses).all()
    assert int(metrics["skipped"]) == 0
    assert np.isinf(metrics["terms"]["endless"].value)
    assert np.abs(change["student"]["embedding"]["kernel"]).max() > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huge(Term):
    """A gradient beside which that of any other term is rounding."""

    def __call__(self, student, teacher, at, parameters):
        return 1e8 * (student.log_normalizer() - student.take(at.targets))


def test_a_term_without_weight_at_a_step_changes_nothing():
    def change(**more):
        terms = {"cross_entropy": CrossEntropy(), **more}
        return run("one device", steps=1, terms=terms, weighting=BY_SIZE)[1]

    alone = change()
    assert np.abs(alone["student"]["embedding"]["kernel"]).max() > 0
    assert_changes_close(change(huge=Huge(weight=0.0)), alone)
    assert_changes_close(change(huge=Huge(weight=lambda step: 0.0 * step)), alone)


def test_ends_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"the terms \['alm'\] read where a word may end; give `ends`"):
        make_eval_step(functools.partial(apply, STUDENT), functools.partial(apply, TEACHER), {"alm": ALM()}, chunk=8)


def test_terms_that_need_a_teacher_are_refused_without_one():
    with pytest.raises(ValueError, match=r"\['alm', 'final', 'hidden', 'states'\] compare the student with a teacher"):
        make_train_step(functools.partial(apply, STUDENT), None, TERMS, Optax(optax.sgd(1.0)).build(1), chunk=8)


@pytest.mark.parametrize("term", [ALM(), ULD(), MinED(), DSKD()], ids=lambda term: type(term).__name__)
def test_terms_across_tokenizers_are_refused_where_there_is_one(term):
    step = make_eval_step(
        functools.partial(apply, STUDENT, taps=hidden_taps({"mine": term}, "student")),
        functools.partial(apply, STUDENT, taps=hidden_taps({"mine": term}, "teacher")),
        {"mine": term},
        chunk=16,
        ends={"mine": ENDS["alm"]},
    )
    with pytest.raises(ValueError, match=r"\['mine'\] compare two tokenizations of a text, and the batch has one"):
        step(tiny_params(STUDENT, 0), tiny_params(STUDENT, 1), packed_batch())


def test_terms_on_equal_ids_are_refused_where_there_are_two():
    step = make_eval_step(
        functools.partial(apply, STUDENT), functools.partial(apply, TEACHER), {"kl": ForwardKL()}, chunk=16
    )
    with pytest.raises(ValueError, match="on two tokenizations of a text there are none"):
        step(tiny_params(STUDENT, 0), tiny_params(TEACHER, 1), paired_batch(0, teacher_vocab=40))


def test_paired_rows_hold_ids_that_the_models_have():
    batch = jax.tree.map(np.asarray, paired_batch(0))
    rows = {**vars(batch), "teacher": {**vars(batch.teacher), "chunks": batch.teacher_chunks}}
    rows.pop("teacher_chunks")
    again = as_batch(rows, vocab=64, teacher_vocab=64)
    assert dataclasses.asdict(again).keys() == dataclasses.asdict(batch).keys()
    assert jnp.array_equal(again.teacher_chunks, batch.teacher_chunks)
    with pytest.raises(ValueError, match="the models have 40 ids"):
        as_batch(rows, vocab=64, teacher_vocab=40)
