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
from jaxdistill.losses.aligned import Ends, aligned_means, at_chunk_ends
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.chunked import evaluate_terms, term_coefficients
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import Parameterized, Term
from jaxdistill.sharding import BATCH_AXES, Layout
from jaxdistill.types import Batch, Mean, Outputs, PairedBatch, Params, TrainState, at_step

Apply = Callable[[Params, Batch], Outputs]
AnyTerm = Term | HiddenMatch | ALM
ROUNDING = 1e-6
"""A mean distance of hidden states that float32 cannot tell from 0."""
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
) -> TrainStep:
    """One optimizer step on one global batch, as a pure function to be jitted with the state donated.

    accumulate: into how many micro-batches the rows are split. The result does not depend on it: every sum is divided
    by the count of the whole batch. Of `terms`, a `HiddenMatch` (resolved) reads what both models return as the tap of
    its name. gradient_shardings: where accumulated gradients live (the shardings of `state.params`); None leaves it to
    the compiler. A step whose loss or gradient is not finite changes nothing but `step` and `skipped`.

    correction: terms that the teacher learns while it teaches; its parameters are then `state.params["teacher"]`, and
    the step's teacher argument is not read. The norm of its gradient is not part of "gradient_norm".

    Batches are `PairedBatch`es where the teacher has another tokenizer: it then reads rows of its own, and hidden
    states are compared where both models have read the same text. ends: for the `ALM` terms that read them, by name.

    Metrics: "loss"; "terms", a `Mean` per term; "gradient_norm" before clipping; "skipped" (1 or 0).
    """
    corrected = {f"teacher/{name}": term for name, term in (correction or {}).items()}
    needs = sorted(name for name, term in terms.items() if isinstance(term, HiddenMatch | ALM))
    if needs and teacher is None:
        raise ValueError(f"the terms {needs} compare the student with a teacher, and there is none.")
    evaluate = _evaluation(
        student, teacher, terms, corrected, chunk=chunk, layout=layout, teacher_layout=teacher_layout, ends=ends or {}
    )

    def train_step(state, frozen, teacher_params, batch):
        # Of the whole batch and known beforehand, so micro-batches are divided by the count of all of them.
        theirs = batch.teacher if isinstance(batch, PairedBatch) else batch
        coefficients = term_coefficients(terms, batch.loss_mask.sum(), state.step)
        coefficients |= term_coefficients(corrected, theirs.loss_mask.sum(), state.step)
        averaged = {name: term for name, term in terms.items() if _is_averaged(term, batch)}

        def evaluated(params: Params, rows: Batch):
            return evaluate(params, frozen, teacher_params, rows, coefficients, state.step)

        def factors_of(means: Mapping[str, Mean]) -> dict[str, Array]:
            return _factors(averaged, means, coefficients, state.step)

        factors = None
        if accumulate > 1 and averaged:
            counts = _accumulated(
                lambda rows: _read_by_factors(averaged, evaluated(state.params, rows)[1]), batch, accumulate, layout
            )
            factors = factors_of(counts)

        def loss_of(params: Params, rows: Batch):
            loss, means = evaluated(params, rows)
            scaled = factors_of(means) if factors is None else factors
            return loss + sum((scaled[name] * means[name].total).sum() for name in averaged), means

        def gradients(rows: Batch):
            (loss, means), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
            return loss, means, _placed(grads, gradient_shardings)

        loss, means, grads = _accumulated(gradients, batch, accumulate, layout)
        after, norm, skipped = _updated(optimizer, state, grads, loss)
        reported = {name: _reported(mean) for name, mean in means.items()}
        return after, {"loss": loss, "terms": reported, "gradient_norm": norm, "skipped": skipped}

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
    evaluate = _evaluation(
        student, teacher, terms, {}, chunk=chunk, layout=layout, teacher_layout=teacher_layout, ends=ends or {}
    )

    def eval_step(params, teacher_params, batch):
        unweighted = {name: jnp.float32(0) for name in terms}
        _, means = evaluate({"student": params, "objective": {}}, {}, teacher_params, batch, unweighted, jnp.int32(0))
        return {name: _reported(mean) for name, mean in means.items()}

    return eval_step


