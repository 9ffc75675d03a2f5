"""How much each part of a model contributes, measured on text: forward passes only, reduced inside the layer scan.

Minitron's scores (Compact Language Models via Pruning and Knowledge Distillation, 2407.14679): a part is
as important as what it hands on is large. Each row of a batch is reduced over its tokens, and rows over the whole
calibration set, so what is kept while measuring is one number per part, and a pass costs little more than a forward.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.formats.paths import AnyPath, any_path, atomic_file, fetched
from jaxdistill.models.decoder import tap_points
from jaxdistill.prune.block_influence import block_influence_tap
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig
from jaxdistill.types import Mean, Tap

Aggregation = Literal["mean", "l2", "variance"]
"""How many numbers become one. "mean": of absolute values; "l2": the root of the sum of squares; "variance"."""

Sums = dict[str, Any]
"""What calibration adds up: for each segment of equal layers, the results of its tap. Add those of several batches."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Over rows of a number per part: its mean, and the sum of squares of what it differs from that, float32 [...].
    rows: how many were not all padding, for each of the leading axes that it has.

    Not sums of the numbers and of their squares: the difference of two large ones would be what is left of a variance.
    """

    mean: Any
    squares: Any
    rows: Any

    @classmethod
    def of(cls, row: Float[Array, "batch ..."], seen: Array) -> Moments:
        """Of numbers for each row, where the row is seen; seen has the leading axes of what is counted apart."""
        rows = seen.sum(0).astype(jnp.float32)
        seen = _spread(seen, row)
        mean = jnp.where(seen, row, 0.0).sum(0) / jnp.maximum(_spread(rows, row[0]), 1.0)
        return cls(mean, jnp.square(jnp.where(seen, row - mean, 0.0)).sum(0), rows)

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both (Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm)."""
        rows = self.rows + other.rows
        share = _spread(other.rows / jnp.maximum(rows, 1.0), self.mean)
        between = other.mean - self.mean
        squares = self.squares + other.squares + jnp.square(between) * _spread(self.rows, self.mean) * share
        return Moments(self.mean + between * share, squares, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """A score for each part of a model; more is more important. Only their order within an axis (and, but for the
    whole model's axes, within a layer) means anything.

    embed: [embed]. layers: [layers]. widths: by axis of `specs.WIDTH_AXES`, an array for each layer.
    """

    embed: Any
    layers: Any
    widths: Mapping[str, tuple[Any, ...]]

    def save(self, path: AnyPath) -> None:
        """As a NumPy .npz file."""
        widths = {f"{axis}/{layer}": s for axis, scores in self.widths.items() for layer, s in enumerate(scores)}
        with atomic_file(any_path(path)) as file:
            np.savez(file, embed=self.embed, layers=self.layers, **widths)

    @classmethod
    def load(cls, path: AnyPath) -> Importance:
        """From what `save` wrote. Raises ValueError for anything else."""
        try:
            with np.load(fetched(path)) as arrays:
                depth = len(arrays["layers"])
                axes = {name.partition("/")[0] for name in arrays.files if "/" in name}
                widths = {axis: tuple(arrays[f"{axis}/{layer}"] for layer in range(depth)) for axis in sorted(axes)}
                return cls(embed=arrays["embed"], layers=arrays["layers"], widths=widths)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a file of importance scores ({error}); measure them again.") from None


def importance_taps(config: ModelConfig, *, sequence: Aggregation = "mean") -> dict[str, Tap]:
    """Taps that reduce, in every layer, what each part hands on: over the tokens of a row, then summed over rows.

    mlp neurons: the input of the down projection. Query heads: the input of the output projection. Channels: the
    outputs of both norms. Layers: Block Influence. Experts: the norm of what one adds to the stream, a mean over the
    tokens that chose it (as in NVIDIA's ModelOpt); of its neurons, these tokens are the row. Padding does not count.
    With packed rows a row is one example. sequence: how the tokens of a row become one number.
    """
    influence = block_influence_tap()

    def reduce(values: Mapping[str, Array], mask: Float[Array, "batch length"], spec: LayerSpec) -> dict[str, Any]:
        found = {
            "embed": [_moments(values[p], mask, sequence) for p in ("mixer_normed", "ffn_normed") if p in values],
            "layers": influence.reduce(values, mask),
        }
        if spec.mixer is not None:
            found["heads"] = _moments(values["heads"], mask, sequence)
        if spec.ffn is None:
            return found
        if not isinstance(spec.ffn, MixtureOfExperts):
            return found | {"mlp": _moments(values["mlp"], mask, sequence)}
        chosen = jax.nn.one_hot(values["chosen_experts"], spec.ffn.experts) * (mask > 0)[..., None, None]
        norms = jnp.linalg.norm(values["experts"].astype(jnp.float32), axis=-1)
        experts = Mean(jnp.einsum("blc,blce->e", norms, chosen, precision="highest"), chosen.sum((0, 1, 2)))
        return found | {"experts": experts, "mlp": _expert_moments(values["mlp"], chosen, sequence)}

    points = ("input", "mixer_normed", "heads", "ffn_normed", "mlp", "chosen_experts", "experts", "output")
    taps, first = {}, 0
    # Segments may differ in width, and so in the shape of their results.
    for segment, (size, spec) in enumerate(config.segments):
        taps[str(segment)] = Tap(
            points=tuple(point for point in points if point in tap_points(spec)),
            reduce=functools.partial(reduce, spec=spec),
            layers=tuple(range(first, first + size)),
        )
        first += size
    return taps


def add(one: Sums, other: Sums) -> Sums:
    """Both calibration results as one; the same as that of all their rows in one batch."""
    return jax.tree.map(operator.add, one, other, is_leaf=lambda found: isinstance(found, Moments))


def importance(config: ModelConfig, sums: Sums, *, batch: Aggregation = "l2") -> Importance:
    """Scores from what the taps of `importance_taps` found in all batches. batch: how rows become one number.

    The defaults, mean over tokens and l2 over rows, are the paper's best. A query head's score is the l2 norm
    over its dimensions, a key-value head's over its query heads; a channel's score is the sum over all norms. An expert
    that no token chose scores 0.
    """
    segments = [jax.tree.map(lambda x: np.asarray(x, np.float64), sums[str(i)]) for i in range(len(config.segments))]
    embed = np.zeros(config.embed)
    layers: list[np.ndarray] = []
    widths: dict[str, list[np.ndarray]] = {axis: [] for axis in config.width_axes}
    for found, (size, spec) in zip(segments, config.segments, strict=True):
        embed += sum(_over_rows(each, batch).sum(0) for each in found["embed"])
        own: dict[str, np.ndarray] = {}
        if spec.mixer is not None:
            heads = own["heads"] = np.linalg.norm(_over_rows(found["heads"], batch), axis=-1)
            own["kv_heads"] = np.linalg.norm(heads.reshape(size, spec.mixer.kv_heads, -1), axis=-1)
        if spec.ffn is not None:
            own["mlp"] = _over_rows(found["mlp"], batch).reshape(size, -1)
        if "experts" in found:
            own["experts"] = found["experts"].value
        for axis in widths:
            widths[axis] += list(own.get(axis, np.zeros((size, 0))))
        influence: Mean = found["layers"]
        layers.append(np.asarray(influence.value))
    return Importance(
        embed=embed, layers=np.concatenate(layers), widths={axis: tuple(scores) for axis, scores in widths.items()}
    )


def _moments(
    values: Float[Array, "batch length ..."], mask: Float[Array, "batch length"], kind: Aggregation
) -> Moments:
    """One number per row and part, then their moments over rows."""
    seen = (mask > 0).reshape(*mask.shape, *(1,) * (values.ndim - 2))
    values = jnp.where(seen, values.astype(jnp.float32), 0.0)
    tokens = (mask > 0).sum(1).astype(jnp.float32).reshape(-1, *(1,) * (values.ndim - 2))
    count = jnp.maximum(tokens, 1.0)
    match kind:
        case "mean":
            row = jnp.abs(values).sum(1) / count
        case "l2":
            row = jnp.sqrt(jnp.square(values).sum(1))
        case "variance":
            row = jnp.square(jnp.where(seen, values - (values.sum(1) / count)[:, None], 0.0)).sum(1) / count
    return Moments.of(row, (mask > 0).any(1))


def _expert_moments(
    values: Float[Array, "batch length choices mlp"],
    chosen: Float[Array, "batch length choices experts"],
    kind: Aggregation,
) -> Moments:
    """The same for neurons of experts, [experts, mlp]: to an expert, a row is the tokens that chose it."""
    values = jnp.where((chosen.sum(-1) > 0)[..., None], values.astype(jnp.float32), 0.0)
    tokens = chosen.sum((1, 2))[..., None]
    count = jnp.maximum(tokens, 1.0)

    def totals(values: Array) -> Float[Array, "batch experts mlp"]:
        return jnp.einsum("blcm,blce->bem", values, chosen, precision="highest")

    match kind:
        case "mean":
            row = totals(jnp.abs(values)) / count
        case "l2":
            row = jnp.sqrt(totals(jnp.square(values)))
        case "variance":
            means = jnp.einsum("bem,blce->blcm", totals(values) / count, chosen, precision="highest")
            row = totals(jnp.square(values - means)) / count
    return Moments.of(row, tokens[..., 0] > 0)


def _over_rows(moments: Moments, kind: Aggregation) -> np.ndarray:
    """[layers, ...] of one number per part."""
    rows = _spread(moments.rows, moments.mean)
    match kind:
        case "mean":
            return moments.mean
        case "l2":
            return np.sqrt(moments.squares + rows * np.square(moments.mean))
        case "variance":
            return moments.squares / np.maximum(rows, 1.0)


def _spread(counts: Any, like: Any) -> Any:
    """Numbers for the leading axes of an array, with as many axes as it has."""
    return counts.reshape(*counts.shape, *(1,) * (like.ndim - counts.ndim))
