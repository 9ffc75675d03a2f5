"""Experts of a mixture: every chosen expert runs on every token that chose it, none is dropped.

Choices are sorted by expert, so that each expert's tokens are neighbours and one grouped product (`ragged_dot`) runs
them all. On a mesh this happens under `shard_map`: a device holds the tokens of its rows, some experts, and some
neurons of each; what it finds is a part of a sum over the devices that hold the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxdistill.sharding import Layout, names_of

Kernels = Mapping[str, Array]
"""gate, up [experts, embed, mlp]; down [experts, mlp, embed]."""


def choose_experts(
    shares: Float[Array, "batch length experts"], count: int, *, layout: Layout
) -> tuple[Float[Array, "batch length choices"], Int[Array, "batch length choices"]]:
    """The largest shares of each token and whose they are. Every device looks at its own rows: left to the compiler,
    the shares of the whole batch would be gathered on all of them."""

    def choose(shares: Array) -> tuple[Array, Array]:
        largest, of = jax.lax.top_k(shares, count)
        return largest, of

    if layout.mesh is None:
        return choose(shares)
    place = layout.spec(("batch", "length", None), shares.shape)
    return jax.shard_map(choose, mesh=layout.mesh, in_specs=place, out_specs=(place, place))(shares)


def run_experts(
    x: Float[Array, "batch length embed"],
    chosen: Int[Array, "batch length choices"],
    shares: Float[Array, "batch length choices"],
    kernels: Kernels,
    *,
    activation: Callable[[Array], Array],
    factors: Float[Array, "batch_or_1 experts mlp"] | None,
    layout: Layout,
) -> tuple[Array, Array, Array]:
    """The sum over each token's experts of share · down(activation(gate(x)) · up(x)), [batch, length, embed]; then,
    by choice, what the down projections read [batch, length, choices, mlp] and each expert's part of the sum
    [batch, length, choices, embed]. factors multiply what the down projections read.
    """
    gated = () if factors is None else (factors,)
    if layout.mesh is None:
        return _run_locally(x, chosen, shares, kernels, *gated, activation=activation, expert_axes=(), mlp_axes=())
    rows = ("batch", "length", None)
    wide, narrow = ("experts", None, "mlp"), ("experts", "mlp", None)
    specs = {name: layout.spec(narrow if name == "down" else wide, k.shape) for name, k in kernels.items()}
    expert_axes, _, mlp_axes = map(names_of, specs["gate"])
    _check_apart(layout, {*expert_axes, *mlp_axes})
    by_choice = (*rows, None), (*x.shape[:2], chosen.shape[-1])
    run = jax.shard_map(
        functools.partial(_run_locally, activation=activation, expert_axes=expert_axes, mlp_axes=mlp_axes),
        mesh=layout.mesh,
        in_specs=(
            layout.spec(rows, x.shape),
            layout.spec(rows, chosen.shape),
            layout.spec(rows, shares.shape),
            specs,
            *(layout.spec(("batch" if f.shape[0] > 1 else None, "experts", "mlp"), f.shape) for f in gated),
        ),
        out_specs=(
            layout.spec(rows, x.shape),
            layout.spec((*rows, "mlp"), (*by_choice[1], kernels["gate"].shape[2])),
            layout.spec(by_choice[0], (*by_choice[1], x.shape[2])),
        ),
    )
    return run(x, chosen, shares, kernels, *gated)


def _check_apart(layout: Layout, split: set[str]) -> None:
    shared = sorted(split & {*layout.mesh_axes("batch"), *layout.mesh_axes("length")})
    if shared:
        raise ValueError(
            f"the sharding rules split both tokens and experts (or their neurons) over the mesh axes {shared}; a "
            "device runs its experts on all tokens of its rows. Give experts and mlp axes of their own."
        )


def _run_locally(
    x: Array,
    chosen: Array,
    shares: Array,
    kernels: Kernels,
    factors: Array | None = None,
    *,
    activation: Callable[[Array], Array],
    expert_axes: tuple[str, ...],
    mlp_axes: tuple[str, ...],
) -> tuple[Array, Array, Array]:
    """`run_experts` with the experts and neurons of this device, summed over all devices that hold others."""
    every = (*expert_axes, *mlp_axes)
    experts, choices = kernels["gate"].shape[0], chosen.shape[-1]
    expert = chosen.reshape(-1) - (jax.lax.axis_index(expert_axes) * experts if expert_axes else 0)
    mine = (expert >= 0) & (expert < experts)
    order = jnp.argsort(jnp.where(mine, expert, experts))  # what other devices run comes last, in no group
    sizes = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    token = order // choices

    here = mine[order][:, None]

    def product(rows: Array, kernel: Array) -> Array:
        # Of rows in no group nothing is promised, nor of their gradients: both are made 0.
        found = jax.lax.ragged_dot(jnp.where(here, rows, 0), kernel, sizes)
        return checkpoint_name(jnp.where(here, found, 0), "expert_products")

    def by_choice(sorted_rows: Array) -> Array:
        """Back in the order of tokens; 0 for the choices that are not this device's."""
        return sorted_rows[jnp.argsort(order)].reshape(*chosen.shape, -1)

    # The same tokens for all experts: their gradient is a sum over the devices that hold experts or neurons.
    rows = jax.lax.pcast(x, every, to="varying").reshape(-1, x.shape[-1])[token]
    mlp = activation(product(rows, kernels["gate"])) * product(rows, kernels["up"])
    if factors is not None:
        row = token // x.shape[1] if factors.shape[0] > 1 else jnp.zeros_like(token)
        mlp = mlp * factors[row, jnp.clip(expert[order], 0, experts - 1)].astype(mlp.dtype)
    outputs = by_choice(product(mlp, kernels["down"])) * shares[..., None].astype(x.dtype)
    return jax.lax.psum(outputs.sum(2), every), jax.lax.psum(by_choice(mlp), expert_axes), jax.lax.psum(outputs, every)
