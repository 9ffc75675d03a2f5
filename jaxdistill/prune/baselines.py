"""What importance is compared with: scores that know nothing of the text, and the same scores upside down."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jaxdistill.prune.choose import Target
from jaxdistill.prune.importance import Importance
from jaxdistill.specs import WIDTH_AXES, ModelConfig

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
        keep = size if wanted is None else wanted
        chosen = np.round(np.linspace(0, size - 1, min(keep, size))).astype(int)
        return np.isin(np.arange(size), chosen).astype(float)

    return _scored(config, even)


def weight_magnitude(
    config: ModelConfig, weights: Mapping[str, np.ndarray], axes: Mapping[str, tuple[str, ...]]
) -> Importance:
    """Scores by the L2 norm of all weights that belong to a part.

    weights: the per-layer view of a model (`models.schema.unstack`). axes: the name of each axis of each weight. Layers
    are scored by all their weights.
    """

    def norms(axis: str, layer: int | None, size: int) -> np.ndarray:
        prefix = "" if layer is None else f"layers.{layer}."
        total = np.zeros(size)
        for name, weight in weights.items():
            if name.startswith(prefix) and axis in axes[name]:
                others = tuple(i for i, other in enumerate(axes[name]) if other != axis)
                total += np.square(np.asarray(weight, np.float64)).sum(others)
        return np.sqrt(total)

    def score(axis: str, layer: int | None, size: int) -> np.ndarray:
        if axis != "layers":
            return norms(axis, layer, size)
        sums = [
            sum(np.square(np.asarray(w, np.float64)).sum() for n, w in weights.items() if n.startswith(f"layers.{i}."))
            for i in range(size)
        ]
        return np.sqrt(np.asarray(sums))

    return _scored(config, score)


def _scored(config: ModelConfig, score: ScoreOf) -> Importance:
    return Importance(
        embed=score("embed", None, config.embed),
        layers=score("layers", None, len(config.layers)),
        widths={
            axis: tuple(score(axis, i, layer.widths[axis]) for i, layer in enumerate(config.layers))
            for axis in WIDTH_AXES
        },
    )
