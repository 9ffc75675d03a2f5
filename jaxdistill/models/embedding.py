"""Looking tokens up in an embedding table that is split over a mesh, without gathering the table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxdistill.sharding import BATCH_AXES, Layout, names_of


def look_up(
    table: Float[Array, "vocab embed"], tokens: Int[Array, "batch length"], *, layout: Layout, dtype: jnp.dtype
) -> Float[Array, "batch length embed"]:
    """Each token's row of the table, in `dtype`, placed like activations ("batch", "length", whole).

    On a mesh the tokens travel, not the table: every device looks up the tokens of all rows that share its piece of
    the table, and one all-to-all gives each row its whole width. The traffic is one activation, whatever the
    vocabulary (the compiler's own choice gathers the table on every device).
    """
    if layout.mesh is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    table_spec = layout.spec(("vocab", "embed"), table.shape)
    tokens_spec = layout.spec(BATCH_AXES, tokens.shape)
    local = functools.partial(
        _look_up_locally,
        dtype=dtype,
        vocab_axes=names_of(table_spec[0]),
        embed_axes=names_of(table_spec[1]),
        batch_axes=names_of(tokens_spec[0]),
    )
    rows = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(table_spec, tokens_spec),
        out_specs=PartitionSpec(*tokens_spec, None),
        check_vma=False,  # that gathered widths are equal on all devices is true and cannot be inferred
    )
    return rows(table, tokens)


def _look_up_locally(
    table: Array,
    tokens: Array,
    *,
    dtype: jnp.dtype,
    vocab_axes: tuple[str, ...],
    embed_axes: tuple[str, ...],
    batch_axes: tuple[str, ...],
) -> Array:
    for axis in (*vocab_axes, *embed_axes):
        if axis in batch_axes:
            tokens = jax.lax.all_gather(tokens, axis, axis=0, tiled=True)
    if vocab_axes:
        rows = tokens - jax.lax.axis_index(vocab_axes) * table.shape[0]
        mine = (rows >= 0) & (rows < table.shape[0])
        x = jnp.where(mine[..., None], jnp.take(table, jnp.where(mine, rows, 0), axis=0), 0).astype(dtype)
    else:
        x = jnp.take(table, tokens, axis=0).astype(dtype)
    # Back in the opposite order, so that every row and every column of the table finds its place.
    for axis in reversed(embed_axes):
        if axis in batch_axes:
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True)
        else:
            x = jax.lax.all_gather(x, axis, axis=2, tiled=True)
    for axis in reversed(vocab_axes):
        if axis in batch_axes:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        else:
            x = jax.lax.psum(x, axis)
    return x
