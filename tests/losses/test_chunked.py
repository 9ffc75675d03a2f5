"""The chunked head: right by definition, equal on every mesh and chunk size, blind to padding, small in memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import collectives_in_loops
from tiny import LAYOUTS, assert_gradients_close

from jaxdistill.losses import chunked
from jaxdistill.losses.chunked import default_chunk, evaluate_terms, term_coefficients
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, TeacherCrossEntropy, Term, TopOneAgreement
from jaxdistill.sharding import Layout
from jaxdistill.types import Head, Outputs

BATCH, LENGTH, EMBED, TEACHER_EMBED, VOCAB = 8, 6, 16, 8, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedKL(Term):
    """A KL whose temperature (inside the sum over the vocabulary) and scale (outside it) are learned."""

    def parameters(self, key, *, student_embed, teacher_embed):
        return {"log_temperature": jnp.float32(0.3), "scale": jnp.float32(1.5)}

    def __call__(self, student, teacher, at, parameters):
        student = student.at_temperature(jnp.exp(parameters["log_temperature"]))
        return parameters["scale"] * teacher.expect(teacher.log_probs() - student.log_probs())


def example(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "hidden": normal(BATCH, LENGTH, EMBED),
        "kernel": normal(VOCAB, EMBED) / 2,
        "bias": normal(VOCAB),
        "teacher_hidden": normal(BATCH, LENGTH, TEACHER_EMBED),
        "teacher_kernel": normal(VOCAB, TEACHER_EMBED),
        "targets": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
        "mask": (rng.uniform(size=(BATCH, LENGTH)) < 0.7).astype(np.float32),
    }


def evaluate(terms, x, *, layout: Layout | None = None, chunk=5, parameters=None, soft_cap=None, step=0, teacher=True):
    """(loss, means) and the gradients by hidden states, kernel, bias and parameters."""
    layout = layout or Layout()
    step = jnp.int32(step)

    def loss(learned):
        return evaluate_terms(
            terms,
            Outputs(learned["hidden"], Head(learned["kernel"], learned["bias"], soft_cap)),
            Outputs(x["teacher_hidden"], Head(x["teacher_kernel"])) if teacher else None,
            targets=x["targets"],
            loss_mask=x["mask"],
            coefficients=term_coefficients(terms, x["mask"].sum(), step),
            parameters=learned["parameters"],
            step=step,
            chunk=chunk,
            layout=layout,
        )

    x = jax.tree.map(jnp.asarray, x)
    learned = {"hidden": x["hidden"], "kernel": x["kernel"], "bias": x["bias"], "parameters": parameters or {}}
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)


def softmax64(scores):
    scores = np.asarray(scores, np.float64)
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


def by_definition(x, *, temperature: float, cross_entropy_weight: float):
    """Values and closed-form gradients of forward KL + weighted cross-entropy, one position after the other."""
    count = x["mask"].sum()
    kl = cross_entropy = agreement = 0.0
    hidden_gradient = np.zeros(x["hidden"].shape)
    kernel_gradient = np.zeros(x["kernel"].shape)
    for row in range(BATCH):
        for t in range(LENGTH):
            if not x["mask"][row, t]:
                continue
            hidden = x["hidden"][row, t].astype(np.float64)
            student = x["kernel"].astype(np.float64) @ hidden + x["bias"]
            teacher = x["teacher_kernel"].astype(np.float64) @ x["teacher_hidden"][row, t]
            p, q = softmax64(teacher / temperature), softmax64(student / temperature)
            kl += temperature**2 * np.sum(p * np.log(p / q))
            hard = softmax64(student)
            target = x["targets"][row, t]
            cross_entropy -= np.log(hard[target])
            agreement += np.argmax(student) == np.argmax(teacher)
            by_score = temperature * (q - p) + cross_entropy_weight * (hard - np.eye(VOCAB)[target])
            hidden_gradient[row, t] = by_score @ x["kernel"] / count
            kernel_gradient += np.outer(by_score, hidden) / count
    return kl / count, cross_entropy / count, agreement / count, hidden_gradient, kernel_gradient


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_are_those_of_the_definition(temperature):
    x = example()
    terms = {
        "kl": ForwardKL(temperature=temperature),
        "cross_entropy": CrossEntropy(weight=0.3),
        "agreement": TopOneAgreement(),
    }
    (loss, means), gradients = evaluate(terms, x)
    kl, cross_entropy, agreement, hidden_gradient, kernel_gradient = by_definition(
        x, temperature=temperature, cross_entropy_weight=0.3
    )
    np.testing.assert_allclose(means["kl"].value, kl, rtol=1e-5)
    np.testing.assert_allclose(means["cross_entropy"].value, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(means["agreement"].value, agreement, rtol=1e-6)
    np.testing.assert_allclose(loss, kl + 0.3 * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(gradients["hidden"], hidden_gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients["kernel"], kernel_gradient, rtol=1e-4, atol=1e-6)


def full_scores(x, terms_of):
    """A loss by automatic differentiation of full score arrays."""

    def loss(learned):
        student = learned["hidden"] @ learned["kernel"].T + learned["bias"]
        teacher = jnp.asarray(x["teacher_hidden"] @ x["teacher_kernel"].T)
        values = terms_of(student, jax.nn.log_softmax(teacher), learned["parameters"])
        return (values * x["mask"]).sum() / x["mask"].sum()

    return loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mesh_gives_the_same_loss_and_gradients(layout):
    x = example(1)
    parameters = {"learned": LearnedKL().parameters(None, student_embed=0, teacher_embed=0)}
    terms = {"learned": LearnedKL(weight=0.5), "kl": ForwardKL(), "agreement": TopOneAgreement()}
    (loss, means), gradients = evaluate(terms, x, layout=LAYOUTS[layout](), parameters=parameters, soft_cap=None)

    def values(student, teacher, parameters):
        p, learned = jnp.exp(teacher), parameters["learned"]
        kl = (p * (teacher - jax.nn.log_softmax(student))).sum(-1)
        warm = jax.nn.log_softmax(student / jnp.exp(learned["log_temperature"]))
        return kl + 0.5 * learned["scale"] * (p * (teacher - warm)).sum(-1)

    learned = {"hidden": x["hidden"], "kernel": x["kernel"], "bias": x["bias"], "parameters": parameters}
    expected, expected_gradients = jax.value_and_grad(full_scores(x, values))(jax.tree.map(jnp.asarray, learned))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_gradients_close(gradients, expected_gradients)
    assert means["kl"].count == x["mask"].sum()


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 1000])
def test_the_chunk_size_changes_nothing(chunk):
    x = example(2)
    terms = {"kl": ForwardKL(temperature=2.0), "cross_entropy": CrossEntropy()}
    (expected, _), expected_gradients = evaluate(terms, x, chunk=BATCH * LENGTH)
    (loss, _), gradients = evaluate(terms, x, chunk=chunk)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_gradients_close(gradients, expected_gradients)


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
def test_the_heads_gradient_is_added_in_blocks_that_need_not_divide_the_vocabulary(layout, monkeypatch):
    x = example(13)
    (_, _), expected = evaluate({"kl": ForwardKL()}, x)
    monkeypatch.setattr(chunked, "BLOCK", 1)
    (_, _), gradients = evaluate({"kl": ForwardKL()}, x, layout=LAYOUTS[layout](), chunk=5)
    assert VOCAB % (5 * VOCAB // EMBED)  # 20 rows a block, or 10 of 32 on two devices
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_poisoned_padding_reaches_neither_value_nor_gradient(poison, layout):
    x = example(3)
    terms = {"kl": ForwardKL(), "cross_entropy": CrossEntropy(weight=0.1)}
    (clean, _), clean_gradients = evaluate(terms, x)
    for name in ("hidden", "teacher_hidden"):
        x[name] = np.where(x["mask"][..., None] == 0, np.float32(poison), x[name])
    x["targets"] = np.where(x["mask"] == 0, -100, x["targets"])
    (loss, _), gradients = evaluate(terms, x, layout=LAYOUTS[layout]())
    np.testing.assert_allclose(loss, clean, rtol=1e-6)
    assert_gradients_close(gradients, clean_gradients)
    assert np.all(np.asarray(gradients["hidden"])[x["mask"] == 0] == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hellinger(Term):
    """A distance with an infinite slope where student and teacher agree, as they do at padding."""

    def __call__(self, student, teacher, at, parameters):
        return jnp.sqrt(student.sum((jnp.sqrt(student.probs()) - jnp.sqrt(teacher.probs())) ** 2))


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
def test_an_infinite_slope_at_padding_reaches_no_gradient(layout):
    x = example(12)
    x["bias"] = np.zeros_like(x["bias"])
    (loss, _), gradients = evaluate({"hellinger": Hellinger()}, x, layout=LAYOUTS[layout]())
    seen = x["mask"] > 0
    p = jax.nn.softmax(x["teacher_hidden"][seen] @ x["teacher_kernel"].T)

    def dropped(hidden, kernel):
        q = jax.nn.softmax(hidden @ kernel.T)
        return jnp.sqrt(((jnp.sqrt(q) - jnp.sqrt(p)) ** 2).sum(-1)).mean()

    expected, (by_hidden, by_kernel) = jax.value_and_grad(dropped, argnums=(0, 1))(x["hidden"][seen], x["kernel"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["hidden"][seen], by_hidden, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients["kernel"], by_kernel, rtol=1e-4, atol=1e-6)


def test_masking_a_position_is_dropping_it():
    x = example(4)
    x["mask"] = np.ones_like(x["mask"])
    x["mask"][:, 4:] = 0
    short = {k: v[:, :4] if v.shape[:2] == (BATCH, LENGTH) else v for k, v in x.items()}
    terms = {"kl": ForwardKL(), "cross_entropy": CrossEntropy()}
    (masked, _), gradients = evaluate(terms, x)
    (dropped, _), short_gradients = evaluate(terms, short)
    np.testing.assert_allclose(masked, dropped, rtol=1e-6)
    assert_gradients_close(gradients["kernel"], short_gradients["kernel"])
    assert_gradients_close(gradients["hidden"][:, :4], short_gradients["hidden"])


def test_nothing_supervised_is_zero_with_zero_gradient():
    x = example(5)
    x["mask"] = np.zeros_like(x["mask"])
    (loss, means), gradients = evaluate({"kl": ForwardKL()}, x)
    assert loss == 0
    assert means["kl"].value == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))


def test_soft_cap_is_differentiated():
    x = example(6)
    (loss, _), gradients = evaluate({"cross_entropy": CrossEntropy()}, x, soft_cap=3.0)

    def capped(learned):
        student = learned["hidden"] @ learned["kernel"].T + learned["bias"]
        log_q = jax.nn.log_softmax(3.0 * jnp.tanh(student / 3.0))
        values = -jnp.take_along_axis(log_q, x["targets"][..., None], -1)[..., 0]
        return (values * x["mask"]).sum() / x["mask"].sum()

    learned = {k: jnp.asarray(x[k]) for k in ("hidden", "kernel", "bias")}
    expected, expected_gradients = jax.value_and_grad(capped)(learned)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_gradients_close({k: gradients[k] for k in learned}, expected_gradients)


def test_terms_of_weight_zero_are_reported_without_gradient():
    x = example(7)
    (loss, means), gradients = evaluate({"cross_entropy": CrossEntropy(weight=0.0)}, x)
    assert loss == 0
    assert means["cross_entropy"].value > 1
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))


def test_hyper_parameters_may_follow_the_step():
    x = example(8)
    scheduled = {"kl": ForwardKL(weight=lambda step: 0.5 * step, temperature=lambda step: 1.0 + step)}
    (loss, _), _ = evaluate(scheduled, x, step=3)
    (expected, _), _ = evaluate({"kl": ForwardKL(weight=1.5, temperature=4.0)}, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_small_divergence_survives_bfloat16_activations():
    """Sums in bfloat16 report a true KL of 0.005 nats as exactly 0."""
    x = jax.tree.map(jnp.asarray, example(9))
    hidden = x["hidden"].astype(jnp.bfloat16)
    kernel = x["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    near = kernel + 0.02 * jnp.asarray(np.random.default_rng(0).normal(size=kernel.shape), jnp.float32)
    near = near.astype(jnp.bfloat16).astype(jnp.float32)
    terms = {"kl": ForwardKL()}
    loss, _ = evaluate_terms(
        terms,
        Outputs(hidden, Head(kernel)),
        Outputs(hidden, Head(near)),
        targets=x["targets"],
        loss_mask=x["mask"],
        coefficients=term_coefficients(terms, x["mask"].sum(), jnp.int32(0)),
        parameters={},
        step=jnp.int32(0),
        chunk=16,
    )
    exact = 0.0
    for row, t in np.argwhere(np.asarray(x["mask"])):
        h = np.asarray(hidden[row, t], np.float64)
        p, q = softmax64(np.asarray(near, np.float64) @ h), softmax64(np.asarray(kernel, np.float64) @ h)
        exact += np.sum(p * np.log(p / q)) / x["mask"].sum()
    assert 1e-4 < exact < 0.02
    np.testing.assert_allclose(loss, exact, rtol=1e-3)


def test_without_a_teacher_terms_on_the_text_alone_work():
    x = example(10)
    (loss, _), _ = evaluate({"cross_entropy": CrossEntropy()}, x, teacher=False)
    (expected, _), _ = evaluate({"cross_entropy": CrossEntropy()}, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_without_a_teacher_the_students_scores_stand_in_without_gradient():
    x = example(10)
    (loss, _), gradients = evaluate({"teacher": TeacherCrossEntropy(weight=1.0)}, x, teacher=False)
    (expected, _), _ = evaluate({"cross_entropy": CrossEntropy()}, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not any(np.any(np.asarray(gradient)) for gradient in jax.tree.leaves(gradients))


def test_the_teachers_own_loss_is_reported():
    x = example(11)
    (_, means), _ = evaluate({"teacher": TeacherCrossEntropy()}, x)
    log_p = jax.nn.log_softmax(x["teacher_hidden"] @ x["teacher_kernel"].T)
    expected = -np.take_along_axis(np.asarray(log_p), x["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(means["teacher"].value, (expected * x["mask"]).sum() / x["mask"].sum(), rtol=1e-5)


# What the compiled program must not hold.


def shapes_in(jaxpr) -> list[tuple[int, ...]]:
    found = []
    for equation in jaxpr.eqns:
        found += [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found += shapes_in(inner)
    return found


def test_no_array_of_all_positions_by_vocabulary_exists():
    x = example()
    terms = {"kl": ForwardKL(), "cross_entropy": CrossEntropy()}

    def loss(hidden, kernel):
        return evaluate_terms(
            terms,
            Outputs(hidden, Head(kernel)),
            Outputs(x["teacher_hidden"], Head(x["teacher_kernel"])),
            targets=x["targets"],
            loss_mask=x["mask"],
            coefficients=term_coefficients(terms, x["mask"].sum(), jnp.int32(0)),
            parameters={},
            step=jnp.int32(0),
            chunk=6,
        )[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x["hidden"], x["kernel"])
    sizes = [int(np.prod(s)) for s in shapes_in(jaxpr.jaxpr) if VOCAB in s]
    assert 6 * VOCAB in sizes, "the chunk's scores should be in the program: the search is broken"
    assert max(sizes) <= VOCAB * EMBED, "only the head may be larger than a chunk of scores"


@pytest.mark.parametrize("layout", ["fsdp 8", "fsdp 4 x tensor 2"])
def test_no_collective_of_head_size_runs_inside_the_token_loop(layout):
    rng = np.random.default_rng(0)
    vocab, embed, chunk = 4096, 32, 8
    place = LAYOUTS[layout]()
    hidden = jnp.asarray(rng.normal(size=(8, 32, embed)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(vocab, embed)), jnp.float32)
    kernel = jax.device_put(kernel, place.sharding(("vocab", "embed"), kernel.shape))
    hidden = jax.device_put(hidden, place.sharding(("batch", "length", None), hidden.shape))
    mask = jnp.ones((8, 32))
    terms = {"kl": ForwardKL(), "cross_entropy": CrossEntropy()}

    def loss(hidden, kernel):
        return evaluate_terms(
            terms,
            Outputs(hidden, Head(kernel)),
            Outputs(hidden, Head(2 * kernel)),
            targets=jnp.zeros((8, 32), jnp.int32),
            loss_mask=mask,
            coefficients=term_coefficients(terms, mask.sum(), jnp.int32(0)),
            parameters={},
            step=jnp.int32(0),
            chunk=chunk,
            layout=place,
        )[0]

    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile()
    text = program.as_text()
    assert " while(" in text
    inside = collectives_in_loops(text)
    assert all(size <= chunk * embed for _, size in inside), inside
    if "tensor" in layout:
        assert inside, "normalizers are summed over vocabulary shards in the loop: the search is broken"
    assert program.output_shardings[1].spec == place.spec(("vocab", "embed"), kernel.shape)


# Errors.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreduced(Term):
    def __call__(self, student, teacher, at, parameters):
        return student.log_probs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShard(Term):
    def __call__(self, student, teacher, at, parameters):
        return student.probs().sum(-1)


def test_a_term_that_does_not_reduce_is_named():
    with pytest.raises(ValueError, match=r"'mine' returned shape \(5, 64\) for 5 positions"):
        evaluate({"mine": Unreduced()}, example())


def test_a_term_that_reduces_one_shard_only_is_named():
    with pytest.raises(ValueError, match=r"'mine' returned sums over one vocabulary shard .*tensor.*Scores\.sum"):
        evaluate({"mine": OneShard()}, example(), layout=LAYOUTS["fsdp 4 x tensor 2"]())


def test_different_vocabularies_are_refused():
    x = example()
    x["teacher_kernel"] = x["teacher_kernel"][:32]
    with pytest.raises(ValueError, match="teacher scores 32 ids and the student 64"):
        evaluate({"kl": ForwardKL()}, x)


def test_chunks_shrink_as_the_vocabulary_grows():
    assert [default_chunk(v) for v in (256, 49152, 65536, 131072, 262144, 10**7)] == [128, 128, 128, 64, 32, 16]
