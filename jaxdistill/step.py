"""Pure train and evaluation steps: (state, frozen, teacher, batch) → (state, metrics). No I/O, no clock, no config.

A model enters as a function `(params, batch) → Outputs`; the steps know nothing else of it. The teacher's parameters
are an argument: never a closure (they would be baked into the program), never optimised, never checkpointed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdistill import partition
from jaxdistill.losses.aligned import ACROSS_TOKENIZERS, Ends
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import Parameterized, Term
from jaxdistill.objective import AnyTerm, Objective, Seen, Weighting
from jaxdistill.sharding import BATCH_AXES, Layout
from jaxdistill.types import Batch, Mean, Outputs, PairedBatch, Params, TrainState

Apply = Callable[[Params, Batch], Outputs]
TrainStep = Callable[[TrainState, Params, Params | None, Batch], tuple[TrainState, dict[str, Any]]]


def init_state(
    student: Params,
    terms: Mapping[str, AnyTerm],
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
    terms: Mapping[str, AnyTerm],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    chunk: int,
    accumulate: int = 1,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
    gradient_shardings: Any = None,
    correction: Mapping[str, Term] | None = None,
    ends: Mapping[str, Ends] | None = None,
    weighting: Weighting = "fixed",
) -> TrainStep:
    """One optimizer step on one global batch, as a pure function to be jitted with the state donated.

    accumulate: into how many micro-batches the rows are split. The result does not depend on it: every sum is divided
    by the count of the whole batch. Of `terms`, a `HiddenMatch` (resolved) reads what both models return as the tap of
    its name, or at the point "final_normed" their last hidden states. gradient_shardings: where accumulated gradients
    live (the shardings of `state.params`); None leaves it to the compiler. A step whose loss or gradient is not finite
    changes nothing but `step` and `skipped`.

    correction: terms that the teacher learns while it teaches; its parameters are then `state.params["teacher"]`, and
    the step's teacher argument is not read. The norm of its gradient is not part of "gradient_norm".

    Batches are `PairedBatch`es where the teacher has another tokenizer: it then reads rows of its own, and hidden
    states are compared where both models have read the same text. ends: for the `ALM` terms that read them, by name.

    Metrics: "loss"; "terms", a `Mean` per term; "gradient_norm" before clipping; "skipped" (1 or 0).
    """
    needs = sorted(name for name, term in terms.items() if isinstance(term, (HiddenMatch, *ACROSS_TOKENIZERS)))
    if needs and teacher is None:
        raise ValueError(f"the terms {needs} compare the student with a teacher, and there is none.")
    objective = Objective(
        terms=terms,
        corrected={f"teacher/{name}": term for name, term in (correction or {}).items()},
        chunk=chunk,
        layout=layout,
        teacher_layout=teacher_layout,
        ends=ends or {},
        weighting=weighting,
    )

    def train_step(state, frozen, teacher_params, batch):
        known = objective.known(batch, state.step)

        def seen(params: Params, rows: Batch) -> Seen:
            return _forward(student, teacher, params, frozen, teacher_params, rows)

        def squares(models: Seen, rows: Batch, shares):
            return objective.squared_gradients(models, rows, state.params["objective"], known, shares)

        whole = None
        if accumulate > 1 and objective.averaged(batch):
            # What is known of the whole batch only is found in passes over all micro-batches before the first gradient.
            def summed(micro: Callable[[Seen, Batch], Any]) -> Any:
                return _accumulated(lambda rows: micro(seen(state.params, rows), rows), batch, accumulate, layout)

            counts = summed(lambda models, rows: objective.counted(models, rows, state.params["objective"], known))
            whole = objective.factors(
                counts, batch, known, lambda shares: summed(lambda models, rows: squares(models, rows, shares))
            )

        def loss_of(params: Params, rows: Batch):
            models = seen(params, rows)
            loss, means = objective.means(models, rows, params["objective"], known)
            factors = whole or objective.factors(means, rows, known, lambda shares: squares(models, rows, shares))
            return loss + objective.total(means, factors), means

        def gradients(rows: Batch):
            (loss, means), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
            return loss, means, _placed(grads, gradient_shardings)

        loss, means, grads = _accumulated(gradients, batch, accumulate, layout)
        after, norm, skipped = _updated(optimizer, state, grads, loss)
        return after, {"loss": loss, "terms": objective.reported(means), "gradient_norm": norm, "skipped": skipped}

    return train_step


def make_eval_step(
    student: Apply,
    teacher: Apply | None,
    terms: Mapping[str, AnyTerm],
    *,
    chunk: int,
    layout: Layout = Layout(),
    teacher_layout: Layout | None = None,
    ends: Mapping[str, Ends] | None = None,
) -> Callable[[Params, Params | None, Batch], dict[str, Mean]]:
    """(student parameters, teacher parameters, batch) → a `Mean` per term, without gradients."""
    objective = Objective(terms=terms, chunk=chunk, layout=layout, teacher_layout=teacher_layout, ends=ends or {})

    def eval_step(params, teacher_params, batch):
        seen = _forward(student, teacher, {"student": params}, {}, teacher_params, batch)
        _, means = objective.means(seen, batch, {}, objective.known(batch, jnp.int32(0)))
        return objective.reported(means)

    return eval_step


def _forward(
    student: Apply, teacher: Apply | None, params: Params, frozen: Params, teacher_params: Params | None, batch: Batch
) -> Seen:
    """What both models return, each for its own rows. A teacher that learns is among the parameters."""
    theirs = batch.teacher if isinstance(batch, PairedBatch) else batch
    outputs = student(partition.merge(params["student"], frozen), batch)
    return Seen(outputs, None if teacher is None else teacher(params.get("teacher", teacher_params), theirs))


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
