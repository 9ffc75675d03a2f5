"""The train step: settings that should not change a result do not; what is frozen stays; bad steps change nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import collectives_in_loops
from tiny import LAYOUTS, assert_changes_close, assert_gradients_close, llama, packed_batch, slow
from tiny import params as tiny_params

from jaxdistill import partition
from jaxdistill.losses.hidden import HiddenMatch, hidden_taps
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
from jaxdistill.models.decoder import Execution, apply
from jaxdistill.models.schema import param_shardings
from jaxdistill.optimizer import AdamW, Optax, scale_by_step, side_by_side
from jaxdistill.sharding import DEFAULT_RULES, Layout, put_batch
from jaxdistill.step import init_state, make_eval_step, make_train_step, state_shardings
from jaxdistill.types import Batch


def models(vocab: int):
    """Student and teacher."""
    return llama(layers=2, vocab=vocab), llama(layers=3, embed=24, mlp=40, tied=False, vocab=vocab)


STUDENT, TEACHER = models(64)
TERMS = {"kl": ForwardKL(temperature=2.0), "cross_entropy": CrossEntropy(weight=0.2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is run; none of it may change what it computes."""

    layout: str = "one device"
    accumulate: int = 1
    chunk: int = 128
    execution: Execution = Execution()
    teacher_rules: dict = dataclasses.field(default_factory=dict)
    vocab: int = 64


@functools.cache
def initial_values(vocab: int):
    """Student and teacher; the teacher's scores are large, so that the two disagree."""
    student, teacher = models(vocab)
    return jax.tree.map(np.asarray, (tiny_params(student, 0), tiny_params(teacher, 1, head_scale=3.0)))


def prepare(setting: Setting, optimizer=None, *, terms=TERMS, trainable=lambda name: True):
    """(jitted step, state, frozen, teacher parameters, layout), everything in its place."""
    optimizer = (optimizer or Optax(optax.sgd(0.5))).build(10)
    layout = LAYOUTS[setting.layout]()
    teacher_layout = Layout(layout.mesh, DEFAULT_RULES.replace(**setting.teacher_rules))
    key = jax.random.key(0)
    shape, teacher_shape = models(setting.vocab)
    student, teacher = (jax.tree.map(jnp.array, p) for p in initial_values(setting.vocab))
    teacher = jax.device_put(teacher, param_shardings(teacher_shape, teacher_layout))
    student = jax.device_put(student, param_shardings(shape, layout))
    student, frozen = partition.split(student, trainable)
    places, _ = partition.split(param_shardings(shape, layout), trainable)
    start = functools.partial(
        init_state,
        terms=terms,
        optimizer=optimizer,
        key=key,
        student_embed=shape.embed,
        teacher_embed=teacher_shape.embed,
    )
    shardings = state_shardings(jax.eval_shape(start, student), places, layout, optimizer)
    state = jax.jit(start, out_shardings=shardings)(student)
    step = make_train_step(
        functools.partial(apply, shape, layout=layout, execution=setting.execution, taps=hidden_taps(terms, "student")),
        functools.partial(apply, teacher_shape, layout=teacher_layout, taps=hidden_taps(terms, "teacher")),
        terms,
        optimizer,
        chunk=setting.chunk,
        accumulate=setting.accumulate,
        layout=layout,
        teacher_layout=teacher_layout,
        gradient_shardings=shardings.params,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), state, frozen, teacher, layout


def run(setting: Setting, steps: int, optimizer=None, **options):
    """Losses of some steps, and the last state."""
    step, state, frozen, teacher, layout = prepare(setting, optimizer, **options)
    losses = []
    for number in range(steps):
        batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch(number)))
        state, metrics = step(state, frozen, teacher, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def trajectory(setting: Setting, steps: int = 10):
    """Losses of some steps of SGD, and the change of the student's parameters in the first."""
    step, state, frozen, teacher, layout = prepare(setting)
    losses, gradients = [], None
    for number in range(steps):
        before = None if number else jax.tree.map(np.asarray, state.params["student"])
        batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch(number)))
        state, metrics = step(state, frozen, teacher, batch)
        losses.append(float(metrics["loss"]))
        if number == 0:
            gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params["student"])
    return np.array(losses), gradients


