"""From what two models return for a batch to a loss: the terms, what their sums are divided by, and how they weigh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.choices import check_choices
from jaxdistill.losses.aligned import ACROSS_TOKENIZERS, Ends, aligned_means, at_chunk_ends
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.chunked import evaluate_terms, term_coefficients, term_values
from jaxdistill.losses.dual_space import DSKD
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.router import RouterBalance, RouterTerm, RouterZ
from jaxdistill.losses.terms import Term
from jaxdistill.sharding import Layout
from jaxdistill.types import Batch, Mean, Outputs, PairedBatch, Params, at_step

AnyTerm = Term | HiddenMatch | ALM | DSKD | RouterBalance | RouterZ

Weighting = Literal["fixed", "gradient_magnitude"]
"""How terms are added up. "fixed": each times its weight. "gradient_magnitude": each times its weight ÷ the norm of its
gradient by what the student's layers return (the last hidden states, and those that a term reads), so that terms of
very different sizes move the student equally; divided by the sum of these factors without the weights. Gradients are
taken by relative changes of a state (the gradient times the state's root mean square at its position), because layers
hold states of very different sizes. The smallest gradient among the terms sets the size of the whole; one that rounding
alone makes is left out. The norms are those of the whole batch at the same step. Each costs a pass through the head for
the term's values and one for its gradient; with micro-batches two more forward passes of both models.

After the authors' code of Approximate Likelihood Matching (2503.20083), which takes norms by the parameters of the last
layer: those are no sums over positions, so they would depend on how a batch is cut."""

ROUNDING = 1e-6
"""A mean distance of hidden states that float32 cannot tell from 0."""


class Seen(NamedTuple):
    """What the models return for a batch. taught: the teacher's outputs, differentiable where it learns."""

    outputs: Outputs
    taught: Outputs | None


class Known(NamedTuple):
    """What a loss is computed with besides batch and parameters. coefficients: of the terms that are sums over
    supervised positions, and so known from the data."""

    coefficients: Mapping[str, Array]
    step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective's terms and how they are evaluated; see `step.make_train_step` for the fields."""

    terms: Mapping[str, AnyTerm]
    chunk: int
    layout: Layout = Layout()
    teacher_layout: Layout | None = None
    ends: Mapping[str, Ends] = dataclasses.field(default_factory=dict)
    corrected: Mapping[str, Term] = dataclasses.field(default_factory=dict)
    weighting: Weighting = "fixed"

    def known(self, batch: Batch, step: Any) -> Known:
        """Of the whole batch, so that micro-batches are divided by the count of all of them."""
        theirs = batch.teacher if isinstance(batch, PairedBatch) else batch
        coefficients = term_coefficients(self.terms, batch.loss_mask.sum(), step)
        return Known(coefficients | term_coefficients(self.corrected, theirs.loss_mask.sum(), step), step)

    def __post_init__(self):
        check_choices(self)
        missing = sorted(n for n, t in self.terms.items() if isinstance(t, ALM) and t.needs_ends and n not in self.ends)
        if missing:
            raise ValueError(
                f"the terms {missing} read where a word may end; give `ends` for them: the ids of both tokenizers "
                "that can follow the end of a word (losses.aligned.Ends, data.aligned.following_ids)."
            )

    def averaged(self, batch: Batch) -> dict[str, AnyTerm]:
        """The terms that `means` leaves out of the loss: `factors` tell what their totals are multiplied by."""
        if isinstance(batch, PairedBatch) or self.weighting != "fixed":
            return dict(self.terms)
        return {name: term for name, term in self.terms.items() if isinstance(term, HiddenMatch | RouterTerm)}

    def means(
        self, seen: Seen, batch: Batch, parameters: Params, known: Known
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """(the loss of all terms but the averaged ones, the `Mean` of every term)."""
        outputs, taught = seen
        signal = jax.lax.stop_gradient(taught)
        loss, means = self._on_scores(outputs, signal, batch, parameters, known)
        for name, term in self.terms.items():
            if isinstance(term, HiddenMatch):
                assert signal is not None, "make_train_step refuses these terms without a teacher"
                own, theirs, mask = term.states(name, outputs), term.states(name, signal), batch.loss_mask
                if isinstance(batch, PairedBatch):
                    own, theirs, mask = at_chunk_ends(batch, own, theirs)
                means[name] = term(own, theirs, mask, parameters.get(name, {}))
            elif isinstance(term, RouterTerm):
                means[name] = term(outputs.taps[name])
        if self.corrected and taught is not None:
            rows, layout = (
                batch.teacher if isinstance(batch, PairedBatch) else batch,
                self.teacher_layout or self.layout,
            )
            added, found = evaluate_terms(
                self.corrected,
                taught,
                None,
                **_rows(rows),
                **known._asdict(),
                parameters={},
                chunk=self.chunk,
                layout=layout,
            )
            loss, means = loss + added, means | found
        return loss, means

    def _on_scores(self, outputs, signal, batch, parameters, known: Known) -> tuple[Float[Array, ""], dict[str, Mean]]:
        terms = {n: term for n, term in self.terms.items() if not isinstance(term, HiddenMatch | RouterTerm)}
        options: dict[str, Any] = {
            "parameters": {name: given for name, given in parameters.items() if name in terms},
            "step": known.step,
            "chunk": self.chunk,
            "layout": self.layout,
            "teacher_layout": self.teacher_layout,
        }
        if isinstance(batch, PairedBatch):
            return jnp.float32(0), aligned_means(terms, outputs, signal, batch, ends=self.ends, **options)
        across = sorted(name for name, term in terms.items() if isinstance(term, ACROSS_TOKENIZERS))
        if across:
            raise ValueError(
                f"the terms {across} compare two tokenizations of a text, and the batch has one; give a PairedBatch "
                "(data.pipeline.make_loader with a teacher_tokenizer)."
            )
        plain = {name: term for name, term in terms.items() if isinstance(term, Term)}
        if self.weighting == "fixed":
            return evaluate_terms(plain, outputs, signal, **_rows(batch), coefficients=known.coefficients, **options)
        # Gradients of single terms are asked for, and those need totals that are differentiable.
        values, count = term_values(plain, outputs, signal, **_rows(batch), **options), batch.loss_mask.sum()
        return jnp.float32(0), {name: Mean(found.sum(), count) for name, found in values.items()}

    # How averaged terms weigh.

    def factors(
        self, means: Mapping[str, Mean], batch: Batch, known: Known, squares: Callable[[Mapping[str, Array]], Any]
    ) -> dict[str, Array]:
        """What the total of each averaged term is multiplied by, a constant.

        means: what `counted` says of the whole batch, or all of it. squares: gives `squared_gradients` of the whole
        batch, for the factors of plain means.
        """
        averaged = self._trained(self.averaged(batch))
        shares = jax.lax.stop_gradient({name: self._share(name, means[name]) for name in averaged})
        if self.weighting != "fixed":
            return self._emphasised(shares, squares(shares), known)
        weights = {name: at_step(term.weight, known.step) for name, term in averaged.items()}
        values = {name: (shares[name] * means[name].total).sum() for name in averaged}
        for name, term in averaged.items():
            if isinstance(term, HiddenMatch) and (other := term.balance) is not None:
                inside = other in averaged
                size = weights[other] * values[other] if inside else known.coefficients[other] * means[other].total
                # States that are equal but for rounding have nothing to learn, and rounding has a direction.
                equal = values[name] <= ROUNDING
                weights[name] *= jnp.where(equal, 0.0, size / jnp.where(equal, 1.0, values[name]))
        return jax.lax.stop_gradient({name: weights[name] * shares[name] for name in averaged})

    def total(self, means: Mapping[str, Mean], factors: Mapping[str, Array]) -> Float[Array, ""]:
        """The loss of the averaged terms, of those that have factors."""
        found: Any = sum((factor * means[name].total).sum() for name, factor in factors.items())
        return jnp.float32(0) + found

    def _trained(self, terms: Mapping[str, AnyTerm]) -> dict[str, AnyTerm]:
        """Without those that never have a weight: they are reported, and nothing of them is differentiated."""
        return {name: term for name, term in terms.items() if callable(term.weight) or term.weight != 0}

    def counted(self, seen: Seen, batch: Batch, parameters: Params, known: Known) -> dict[str, Mean]:
        """What `factors` reads of means. Totals that it does not read are left out: then nothing computes them."""
        _, means = self.means(seen, batch, parameters, known)
        averaged = self.averaged(batch)
        balances = {n: term.balance for n, term in averaged.items() if isinstance(term, HiddenMatch) and term.balance}
        totals = {*balances, *balances.values()} | {n for n, t in averaged.items() if isinstance(t, RouterTerm)}
        return {
            name: mean if name in totals else dataclasses.replace(mean, total=jnp.zeros_like(mean.total))
            for name, mean in means.items()
            if name in totals or name in averaged
        }

    def squared_gradients(
        self, seen: Seen, batch: Batch, parameters: Params, known: Known, factors: Mapping[str, Array]
    ) -> dict[str, Float[Array, ""]]:
        """The squared norm of each term's gradient by relative changes of what the student's layers return; a sum over
        positions, and a constant."""
        seen, parameters = jax.lax.stop_gradient((seen, parameters))
        states = {"hidden": seen.outputs.hidden, "taps": seen.outputs.taps}

        def value(read: Any, name: str) -> Array:
            outputs = dataclasses.replace(seen.outputs, **read)
            alone = dataclasses.replace(self, terms={name: self.terms[name]}, corrected={})
            _, means = alone.means(Seen(outputs, seen.taught), batch, parameters, known)
            return (factors[name] * means[name].total).sum()

        def square(name: str) -> Array:
            found = jax.tree.map(_relative_squares, jax.grad(value)(states, name), states)
            return jnp.stack(jax.tree.leaves(found)).sum()

        return {name: square(name) for name in factors}

    def _emphasised(self, factors: Mapping[str, Array], squares: Mapping[str, Array], known: Known) -> dict[str, Array]:
        """The factors by which every term's gradient has the size that its weight says."""
        weights = {name: jnp.float32(at_step(self.terms[name].weight, known.step)) for name in factors}
        # A term without weight at this step says nothing, and one without gradient has none to be made larger. One that
        # is least but for rounding has no direction either.
        sizes = [jnp.where(weights[name] == 0, 0.0, squares[name]) for name in factors]
        least = ROUNDING**2 * jnp.stack([jnp.float32(0), *sizes]).max()
        counts = {name: (weights[name] != 0) & (squares[name] > least) for name in factors}
        inverse = {n: jnp.where(counts[n], jax.lax.rsqrt(jnp.where(counts[n], squares[n], 1.0)), 0.0) for n in factors}
        total = sum(inverse.values())
        return {
            name: weights[name] * inverse[name] / jnp.where(total == 0, 1.0, total) * factors[name] for name in factors
        }

    def _share(self, name: str, mean: Mean) -> Array:
        """The factors of a mean's totals in its value."""
        term = self.terms.get(name)
        return term.share(mean) if isinstance(term, RouterTerm) else _share(mean)

    def reported(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        """Means as metrics: one total and one count each."""
        return {
            name: Mean((self._share(name, mean) * mean.total).sum(), jnp.float32(1)) if jnp.ndim(mean.total) else mean
            for name, mean in means.items()
        }


def _rows(batch: Batch) -> dict[str, Array]:
    return {"targets": batch.targets, "loss_mask": batch.loss_mask}


def _relative_squares(slopes: Float[Array, "... embed"], states: Float[Array, "... embed"]) -> Float[Array, ""]:
    """The sum over positions of a gradient's square times the mean square of the state. Without a gradient any state
    may stand there, also one that is no number."""
    slopes, states = slopes.astype(jnp.float32), states.astype(jnp.float32)
    steep = jnp.square(slopes).sum(-1)
    return jnp.where(steep == 0, 0.0, steep * jnp.square(states).mean(-1)).sum()


def _share(mean: Mean) -> Array:
    """The factor of each total in a mean's value; of several side by side the value is their mean."""
    empty = mean.count == 0
    return jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, mean.count)) / jnp.size(mean.count)
