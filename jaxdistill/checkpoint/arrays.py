"""Pytrees of arrays as flat, named, described leaves: what Orbax is given, and what a mismatch is reported in.

A checkpoint holds leaves by name ("params/student/embed"), never the classes of the tree that held them, so that it
can be read after a class was renamed and every difference can be told by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

CHUNK_BYTES = 1 << 28

WHERE_SEVERAL_WRITE = "Allowed are disks that all of them share, and gs://."


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with what is left intact and what to do."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one saved leaf. key_impl: the generator of a typed random key, else None."""

    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * jnp.dtype(self.dtype).itemsize


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path; keys of its dicts must not contain '/'.")
    return named


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaf_specs(arrays: Mapping[str, jax.Array]) -> dict[str, LeafSpec]:
    """What is recorded beside saved arrays. Raises TypeError for leaves that are not jax arrays."""
    foreign = {name: type(leaf).__name__ for name, leaf in arrays.items() if not isinstance(leaf, jax.Array)}
    if foreign:
        raise TypeError(f"a checkpoint holds jax arrays only; these leaves are not: {foreign}. Use jnp.asarray.")
    return {
        name: LeafSpec(leaf.shape, str(leaf.dtype), str(jax.random.key_impl(leaf)) if is_key(leaf) else None)
        for name, leaf in arrays.items()
    }


def specs_to_json(specs: Mapping[str, LeafSpec]) -> dict[str, Any]:
    return {
        name: {"shape": list(s.shape), "dtype": s.dtype} | ({"key_impl": s.key_impl} if s.key_impl else {})
        for name, s in specs.items()
    }


def specs_from_json(document: Mapping[str, Any]) -> dict[str, LeafSpec]:
    return {
        name: LeafSpec(tuple(leaf["shape"]), leaf["dtype"], leaf.get("key_impl")) for name, leaf in document.items()
    }


def check_leaves(saved: Mapping[str, LeafSpec], expected: Mapping[str, Any], where: str) -> None:
    """Refuse arrays that differ from what the program expects, naming every differing leaf (saved / expected)."""
    lines = []
    for name in sorted(saved.keys() | expected.keys()):
        given = str(saved[name]) if name in saved else "absent"
        wanted = "absent"
        if name in expected:
            leaf = expected[name]
            wanted = str(LeafSpec(tuple(leaf.shape), str(leaf.dtype)))
        if given != wanted:
            lines.append(f"  {name}: {given} / {wanted}")
    if lines:
        shown = [*lines[:40], f"  ... and {len(lines) - 40} more"] if len(lines) > 40 else lines
        raise CheckpointError(
            f"{where} does not fit what is being restored; {len(lines)} leaves differ (saved / expected):\n"
            + "\n".join(shown)
            + "\nRestore it with the configuration that it was saved with."
        )


def handler() -> ocp.PyTreeCheckpointHandler:
    # Weights and moments are close to random bits: zstd saves 8 % of the bytes and takes 2.5 times as long.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def save_args(arrays: Mapping[str, jax.Array]) -> ocp.args.PyTreeSave:
    """Named arrays as Orbax takes them; random keys as their raw data."""
    return ocp.args.PyTreeSave(
        {name: jax.random.key_data(x) if is_key(x) else x for name, x in arrays.items()},
        # So that a part of an array can be read without the whole of it.
        save_args={name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays},
    )


def restore_args(expected: Mapping[str, Any]) -> ocp.args.PyTreeRestore:
    """How each named leaf is read: its shape, dtype and sharding, so that every shard is read where it will live."""
    homeless = [name for name, leaf in expected.items() if leaf.sharding is None]
    if homeless:
        raise ValueError(f"these leaves to restore have no sharding: {homeless}; give each a jax.sharding.Sharding.")
    plain = {
        name: jax.ShapeDtypeStruct(
            (data := jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf).shape,
            data.dtype,
            sharding=leaf.sharding,
        )
        for name, leaf in expected.items()
    }
    return ocp.args.PyTreeRestore(
        item=plain,
        restore_args={
            name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for name, x in plain.items()
        },
    )


def rewrap_keys(arrays: Mapping[str, jax.Array], saved: Mapping[str, LeafSpec]) -> dict[str, jax.Array]:
    """Raw key data as typed keys again."""
    return {
        name: x if (impl := saved[name].key_impl) is None else jax.random.wrap_key_data(x, impl=impl)
        for name, x in arrays.items()
    }


def short(error: BaseException) -> str:
    """A library's error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
