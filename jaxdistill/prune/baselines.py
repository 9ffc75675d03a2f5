"""What importance is compared with: scores that know nothing of the text, and the same scores upside down."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.models.schema import leaf_at, stacked_schema
from jaxdistill.prune.choose import Target
from jaxdistill.prune.importance import Importance
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params

ScoreOf = Callable[[str, int | None, int], np.ndarray]
"""From an axis, its layer (None: the whole model's) and its size to a score for each part."""


def random_importance(config: ModelConfig, seed: int) -> Importance:
    """Scores that are drawn at random."""
    rng = np.random.default_rng(seed)
    return _scored(config, lambda axis, layer, size: rng.uniform(size=size))


def worst_first(scores: Importance) -> Importance:
    """The scores negated: what is kept is what contributes least."""
    return Importance(
        embed=-scores.embed,
        layers=-scores.layers,
        widths={axis: tuple(-values for values in layers) for axis, layers in scores.widths.items()},
    )


def even_importance(config: ModelConfig, target: Target) -> Importance:
    """Scores by which `choose` keeps parts at equal distances, the first and the last among them."""

    def even(axis: str, layer: int | None, size: int) -> np.ndarray:
        wanted = getattr(target, axis)
        if isinstance(wanted, tuple):
            raise ValueError(f"{axis} is {wanted}; equal distances are made for one size that all layers have.")
        groups = config.layers[layer].widths.get("experts", 1) if layer is not None and axis == "mlp" else 1
        size //= groups
        keep = size if wanted is None else wanted
        chosen = np.round(np.linspace(0, size - 1, min(keep, size))).astype(int)
        return np.tile(np.isin(np.arange(size), chosen).astype(float), groups)

    return _scored(config, even)


def weight_magnitude(config: ModelConfig, params: Params, layout: Layout = Layout()) -> Importance:
    """Scores by the L2 norm of all weights that belong to a part, layers by all their weights; on any mesh."""

    # On every device whole, so that each process can read them.
    @functools.partial(jax.jit, out_shardings=layout.replicated() if layout.mesh else None)
    def squares(params: Params) -> dict[str, dict[str, Array]]:
        found: dict[str, dict[str, Array]] = {}
        for path, leaf in stacked_schema(config).items():
            values = jnp.square(leaf_at(params, path).astype(jnp.float32))
            for axis in ("embed", "layers", *config.width_axes):
                if axis not in leaf.axes:
                    continue
                own = (axis, "layers", "experts") if axis == "mlp" else (axis, "layers")
                sums = values.sum([at for at, name in enumerate(leaf.axes) if name not in own])
                sums = sums.reshape(len(sums), -1) if axis == "mlp" else sums  # neurons of one expert after another
                place = "model" if axis == "embed" else path[1]
                # One choice of channels for the whole model; each layer has its own of everything else.
                sums = sums.sum(0) if axis == "embed" and leaf.stacked else sums
                total = found.setdefault(place, {})
                total[axis] = total[axis] + sums if axis in total else sums
        return found

    found = jax.tree.map(lambda x: np.sqrt(np.asarray(x, np.float64)), squares(params))
    segments = [found.get(str(i), {}) for i in range(len(config.segments))]
    both = zip(segments, config.segments, strict=True)
    return Importance(
        embed=found["model"]["embed"],
        layers=np.concatenate([each.get("layers", np.zeros(size)) for each, (size, _) in both]),
        widths={
            axis: tuple(
                row
                for each, (size, _) in zip(segments, config.segments, strict=True)
                for row in each.get(axis, np.zeros((size, 0)))
            )
            for axis in config.width_axes
        },
    )


def _scored(config: ModelConfig, score: ScoreOf) -> Importance:
    return Importance(
        embed=score("embed", None, config.embed),
        layers=score("layers", None, len(config.layers)),
        widths={
            axis: tuple(score(axis, i, layer.parts.get(axis, 0)) for i, layer in enumerate(config.layers))
            for axis in config.width_axes
        },
    )
