"""Pure train and evaluation steps: (state, frozen, teacher, batch) → (state, metrics). No I/O, no clock, no config.

A model enters as a function `(params, batch) → Outputs`; the steps know nothing else of it. The teacher's parameters
are an argument: never a closure (they would be baked into the program), never optimised, never checkpointed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdistill import partition
from jaxdistill.losses.chunked import evaluate_terms, term_coefficients
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import Parameterized, Term
from jaxdistill.sharding import BATCH_AXES, Layout
from jaxdistill.types import Batch, Mean, Outputs, Params, TrainState

Apply = Callable[[Params, Batch], Outputs]
ROUNDING = 1e-6
"""A mean distance of hidden states that float32 cannot tell from 0."""
TrainStep = Callable[[TrainState, Params, Params | None, Batch], tuple[TrainState, dict[str, Any]]]


def init_state(
    student: Params,
    terms: Mapping[str, Term | HiddenMatch],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    key: Any,
    student_embed: int,
    teacher_embed: int,
    teacher: Params | None = None,
) -> TrainState:
    """The state before the first step. student: the trainable leaves alone (see `partition.split`). teacher: the
    parameters of one that is corrected while it teaches, else None.
    """
    objective = {
        name: term.parameters(jax.random.fold_in(key, index), student_embed=student_embed, teacher_embed=teacher_embed)
        for index, (name, term) in enumerate(terms.items())
        if isinstance(term, Parameterized)
    }
    params = {"student": student, "objective": objective} | ({} if teacher is None else {"teacher": teacher})
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        rng=key,
        skipped=jnp.zeros(2, jnp.int32),
    )


def state_shardings(
    state: TrainState,
    student: Params,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Params | None = None,
) -> TrainState:
    """Where a state lives: optimizer moments beside their parameters, everything else on all devices.

    state: real or abstract. student, teacher: the shardings of the trainable leaves.
    """
    whole = layout.replicated()
    params = {"student": student, "objective": jax.tree.map(lambda _: whole, state.params["objective"])}
    params |= {} if teacher is None else {"teacher": teacher}
    moments = optax.tree.map_params(
        optimizer,
        # Of two transformations side by side each has nothing where the other one works.
        lambda moment, place: moment if isinstance(moment, optax.MaskedNode) else place,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda moment: isinstance(moment, optax.MaskedNode),
    )
    return dataclasses.replace(state, step=whole, params=params, opt_state=moments, rng=whole, skipped=whole)


def make_train_step(
    student: Apply,
    teacher: Apply | None,
    terms: Mapping[str, Term | HiddenMatch],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    chunk: int,
    accumulate: int = 1,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
    gradient_shardings: Any = None,
    correction: Mapping[str, Term] | None = None,
) -> TrainStep:
    """One optimizer step on one global batch, as a pure function to be jitted with the state donated.

    accumulate: into how many micro-batches the rows are split. The result does not depend on it: every sum is divided
    by the count of the whole batch. Of `terms`, a `HiddenMatch` (resolved) reads what both models return as the tap of
    its name. gradient_shardings: where accumulated gradients live (the shardings of `state.params`); None leaves it to
    the compiler. A step whose loss or gradient is not finite changes nothing but `step` and `skipped`.

    correction: terms that the teacher learns while it teaches; its parameters are then `state.params["teacher"]`, and
    the step's teacher argument is not read. The norm of its gradient is not part of "gradient_norm".

    Metrics: "loss"; "terms", a `Mean` per term; "gradient_norm" before clipping; "skipped" (1 or 0).
    """
    corrected = {f"teacher/{name}": term for name, term in (correction or {}).items()}
    all_terms = {**terms, **corrected}
    on_states = {name: term for name, term in terms.items() if isinstance(term, HiddenMatch)}
    if on_states and teacher is None:
        raise ValueError(f"the terms {sorted(on_states)} compare hidden states, and there is no teacher.")
    evaluate = _evaluation(
        student, teacher, terms, corrected, chunk=chunk, layout=layout, teacher_layout=teacher_layout
    )

    def train_step(state, frozen, teacher_params, batch):
        # Of the whole batch and known beforehand, so micro-batches are divided by the count of all of them.
        coefficients = term_coefficients(all_terms, batch.loss_mask.sum(), state.step)

        def evaluated(params: Params, rows: Batch):
            return evaluate(params, frozen, teacher_params, rows, coefficients, state.step)

        factors = None
        if accumulate > 1 and any(term.balance for term in on_states.values()):
            means = _accumulated(lambda rows: evaluated(state.params, rows)[1], batch, accumulate, layout)
            factors = _balanced(on_states, means, coefficients)

        def loss_of(params: Params, rows: Batch):
            loss, means = evaluated(params, rows)
            scaled = _balanced(on_states, means, coefficients) if factors is None else factors
            return loss + sum(scaled[name] * means[name].total for name in on_states), means

        def gradients(rows: Batch):
            (loss, means), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
            return loss, means, _placed(grads, gradient_shardings)

        loss, means, grads = _accumulated(gradients, batch, accumulate, layout)
        after, norm, skipped = _updated(optimizer, state, grads, loss)
        return after, {"loss": loss, "terms": means, "gradient_norm": norm, "skipped": skipped}

    return train_step


def make_eval_step(
    student: Apply,
    teacher: Apply | None,
    terms: Mapping[str, Term],
    *,
    chunk: int,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
) -> Callable[[Params, Params | None, Batch], dict[str, Mean]]:
    """(student parameters, teacher parameters, batch) → a `Mean` per term, without gradients."""

    def eval_step(params, teacher_params, batch):
        _, means = evaluate_terms(
            terms,
            student(params, batch),
            None if teacher is None else teacher(teacher_params, batch),
            targets=batch.targets,
            loss_mask=batch.loss_mask,
            coefficients={name: jnp.float32(0) for name in terms},
            parameters={},
            step=jnp.int32(0),
            chunk=chunk,
            layout=layout,
            teacher_layout=teacher_layout,
        )
        return means

    return eval_step


def _evaluation(
    student: Apply,
    teacher: Apply | None,
    terms: Mapping[str, Term | HiddenMatch],
    corrected: Mapping[str, Term],
    *,
    chunk: int,
    layout: Layout,
    teacher_layout: Layout | None,
) -> Callable[..., tuple[Float[Array, ""], dict[str, Mean]]]:
    """(parameters, frozen, teacher's parameters, batch, coefficients, step) → (the loss without the terms on hidden
    states, the `Mean` of every term). corrected: the terms that the teacher learns.
    """
    on_scores = {name: term for name, term in terms.items() if not isinstance(term, HiddenMatch)}

    def evaluate(params, frozen, teacher_params, batch: Batch, coefficients, step):
        outputs = student(partition.merge(params["student"], frozen), batch)
        taught = None if teacher is None else teacher(params.get("teacher", teacher_params), batch)
        signal = jax.lax.stop_gradient(taught)
        objective = params["objective"]
        on_batch = functools.partial(
            evaluate_terms,
            targets=batch.targets,
            loss_mask=batch.loss_mask,
            coefficients=coefficients,
            step=step,
            chunk=chunk,
        )
        own = {name: given for name, given in objective.items() if name in on_scores}
        loss, means = on_batch(on_scores, outputs, signal, parameters=own, layout=layout, teacher_layout=teacher_layout)
        if corrected and taught is not None:
            theirs, found = on_batch(corrected, taught, None, parameters={}, layout=teacher_layout or layout)
            loss, means = loss + theirs, means | found
        for name, term in terms.items():
            if isinstance(term, HiddenMatch):
                assert signal is not None, "make_train_step refuses these terms without a teacher"
                states = outputs.taps[name], signal.taps[name]
                means[name] = term(*states, batch.loss_mask, objective.get(name, {}))
        return loss, means

    return evaluate


def _balanced(
    on_states: Mapping[str, HiddenMatch], means: Mapping[str, Mean], coefficients: Mapping[str, Array]
) -> dict[str, Array]:
    """What the total of each term on hidden states is multiplied by, given what all terms are on the whole batch."""
    factors = {}
    for name, term in on_states.items():
        factors[name] = coefficients[name]
        if term.balance is not None:
            other, own = coefficients[term.balance] * means[term.balance].total, means[name].total
            # Both are sums over the same positions; the weight stays, the division by their count is the other's.
            weight = coefficients[name] * means[name].count
            # States that are equal but for rounding have nothing to learn, and rounding has a direction.
            equal = own <= ROUNDING * means[name].count
            factors[name] = weight * jnp.where(equal, 0.0, other / jnp.where(equal, 1.0, own))
    return jax.lax.stop_gradient(factors)


def _accumulated(micro: Callable[[Batch], Any], batch: Batch, accumulate: int, layout: Layout) -> Any:
    """The sum of `micro` over micro-batches, one at a time."""
    if accumulate == 1:
        return micro(batch)
    rows = batch.tokens.shape[0]
    if accumulate < 1 or rows % accumulate:
        raise ValueError(f"{rows} rows cannot be split into {accumulate} micro-batches; use a divisor of {rows}.")

    def split(x: Array) -> Array:
        # Every accumulate-th row: a device keeps the rows it has, whatever the mesh.
        x = x.reshape(rows // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(x, (None, *BATCH_AXES))

    parts = jax.tree.map(split, batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, jax.tree.map(lambda x: x[0], parts))
    )
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, micro(part)), None), zeros, parts)
    return total


def _placed(grads: Params, shardings: Any) -> Params:
    return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)


def _updated(
    optimizer: optax.GradientTransformationExtraArgs, state: TrainState, grads: Params, loss: Float[Array, ""]
) -> tuple[TrainState, Float[Array, ""], Int[Array, ""]]:
    """(the next state, the gradient's norm, 1 if the step was skipped because something is not finite, else 0)."""
    norm = optax.tree.norm({name: part for name, part in grads.items() if name != "teacher"})
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if "teacher" in grads:
        finite &= jnp.isfinite(optax.tree.norm(grads["teacher"]))

    def update(params, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params, step=state.step, gradient_norm=norm)
        return optax.apply_updates(params, updates), opt_state

    # A branch, and not a choice between two results: those would both have to exist.
    params, opt_state = jax.lax.cond(finite, update, lambda *same: same, state.params, state.opt_state)
    skipped = 1 - finite.astype(jnp.int32)
    counts = jnp.stack([jnp.where(finite, 0, state.skipped[0] + 1), state.skipped[1] + skipped])
    return TrainState(state.step + 1, params, opt_state, state.rng, counts), norm, skipped
