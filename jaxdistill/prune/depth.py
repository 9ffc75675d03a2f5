"""Which layers may go, measured by leaving them out: the loss, or the distance to the full model, without them.

Costlier than Block Influence (a forward pass of the calibration text for each set of layers that is tried) and closer
to what is wanted: Compact Language Models via Pruning and Knowledge Distillation (2407.14679) compares
both, and LLM Pruning and Distillation in Practice (2408.11796) drops one contiguous block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill.losses.chunked import default_chunk, evaluate_terms
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
from jaxdistill.models.decoder import apply
from jaxdistill.prune.choose import Target
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.measure import Calibration
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Batch, Mean, Params

Measure = Literal["loss", "kl"]
"""What is looked at without the layers, in nats per token: the cross-entropy of the text ("loss"), or the forward KL
from the full model ("kl")."""

Depth = Literal["scorer", "loss", "kl", "block-by-loss", "block-by-kl"]
"""How layers are chosen: as the scorer ranks them, by the measure without each of them, or as the contiguous block
without which the measure is best."""


def with_depth(
    depth: Depth, scores: Importance, target: Target, calibration: Callable[[], Calibration]
) -> tuple[Importance, Target]:
    """Scores and sizes by which `choose` keeps the layers that `depth` says; they stay as they are where the scorer
    says it, or the target says which layers are kept. calibration: called where layers are left out."""
    if depth == "scorer" or not isinstance(target.layers, int):
        return scores, target
    by: Measure = "loss" if depth in ("loss", "block-by-loss") else "kl"
    if depth == by:
        return dataclasses.replace(scores, layers=layers_when_dropped(calibration(), by=by)), target
    if target.layers >= len(scores.layers):
        return scores, target
    return scores, dataclasses.replace(target, layers=best_window(calibration(), target.layers, by=by))


def without_layers(calibration: Calibration, dropped: Sequence[Sequence[int]], *, by: Measure = "loss") -> np.ndarray:
    """The measure on the calibration text without each of these sets of layers; [sets].

    One compiled program tries all of them: a layer that is left out adds 0 to the residual stream.
    """
    config, layout = calibration.config, calibration.layout
    terms: dict[str, Term] = {"loss": CrossEntropy()} if by == "loss" else {"kl": ForwardKL()}
    keeps = np.ones((len(dropped), len(config.layers)), np.float32)
    for keep, layers in zip(keeps, dropped, strict=True):
        keep[list(layers)] = 0.0

    def measure(params: Params, batch: Batch) -> Mean:
        def forward(keep: Array | None) -> Any:
            gates = None if keep is None else _layer_gates(config, keep)
            return apply(config, params, batch, layout=layout, execution=calibration.execution, gates=gates)

        full = None if by == "loss" else forward(None)

        def one(keep: Array) -> Mean:
            _, means = evaluate_terms(
                terms,
                forward(keep),
                full,
                targets=batch.targets,
                loss_mask=batch.loss_mask,
                coefficients={by: jnp.float32(0)},
                parameters={},
                step=jnp.int32(0),
                chunk=default_chunk(config.vocab // layout.split("vocab")),
                layout=layout,
            )
            return means[by]

        return jax.lax.map(one, keeps)

    return np.asarray(calibration.total(measure).value)


def layers_when_dropped(calibration: Calibration, *, by: Measure = "loss") -> np.ndarray:
    """How bad it is to lose each layer alone: scores to rank layers by; [layers]."""
    return without_layers(calibration, [(layer,) for layer in range(len(calibration.config.layers))], by=by)


def best_window(calibration: Calibration, keep: int, *, by: Measure = "loss") -> tuple[int, ...]:
    """The `keep` layers that are left when the contiguous block goes whose loss is felt least; of equals the first."""
    depth = len(calibration.config.layers)
    if not 1 <= keep < depth:
        raise ValueError(f"cannot keep {keep} layers of {depth} by dropping a block; choose from 1 to {depth - 1}.")
    windows = [range(start, start + depth - keep) for start in range(keep + 1)]
    gone = windows[int(np.argmin(without_layers(calibration, windows, by=by)))]
    return tuple(layer for layer in range(depth) if layer not in gone)


def _layer_gates(config: ModelConfig, keep: Array) -> dict[str, dict[str, Array]]:
    gates, first = {}, 0
    for segment, (size, _) in enumerate(config.segments):
        gates[str(segment)] = {"layer": keep[first : first + size].reshape(size, 1, 1)}
        first += size
    return gates
