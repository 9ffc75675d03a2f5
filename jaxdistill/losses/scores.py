"""Scores of a few positions over the vocabulary, whole or split over mesh axes: the only place that reduces over it.

A term of the objective never sums over the vocabulary itself: under `shard_map` it holds one shard, and a plain
`log_softmax` there is silently wrong. `Scores` holds the shard and the names of the axes, and does every reduction
with the collective it needs. The same term code then runs on one device and on a pod.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SMALLEST_SHARE = 1e-30
"""Of a probability that `Scores.log_share` tells from 0."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Unnormalised log-probabilities (float32) of some positions.

    local: [position, vocab_shard], this device's part of the vocabulary. axes: the mesh axes that the vocabulary is
    split over; () when `local` is all of it. known: log Σ exp(score), where an earlier walk has found it; other scores
    made of these are `Scores` without it.
    """

    local: Float[Array, "position vocab_shard"]
    axes: tuple[str, ...] = ()
    known: Float[Array, "position"] | None = None

    def at_temperature(self, temperature: float | Array) -> Scores:
        """These scores divided by a temperature."""
        return Scores(self.local / temperature, self.axes)

    def log_normalizer(self) -> Float[Array, "position"]:
        """log Σ exp(score)."""
        return _log_normalizer(self.local, self.known, self.axes)

    def log_share(
        self, chosen: Bool[Array, "vocab"] | np.ndarray, known: Float[Array, "position"] | None = None
    ) -> Float[Array, "position"]:
        """log Σ probability of the chosen ids, bool [vocab]; ids beyond its end are not chosen. Smaller shares than
        `SMALLEST_SHARE` are that, and without gradient: float32 could not tell them from 0. known: the result, where
        an earlier walk has found it."""
        return _log_share(self.local, self.part(chosen), self.known, known, self.axes)

    def log_probs(self) -> Float[Array, "position vocab_shard"]:
        """Log-probabilities of this shard's ids."""
        return self.local - self.log_normalizer()[:, None]

    def probs(self) -> Float[Array, "position vocab_shard"]:
        """Probabilities of this shard's ids."""
        return jnp.exp(self.log_probs())

    def sum(self, values: Float[Array, "position vocab_shard"]) -> Float[Array, "position"]:
        """Σ over the whole vocabulary of values given for this shard."""
        return _psum(values.sum(-1), self.axes)

    def expect(self, values: Float[Array, "position vocab_shard"]) -> Float[Array, "position"]:
        """Expectation of values given for this shard, under these scores' distribution over the whole vocabulary."""
        return self.sum(self.probs() * values)

    def take(self, ids: Int[Array, "position"]) -> Float[Array, "position"]:
        """The score of one id per position."""
        here = ids - self._first_id()
        inside = (here >= 0) & (here < self.local.shape[-1])
        taken = jnp.take_along_axis(self.local, jnp.where(inside, here, 0)[:, None], axis=-1)[:, 0]
        return _psum(jnp.where(inside, taken, 0.0), self.axes)

    def max(self) -> Float[Array, "position"]:
        """The largest score; not differentiable."""
        return _pmax(jax.lax.stop_gradient(self.local).max(-1), self.axes)

    def argmax(self) -> Int[Array, "position"]:
        """The id of the largest score, the lowest one of equal ones; no id of the vocabulary where a score is NaN."""
        local = jax.lax.stop_gradient(self.local)
        # A minimum of float32 ids, exact up to 2²⁴ of them: on a CPU a third of the time of an argmax.
        ids = jax.lax.broadcasted_iota(jnp.float32, local.shape, 1) + self._first_id()
        lowest = jnp.where(local == self.max()[:, None], ids, jnp.inf).min(-1)
        return (jax.lax.pmin(lowest, self.axes) if self.axes else lowest).astype(jnp.int32)

    def top_k(self, k: int) -> tuple[Float[Array, "position k"], Int[Array, "position k"]]:
        """The k largest scores and their ids, in falling order; costs k x shards numbers of communication. All of them,
        where there are fewer."""
        values, ids = jax.lax.top_k(self.local, min(k, self.local.shape[-1]))
        if not self.axes:
            return values, ids
        ids = ids + self._first_id()
        values = _all_gather(values, self.axes)
        ids = _all_gather(ids, self.axes)
        values, order = jax.lax.top_k(values, min(k, values.shape[-1]))
        return values, jnp.take_along_axis(ids, order, axis=-1)

    def gather_chunk(self) -> Scores:
        """These positions with the whole vocabulary on every device: for a term that needs a global order.

        Costs position x vocab numbers of communication and memory; most terms never need it.
        """
        return Scores(_all_gather(self.local, self.axes)) if self.axes else self

    def part(self, values: Array | np.ndarray) -> Array:
        """This shard's part of something given for every id, [vocab, ...]; 0 (False) for ids beyond it."""
        here = self._first_id() + jnp.arange(self.local.shape[-1])
        return jnp.take(jnp.asarray(values), here, axis=0, mode="fill", fill_value=0)

    def _first_id(self) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self.axes) * self.local.shape[-1] if self.axes else 0


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _pmax(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.pmax(x, axes) if axes else x


def _all_gather(x: Array, axes: tuple[str, ...]) -> Array:
    # The result is equal on every shard, and typed so: what is computed from it needs no further reduction.
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True, to="invarying")


