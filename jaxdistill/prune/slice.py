"""Cutting a model to a plan: which indices each parameter keeps follows from the names of its axes alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.schema import Path, StackedSpec, leaf_at, locate, nested, param_shardings, stacked_schema
from jaxdistill.prune.plan import Indices, PrunePlan
from jaxdistill.sharding import Layout, names_of
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
    norms take a mean off, heads have norms with the same epsilon, or what is added to the stream has norms of its own,
    there is no exact repair.
    On a mesh leaves are cut one after another, and stay divided while they are.
    Raises ValueError for a plan of another model, and for sizes that the layout's mesh could divide before and cannot
    afterwards: an array that is not divided is held whole by every device.
    """
    smaller, cut = plan_cut(config, plan, layout=layout, norm_repair=norm_repair)
    return smaller, cut(params)


@dataclasses.dataclass(frozen=True)
class Take:
    """What is kept of one dimension: indices [kept], or for each place of the leading dimensions [..., kept]."""

    position: int
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class LeafCut:
    """One leaf of the smaller model, out of the leaves of the original that hold its members.

    takes: for each source what is taken of it, one after another; partners: the same for the heads whose residual is
    added, empty where none is.
    """

    program: Any
    sources: tuple[Path, ...]
    takes: tuple[tuple[Take, ...], ...]
    partners: tuple[tuple[Take, ...], ...] = ()

    def arguments(self, params: Params) -> tuple[Any, ...]:
        """What the program is called with."""
        own, partners = ([[take.indices for take in each] for each in of] for of in (self.takes, self.partners))
        return [leaf_at(params, path) for path in self.sources], own, partners

    def __call__(self, params: Params) -> jax.Array:
        return self.program(*self.arguments(params))


@dataclasses.dataclass(frozen=True)
class Cut:
    """From parameters to smaller ones, leaf by leaf: what is moved on the way is freed with each of them."""

    leaves: Mapping[Path, LeafCut]

    def __call__(self, params: Params) -> Params:
        return nested({path: leaf(params) for path, leaf in self.leaves.items()})


def plan_cut(
    config: ModelConfig, plan: PrunePlan, *, layout: Layout = Layout(), norm_repair: NormRepair = "none"
) -> tuple[ModelConfig, Cut]:
    """`prune_model` in two steps: the smaller shape, and the compiled functions from parameters to smaller ones.

    Leaves that are alike but for the indices and the layers share a program.
    """
    smaller = plan.resize(config)
    _check_divisible(config, smaller, plan, layout)
    growth = config.embed / smaller.embed if norm_repair == "exact" else 1.0
    if growth != 1.0:
        _check_repairable(config)
    smaller = dataclasses.replace(smaller, norm_epsilon=smaller.norm_epsilon * growth)
    before, after = param_shardings(config, layout), param_shardings(smaller, layout)

    def made(path: Path, leaf: StackedSpec) -> LeafCut:
        is_norm = leaf.spec.axes == ("embed",) and leaf.members[0].endswith("norm.scale")
        repair = (1.0 if config.norm.one_plus else 0.0, math.sqrt(growth)) if is_norm and growth != 1.0 else None
        sources, takes = _sources(config, plan, leaf, plan.widths)
        merged = plan.head_partners and ".mixer.query." in leaf.members[0]
        partners = _sources(config, plan, leaf, {**plan.widths, "heads": plan.head_partners})[1] if merged else ()
        steps = tuple(tuple(tuple(take.position for take in each) for each in of) for of in (takes, partners))
        places = tuple(leaf_at(before, source) for source in sources)
        program = _program(places, *steps, repair, leaf_at(after, path))
        return LeafCut(program, sources, takes, partners)

    return smaller, Cut({path: made(path, leaf) for path, leaf in stacked_schema(smaller).items()})


def _check_repairable(config: ModelConfig) -> None:
    of_heads = {spec.mixer.qk_norm for spec in config.layers if spec.mixer is not None} - {None}
    if config.norm.kind != "rms" or of_heads:
        raise ValueError(
            f"norm_repair is 'exact'; a {config.family} with {config.norm} and norms {sorted(map(str, of_heads))} of "
            "query and key heads has none. Use 'none'."
        )
    places = {spec.norms for spec in config.layers} - {"pre"}
    if places:
        raise ValueError(
            f"norm_repair is 'exact'; a {config.family} with norms {sorted(places)} has none: a norm of what is added "
            "to the stream takes a mean over channels that may hold something where the stream holds zero. Use 'none'."
        )