REFERENCE = functools.cache(lambda: trajectory(Setting()))


EQUAL_SETTINGS = {
    "accumulate 8": Setting(accumulate=8),
    "fsdp 8": Setting(layout="fsdp 8"),
    "accumulate 2, chunks of 5, fsdp 4 x tensor 2, another layout for the teacher": Setting(
        layout="fsdp 4 x tensor 2",
        accumulate=2,
        chunk=5,
        teacher_rules={"embed": None, "vocab": ("fsdp", "tensor"), "mlp": None},
    ),
    "data 2 x fsdp 2 x tensor 2": Setting(layout="data 2 x fsdp 2 x tensor 2"),
    "sequence 2 x fsdp 4, rematerialised blocks": Setting(
        layout="sequence 2 x fsdp 4", execution=Execution(remat="block")
    ),
}


@pytest.mark.parametrize("name", [name if "accumulate" in name else slow(name) for name in EQUAL_SETTINGS])
def test_equal_settings_have_equal_gradients_and_trajectories(name):
    losses, gradients = trajectory(EQUAL_SETTINGS[name])
    expected, expected_gradients = REFERENCE()
    assert_changes_close(gradients, expected_gradients)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_vocabulary_that_the_mesh_does_not_divide_has_the_same_gradients():
    _, expected = trajectory(Setting(vocab=67), steps=1)
    _, gradients = trajectory(Setting(layout="fsdp 4 x tensor 2", vocab=67), steps=1)
    assert_changes_close(gradients, expected)


@pytest.mark.parametrize("layout", ["fsdp 8", "fsdp 4 x tensor 2"])
def test_no_collective_of_head_size_runs_inside_a_loop_of_the_whole_step(layout):
    vocab = 4096  # larger than a layer's kernel or its activations here
    step, state, frozen, teacher, place = prepare(Setting(layout=layout, vocab=vocab, chunk=8))
    batch = put_batch(place, jax.tree.map(np.asarray, packed_batch()))
    inside = collectives_in_loops(step.lower(state, frozen, teacher, batch).compile().as_text())
    assert inside, "layers gather their parameters in the loop over layers: the search is broken"
    assert all(size < vocab for _, size in inside), inside


def test_equal_settings_follow_one_trajectory_with_adam():
    setting = Setting(layout="fsdp 4 x tensor 2", accumulate=2, chunk=5)
    losses, expected = (run(each, 10, AdamW(learning_rate=0.01))[0] for each in (setting, Setting()))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_training_learns():
    step, state, frozen, teacher, _ = prepare(Setting(), AdamW(learning_rate=0.02, weight_decay=0.0))
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, teacher, packed_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_only_the_norms_train_when_all_else_is_frozen():
    trainable = partition.matches(["*norm.scale"])
    step, state, frozen, teacher, layout = prepare(
        Setting(layout="fsdp 8"), AdamW(learning_rate=0.01), trainable=trainable
    )
    assert set(partition.names(state.params["student"])) == {
        "final_norm.scale",
        "segments.0.mixer.norm.scale",
        "segments.0.ffn.norm.scale",
    }
    before = jax.tree.map(np.asarray, (state.params["student"], frozen, teacher))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1]
    assert sum(m.size for m in moments) == 2 * sum(x.size for x in jax.tree.leaves(before[0]))
    losses = []
    for _ in range(5):
        batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch()))
        state, metrics = step(state, frozen, teacher, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, (frozen, teacher)), before[1:])
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), jax.tree.map(np.asarray, state.params["student"]), before[0]
    )
    assert all(jax.tree.leaves(changed))


