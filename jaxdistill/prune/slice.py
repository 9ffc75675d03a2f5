"""Cutting a model to a plan: which indices each parameter keeps follows from the names of its axes alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.schema import StackedSpec, leaf_at, locate, nested, param_shardings, stacked_schema
from jaxdistill.prune.plan import Indices, PrunePlan
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params

NormRepair = Literal["none", "exact"]
"""What becomes of the norms when channels of the residual stream go. "none": their scales as they are (the published
recipes). "exact": changed so that a stream whose dropped channels are zero has the same output; see `prune_model`."""


def prune_model(
    config: ModelConfig,
    params: Params,
    plan: PrunePlan,
    *,
    layout: Layout = Layout(),
    norm_repair: NormRepair = "none",
) -> tuple[ModelConfig, Params]:
    """The model with what the plan keeps, in the plan's order; its parameters are new arrays in their places.

    norm_repair: RMSNorm divides by the root of a mean over channels. If the dropped channels are zero, the mean over
    the D' kept of D channels is D / D' times larger; "exact" undoes that: scale · √(D / D'), epsilon · D / D'. Where
    norms take a mean off, or heads have norms with the same epsilon, there is no exact repair.
    Raises ValueError for a plan of another model, and for sizes that the layout's mesh could divide before and cannot
    afterwards: an array that is not divided is held whole by every device.
    """
    smaller, cut = plan_cut(config, plan, layout=layout, norm_repair=norm_repair)
    return smaller, cut(params)


def plan_cut(
    config: ModelConfig, plan: PrunePlan, *, layout: Layout = Layout(), norm_repair: NormRepair = "none"
) -> tuple[ModelConfig, Callable[[Params], Params]]:
    """`prune_model` in two steps: the smaller shape, and the compiled function from parameters to smaller ones."""
    smaller = plan.resize(config)
    _check_divisible(config, smaller, plan, layout)
    growth = config.embed / smaller.embed if norm_repair == "exact" else 1.0
    if growth != 1.0:
        _check_repairable(config)
    smaller = dataclasses.replace(smaller, norm_epsilon=smaller.norm_epsilon * growth)

    def cut(params: Params) -> Params:
        def made(leaf: StackedSpec) -> jax.Array:
            value = _cut_leaf(config, params, plan, leaf)
            is_norm = leaf.spec.axes == ("embed",) and leaf.members[0].endswith("norm.scale")
            if not is_norm or growth == 1.0:
                return value
            kept = 1.0 if config.norm.one_plus else 0.0
            return (kept + value) * math.sqrt(growth) - kept

        return nested({path: made(leaf) for path, leaf in stacked_schema(smaller).items()})

    return smaller, jax.jit(cut, out_shardings=param_shardings(smaller, layout))


def _check_repairable(config: ModelConfig) -> None:
    of_heads = {spec.mixer.qk_norm for spec in config.layers if spec.mixer is not None} - {None}
    if config.norm.kind != "rms" or of_heads:
        raise ValueError(
            f"norm_repair is 'exact'; a {config.family} with {config.norm} and norms {sorted(map(str, of_heads))} of "
            "query and key heads has none. Use 'none'."
        )


def _cut_leaf(config: ModelConfig, params: Params, plan: PrunePlan, leaf: StackedSpec) -> jax.Array:
    """One leaf of the smaller model, out of the leaves of the original that hold its members."""
    if not leaf.stacked:
        path, _ = locate(config, leaf.members[0])
        return _take(leaf_at(params, path), leaf.spec.axes, {"embed": plan.embed})
    parts = []
    members = [_source(plan, name) for name in leaf.members]
    for path, run in itertools.groupby(members, key=lambda member: locate(config, member[1])[0]):
        kept, names = zip(*run, strict=True)
        stacked = leaf_at(params, path)
        rows = tuple(locate(config, name)[1] for name in names)
        layers = stacked if rows == tuple(range(stacked.shape[0])) else stacked[np.asarray(rows)]
        layers = _take(layers, ("layers", *leaf.spec.axes), {"embed": plan.embed})
        taken = _take_by_layer(layers, leaf.spec.axes, plan.widths, kept)
        if plan.head_partners and ".mixer.query." in leaf.members[0]:
            partners = {**plan.widths, "heads": plan.head_partners}
            taken = taken + (taken - _take_by_layer(layers, leaf.spec.axes, partners, kept))
        parts.append(taken)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _source(plan: PrunePlan, name: str) -> tuple[int, str]:
    """For a parameter of the smaller model, the place of its layer in the plan, and its name in the original."""
    _, layer, *rest = name.split(".")
    return int(layer), ".".join(("layers", str(plan.layers[int(layer)]), *rest))


def _take(value: jax.Array, axes: tuple[Any, ...], chosen: dict[str, Indices]) -> jax.Array:
    for position, axis in enumerate(axes):
        if axis in chosen and chosen[axis] != tuple(range(value.shape[position])):
            value = jnp.take(value, np.asarray(chosen[axis]), axis=position)
    return value


def _take_by_layer(
    value: jax.Array, axes: tuple[Any, ...], widths: Mapping[str, tuple[Indices, ...]], kept: tuple[int, ...]
) -> jax.Array:
    """The same on axes where every layer keeps indices of its own; value leads with the axis of these layers."""
    for position, axis in enumerate(axes):
        if axis not in widths:
            continue
        chosen, size = np.asarray([widths[axis][at] for at in kept]), value.shape[position + 1]
        if axis == "mlp" and "experts" in axes:
            # Numbers of neurons among those of all experts become numbers within each kept one. Experts lead, and are
            # already cut.
            of_expert = chosen.reshape(*value.shape[:2], -1) % size
            if of_expert.shape[-1] < size or np.any(of_expert != np.arange(size)):
                take = jax.vmap(lambda expert, indices, p=position - 1: jnp.take(expert, indices, axis=p))
                value = jax.vmap(take)(value, of_expert)
        elif any(widths[axis][at] != tuple(range(size)) for at in kept):
            value = jax.vmap(lambda layer, indices, p=position: jnp.take(layer, indices, axis=p))(value, chosen)
    return value


def _check_divisible(config: ModelConfig, smaller: ModelConfig, plan: PrunePlan, layout: Layout) -> None:
    sizes = [("embed", config.embed, smaller.embed)]
    for before, after in {(config.layers[i], layer) for i, layer in zip(plan.layers, smaller.layers, strict=True)}:
        sizes += [(axis, size, after.widths[axis]) for axis, size in before.widths.items()]
    for axis, before, after in sizes:
        parts = layout.split(axis)
        # Fewer key-value heads than parts are usual: every device holds them.
        usual = axis == "kv_heads" and after < parts
        if after != before and before % parts == 0 and after % parts and not usual:
            nearest = " or ".join(str(n) for n in (after // parts * parts, (after // parts + 1) * parts) if n > 0)
            raise ValueError(
                f"{axis} would be {after}, which the {parts} devices that split it do not divide "
                f"({' x '.join(layout.mesh_axes(axis))}); choose {nearest}, or another mesh."
            )
