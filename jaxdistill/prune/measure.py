"""Ways to score a model's parts: each a frozen dataclass of settings that turns a `Calibration` into `Importance`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.choices import check_choices
from jaxdistill.data.pipeline import DataConfig, make_loader
from jaxdistill.losses.chunked import default_chunk, evaluate_terms
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.decoder import GATE_POINTS, Execution, Gates, apply
from jaxdistill.prune.baselines import random_importance, weight_magnitude
from jaxdistill.prune.importance import Aggregation, Importance, add, importance, importance_taps
from jaxdistill.sharding import Layout, put_batch
from jaxdistill.specs import LayerSpec, ModelConfig
from jaxdistill.tokenizers import Tokenizer
from jaxdistill.types import Batch, Params, as_batch

Progress = Callable[[int, int], None]
"""Told (passes done, passes in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model, and the text that its parts are measured on."""

    config: ModelConfig
    params: Params
    batches: Sequence[Batch]
    """On the devices; read once or more."""
    layout: Layout = Layout()
    execution: Execution = Execution()
    progress: Progress = lambda done, total: None

    def __post_init__(self):
        if not self.batches:
            raise ValueError("there are no calibration batches; give at least one.")

    def total(self, measure: Callable[[Params, Batch], Any]) -> Any:
        """The sum over all batches of what a function of parameters and one batch returns, as NumPy arrays.

        A pure accumulation: one compiled program takes the sums so far and returns them with a batch added.
        """

        place = self.layout.replicated()

        # On every device whole: each process reads them, and what goes in next is placed as what went in first.
        @functools.partial(jax.jit, donate_argnums=0, out_shardings=place)
        def accumulate(sums: Any, params: Params, batch: Batch) -> Any:
            return add(sums, measure(params, batch))

        shapes = jax.eval_shape(measure, self.params, self.batches[0])
        sums = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), place), shapes)
        for done, batch in enumerate(self.batches):
            sums = jax.block_until_ready(accumulate(sums, self.params, batch))
            self.progress(done + 1, len(self.batches))
        return jax.tree.map(np.asarray, sums)


def calibrate(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    batches: int,
    layout: Layout = Layout(),
    execution: Execution = Execution(),
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """A model with the first batches of some data, from a loader of their own: a run still begins at the beginning."""
    loader = make_loader(data, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    with contextlib.closing(loader):
        rows = [next(loader) for _ in range(batches)]
    return Calibration(
        config=config,
        params=params,
        batches=[put_batch(layout, as_batch(each, vocab=config.vocab)) for each in rows],
        layout=layout,
        execution=execution,
        progress=progress,
    )


class Scorer(Protocol):
    """Anything that scores the parts of a model."""

    def __call__(self, calibration: Calibration) -> Importance: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """Minitron's scores: how large what a part hands on is, and Block Influence for layers; forward passes alone.

    sequence, batch: how tokens of a row, and rows, become one number (2407.14679; the defaults are its best).
    """

    sequence: Aggregation = "mean"
    batch: Aggregation = "l2"

    def __post_init__(self):
        check_choices(self)

    def __call__(self, calibration: Calibration) -> Importance:
        config, taps = calibration.config, importance_taps(calibration.config, sequence=self.sequence)

        def measure(params: Params, batch: Batch) -> Any:
            given = {"layout": calibration.layout, "execution": calibration.execution, "taps": taps}
            return apply(config, params, batch, **given).taps

        return importance(config, calibration.total(measure), batch=self.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGradients:
    """How much a row's loss changes when a part is switched off, to first order: mean over rows of |∂ loss / ∂ factor|
    where each part is multiplied by a factor of 1 (Michel et al. 2019, 1905.10650, equation 2).

    Layers run a second time in the backward pass, whatever `Execution.remat` says: of each only its input is kept.

    MiniMA prunes by it (Towards the Law of Capacity Gap in Distilling Language Models, 2311.07052). Where the factor of
    a channel stands is our reading: at the outputs of both norms of all layers. MiniMA's code divides the scores of a
    layer by their norm, which changes no order within it.
    """

    def __call__(self, calibration: Calibration) -> Importance:
        config = calibration.config

        def measure(params: Params, batch: Batch) -> Any:
            def loss(gates: Gates) -> Float[Array, ""]:
                return row_losses(calibration, params, batch, gates)

            slopes = jax.grad(loss)(open_gates(config, batch.tokens.shape[0]))
            return _absolute(config, slopes), (batch.loss_mask.sum(1) > 0).sum()

        scores, rows = calibration.total(measure)
        return jax.tree.map(lambda x: x / max(rows, 1.0), scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMagnitude:
    """The L2 norm of all weights that belong to a part; reads no text."""

    def __call__(self, calibration: Calibration) -> Importance:
        return weight_magnitude(calibration.config, calibration.params, calibration.layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomScores:
    """Drawn at random: what every other way has to beat."""

    seed: int = 0

    def __call__(self, calibration: Calibration) -> Importance:
        return random_importance(calibration.config, self.seed)


def row_losses(calibration: Calibration, params: Params, batch: Batch, gates: Gates) -> Float[Array, ""]:
    """Each row's mean cross-entropy in nats, summed over rows; rows without targets count 0."""
    config, layout = calibration.config, calibration.layout
    # Any other choice keeps activations of all layers for the backward pass, [layers, batch, length, mlp].
    execution = dataclasses.replace(calibration.execution, remat="block")
    outputs = apply(config, params, batch, layout=layout, execution=execution, gates=gates)
    weights = batch.loss_mask / jnp.maximum(batch.loss_mask.sum(1, keepdims=True), 1.0)
    total, _ = evaluate_terms(
        {"loss": CrossEntropy()},
        outputs,
        None,
        targets=batch.targets,
        loss_mask=weights,
        coefficients={"loss": jnp.float32(1)},
        parameters={},
        step=jnp.int32(0),
        chunk=default_chunk(config.vocab // layout.split("vocab")),
        layout=layout,
    )
    return total


def open_gates(config: ModelConfig, rows: int) -> dict[str, dict[str, Array]]:
    """A factor of 1 for every part of every layer, and for each row one of its own."""

    def ones(size: int, spec: LayerSpec) -> dict[str, Array]:
        parts = {axis: count for axis, count in spec.parts.items() if axis in GATE_POINTS} | {"layer": 1}
        halves = (("mixer_normed", spec.mixer), ("ffn_normed", spec.ffn))
        parts |= {point: config.embed for point, half in halves if half is not None}
        return {point: jnp.ones((size, rows, count)) for point, count in parts.items()}

    return {str(i): ones(*segment) for i, segment in enumerate(config.segments)}


def _absolute(config: ModelConfig, slopes: Gates) -> Importance:
    """Σ over rows of |slope|, with one factor for all that belongs to a part: a channel in all layers, a head's group.

    The widths are arrays [layers of a segment, parts] in the order of the segments; layers are rows of them.
    """
    embed = sum(s[point].sum(0) for s in slopes.values() for point in ("mixer_normed", "ffn_normed") if point in s)
    widths: dict[str, list[Array]] = {axis: [] for axis in config.width_axes}
    layers = []
    for segment, (size, spec) in enumerate(config.segments):
        found = slopes[str(segment)]
        own = dict(found)
        if spec.mixer is not None:
            rows = found["heads"].shape[1]
            own["kv_heads"] = found["heads"].reshape(size, rows, spec.mixer.kv_heads, -1).sum(-1)
        for axis in config.width_axes:
            widths[axis] += list(jnp.abs(own[axis]).sum(1) if axis in own else jnp.zeros((size, 0)))
        layers.append(jnp.abs(found["layer"]).sum((1, 2)))
    return Importance(
        embed=jnp.abs(embed).sum(0),
        layers=jnp.concatenate(layers),
        widths={axis: tuple(values) for axis, values in widths.items()},
    )