def test_a_frozen_leaf_may_be_the_teachers_own_buffer():
    """A student that shares its teacher's head: nothing frozen is donated, so the shared buffer survives the step."""
    key = jax.random.key(0)
    params = tiny_params(STUDENT)
    trainable, frozen = partition.split(params, partition.matches(["segments.*"]))
    optimizer = Optax(optax.sgd(0.1)).build(10)
    state = init_state(trainable, TERMS, optimizer, key=key, student_embed=16, teacher_embed=16)
    state = jax.tree.map(jnp.copy, state)
    forward = functools.partial(apply, STUDENT)
    step = jax.jit(make_train_step(forward, forward, TERMS, optimizer, chunk=64), donate_argnums=0)
    for _ in range(2):
        state, metrics = step(state, frozen, params, packed_batch())
    assert np.isfinite(metrics["loss"])
    assert np.all(np.isfinite(frozen["embedding"]["kernel"]))


def test_parameters_in_both_trees_are_refused():
    with pytest.raises(ValueError, match="'kernel'; a parameter is trained or frozen, not both"):
        partition.merge({"head": {"kernel": 1}}, {"head": {"kernel": 2}})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(accumulate):
    step, state, frozen, teacher, _ = prepare(Setting(accumulate=accumulate), AdamW(learning_rate=0.01))
    state, _ = step(state, frozen, teacher, packed_batch(0))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    bad = {**teacher, "final_norm": {"scale": teacher["final_norm"]["scale"] * jnp.nan}}
    for number in (1, 2):
        state, metrics = step(state, frozen, bad, packed_batch(1))
        assert metrics["skipped"] == 1
        assert state.skipped.tolist() == [number, number]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, (state.params, state.opt_state)), before)
    assert state.step == 3
    state, metrics = step(state, frozen, teacher, packed_batch(2))
    assert metrics["skipped"] == 0
    assert state.skipped.tolist() == [0, 2]


def test_schedules_follow_consumed_batches_not_applied_updates():
    """The learning rate is a schedule of the step: after one skipped step, the second batch is trained at its rate."""
    optimizer = Optax(scale_by_step(lambda step: jnp.where(step == 1, -0.5, 0.0)))
    step, state, frozen, teacher, _ = prepare(Setting(), optimizer)
    bad = {**teacher, "final_norm": {"scale": teacher["final_norm"]["scale"] * jnp.nan}}
    before = jax.tree.map(np.asarray, state.params)
    state, _ = step(state, frozen, bad, packed_batch(0))
    state, _ = step(state, frozen, teacher, packed_batch(1))
    kernel = state.params["student"]["embedding"]["kernel"]
    assert np.abs(np.asarray(kernel) - before["student"]["embedding"]["kernel"]).max() > 1e-3


def test_schedules_follow_batches_not_micro_batches():
    """Learning rate, weight and temperature all change at every step, and accumulation changes none of them."""
    terms = {"kl": ForwardKL(weight=lambda step: 1.0 + step, temperature=lambda step: 1.0 + 0.5 * step)}
    optimizer = Optax(scale_by_step(lambda step: -0.2 * (1.0 + step)))
    losses, _ = run(Setting(accumulate=4), 3, optimizer, terms=terms)
    expected, _ = run(Setting(), 3, optimizer, terms=terms)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cliff(Term):
    """A finite value with an infinite gradient: the root of a learned zero."""

    def parameters(self, key, *, student_embed, teacher_embed):
        return {"zero": jnp.float32(0.0)}

    def __call__(self, student, teacher, at, parameters):
        return student.log_normalizer() - student.take(at.targets) + jnp.sqrt(parameters["zero"])


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
    step, state, frozen, teacher, _ = prepare(Setting(), terms={"cliff": Cliff()})
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, frozen, teacher, packed_batch())
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.params), before)


