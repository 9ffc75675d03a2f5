"""Low-rank adapters (LoRA, arXiv 2106.09685): small matrices beside kernels that stay as they are.

An adapted kernel acts as `kernel + scale / rank * down @ up`. The leaves `lora_down` and `lora_up` stand beside
`kernel` in the stacked tree and are parameters like any other: they have axes, are placed, trained and saved. `adapted`
makes of the tree what a model runs on; `merge_adapters` makes an ordinary model of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from jaxdistill import partition
from jaxdistill.models.kernels import Adapted, merged
from jaxdistill.models.schema import (
    ParamSpec,
    Path,
    StackedSpec,
    leaf_initialiser,
    leaf_shardings,
    stacked_schema,
)
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params

NAMES_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which kernels get adapters, and of what size.

    Adapters are float32. `down` starts as normal numbers of standard deviation 1 / rank (the reference implementation
    of ALM draws so), `up` as zeros: the first step sees the base, bit for bit.
    """

    rank: int = 64
    scale: float = 64.0
    """The change is multiplied by scale / rank, so that a rate that suits one rank suits another."""
    targets: tuple[str, ...] = ("segments.*",)
    """Shell patterns of the kernels that are adapted, as `segments.0.mixer.query.kernel`. By default all of the layers,
    routers included. The embedding and a head of its own (`embedding.*`, `head.*`) can be named too; their effective
    table is formed whole in every pass, which costs its memory: `student.trainable` often suits them better."""

    def __post_init__(self):
        if self.rank < 1 or not self.scale > 0 or not self.targets:
            raise ValueError(f"{self}: rank and scale must be positive, and targets name at least one kernel.")

    @property
    def factor(self) -> float:
        return self.scale / self.rank


def adapted_kernels(config: ModelConfig, lora: Lora) -> dict[Path, StackedSpec]:
    """The kernels that get adapters, by their paths in the stacked tree.

    Raises ValueError for a pattern that matches no kernel.
    """
    kernels = {".".join(path): path for path, leaf in stacked_schema(config).items() if leaf.spec.inputs}
    for pattern in lora.targets:
        if not any(map(partition.matches((pattern,)), kernels)):
            more = f", … ({len(kernels)})" if len(kernels) > NAMES_SHOWN else ""
            raise ValueError(
                f"no kernel matches lora.targets {pattern!r}; kernels of this model are "
                f"{', '.join(list(kernels)[:NAMES_SHOWN])}{more}. Name some of them, or leave the pattern out."
            )
    chosen = partition.matches(lora.targets)
    return {path: stacked_schema(config)[path] for name, path in kernels.items() if chosen(name)}


def adapter_schema(config: ModelConfig, lora: Lora) -> dict[Path, StackedSpec]:
    """Every leaf of the adapters by its path: `down` has the kernel's input axes, `up` its output axes, and both those
    of experts, which have a pair each."""
    leaves = {}
    for path, leaf in adapted_kernels(config, lora).items():
        (experts, inputs, outputs), shape = _axes(leaf.spec), leaf.spec.shape
        sizes = dict(zip(leaf.spec.axes, shape, strict=True)) | {"rank": lora.rank}
        for name, axes, start in (
            ("lora_down", (*experts, *inputs, "rank"), normal(1 / lora.rank)),
            ("lora_up", (*experts, "rank", *outputs), zeros),
        ):
            spec = ParamSpec(tuple(sizes[axis] for axis in axes), axes, start)
            members = tuple(f"{member.removesuffix('kernel')}{name}" for member in leaf.members)
            leaves[(*path[:-1], name)] = StackedSpec(members, leaf.stacked, spec)
    return leaves


def adapter_shardings(config: ModelConfig, lora: Lora, layout: Layout) -> Params:
    """Where the adapters live: split as the kernels' axes are."""
    return leaf_shardings(adapter_schema(config, lora), layout)


def init_adapters(config: ModelConfig, lora: Lora, key: jax.Array, layout: Layout = Layout()) -> Params:
    """Fresh adapters, float32, as a tree to be merged with the base's (`partition.merge`). Values depend on the key
    and on names alone, as those of `init_params`."""
    return leaf_initialiser(adapter_schema(config, lora), layout, jnp.dtype("float32"))(key)


def adapted(params: Params, lora: Lora) -> Params:
    """What a model runs on: the stacked tree with each adapted kernel as an `Adapted`, formed where it is used. Tables
    outside the layers are formed here."""
    tree = _paired(params, lora)
    return {part: node if part == "segments" else _formed(node) for part, node in tree.items()}


def merge_adapters(params: Params, lora: Lora) -> Params:
    """An ordinary model's parameters: each adapted kernel is the base plus the change, in float32, where the base is;
    all other leaves are those that were given. One leaf is formed at a time."""

    def formed(_: str, leaf: Any) -> Any:
        return jax.jit(merged, out_shardings=leaf.kernel.sharding)(leaf) if isinstance(leaf, Adapted) else leaf

    return partition.map_names(formed, _paired(params, lora))


def _axes(spec: ParamSpec) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """A kernel's axes: of experts, inputs, outputs."""
    lead = int(spec.axes[0] == "experts")
    return spec.axes[:lead], spec.axes[lead : lead + spec.inputs], spec.axes[lead + spec.inputs :]


def _paired(node: Params, lora: Lora) -> Params:
    """The tree with kernels and their adapters in one leaf."""
    if "lora_down" not in node:
        return {key: _paired(child, lora) if isinstance(child, dict) else child for key, child in node.items()}
    rest = {key: leaf for key, leaf in node.items() if key not in ("kernel", "lora_down", "lora_up")}
    return rest | {"kernel": Adapted(node["kernel"], node["lora_down"], node["lora_up"], lora.factor)}


def _formed(node: Params) -> Params:
    return jax.tree.map(merged, node, is_leaf=lambda leaf: isinstance(leaf, Adapted))
