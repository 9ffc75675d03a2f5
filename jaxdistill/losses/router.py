"""Losses on the routers of mixtures of experts: that experts are used alike, and that scores stay small."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.types import Mean, Scalar, Tap


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTerm(abc.ABC):
    """A term on the student's routers, over all tokens that are not padding and all layers with a mixture.

    layers: which those are; None until `resolved`.
    """

    weight: Scalar
    layers: tuple[int, ...] | None = None

    def resolved(self, mixtures: Sequence[int]) -> Self:
        """This term for a model whose layers with these indices have a mixture."""
        if not mixtures:
            raise ValueError(f"{type(self).__name__} is a loss of routers, and the student has none; leave it out.")
        return dataclasses.replace(self, layers=tuple(mixtures))

    def tap(self, side: Literal["student", "teacher"]) -> Tap | None:
        """What the student has to return under the term's name; the teacher nothing."""
        if side == "teacher":
            return None
        if self.layers is None:
            raise ValueError(f"{type(self).__name__}.layers is None; call `resolved` first.")
        return Tap(points=("router", "chosen_experts"), reduce=self.reduce, layers=self.layers)

    @abc.abstractmethod
    def reduce(self, values: Any, mask: Float[Array, "batch length"]) -> dict[str, Array]:
        """Sums over a layer's tokens."""

    @abc.abstractmethod
    def __call__(self, tapped: dict[str, Array]) -> Mean:
        """From the sums of all layers, stacked. May be larger than a scalar, see `share`."""

    @abc.abstractmethod
    def share(self, mean: Mean) -> Array:
        """What totals are multiplied by in the loss; of the same shape, from the whole batch's, and constant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterBalance(RouterTerm):
    """experts · Σ over experts of (its share of tokens) · (its mean probability): least where all are used alike, and
    then as large as the number of experts that a token chooses.

    Switch Transformers (2101.03961, equations 4 to 6), over all layers together, as in transformers. Shares are counts
    and have no gradient; they are those of the whole batch, so with micro-batches the student runs forward once more.
    """

    weight: Scalar = 0.01

    def reduce(self, values, mask):
        logits = values["router"].astype(jnp.float32)
        probs = jax.nn.softmax(logits) * mask[..., None]
        chosen = jax.nn.one_hot(values["chosen_experts"], logits.shape[-1]).sum(-2) * mask[..., None]
        return {"probs": probs.sum((0, 1)), "chosen": chosen.sum((0, 1)), "tokens": mask.sum()}

    def __call__(self, tapped):
        """Totals are [2, experts]: probabilities, and how often an expert was chosen."""
        totals = jnp.stack([tapped["probs"].sum(0), jax.lax.stop_gradient(tapped["chosen"].sum(0))])
        return Mean(totals, jnp.broadcast_to(tapped["tokens"].sum(), totals.shape))

    def share(self, mean):
        chosen, tokens = mean.total[1], jnp.maximum(mean.count[0], 1.0)
        factor = jax.lax.stop_gradient(chosen.shape[0] * chosen / tokens**2)
        return jnp.stack([factor, jnp.zeros_like(factor)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterZ(RouterTerm):
    """The mean square of the routers' log Σ exp(score), which keeps scores small enough for their precision (ST-MoE,
    2202.08906, equation 5)."""

    weight: Scalar = 0.001

    def reduce(self, values, mask):
        sizes = jax.nn.logsumexp(values["router"].astype(jnp.float32), axis=-1)
        return {"squares": (jnp.square(sizes) * mask).sum(), "tokens": mask.sum()}

    def __call__(self, tapped):
        return Mean(tapped["squares"].sum(), tapped["tokens"].sum())

    def share(self, mean):
        return jnp.where(mean.count == 0, 0.0, 1.0 / jnp.where(mean.count == 0, 1.0, mean.count))
