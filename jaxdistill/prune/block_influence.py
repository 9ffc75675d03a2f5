"""Block Influence: how much a layer turns the residual stream; the layers that turn it least can go first."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdistill.types import Mean, Tap


def block_influence_tap() -> Tap:
    """A tap of every layer whose result is the `Mean` of 1 - cos(input, output) over the tokens that are not padding.

    Its total and count are [layers]; add those of several batches. Source: ShortGPT (2403.03853, equation 1), used
    for depth pruning in Compact Language Models via Pruning and Knowledge Distillation (2407.14679).
    """

    def reduce(values, mask):
        before, after = (values[point].astype(jnp.float32) for point in ("input", "output"))
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = (before * after).sum(-1) / jnp.maximum(norms, 1e-30)
        return Mean(jnp.where(mask > 0, 1 - cosine, 0.0).sum(), mask.sum())

    return Tap(points=("input", "output"), reduce=reduce)