def test_packed_rows_train_as_separate_rows():
    packed = packed_batch(rows=2, length=12)
    assert set(np.unique(packed.segment_ids)) >= {1, 2}
    rows = []
    for row in range(2):
        for segment in (1, 2):
            here = np.asarray(packed.segment_ids[row]) == segment

            def cut(x, row=row, here=here):
                values = np.asarray(x[row])[here]
                return np.pad(values, (0, 12 - len(values)))

            rows.append(jax.tree.map(cut, packed))
    separate = Batch(
        **{f.name: jnp.asarray(np.stack([getattr(r, f.name) for r in rows])) for f in dataclasses.fields(Batch)}
    )
    forward = functools.partial(apply, STUDENT)
    teach = functools.partial(apply, TEACHER)
    optimizer = Optax(optax.sgd(1.0)).build(10)
    key = jax.random.key(3)
    teacher = tiny_params(TEACHER, 1)
    step = make_train_step(forward, teach, TERMS, optimizer, chunk=16)

    def updated(batch):
        state = init_state(tiny_params(STUDENT), TERMS, optimizer, key=key, student_embed=16, teacher_embed=24)
        new, metrics = jax.jit(step)(state, {}, teacher, batch)
        return metrics["loss"], jax.tree.map(jnp.subtract, state.params, new.params)

    (loss, gradients), (expected, expected_gradients) = updated(packed), updated(separate)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-7), gradients, expected_gradients)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharpened(Term):
    """A cross-entropy with a learned temperature."""

    def parameters(self, key, *, student_embed, teacher_embed):
        return {"log_temperature": jnp.float32(0.0)}

    def __call__(self, student, teacher, at, parameters):
        student = student.at_temperature(jnp.exp(parameters["log_temperature"]))
        return student.log_normalizer() - student.take(at.targets)


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
def test_parameters_of_terms_are_trained_with_the_student(layout):
    terms = {"sharpened": Sharpened(), "plain": CrossEntropy()}
    losses, state = run(Setting(layout=layout), 5, AdamW(learning_rate=0.05), terms=terms)
    expected, _ = run(Setting(), 5, AdamW(learning_rate=0.05), terms=terms)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert set(state.params["objective"]) == {"sharpened"}
    assert abs(float(state.params["objective"]["sharpened"]["log_temperature"])) > 0.05


HIDDEN = {
    "kl": ForwardKL(weight=0.5),
    "blocks": HiddenMatch(layers=((0, 1), (1, 2)), weight=2.0, balance="kl"),
    "embedding": HiddenMatch(layers=((0, 0),), point="input", distance="normalized_mse", weight=0.1),
}


HIDDEN_REFERENCE = functools.cache(lambda: run(Setting(), 4, terms=HIDDEN)[0])


@pytest.mark.parametrize("setting", [slow(Setting(accumulate=4)), Setting(layout="fsdp 4 x tensor 2", accumulate=2)])
def test_hidden_states_are_matched_alike_in_every_setting(setting):
    losses, state = run(setting, 4, terms=HIDDEN)
    expected = HIDDEN_REFERENCE()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    projections = {name: parameters["projection"].shape for name, parameters in state.params["objective"].items()}
    assert projections == {"blocks": (16, 24), "embedding": (16, 24)}