def _evaluation(
    student: Apply,
    teacher: Apply | None,
    terms: Mapping[str, AnyTerm],
    corrected: Mapping[str, Term],
    *,
    chunk: int,
    layout: Layout,
    teacher_layout: Layout | None,
    ends: Mapping[str, Ends],
) -> Callable[..., tuple[Float[Array, ""], dict[str, Mean]]]:
    """(parameters, frozen, teacher's parameters, batch, coefficients, step) → (the loss without the terms that are
    averaged afterwards, the `Mean` of every term). corrected: the terms that the teacher learns.
    """
    on_scores = {name: term for name, term in terms.items() if not isinstance(term, HiddenMatch)}

    def evaluate(params, frozen, teacher_params, batch: Batch, coefficients, step):
        paired = isinstance(batch, PairedBatch)
        theirs = batch.teacher if paired else batch
        outputs = student(partition.merge(params["student"], frozen), batch)
        taught = None if teacher is None else teacher(params.get("teacher", teacher_params), theirs)
        signal = jax.lax.stop_gradient(taught)
        objective = params["objective"]
        own = {name: given for name, given in objective.items() if name in on_scores}
        places = {"layout": layout, "teacher_layout": teacher_layout}

        def summed(some, outputs, signal, rows: Batch, **options):
            on_rows = {"targets": rows.targets, "loss_mask": rows.loss_mask, "coefficients": coefficients}
            return evaluate_terms(some, outputs, signal, **on_rows, step=step, chunk=chunk, **options)

        if paired:
            options = {"ends": ends, "parameters": own, "step": step, "chunk": chunk}
            loss, means = jnp.float32(0), aligned_means(on_scores, outputs, signal, batch, **options, **places)
        else:
            loss, means = summed(on_scores, outputs, signal, batch, parameters=own, **places)
        if corrected and taught is not None:
            added, found = summed(corrected, taught, None, theirs, parameters={}, layout=teacher_layout or layout)
            loss, means = loss + added, means | found
        for name, term in terms.items():
            if isinstance(term, HiddenMatch):
                assert signal is not None, "make_train_step refuses these terms without a teacher"
                mine, matched, mask = outputs.taps[name], signal.taps[name], batch.loss_mask
                if isinstance(batch, PairedBatch):
                    mine, matched, mask = at_chunk_ends(batch, mine, matched)
                means[name] = term(mine, matched, mask, objective.get(name, {}))
        return loss, means

    return evaluate


def _is_averaged(term: AnyTerm, batch: Batch) -> bool:
    """Whether what a term's total is divided by is known only after the models have run."""
    return isinstance(term, HiddenMatch | ALM) or isinstance(batch, PairedBatch)


def _factors(
    averaged: Mapping[str, AnyTerm], means: Mapping[str, Mean], coefficients: Mapping[str, Array], step: Any
) -> dict[str, Array]:
    """What the total of each averaged term is multiplied by, given what all terms are on the whole batch."""
    weights = {name: at_step(term.weight, step) for name, term in averaged.items()}
    shares = {name: _share(means[name]) for name in averaged}
    values = {name: (shares[name] * means[name].total).sum() for name in averaged}
    for name, term in averaged.items():
        if isinstance(term, HiddenMatch) and (other := term.balance) is not None:
            known = (
                coefficients[other] * means[other].total if other not in averaged else weights[other] * values[other]
            )
            # States that are equal but for rounding have nothing to learn, and rounding has a direction.
            equal = values[name] <= ROUNDING
            weights[name] *= jnp.where(equal, 0.0, known / jnp.where(equal, 1.0, values[name]))
    return jax.lax.stop_gradient({name: weights[name] * shares[name] for name in averaged})


def _read_by_factors(averaged: Mapping[str, AnyTerm], means: Mapping[str, Mean]) -> dict[str, Mean]:
    """What `_factors` reads of means. Totals that it does not read are left out: then nothing computes them."""
    balanced = {name: term.balance for name, term in averaged.items() if isinstance(term, HiddenMatch) and term.balance}
    totals = {*balanced, *balanced.values()}
    return {
        name: mean if name in totals else dataclasses.replace(mean, total=jnp.zeros_like(mean.total))
        for name, mean in means.items()
        if name in totals or name in averaged
    }


def _share(mean: Mean) -> Array:
    """The factor of each total in a mean's value; of several side by side the value is their mean."""
    empty = mean.count == 0
    return jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, mean.count)) / jnp.size(mean.count)


def _reported(mean: Mean) -> Mean:
    """A mean as a metric: one total and one count."""
    if not jnp.ndim(mean.total):
        return mean
    return Mean((_share(mean) * mean.total).sum(), jnp.float32(1))


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