def _peak(local: Float[Array, "position vocab_shard"], axes: tuple[str, ...]) -> Float[Array, "position"]:
    peak = _pmax(local.max(-1), axes)
    # A position whose scores are all -inf has no distribution; 0 keeps exp(-inf - -inf) from making NaN here.
    return jnp.where(jnp.isfinite(peak), peak, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_normalizer(
    local: Float[Array, "position vocab_shard"], known: Float[Array, "position"] | None, axes: tuple[str, ...]
) -> Float[Array, "position"]:
    if known is not None:
        return known
    peak = _peak(local, axes)
    return peak + jnp.log(_psum(jnp.exp(local - peak[:, None]).sum(-1), axes))


def _log_normalizer_forward(local, known, axes):
    value = _log_normalizer(local, known, axes)
    return value, (local, value)


def _log_normalizer_backward(axes, saved, cotangent):
    # The gradient of log Σ exp is the softmax: local to each shard once the normalizer is known.
    local, value = saved
    return cotangent[:, None] * jnp.exp(local - value[:, None]), None


_log_normalizer.defvjp(_log_normalizer_forward, _log_normalizer_backward)


# As expressions the exponentials here are those of `_log_normalizer` and its gradient: a program that needs both makes
# them once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_share(
    local: Float[Array, "position vocab_shard"],
    chosen: Bool[Array, "vocab_shard"],
    known_normalizer: Float[Array, "position"] | None,
    known: Float[Array, "position"] | None,
    axes: tuple[str, ...],
) -> Float[Array, "position"]:
    if known is not None:
        return known
    peak = _peak(local, axes)
    some = _psum(jnp.where(chosen, jnp.exp(local - peak[:, None]), 0.0).sum(-1), axes)
    normalizer: Any = _log_normalizer(local, known_normalizer, axes)
    return jnp.maximum(jnp.log(some) + peak - normalizer, math.log(SMALLEST_SHARE))


def _log_share_forward(local, chosen, known_normalizer, known, axes):
    value = _log_share(local, chosen, known_normalizer, known, axes)
    return value, (local, chosen, _log_normalizer(local, known_normalizer, axes), value)


def _log_share_backward(axes, saved, cotangent):
    local, chosen, normalizer, value = saved
    kept = jnp.where(value > math.log(SMALLEST_SHARE), cotangent, 0.0)
    factor = jnp.where(chosen, jnp.exp(-value)[:, None] - 1, -1.0)
    return kept[:, None] * factor * jnp.exp(local - normalizer[:, None]), None, None, None


_log_share.defvjp(_log_share_forward, _log_share_backward)
