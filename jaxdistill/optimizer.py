"""Optimizers and schedules: AdamW with warm-up by default, any optax transformation instead.

Schedules follow the train step (consumed batches), not an optimizer's own counter, so accumulation, skipped steps and
resume cannot shift them: the step hands its number to the transformation as the extra argument `step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxdistill import partition
from jaxdistill.types import Params, Scalar, at_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `final` at `total_steps`."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self):
        _check_steps("WarmupCosine", self.total_steps, self.warmup_steps)

    def __call__(self, step):
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return _warmed(self, step, self.final + (self.peak - self.final) * falling)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up from 0 to `peak`, constant, then linear to `final` over the last `decay_steps` (WSD)."""

    peak: float
    total_steps: int
    decay_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self):
        _check_steps("WarmupStableDecay", self.total_steps, self.warmup_steps + self.decay_steps)

    def __call__(self, step):
        progress = (step - (self.total_steps - self.decay_steps)) / max(1, self.decay_steps)
        return _warmed(self, step, self.peak + (self.final - self.peak) * jnp.clip(progress, 0.0, 1.0))


def _check_steps(name: str, total: int, needed: int) -> None:
    if total < 1 or needed > total or needed < 0:
        raise ValueError(
            f"{name} has {total} total_steps and {needed} steps of warm-up and decay; they must fit in it."
        )


def _warmed(schedule: WarmupCosine | WarmupStableDecay, step: Any, value: Any) -> Any:
    # The first step already learns: a rate of 0 would waste its batch.
    rising = schedule.peak * (step + 1) / max(1, schedule.warmup_steps)
    return jnp.where(step < schedule.warmup_steps, rising, value)


class Optimizer(Protocol):
    """What builds the transformation for a run; `AdamW` is one, `Optax` wraps any other."""

    def build(self) -> optax.GradientTransformationExtraArgs: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay and clipping by the global gradient norm (Loshchilov & Hutter 2019).

    learning_rate: a number or a schedule of the step. no_decay: shell patterns of dotted parameter names that are
    not decayed (`student.segments.0.ffn.norm.scale`, `objective.*`). clip_norm: None leaves gradients as they are.
    state_dtype: how both moments are stored; they are computed in float32.
    """

    learning_rate: Scalar = 1e-4
    first_decay: float = 0.9
    second_decay: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("*.scale", "*.bias", "*embedding.*", "objective.*")
    clip_norm: float | None = 1.0
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"AdamW.clip_norm is {self.clip_norm}; give a positive norm, or None to leave gradients.")

    def build(self) -> optax.GradientTransformationExtraArgs:
        adam = optax.scale_by_adam(b1=self.first_decay, b2=self.second_decay, eps=self.epsilon)
        return optax.chain(
            optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm),
            adam if self.state_dtype == "float32" else stored_as(adam, jnp.dtype(self.state_dtype)),
            optax.add_decayed_weights(self.weight_decay, mask=self._decayed),
            scale_by_step(lambda step: -at_step(self.learning_rate, step)),
        )

    def _decayed(self, params: Params) -> Params:
        kept = partition.matches(self.no_decay)
        return partition.map_names(lambda name, _: not kept(name), params)


@dataclasses.dataclass(frozen=True)
class Optax:
    """Any optax transformation as it is, its learning rate included."""

    transformation: optax.GradientTransformation

    def build(self) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.transformation)


def scale_by_step(factor: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a schedule of the train step, which `update` receives as `step=`."""

    def update(updates, state, params=None, *, step, **extra):
        value = factor(step)
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