def test_states_that_are_equal_but_for_rounding_are_not_balanced():
    """The embedding of a student that was cut in depth is the teacher's: rounding must not become a loss."""
    terms = {"kl": ForwardKL(), "embedding": HiddenMatch(layers=((0, 0),), point="input", balance="kl")}
    config, params = TEACHER, jax.tree.map(jnp.array, initial_values(64)[1])
    optimizer = Optax(optax.sgd(0.1)).build(10)
    tapped = [functools.partial(apply, config, taps=hidden_taps(terms, side)) for side in ("student", "teacher")]
    other = {**params, "segments": jax.tree.map(lambda x: 1.3 * x, params["segments"])}
    state = init_state(other, terms, optimizer, key=jax.random.key(0), student_embed=24, teacher_embed=24)
    _, metrics = jax.jit(make_train_step(*tapped, terms, optimizer, chunk=16))(state, {}, params, packed_batch())
    assert float(metrics["loss"]) == pytest.approx(float(metrics["terms"]["kl"].value), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_balanced_term_adds_its_weight_times_the_other(accumulate):
    """L = 0.5 KL + 2 · H · sg(0.5 KL / H): in value three times the first; in gradient H's own direction."""
    terms = {"kl": HIDDEN["kl"], "blocks": HIDDEN["blocks"]}
    step, state, frozen, teacher, layout = prepare(Setting(accumulate=accumulate), terms=terms)
    batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch()))
    before = jax.tree.map(np.asarray, state.params)
    moved, metrics = step(state, frozen, teacher, batch)
    kl, own = (float(metrics["terms"][name].value) for name in ("kl", "blocks"))
    assert float(metrics["loss"]) == pytest.approx(3 * 0.5 * kl, rel=1e-5)
    fixed = {"kl": HIDDEN["kl"], "blocks": dataclasses.replace(HIDDEN["blocks"], balance=None, weight=kl / own)}
    step, state, *_ = prepare(Setting(), terms=fixed)
    expected, _ = step(state, frozen, teacher, batch)
    changes = [jax.tree.map(lambda new, old: new - old, s.params, before) for s in (moved, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *changes)


@pytest.mark.parametrize("layout", [slow("one device"), "fsdp 4 x tensor 2"])
def test_a_teacher_that_is_corrected_learns_as_if_alone(layout):
    """Its trajectory is that of training it by itself; the student learns from what it is at each step."""
    place = LAYOUTS[layout]()
    own, other = AdamW(learning_rate=0.02), AdamW(learning_rate=0.01, clip_norm=0.1)
    optimizer = side_by_side(own.build(10), other.build(10))
    # Hidden states too: no gradient of theirs may reach the teacher.
    states = HiddenMatch(layers=((0, 1),), distance="mse")
    terms = {"kl": ForwardKL(), "states": states}
    student, teacher = (jax.tree.map(jnp.array, p) for p in initial_values(64))
    start = functools.partial(
        init_state, terms=terms, optimizer=optimizer, key=jax.random.key(0), student_embed=16, teacher_embed=24
    )
    shardings = state_shardings(
        jax.eval_shape(start, student, teacher=teacher),
        param_shardings(STUDENT, place),
        place,
        optimizer,
        teacher=param_shardings(TEACHER, place),
    )
    state = jax.jit(start, out_shardings=shardings)(student, teacher=teacher)
    step = make_train_step(
        functools.partial(apply, STUDENT, layout=place, taps=hidden_taps(terms, "student")),
        functools.partial(apply, TEACHER, layout=place, taps=hidden_taps(terms, "teacher")),
        terms,
        optimizer,
        chunk=16,
        layout=place,
        correction={"cross_entropy": CrossEntropy()},
    )
    step = jax.jit(step, out_shardings=(shardings, None))
    alone_terms, alone = {"cross_entropy": CrossEntropy()}, other.build(10)
    alone_state = init_state(teacher, alone_terms, alone, key=jax.random.key(0), student_embed=24, teacher_embed=24)
    alone_step = jax.jit(make_train_step(functools.partial(apply, TEACHER), None, alone_terms, alone, chunk=16))
    kl_step = jax.jit(
        make_eval_step(
            functools.partial(apply, STUDENT), functools.partial(apply, TEACHER), {"kl": ForwardKL()}, chunk=16
        )
    )
    for number in range(3):
        batch = packed_batch(number)
        kl = kl_step(jax.device_get(state.params["student"]), alone_state.params["student"], batch)["kl"].value
        placed = put_batch(place, jax.tree.map(np.asarray, batch))
        state, metrics = step(state, {}, {}, placed)
        alone_state, alone_metrics = alone_step(alone_state, {}, None, batch)
        assert float(metrics["terms"]["kl"].value) == pytest.approx(float(kl), rel=1e-4)
        theirs, own_value = metrics["terms"]["teacher/cross_entropy"].value, alone_metrics["loss"]
        assert float(theirs) == pytest.approx(float(own_value), rel=1e-5)
        matched = metrics["terms"]["states"].value
        assert float(metrics["loss"]) == pytest.approx(float(kl + own_value + matched), rel=1e-4)


def test_optimizer_moments_live_beside_their_parameters():
    _, state, *_ = prepare(Setting(layout="fsdp 4 x tensor 2"), AdamW(learning_rate=0.01))
    kernel = state.params["student"]["segments"]["0"]["ffn"]["gate"]["kernel"]
    assert "fsdp" in str(kernel.sharding.spec)
    assert "tensor" in str(kernel.sharding.spec)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) == 4, "two moments each of gate and up"
    assert all(m.sharding == kernel.sharding for m in moments)


