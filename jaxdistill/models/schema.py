"""The schema: every parameter's name, shape, axes and initialiser; and the stacked form that training holds.

Two views of one model. *Per layer*: a flat dict of dotted names (`layers.3.ffn.gate.kernel`), the language of
converters and pruning. *Stacked*: a nested dict in which a run of equal layers is one array per parameter with a
leading axis "layers" (`segments.0.ffn.gate.kernel`), the language of steps and checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from jaxdistill.models.modules import Decoder
from jaxdistill.sharding import Axes, Layout
from jaxdistill.specs import LayerSpec, ModelConfig
from jaxdistill.types import Params

Path = tuple[str, ...]
"""Keys from the root of the stacked tree to a leaf."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter of one layer (or of the model): its shape, the name of each axis, and how it starts.

    inputs: of a kernel, how many axes a product sums over, which lead but for "experts"; 0 for what is no kernel.
    dtype: of what is no weight, and never learns; None for weights, which have the dtype that is asked for.
    """

    shape: tuple[int, ...]
    axes: Axes
    initializer: Initializer
    inputs: int = 0
    dtype: Any = None


@dataclasses.dataclass(frozen=True)
class StackedSpec:
    """One leaf of the stacked tree: its members in the per-layer view, in order, and their common spec."""

    members: tuple[str, ...]
    stacked: bool
    spec: ParamSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.members), *self.spec.shape) if self.stacked else self.spec.shape

    @property
    def axes(self) -> Axes:
        return ("layers", *self.spec.axes) if self.stacked else self.spec.axes


@functools.lru_cache(maxsize=1024)
def _schema(config: ModelConfig) -> dict[str, ParamSpec]:
    specs: dict[str, ParamSpec] = {}
    # Read inside eval_shape: no array is made, and attributes still have the order in which they were declared.
    jax.eval_shape(lambda: specs.update(_declared(Decoder(config), "")))
    return specs


def schema(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter by its per-layer dotted name, in the model's order."""
    return dict(_schema(config))


def _declared(node: Any, prefix: str) -> Iterator[tuple[str, ParamSpec]]:
    """The parameters below a module, in the order in which they were declared."""
    if isinstance(node, nnx.Param):
        meta = node.get_metadata()
        names = ("logical_axes", "initializer", "inputs", "fixed_dtype")
        yield prefix, ParamSpec(tuple(node.shape), *(meta[name] for name in names))
    elif isinstance(node, nnx.List):
        for index, child in enumerate(node):
            yield from _declared(child, f"{prefix}.{index}")
    elif isinstance(node, nnx.Module):
        for name, child in vars(node).items():
            yield from _declared(child, f"{prefix}.{name}" if prefix else name)


def locate(config: ModelConfig, name: str) -> tuple[Path, int | None]:
    """Where a per-layer name lives in the stacked tree: the path of its leaf, and its index on axis 0 if stacked.

    Lets a reader write one tensor straight into its slice. Raises KeyError for a name that the model lacks.
    """
    if name not in _schema(config):
        raise KeyError(f"the model has no parameter {name!r}; its parameters are named like {_examples(config)}.")
    first, *rest = name.split(".")
    if first != "layers":
        return (first, *rest), None
    layer = int(rest[0])
    for segment, (start, stop) in enumerate(segment_bounds(config)):
        if start <= layer < stop:
            return ("segments", str(segment), *rest[1:]), layer - start
    raise AssertionError(name)


