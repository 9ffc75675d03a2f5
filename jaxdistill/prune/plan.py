"""What is kept of a model: indices by axis and layer, as data that can be read, edited, saved and checked.

A plan knows axes by the names that parameters give them, never a family. `prune.slice` applies it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.formats.paths import AnyPath, any_path, write_text
from jaxdistill.specs import ModelConfig, parts_of

Indices = tuple[int, ...]
GROUPS = {"heads": "kv_heads", "mlp": "experts"}
"""Axes whose parts belong to those of another axis, equally many to each, in its order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of the axes that a plan may cut: of the whole model, and of each of its layers by axis name.

    The rest tells models apart whose sizes are equal; None in plans that were saved without it. head_dims: of each
    layer, 0 where it has no attention.
    """

    embed: int
    layers: tuple[Mapping[str, int], ...]
    family: str | None = None
    vocab: int | None = None
    head_dims: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        return cls(
            embed=config.embed,
            layers=tuple(layer.widths for layer in config.layers),
            family=config.family,
            vocab=config.vocab,
            head_dims=tuple(0 if layer.mixer is None else layer.mixer.head_dim for layer in config.layers),
        )

    def agrees(self, other: Shape) -> bool:
        """Whether both are the same as far as both are known."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return all(own == theirs for own, theirs in pairs if own is not None and theirs is not None)

    def __str__(self) -> str:
        kinds = sorted({", ".join(f"{name} {size}" for name, size in layer.items()) for layer in self.layers})
        known = {
            "embed": self.embed,
            "family": self.family,
            "vocab": self.vocab,
            "head_dim": " or ".join(map(str, sorted({*(self.head_dims or ())} - {0}))) or None,
        }
        told = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        return f"{len(self.layers)} layers, {told}; {' or '.join(kinds)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without what is not known."""
        values = dataclasses.asdict(self) | {"layers": [dict(layer) for layer in self.layers]}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Shape:
        """The inverse of `to_dict`. Raises KeyError, TypeError or AttributeError for anything else."""
        dims = document.get("head_dims")
        return cls(
            embed=int(document["embed"]),
            layers=tuple(dict(each) for each in document["layers"]),
            family=document.get("family"),
            vocab=document.get("vocab"),
            head_dims=None if dims is None else tuple(dims),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Indices into the original, in the order in which the smaller model has them: a subset, or only a new order.

    source: the shape of the model that the indices belong to. layers: increasing. embed: one choice for the whole
    model, since the residual stream runs through all of it. widths: for each of the axes `specs.WIDTH_AXES` that the
    model has, one choice for each kept layer, empty where the layer lacks the axis. Query heads stand in the order of
    their key-value heads, equally many for each; so do the neurons of a mixture in that of its experts, neuron j of
    expert i being i · mlp + j. Where parts are sorted by importance, the first n channels, neurons, key-value heads or
    experts are those of the plan of size n; of query heads the first n of each key-value head are, and of a mixture's
    neurons the first n of each expert, never the first of all.
    head_partners: empty, or for each kept layer and query head the head of its group whose residual its query weights
    take (W becomes W + (W - W of the partner)); itself where nothing changes.
    """

    source: Shape
    layers: Indices
    embed: Indices
    widths: Mapping[str, tuple[Indices, ...]]
    head_partners: tuple[Indices, ...] = ()

    def __post_init__(self):
        check_indices("layers", self.layers, len(self.source.layers))
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers to keep are {self.layers}; give them in increasing order.")
        check_indices("embed", self.embed, self.source.embed)
        for axis, choices in self.widths.items():
            if len(choices) != len(self.layers):
                raise ValueError(
                    f"{axis} has {len(choices)} choices for {len(self.layers)} kept layers; give one for each."
                )
            for layer, chosen in zip(self.layers, choices, strict=True):
                parts = parts_of(self.source.layers[layer])
                if axis in parts:
                    check_indices(f"{axis} of layer {layer}", chosen, parts[axis])
                elif chosen:
                    raise ValueError(f"layer {layer} has no axis {axis!r}; its axes are {sorted(parts)}.")
        for members, groups in GROUPS.items():
            if any(groups in self.source.layers[layer] for layer in self.layers):
                self._check_groups(members, groups)
        self._check_partners()

    def _check_groups(self, members: str, groups: str) -> None:
        """Each kept group keeps equally many of its own members."""
        missing = [axis for axis in (members, groups) if axis not in self.widths]
        if len(missing) == 1:
            given = members if missing == [groups] else groups
            raise ValueError(f"the plan says which {given} are kept and not which {missing[0]}; give both.")
        if missing:
            return
        for layer, chosen, owners in zip(self.layers, self.widths[members], self.widths[groups], strict=True):
            parts = parts_of(self.source.layers[layer])
            if groups not in parts:
                continue
            size, kept = parts[members] // parts[groups], len(chosen) // len(owners)
            found = tuple(index // size for index in chosen)
            if len(chosen) % len(owners) or found != tuple(owner for owner in owners for _ in range(kept)):
                raise ValueError(
                    f"layer {layer} keeps {len(chosen)} {members} ({_written(chosen):.60}) and the {groups} "
                    f"{_written(owners)}; number i of the {members} belongs to number i // {size} of the {groups}, and "
                    "each kept one needs equally many of its own, in its order."
                )

    def _check_partners(self) -> None:
        """A head's partner is of its own key-value head."""
        if not self.head_partners:
            return
        if "heads" not in self.widths:
            raise ValueError(
                "the plan gives head_partners and not which query heads are kept; give heads and kv_heads too, or "
                "leave head_partners out."
            )
        if [len(each) for each in self.head_partners] != [len(each) for each in self.widths["heads"]]:
            raise ValueError("head_partners does not give one head for each kept query head of each kept layer.")
        for layer, heads, others in zip(self.layers, self.widths["heads"], self.head_partners, strict=True):
            parts = self.source.layers[layer]
            if not heads:  # A layer without attention.
                continue
            size = parts["heads"] // parts["kv_heads"]
            if [head // size for head in heads] != [head // size for head in others]:
                raise ValueError(
                    f"layer {layer} gives the query heads {heads} the partners {others}; a head's partner is of its "
                    f"own key-value head (head i belongs to i // {size})."
                )

    def resize(self, config: ModelConfig) -> ModelConfig:
        """The shape of the smaller model. Raises ValueError for another model than the plan's."""
        self.check(config)
        layers = [config.layers[layer].with_widths(self.sizes(at)) for at, layer in enumerate(self.layers)]
        return dataclasses.replace(config, embed=len(self.embed), layers=tuple(layers))

    def sizes(self, at: int) -> dict[str, int]:
        """The widths of a kept layer, given its place among them; neurons are those of one expert."""
        counts = {axis: len(choices[at]) for axis, choices in self.widths.items() if choices[at]}
        return counts | ({"mlp": counts["mlp"] // counts.get("experts", 1)} if "mlp" in counts else {})

    def check(self, config: ModelConfig) -> None:
        """Refuses another model than the one whose indices these are."""
        given = Shape.of(config)
        if not given.agrees(self.source):
            raise ValueError(
                f"the plan was made for a model of {self.source}; this one has {given}. Make a plan for this model."
            )

    def summary(self) -> str:
        """What is kept, in a few words."""
        depth, parts = len(self.source.layers), []
        if len(self.layers) < depth:
            parts.append(f"layers {_written(self.layers)}")
        if len(self.embed) < self.source.embed:
            parts.append(f"{len(self.embed)} of {self.source.embed} channels")
        before = [self.source.layers[layer] for layer in self.layers]
        after = [self.sizes(at) for at in range(len(self.layers))]
        for axis in self.widths:
            if any(new.get(axis) != old.get(axis) for new, old in zip(after, before, strict=True)):
                sizes = sorted({new[axis] for new in after if axis in new})
                parts.append(f"{axis} {' or '.join(map(str, sizes))}")
        return ", ".join(parts) or "everything"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, runs of indices as "first-last"."""
        return {
            "source": self.source.to_dict(),
            "layers": _written(self.layers),
            "embed": _written(self.embed),
            "widths": {axis: [_written(chosen) for chosen in choices] for axis, choices in self.widths.items()},
            "head_partners": [_written(partners) for partners in self.head_partners],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PrunePlan:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        try:
            return cls(
                source=Shape.from_dict(document["source"]),
                layers=_read(document["layers"]),
                embed=_read(document["embed"]),
                widths={axis: tuple(map(_read, choices)) for axis, choices in document["widths"].items()},
                head_partners=tuple(map(_read, document.get("head_partners", ()))),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not a prune plan ({type(error).__name__}: {error}); a plan is an object with source, layers, "
                'embed and widths, whose indices are text like "0-2 5 7-9".'
            ) from None

    def save(self, path: AnyPath) -> None:
        """As a JSON file."""
        write_text(any_path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: AnyPath) -> PrunePlan:
        """From a JSON file. Raises ValueError, with the path, for one that is not a plan."""
        try:
            return cls.from_dict(json.loads(any_path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def whole_plan(config: ModelConfig) -> PrunePlan:
    """The plan that keeps everything as it is."""
    return PrunePlan(
        source=Shape.of(config),
        layers=tuple(range(len(config.layers))),
        embed=tuple(range(config.embed)),
        widths={
            axis: tuple(tuple(range(layer.parts.get(axis, 0))) for layer in config.layers) for axis in config.width_axes
        },
    )


def depth_plan(config: ModelConfig, kept: Sequence[int]) -> PrunePlan:
    """The plan that keeps some layers, each whole."""
    whole, kept = whole_plan(config), tuple(kept)
    check_indices("layers", kept, len(config.layers))
    widths = {axis: tuple(choices[layer] for layer in kept) for axis, choices in whole.widths.items()}
    return dataclasses.replace(whole, layers=kept, widths=widths)


def check_indices(name: str, indices: Indices, size: int) -> None:
    """Refuses anything but one or more different indices below a size."""
    if not indices or len(set(indices)) != len(indices) or min(indices) < 0 or max(indices) >= size:
        shown = _written(indices) if len(indices) < 50 else f"{len(indices)} indices up to {max(indices)}"
        raise ValueError(
            f"{name}: {shown or 'nothing'} is to be kept; allowed are one or more different indices from 0 to "
            f"{size - 1}."
        )


def _written(indices: Indices) -> str:
    """ "0-2 5 7-8" for (0, 1, 2, 5, 7, 8); any order is kept."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _read(text: str) -> Indices:
    indices: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f'{run!r} is not an index or a run of them; write indices like "0-2 5 7-9".')
        indices += range(int(first), int(last or first) + 1)
    return tuple(indices)