def _sources(
    config: ModelConfig, plan: PrunePlan, leaf: StackedSpec, widths: Mapping[str, tuple[Indices, ...]]
) -> tuple[tuple[Path, ...], tuple[tuple[Take, ...], ...]]:
    """The leaves of the original that hold the members of one of the smaller model, and what is taken of each."""
    if not leaf.stacked:
        path, _ = locate(config, leaf.members[0])
        return (path,), (_takes(stacked_schema(config)[path], plan.embed),)
    paths, takes = [], []
    members = [_source(plan, name) for name in leaf.members]
    for path, run in itertools.groupby(members, key=lambda member: locate(config, member[1])[0]):
        kept, names = zip(*run, strict=True)
        source, rows = stacked_schema(config)[path], tuple(locate(config, name)[1] for name in names)
        layers = () if rows == tuple(range(source.shape[0])) else (Take(0, np.asarray(rows)),)
        paths.append(path)
        takes.append((*layers, *_takes(source, plan.embed), *_takes_by_layer(source, widths, kept)))
    return tuple(paths), tuple(takes)


def _source(plan: PrunePlan, name: str) -> tuple[int, str]:
    """For a parameter of the smaller model, the place of its layer in the plan, and its name in the original."""
    _, layer, *rest = name.split(".")
    return int(layer), ".".join(("layers", str(plan.layers[int(layer)]), *rest))


def _takes(source: StackedSpec, embed: Indices) -> tuple[Take, ...]:
    """Of the axis for which the whole model has one choice."""
    if "embed" not in source.axes:
        return ()
    position = source.axes.index("embed")
    return () if embed == tuple(range(source.shape[position])) else (Take(position, np.asarray(embed)),)


def _takes_by_layer(
    source: StackedSpec, widths: Mapping[str, tuple[Indices, ...]], kept: tuple[int, ...]
) -> Iterator[Take]:
    """The same of axes where every layer keeps indices of its own."""
    for position, (axis, size) in enumerate(zip(source.axes, source.shape, strict=True)):
        if axis is None or axis not in widths:
            continue
        chosen = np.asarray([widths[axis][at] for at in kept])
        if axis == "mlp" and "experts" in source.axes:
            # Numbers of neurons among those of all experts become numbers within each kept one. Experts lead, and are
            # already cut.
            experts = len(widths["experts"][kept[0]])
            chosen = chosen.reshape(len(kept), experts, -1) % size
        if chosen.shape[-1] < size or np.any(chosen != np.arange(size)):
            yield Take(position, chosen)


@functools.lru_cache(maxsize=256)
def _program(
    places: tuple[jax.sharding.Sharding, ...],
    steps: tuple[tuple[int, ...], ...],
    partner_steps: tuple[tuple[int, ...], ...],
    repair: tuple[float, float] | None,
    place: jax.sharding.Sharding,
) -> Any:
    """The compiled function from sources and indices to a leaf.

    places: where the sources are. steps: the dimensions that are cut of each, in their order. repair: of a norm's
    scale, what the norm adds to it, and the factor of their sum. place: where the leaf goes.
    """

    def joined(sources: list[jax.Array], indices: list[list[jax.Array]], steps: Any) -> jax.Array:
        parts = [_taken(*given) for given in zip(sources, indices, steps, places, strict=True)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def cut(sources: list[jax.Array], own: list[list[jax.Array]], partners: list[list[jax.Array]]) -> jax.Array:
        taken = joined(sources, own, steps)
        if partner_steps:
            taken = taken + (taken - joined(sources, partners, partner_steps))
        if repair is None:
            return taken
        added, factor = repair
        # Rounded once: a sum with 1 in bfloat16 loses the last bits of a small scale.
        return ((added + taken.astype(jnp.float32)) * factor - added).astype(taken.dtype)

    return jax.jit(cut, out_shardings=place)


def _taken(
    value: jax.Array, indices: list[jax.Array], steps: tuple[int, ...], place: jax.sharding.Sharding
) -> jax.Array:
    """What is left of an array when its dimensions are cut one after another.

    Devices that split a dimension would each add up zeros for the indices that they lack, which takes the whole result
    on all of them. So that dimension is made whole first, and they split another one.
    """
    for at, (position, chosen) in enumerate(zip(steps, indices, strict=True)):
        own = chosen.ndim - 1
        # The plan has checked the indices: none is out of bounds.
        take: Any = functools.partial(jnp.take, axis=position - own, mode="clip")
        for _ in range(own):
            take = jax.vmap(take)
        place = _made_whole(place, value.shape, position, later=steps[at + 1 :])
        value = _put(take(_put(value, place), chosen), place)
    return value


def _made_whole(
    place: jax.sharding.Sharding, shape: tuple[int, ...], position: int, *, later: tuple[int, ...]
) -> jax.sharding.Sharding:
    """The placement with one dimension whole, whose mesh axes split another that they divide, if there is one.

    Rather one that is not cut later, that nothing splits yet, and that is no leading one.
    """
    if not isinstance(place, jax.sharding.NamedSharding):
        return place
    entries = [names_of(entry) for entry in place.spec]
    moved, entries[position] = entries[position], ()
    others = (at for at in range(len(shape)) if at != position)
    for at in sorted(others, key=lambda at: (at in later, len(entries[at]), -at)):
        if shape[at] % math.prod(place.mesh.shape[name] for name in (*entries[at], *moved)) == 0:
            entries[at] += moved
            break
    return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*entries))


def _put(value: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, place) if isinstance(place, jax.sharding.NamedSharding) else value


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