def segment_bounds(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """First layer and one past the last of every segment."""
    bounds, start = [], 0
    for size, _ in config.segments:
        bounds.append((start, start + size))
        start += size
    return tuple(bounds)


@functools.lru_cache(maxsize=64)
def stacked_schema(config: ModelConfig) -> dict[Path, StackedSpec]:
    """Every leaf of the stacked tree by its path."""
    members: dict[Path, list[str]] = {}
    for name in _schema(config):
        members.setdefault(locate(config, name)[0], []).append(name)
    return {
        path: StackedSpec(tuple(names), path[0] == "segments", _schema(config)[names[0]])
        for path, names in members.items()
    }


def nested(leaves: Mapping[Path, Any]) -> Params:
    """The tree with these leaves."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def segment_of(params: Params, segment: str) -> Params:
    """The stacked leaves of a segment; none of layers that have no parameters."""
    return params.get("segments", {}).get(segment, {})


def leaf_at(params: Params, path: Path) -> Any:
    """The leaf of the tree at a path."""
    for key in path:
        params = params[key]
    return params


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The stacked tree as shapes and dtypes, without values."""
    leaves = stacked_schema(config)
    return nested({path: jax.ShapeDtypeStruct(leaf.shape, leaf.spec.dtype or dtype) for path, leaf in leaves.items()})


def param_axes(config: ModelConfig) -> Params:
    """The stacked tree of axis names; stacked leaves lead with "layers"."""
    return nested({path: leaf.axes for path, leaf in stacked_schema(config).items()})


def param_shardings(config: ModelConfig, layout: Layout) -> Params:
    """Where each leaf of the stacked tree lives; see `leaf_shardings`."""
    return leaf_shardings(stacked_schema(config), layout)


def leaf_shardings(leaves: Mapping[Path, StackedSpec], layout: Layout) -> Params:
    """Where leaves live.

    Vectors (one axis besides "layers") stay whole on every device: gathering them costs latency and saves nothing.
    """

    def place(leaf: StackedSpec) -> jax.sharding.Sharding:
        axes = leaf.axes if len(leaf.spec.axes) > 1 else (None,) * len(leaf.axes)
        return layout.sharding(axes, leaf.shape)

    return nested({path: place(leaf) for path, leaf in leaves.items()})


def init_params(config: ModelConfig, key: jax.Array, layout: Layout = Layout(), dtype: Any = jnp.float32) -> Params:
    """Fresh parameters in the stacked form; each device makes only its own shard.

    A parameter's values depend on the key and its per-layer name alone: not on the mesh, nor on the segmentation.
    """
    return _initialiser(config, layout, jnp.dtype(dtype))(key)


@functools.lru_cache(maxsize=64)
def _initialiser(config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> Callable[[jax.Array], Params]:
    return leaf_initialiser(stacked_schema(config), layout, dtype)


def leaf_initialiser(
    leaves: Mapping[Path, StackedSpec], layout: Layout, dtype: jnp.dtype
) -> Callable[[jax.Array], Params]:
    """The compiled function from a key to fresh leaves; see `init_params`."""

    def values(leaf: StackedSpec, key: jax.Array) -> jax.Array:
        names = jnp.asarray([zlib.crc32(name.encode()) for name in leaf.members], jnp.uint32)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(names)
        made = jax.vmap(lambda k: leaf.spec.initializer(k, leaf.spec.shape, jnp.float32))(keys)
        made = made.astype(leaf.spec.dtype or dtype)
        return made if leaf.stacked else made[0]

    def initialise(key: jax.Array) -> Params:
        return nested({path: values(leaf, key) for path, leaf in leaves.items()})

    return jax.jit(initialise, out_shardings=leaf_shardings(leaves, layout))


def stack(config: ModelConfig, per_layer: Mapping[str, Any]) -> Params:
    """From the per-layer view to the stacked form; the inverse of `unstack`. Raises on missing or extra names."""
    missing = [n for n in _schema(config) if n not in per_layer]
    extra = [n for n in per_layer if n not in _schema(config)]
    if missing or extra:
        raise ValueError(
            f"the parameters do not match the model: missing {missing[:5]} ({len(missing)}), not in the model "
            f"{extra[:5]} ({len(extra)}); give exactly the names of schema(config), like {_examples(config)}."
        )
    return nested(
        {
            path: jnp.stack([per_layer[n] for n in leaf.members]) if leaf.stacked else per_layer[leaf.members[0]]
            for path, leaf in stacked_schema(config).items()
        }
    )


def unstack(config: ModelConfig, params: Params) -> dict[str, Any]:
    """From the stacked form to the per-layer view, names in the model's order."""
    flat = {}
    for name in _schema(config):
        path, index = locate(config, name)
        leaf = leaf_at(params, path)
        flat[name] = leaf if index is None else leaf[index]
    return flat


def count_parameters(config: ModelConfig) -> int:
    """How many weights the model has; a tied head is counted once."""
    return _sizes(config, config.layers[0])[""] + sum(sum(layer.values()) for layer in layer_sizes(config))


def layer_sizes(config: ModelConfig) -> list[dict[str, int]]:
    """Parameters of every layer's parts ("mixer", "ffn" and, apart from it, "experts"), in the model's order."""
    return [{part: size for part, size in _sizes(config, spec).items() if part} for spec in config.layers]


def _sizes(config: ModelConfig, spec: LayerSpec) -> dict[str, int]:
    """Parameters of the parts of such a layer, and under "" of all that is in no layer.

    Shapes do not depend on how many layers there are: a model of this one tells them, in a fraction of the time.
    """
    sizes = {"": 0}
    for name, leaf in _schema(dataclasses.replace(config, layers=(spec,))).items():
        first, *rest = name.split(".")
        part = "" if first != "layers" else "experts" if leaf.axes[0] == "experts" else rest[1]
        sizes[part] = sizes.get(part, 0) + (math.prod(leaf.shape) if leaf.dtype is None else 0)
    return sizes


def weights(config: ModelConfig) -> Callable[[str], bool]:
    """A test of dotted names in the stacked tree: whether the leaf is a weight, that may learn."""
    fixed = {".".join(path) for path, leaf in stacked_schema(config).items() if leaf.spec.dtype is not None}
    return lambda name: name not in fixed


def _examples(config: ModelConfig) -> str:
    names = list(_schema(config))
    return ", ".join(repr(n) for n in names[:3])
