"""Optimizers and schedules: AdamW with warm-up by default, any optax transformation instead.

Schedules follow the train step (consumed batches), not an optimizer's own counter, so accumulation, skipped steps and
resume cannot shift them: the step hands its number to the transformation as the extra argument `step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jaxdistill import partition
from jaxdistill.choices import check_choices
from jaxdistill.types import Params, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up to `peak`, then half a cosine down to `final` (a share of peak) at the end of the run."""

    peak: float
    warmup: float = 0.05
    """The share of the run that warms up."""
    final: float = 0.1

    def __post_init__(self):
        _check_shares("WarmupCosine", self.peak, self.warmup)

    def over(self, steps: int) -> Schedule:
        """The rate at each step of a run of this many."""
        rise = round(self.warmup * steps)

        def rate(step):
            progress = jnp.clip((step - rise) / max(1, steps - rise), 0.0, 1.0)
            share = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            return self.peak * jnp.minimum(share, _risen(step, rise))

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up to `peak`, constant, then linear to `final` (a share of peak) over the last `decay` of the run."""

    peak: float
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self):
        _check_shares("WarmupStableDecay", self.peak, self.warmup, self.decay)

    def over(self, steps: int) -> Schedule:
        """The rate at each step of a run of this many."""
        rise, fall = round(self.warmup * steps), max(1, round(self.decay * steps))

        def rate(step):
            progress = jnp.clip((step - (steps - fall)) / fall, 0.0, 1.0)
            return self.peak * jnp.minimum(1 - (1 - self.final) * progress, _risen(step, rise))

        return rate


def _check_shares(name: str, peak: float, *shares: float) -> None:
    if not peak > 0 or any(not 0 <= s <= 1 for s in shares) or sum(shares) > 1:
        raise ValueError(
            f"{name} has peak {peak} and shares of the run {shares}; the peak must be positive, the shares between 0 "
            "and 1 and at most 1 together."
        )


def _risen(step: Any, rise: int) -> Any:
    # The first step already learns: a rate of 0 would waste its batch.
    return jnp.minimum((step + 1) / max(1, rise), 1.0)


LearningRate = float | WarmupCosine | WarmupStableDecay


@runtime_checkable
class Optimizer(Protocol):
    """What builds the transformation for a run; `AdamW` is one, `Optax` wraps any other."""

    def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for a run of this many steps."""
        ...

    def rate(self, steps: int) -> Schedule | None:
        """The learning rate at each step of a run of this many; None when the transformation does not tell."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay and clipping by the global gradient norm (Loshchilov & Hutter 2019).

    learning_rate: a number or a schedule over the run. no_decay: shell patterns of dotted parameter names that are
    not decayed (`student.segments.0.ffn.norm.scale`, `objective.*`). clip_norm: None leaves gradients as they are.
    state_dtype: how both moments are stored; they are computed in float32.
    """

    learning_rate: LearningRate = 1e-4
    first_decay: float = 0.9
    second_decay: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("*.scale", "*.bias", "*embedding.*", "objective.*")
    clip_norm: float | None = 1.0
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_choices(self)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"AdamW.clip_norm is {self.clip_norm}; give a positive norm, or None to leave gradients.")

    def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for a run of this many steps."""
        rate = self.rate(steps)
        adam = optax.scale_by_adam(b1=self.first_decay, b2=self.second_decay, eps=self.epsilon)
        return optax.chain(
            optax.identity() if self.clip_norm is None else _clip_by_norm(self.clip_norm),
            adam if self.state_dtype == "float32" else stored_as(adam, jnp.dtype(self.state_dtype)),
            optax.add_decayed_weights(self.weight_decay, mask=self._decayed),
            scale_by_step(lambda step: -rate(step)),
        )

    def rate(self, steps: int) -> Schedule:
        """The learning rate at each step of a run of this many."""
        given = self.learning_rate
        return (lambda step: given) if isinstance(given, int | float) else given.over(steps)

    def _decayed(self, params: Params) -> Params:
        kept = partition.matches(self.no_decay)
        return partition.map_names(lambda name, _: not kept(name), params)


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optax transformation as it is, its learning rate and its own step count included.

    A resume cannot see numbers inside it: the caller keeps them as they were.
    """

    transformation: optax.GradientTransformation

    def build(self, steps: int) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.transformation)

    def rate(self, steps: int) -> None:
        return None


def side_by_side(
    student: optax.GradientTransformationExtraArgs, teacher: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """One transformation for a state whose teacher learns too: everything else by the first, "teacher" by the second,
    which finds the norm of its gradient itself."""

    def update(updates, state, params=None, *, gradient_norm=None, **extra):
        return teacher.update(updates, state, params, **extra)

    alone = optax.GradientTransformationExtraArgs(teacher.init, update)
    labels = {"student": "student", "objective": "student", "teacher": "teacher"}
    return optax.partition({"student": student, "teacher": alone}, labels)


def _clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scales updates so that their global norm is at most `largest`: by one factor, which costs no memory (optax's
    choice between two results keeps one of them). First in its chain: `gradient_norm=` is the norm of these updates,
    which the train step knows already; without it it is computed."""

    def update(updates, state, params=None, *, gradient_norm=None, **extra):
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        factor = jnp.minimum(1.0, largest / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_step(factor: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a schedule of the train step, which `update` receives as `step=`."""

    def update(updates, state, params=None, **extra):
        value = factor(extra["step"])
        return jax.tree.map(lambda u: u * jnp.asarray(value, u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def stored_as(inner: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation whose floating-point state is kept in `dtype` and computed in float32."""
    inner = optax.with_extra_args_support(inner)

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, cast(state, jnp.float32), params, **extra)
        return updates, cast(state, dtype)

    return optax.GradientTransformationExtraArgs(lambda params: cast(inner.init(params), dtype), update)
