"""Meshes, and the rules that turn an array's logical axes into a placement on a mesh.

A parameter names its axes once (`("vocab", "embed")`); `Rules` say which mesh axes each of them is split over; a
`Layout` is rules on one mesh. Teacher and student may have layouts of their own. A rule may name mesh axes that the
mesh lacks: they count as size 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
"""The logical name of each dimension of an array; None is a dimension that is never split."""

MESH_AXES = ("data", "fsdp", "sequence", "tensor", "expert")
"""Slowest to fastest: neighbours in the last axes are closest on the interconnect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has. One axis may be -1: it takes all devices that are left."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        wrong = {k: v for k, v in sizes.items() if v == 0 or v < -1}
        if wrong or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh sizes are {sizes}; each must be at least 1, and at most one may be -1 (the rest).")

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes on this many devices; raises when they do not multiply to it."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(v for v in sizes.values() if v != -1)
        for name, size in sizes.items():
            if size == -1:
                sizes[name] = max(1, devices // fixed)
        if math.prod(sizes.values()) != devices:
            raise ValueError(
                f"the mesh {sizes} has {math.prod(sizes.values())} places and there are {devices} devices; "
                f"choose sizes whose product is {devices}."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The one place where meshes are built. Axes are automatic: the compiler places what we do not constrain."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes[a] for a in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


LOGICAL_AXES = ("batch", "length", "layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "experts", "mlp")
"""The names that parameters and activations give their axes."""

MeshAxes = str | tuple[str, ...] | None


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one entry of a rule or of a partition spec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axis (or several, or none). Names that are not listed are not split."""

    table: Mapping[str, MeshAxes]

    def __post_init__(self):
        unknown = {a for v in self.table.values() for a in names_of(v)} - set(MESH_AXES)
        if unknown:
            raise ValueError(f"sharding rules name the mesh axes {sorted(unknown)}; allowed are {MESH_AXES}.")
        unknown = self.table.keys() - {*LOGICAL_AXES}
        if unknown:
            raise ValueError(f"sharding rules are for the axes {sorted(unknown)}; allowed are {LOGICAL_AXES}.")

    def replace(self, **changes: MeshAxes) -> Rules:
        return Rules({**self.table, **changes})

    def __hash__(self):
        return hash(tuple(sorted(self.table.items(), key=lambda kv: kv[0])))


DEFAULT_RULES = Rules(
    {
        # Activations: rows over every data-like axis, so that fsdp devices work on different rows.
        "batch": ("data", "fsdp"),
        "length": "sequence",
        # Parameters: fully sharded along embed, split for compute along the others.
        "embed": "fsdp",
        "mlp": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "vocab": "tensor",
        "experts": "expert",
    }
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rules on one mesh. Without a mesh everything stays on one device and constraints do nothing."""

    mesh: Mesh | None = None
    rules: Rules = DEFAULT_RULES

    def spec(self, axes: Axes, shape: Sequence[int]) -> PartitionSpec:
        """How an array with these axes is split. A dimension that its mesh axes do not divide is left whole.

        Raises ValueError when two dimensions would be split over the same mesh axis.
        """
        if len(axes) != len(shape):
            raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {tuple(shape)}; give one each.")
        if self.mesh is None:
            return PartitionSpec()
        entries: list[MeshAxes] = []
        used: dict[str, str] = {}
        for name, size in zip(axes, shape, strict=True):
            split = tuple(a for a in self.mesh_axes(name) if self.mesh.shape[a] > 1)
            if not split or size % math.prod(self.mesh.shape[a] for a in split):
                entries.append(None)
                continue
            for mesh_axis in split:
                if mesh_axis in used:
                    raise ValueError(
                        f"the sharding rules split both {used[mesh_axis]!r} and {name!r} of an array with axes {axes} "
                        f"over the mesh axis {mesh_axis!r}; change the rule of one of them."
                    )
                used[mesh_axis] = str(name)
            entries.append(split[0] if len(split) == 1 else split)
        return PartitionSpec(*entries)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """The axes of this mesh that a logical axis is split over."""
        if self.mesh is None or name is None:
            return ()
        return tuple(a for a in names_of(self.rules.table.get(name)) if a in self.mesh.shape)

    def split(self, name: str) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[a] for a in self.mesh_axes(name)) if self.mesh else 1

    def sharding(self, axes: Axes, shape: Sequence[int]) -> jax.sharding.Sharding:
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Pin an intermediate to its place; inside jit."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes, x.shape)))

    def shardings(self, axes: Any, arrays: Any) -> Any:
        """A tree of shardings for a tree of arrays (or shapes), given the tree of their axes."""
        return jax.tree.map(lambda a, x: self.sharding(a, x.shape), axes, arrays, is_leaf=is_axes)

    def replicated(self) -> jax.sharding.Sharding:
        return self.sharding((), ())


def is_axes(x: Any) -> bool:
    """Whether a node of a tree is an `Axes` tuple (a leaf) rather than a branch."""
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


BATCH_AXES: Axes = ("batch", "length")


def put_batch(layout: Layout, rows: Any) -> Any:
    """This process's rows of the global batch, as global arrays split along "batch".

    Rows go to this process's own devices: their order in the global batch is that of the devices on the mesh.
    """

    def put(x: np.ndarray) -> jax.Array:
        if layout.mesh is None:
            return jax.device_put(x)
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(_batch_sharding(layout, shape), x, shape)

    return jax.tree.map(put, rows)


def put_global_batch(layout: Layout, rows: Any) -> Any:
    """Rows of which every process holds all, in their order, as global arrays split along "batch"."""

    def put(x: np.ndarray) -> jax.Array:
        if layout.mesh is None:
            return jax.device_put(x)
        return jax.make_array_from_callback(x.shape, _batch_sharding(layout, x.shape), lambda part: x[part])

    return jax.tree.map(put, rows)


def _batch_sharding(layout: Layout, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return layout.sharding((*BATCH_AXES, *(None,) * len(shape))[: len(shape)], shape)