TRACES: list[str] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Term):
    """A cross-entropy that notes when it is traced."""

    def __call__(self, student, teacher, at, parameters):
        TRACES.append("traced")
        return student.log_normalizer() - student.take(at.targets)


def test_the_step_is_traced_once():
    optimizer = AdamW(learning_rate=0.01)
    step, state, frozen, teacher, layout = prepare(Setting(layout="fsdp 8"), optimizer, terms={"counted": Counted()})
    traced = []
    TRACES.clear()
    for number in range(3):
        batch = put_batch(layout, jax.tree.map(np.asarray, packed_batch(number)))
        state, _ = step(state, frozen, teacher, batch)
        traced.append(len(TRACES))
    assert traced[0] > 0
    assert traced == traced[:1] * 3


def test_rows_that_accumulation_cannot_split_are_refused():
    step, state, frozen, teacher, _ = prepare(Setting(accumulate=3))
    with pytest.raises(ValueError, match="8 rows cannot be split into 3 micro-batches"):
        step(state, frozen, teacher, packed_batch())


def test_evaluation_sums_over_batches_as_over_one_large_batch():
    layout = LAYOUTS["fsdp 4 x tensor 2"]()
    teacher = jax.device_put(tiny_params(TEACHER, 1), param_shardings(TEACHER, layout))
    student = jax.device_put(tiny_params(STUDENT), param_shardings(STUDENT, layout))
    evaluate = jax.jit(
        make_eval_step(
            functools.partial(apply, STUDENT, layout=layout),
            functools.partial(apply, TEACHER, layout=layout),
            TERMS,
            chunk=16,
            layout=layout,
        )
    )
    one, two = packed_batch(0), packed_batch(1)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two)
    parts = jax.tree.map(jnp.add, evaluate(student, teacher, one), evaluate(student, teacher, two))
    large = evaluate(student, teacher, both)
    for name in TERMS:
        np.testing.assert_allclose(parts[name].value, large[name].value, rtol=1e-5)
        assert parts[name].count == both.loss_mask.sum()


def test_first_gradients_agree_with_a_plain_loss():
    """The whole step against automatic differentiation of full scores."""
    key = jax.random.key(0)
    student, teacher = tiny_params(STUDENT), tiny_params(TEACHER, 1, head_scale=3.0)
    batch = packed_batch()

    def plain(params):
        mine, theirs = apply(STUDENT, params, batch), apply(TEACHER, teacher, batch)
        student_scores = mine.hidden @ mine.head.kernel.T
        log_q = jax.nn.log_softmax(student_scores / 2)
        log_p = jax.nn.log_softmax(theirs.hidden @ theirs.head.kernel.T / 2)
        kl = 4 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        hard = -jnp.take_along_axis(jax.nn.log_softmax(student_scores), batch.targets[..., None], -1)[..., 0]
        return ((kl + 0.2 * hard) * batch.loss_mask).sum() / batch.loss_mask.sum()

    # An optimizer whose state is the gradients that it was given.
    kept = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_, **__: (grads, grads)
    )
    state = init_state(student, TERMS, kept, key=key, student_embed=16, teacher_embed=24)
    step = make_train_step(functools.partial(apply, STUDENT), functools.partial(apply, TEACHER), TERMS, kept, chunk=24)
    after, metrics = jax.jit(step)(state, {}, teacher, batch)
    expected, gradients = jax.jit(jax.value_and_grad(plain))(student)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_gradients_close(after.opt_state["student"], gradients)
